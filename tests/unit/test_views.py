"""Views, arrays and tensors: what they show, that nobody can write through them, and that none outlives its share."""

from __future__ import annotations

import pickle

import pytest
from arena_support import pattern

from shmcache import Cache, Status, ViewInUseError

OK = Status.OK


@pytest.fixture
def stored(cache: Cache) -> Cache:
    """A cache with the objects a and b."""
    for key in (b"a", b"b"):
        assert cache.put(key, pattern(key, 1000)) == OK
    return cache


def test_an_export_that_python_cannot_count_keeps_the_share_until_it_ends(stored: Cache) -> None:
    batch = stored.read([b"a", b"b"])
    assert batch.views[1] is not None
    exported = pickle.PickleBuffer(batch.views[1])
    with pytest.raises(ViewInUseError):
        batch.release()
    assert stored.stats().held == 2
    assert exported.raw() == pattern(b"b", 1000)
    exported.release()
    batch.release()
    assert stored.stats().held == 0
