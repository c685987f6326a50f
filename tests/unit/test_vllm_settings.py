"""kv_connector_extra_config: what is taken, what is refused, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest

import shmcache
from shmcache.integrations.vllm.settings import Settings


def test_only_the_name_is_needed() -> None:
    assert Settings.of({"arena": "kv"}) == Settings("kv", None, (), 64 << 20, 10.0, 2.0)


def test_all_that_can_be_stated() -> None:
    stated = {
        "arena": "kv",
        "capacity": "8MiB",
        "block_size": "4KiB",
        "slots": 100,
        "lanes": 8,
        "read_lease_s": 5,
        "l2": ["/var/cache/kv", "redis://host"],
        "sync_load_bytes": "1MiB",
        "prefetch_timeout_s": 3,
        "save_timeout_s": 0.5,
    }
    found = Settings.of(stated)
    config = shmcache.ArenaConfig("8MiB", block_size="4KiB", slots=100, lanes=8, read_lease_s=5.0, populate=True)
    assert found == Settings("kv", config, ("/var/cache/kv", "redis://host"), 1 << 20, 3.0, 0.5)
    assert stated["arena"] == "kv", "what vLLM handed over stays as it is"


@pytest.mark.parametrize(("stated", "populate"), [({}, True), ({"populate": False}, False), ({"populate": True}, True)])
def test_memory_is_there_before_the_scheduler_needs_it(stated: dict[str, Any], populate: bool) -> None:
    config = Settings.of({"arena": "kv", "capacity": "1MiB", **stated}).create
    assert config is not None
    assert config.populate is populate


@pytest.mark.parametrize(
    ("l2", "found"), [("/a", ("/a",)), (["/a"], ("/a",)), (("/a", "b://"), ("/a", "b://")), ([], ())]
)
def test_tiers(l2: Any, found: tuple[str, ...]) -> None:
    assert Settings.of({"arena": "kv", "l2": l2}).l2 == found


@pytest.mark.parametrize(("most", "found"), [(0, 0), (1, 1), ("4KiB", 4096)])
def test_how_much_is_loaded_within_a_step(most: Any, found: int) -> None:
    assert Settings.of({"arena": "kv", "sync_load_bytes": most}).sync_load_bytes == found


@pytest.mark.parametrize("seconds", [0, 0.001, 3600, 7])
@pytest.mark.parametrize("what", ["prefetch_timeout_s", "save_timeout_s"])
def test_seconds(what: str, seconds: float) -> None:
    found = getattr(Settings.of({"arena": "kv", what: seconds}), what)
    assert (found, type(found)) == (seconds, float)


NAN = float("nan")


@pytest.mark.parametrize(
    ("stated", "error", "message"),
    [
        ({"arena": None}, TypeError, 'expected "arena", the name of an arena, got None'),
        ({"arena": 7}, TypeError, 'expected "arena", the name of an arena, got 7'),
        ({"arena": b"kv"}, TypeError, "got b'kv'"),
        ({"l2": None}, TypeError, "l2: expected a folder, a URL, or a list of them, got None"),
        ({"l2": 7}, TypeError, "l2: expected .* got 7"),
        ({"l2": ["/a", 7]}, TypeError, r"l2: expected .* got \['/a', 7\]"),
        ({"l2": {"/a": 1}}, TypeError, "l2: expected .* got {'/a': 1}"),
        ({"sync_load_bytes": "much"}, ValueError, "sync_load_bytes: expected a number and one of .* got 'much'"),
        ({"sync_load_bytes": -1}, ValueError, "sync_load_bytes: expected at least 1 byte, got -1"),
        ({"sync_load_bytes": False}, TypeError, "sync_load_bytes: expected bytes .* got False"),
        ({"sync_load_bytes": None}, TypeError, "sync_load_bytes: expected bytes .* got None"),
        ({"prefetch_timeout_s": "10"}, TypeError, "prefetch_timeout_s: expected seconds, got '10'"),
        ({"prefetch_timeout_s": True}, TypeError, "prefetch_timeout_s: expected seconds, got True"),
        ({"prefetch_timeout_s": -0.1}, ValueError, "prefetch_timeout_s: expected 0 to 3600 seconds, got -0.1"),
        ({"save_timeout_s": None}, TypeError, "save_timeout_s: expected seconds, got None"),
        ({"save_timeout_s": 3601}, ValueError, "save_timeout_s: expected 0 to 3600 seconds, got 3601"),
        ({"save_timeout_s": NAN}, ValueError, "save_timeout_s: expected 0 to 3600 seconds, got nan"),
        ({"size": 1, "colour": 2}, ValueError, "unknown colour, size; expected arena, block_size, capacity, .* l2, "),
        ({"create": 1}, ValueError, "unknown create; expected arena, "),
        ({"slots": 5, "lanes": 9}, ValueError, 'lanes, slots only matter where the arena is made; state "capacity"'),
        ({"capacity": "some"}, ValueError, "capacity: expected a number"),
        ({"capacity": "1MiB", "block_size": 5}, ValueError, "block_size: expected"),
    ],
)
def test_what_is_refused(stated: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Settings.of({"arena": "kv", **stated})


def test_no_name_at_all() -> None:
    with pytest.raises(TypeError, match='kv_connector_extra_config: expected "arena"'):
        Settings.of({})


# The arena


def test_the_first_makes_it_and_the_others_find_it(arena_name: str) -> None:
    settings = Settings.of({"arena": arena_name, "capacity": "64KiB", "block_size": "4KiB", "lanes": 4})
    others = Settings.of({"arena": arena_name, "capacity": "128KiB"})
    with settings.attach("engine", 0, 2) as first, others.attach("engine", 1, 2) as second:
        assert first.stats().capacity == second.stats().capacity == 64 << 10
        assert {lane.rank for lane in shmcache.inspect(arena_name).lanes if lane.state == "alive"} == {0, 1}


@pytest.mark.parametrize("config", [shmcache.ArenaConfig("64KiB", block_size="4KiB", lanes=4)])
def test_one_that_is_there_needs_no_size(arena: str) -> None:
    with Settings.of({"arena": arena}).attach("engine", 2, 3) as cache:
        assert cache.stats().capacity == 64 << 10


def test_one_that_is_not_there_needs_a_size(arena_name: str) -> None:
    with pytest.raises(shmcache.ArenaNotFoundError, match=f'{arena_name}.*or state "capacity" in kv_connector_extra_'):
        Settings.of({"arena": arena_name}).attach("engine", 0, 1)
    assert arena_name not in shmcache.arenas()
