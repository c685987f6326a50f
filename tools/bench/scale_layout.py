"""The limits and the bytes of an arena, as native/layout.h and sc_plan in native/segment.c have them.

``check`` holds them beside real arenas: a format that has changed since is an error, not a wrong table.
"""

from __future__ import annotations

from itertools import count

from cost_common import arena

import shmcache

MAX_SLOTS = 1 << 20
MAX_LANES = 256
MAX_BLOCK_NUMBERS = (1 << 32) - 1  # of all regions together
REGIONS = 8  # that an arena can have unless told otherwise
VICTIMS = 128  # one in so many slots is in a list of victims: native/evict.c
FEW_VICTIMS = 16
STALE_S = 1e-6  # a slot: a process makes its list of victims anew when it is older
HOLD_KEYS = 1024  # a hold of the arena lock: native/write.c
SPIN_S = 8e-6  # what the 200 spins of native/lock.c take, about; then the waiter sleeps
LOCK_TIMEOUT_S = 5.0  # by default; then ArenaBusyError

_PAGE, _HUGE = 4096, 2 << 20
_CHECKS = ((1, 64, 8), (1000, 7, 0), (4096, 256, 31), (60000, 2, 1))  # slots, lanes, regions


def _up(nbytes: int, to: int) -> int:
    return -(-nbytes // to) * to


def index_bytes(slots: int) -> int:
    return 8 << max(4, (4 * slots - 1).bit_length())


def metadata_parts(slots: int, lanes: int, blocks: int, regions: int = REGIONS) -> dict[str, int]:
    """Bytes of each part, in whole pages."""
    numbers = blocks * (1 + regions)
    parts = {
        "header": 4096,
        "lane table": lanes * 2048,
        "layout table": 1024 * 512,
        "region table": regions * 256,
        "slot table": slots * 128,
        "scores": slots * 8,
        "ghosts": 2 * slots * 64,
        "shares": lanes * _up(slots * 8, 128),
        "since": lanes * _up(slots * 4, 128),
        "index": index_bytes(slots),
        "slot map": _up(slots, 64) // 8,
        "block map": _up(numbers, 64) // 8,
        "owners": numbers * 4,
        "backed": _up(blocks, 64) // 8,
    }
    return {name: _up(nbytes, _PAGE) for name, nbytes in parts.items()}


def metadata_bytes(slots: int, lanes: int, blocks: int, regions: int = REGIONS) -> int:
    return sum(metadata_parts(slots, lanes, blocks, regions).values())


def victims(slots: int) -> int:
    """Objects in a list of victims, and so evictions for one scan of all scores."""
    return max(FEW_VICTIMS, slots // VICTIMS)


def check() -> None:
    """RuntimeError where real arenas have other sizes. A payload begins at a multiple of 2 MiB, so it is looked at
    where one more slot moves it: there some pages too many or too few show."""
    for slots, lanes, regions in _CHECKS:
        edge = next(
            more for more in count(slots + 1) if _payload(more, lanes, regions) > _payload(slots, lanes, regions)
        )
        for number in (edge - 1, edge):
            config = {"capacity": number * _PAGE, "block_size": _PAGE, "lanes": lanes, "regions": regions}
            expected = _payload(number, lanes, regions) + number * _PAGE
            with arena(**config) as name:
                found = shmcache.inspect(name).segment_bytes
            if found != expected:
                raise RuntimeError(f"an arena of {config} has {found:,} bytes; this program expected {expected:,}")


def _payload(slots: int, lanes: int, regions: int) -> int:
    """Where the payload begins, with a block a slot."""
    return _up(metadata_bytes(slots, lanes, slots, regions), _HUGE)
