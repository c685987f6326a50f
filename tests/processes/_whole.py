"""What must hold of an arena after a death, whoever died."""

from __future__ import annotations

from shmcache import Cache, Status


def check_whole(cache: Cache) -> None:
    """Nothing is left of the dead, the invariants hold, and every block and slot can be used again.

    Deletes all objects. Nobody else may have shares or write meanwhile.
    """
    cache.reap()
    stats = cache.stats()
    assert (stats.reserved, stats.held, stats.writing, stats.lanes_dead) == (0, 0, 0, 0)
    assert cache.verify() == []
    cache.clear()
    assert cache.stats().used_bytes == 0
    keys = [b"whole-%d" % i for i in range(min(stats.slots, stats.capacity // stats.block_size))]
    assert cache.reserve_write(keys, stats.block_size).publish() == [Status.OK] * len(keys)
    assert cache.stats().used_bytes == len(keys) * stats.block_size
    assert cache.lookup(keys) == len(keys)
    assert cache.verify() == []
    assert cache.clear() == len(keys)
    assert cache.verify() == []
