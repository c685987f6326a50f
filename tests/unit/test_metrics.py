"""``shmcache.metrics``: what a scrape gives is what ``inspect`` says, in a form that Prometheus' own parsers read."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_double
import pytest
from arena_support import Join, run_python
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

import shmcache
from shmcache import metrics
from shmcache.metrics import Collector
from shmcache.segment import path_of
from shmcache.stats import BUCKETS_S, ArenaInfo, Counters, Gauges, Histograms, LaneInfo, LockInfo, RegionInfo, Stats
from shmcache.storage.l1 import L1, Notes
from shmcache_tools.stat.serve import DASHBOARD, address

Values = dict[str, float]  #: by the values of all labels but the arena's, with "," between


def scrape(*names: str) -> dict[str, Metric]:
    """All families by name, as a parser reads them out of what a registry gives."""
    return {family.name: family for family in read_text(exposition(*names).decode())}


def exposition(*names: str) -> bytes:
    registry = CollectorRegistry()
    registry.register(Collector(*names))
    return generate_latest(registry)


def values(families: dict[str, Metric], name: str, sample: str = "") -> Values:
    """The values of one family, of its samples of one name."""
    return {
        ",".join(value for label, value in found.labels.items() if label != "arena"): found.value
        for found in families[name].samples
        if found.name == (sample or name)
    }


def only(families: dict[str, Metric], name: str, sample: str = "") -> float:
    (value,) = values(families, name, sample).values()
    return value


def ups(families: dict[str, Metric]) -> dict[str, float]:
    return {sample.labels["arena"]: sample.value for sample in families["shmcache_up"].samples}


def stats_of(info: ArenaInfo) -> Stats:
    assert info.stats is not None
    return info.stats


@pytest.fixture
def gpus(tmp_path: Path) -> Iterator[cuda_double.Double]:
    """A driver of GPUs that are not there."""
    with cuda_double.installed(tmp_path, devices=2, torch=False) as driver:
        yield driver
    assert cuda_double.violations(tmp_path) == []


@pytest.fixture
def busy(gpus: cuda_double.Double, join: Join) -> Iterator[shmcache.Cache]:
    """A cache of two that hold, reserve, write, have a region, and have notes of everything that can be noted."""
    worker, controller = join("engine", 0, 2), join("engine", None, 2)
    there = worker.reserve_write([b"there"], 100, region=worker.add_region(f"cuda:{gpus.devices - 1}", "64KiB"))
    there.publish()
    for key in (b"a", b"b", b"c", b"d"):
        worker.put(key, b"x" * 5000)
    batch = worker.read([b"a", b"b", b"missing"])
    controller.reserve_read([b"b", b"c"], extra_count=1)
    writing = controller.reserve_write([b"half"], 100)
    notes = Notes(L1(controller))
    for number, name in enumerate(Counters.__slots__, 1):
        notes.count(name, 1000 * number)
    for number, name in enumerate(Gauges.__slots__, 1):
        notes.gauge(name, number)
    for number, name in enumerate(Histograms.__slots__, 1):
        for times in range(3 * number):
            notes.time(name, 5e-6 * 3**times)
    notes.flush()
    yield worker
    writing.abort()
    batch.release()


# Values


def test_values_are_what_inspect_says(busy: shmcache.Cache) -> None:
    found, info = scrape(busy.name), shmcache.inspect(busy.name)
    stats = stats_of(info)
    for name in Counters.__slots__:
        assert only(found, f"shmcache_{name}", f"shmcache_{name}_total") == getattr(stats.counters, name) > 0, name
    for name in Gauges.__slots__:
        assert only(found, f"shmcache_{name}") == getattr(stats.gauges, name) > 0, name
    for name, number in {
        "up": 1,
        "created_timestamp_seconds": info.created,
        "capacity_bytes": stats.capacity,
        "block_size_bytes": stats.block_size,
        "resident_bytes": stats.resident_bytes,
        "slots": stats.slots,
        "layouts": info.layouts,
        "groups": stats.groups,
        "lane_limit": info.lane_limit,
    }.items():
        assert only(found, f"shmcache_{name}") == number, name
    assert (
        values(found, "shmcache_objects")
        == {"ready": 5, "writing": 1}
        == {
            "ready": stats.objects,
            "writing": stats.writing,
        }
    )
    assert (
        values(found, "shmcache_shares")
        == {"reserved": 4, "held": 2}
        == {
            "reserved": stats.reserved,
            "held": stats.held,
        }
    )
    used = values(found, "shmcache_used_bytes")
    assert used == {"ready": 8192, "reserved": 8192, "writing": 4096, "held": 16384, "dead": 0}
    assert sum(used.values()) == stats.used_bytes
    assert 0 < only(found, "shmcache_scrape_seconds") < 60


def test_histograms_are_what_inspect_says(busy: shmcache.Cache) -> None:
    found, stats = scrape(busy.name), stats_of(shmcache.inspect(busy.name))
    for name in Histograms.__slots__:
        family, times = f"shmcache_{name}_seconds", getattr(stats.histograms, name)
        buckets = values(found, family, f"{family}_bucket")
        assert [float(bound) for bound in buckets] == list(BUCKETS_S)
        assert list(buckets.values()) == list(itertools.accumulate(times.buckets))
        assert only(found, family, f"{family}_count") == times.count > 0
        assert only(found, family, f"{family}_sum") == pytest.approx(times.sum_s)


def test_lanes_are_what_inspect_says(busy: shmcache.Cache) -> None:
    found, info = scrape(busy.name), shmcache.inspect(busy.name)
    names = {lane.index: f"engine,{lane.index},{'' if lane.rank is None else lane.rank}" for lane in info.lanes}
    lanes = {names[lane.index]: lane for lane in info.lanes if lane.state != "vacant"}
    assert len(lanes) == 2
    for field, name in {
        "started": "started_timestamp_seconds",
        "reserved": "reserved_shares",
        "held": "held_shares",
        "held_bytes": "held_bytes",
        "writing": "writing_objects",
    }.items():
        assert values(found, f"shmcache_lane_{name}") == {who: getattr(lane, field) for who, lane in lanes.items()}
    oldest = values(found, "shmcache_lane_oldest_held_timestamp_seconds")
    assert oldest == pytest.approx({who: lane.oldest_held for who, lane in lanes.items() if lane.held}, abs=1)
    assert len(oldest) == 1
    states = values(found, "shmcache_lane_state")
    assert states == {f"{who},{state}": state == "alive" for who in lanes for state in ("alive", "stopped", "dead")}
    assert values(found, "shmcache_lanes") == {"alive": 2, "stopped": 0, "dead": 0}


def test_regions_are_what_inspect_says(busy: shmcache.Cache) -> None:
    found, info = scrape(busy.name), shmcache.inspect(busy.name)
    (region,) = info.regions
    who = f"1,{region.uuid}"
    assert re.fullmatch(r"1,GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", who)
    assert only(found, "shmcache_region_limit") == info.region_limit == 8
    assert values(found, "shmcache_region_capacity_bytes") == {who: 65536}
    assert values(found, "shmcache_region_used_bytes") == {who: 4096}
    assert values(found, "shmcache_region_block_size_bytes") == {who: 4096}
    assert values(found, "shmcache_region_openers") == {who: len(region.opened)}
    assert values(found, "shmcache_region_state") == {f"1,live,{region.uuid}": 1, f"1,lost,{region.uuid}": 0}
    pinned = values(found, "shmcache_lane_pinned_bytes")
    assert list(pinned.values()) == [lane.gauges.pinned_bytes for lane in info.lanes if lane.state != "vacant"]
    assert sum(pinned.values()) == stats_of(info).gauges.pinned_bytes > 0


def test_regions_in_all_states(shown: Callable[..., dict[str, Metric]]) -> None:
    regions = (
        RegionInfo(1, "live", 0, 0, "GPU-a", 2**30, 2**20, 65536, opened=(1, 2, 3)),
        RegionInfo(2, "lost", 200, 0, "GPU-a", 2**30, 0, 65536),
        RegionInfo(3, "live", 0, 1, 'GPU-"\n\x1b', 2**81, 2**80, 2**50),
    )
    found = shown(regions=regions)
    lost = {who for who, value in values(found, "shmcache_region_state").items() if value}
    assert lost == {"1,live,GPU-a", "2,lost,GPU-a", '3,live,GPU-"??'}
    assert list(values(found, "shmcache_region_openers").values()) == [3, 0, 0]
    assert list(values(found, "shmcache_region_capacity_bytes").values()) == [2**30, 2**30, 2**81]
    assert values(shown(), "shmcache_region_state") == {}


def test_both_formats_say_the_same(busy: shmcache.Cache) -> None:
    registry = CollectorRegistry()
    registry.register(Collector(busy.name))
    plain = list(read_text(generate_latest(registry).decode()))
    new = list(read_openmetrics(openmetrics.generate_latest(registry).decode()))
    told = [[(f.name, f.type, f.documentation) for f in found] for found in (plain, new)]
    assert told[0] == told[1]
    changing = {"shmcache_scrape_seconds", "shmcache_lane_oldest_held_timestamp_seconds"}
    samples = [
        {(s.name, *s.labels.items()): s.value for f in found if f.name not in changing for s in f.samples}
        for found in (plain, new)
    ]
    assert samples[0] == samples[1]


def _lane(index: int, **fields: object) -> LaneInfo:
    lane = LaneInfo(index, "rank", "alive", "g", index, 8, 1, 4000 + index, "python", 1e9, 0, 0, 0, Counters())
    return replace(lane, **fields)  # type: ignore[arg-type]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, arena: str) -> Callable[..., dict[str, Metric]]:
    """A scrape of an arena with some fields changed, read by both parsers."""
    info = shmcache.inspect(arena)

    def show(**fields: object) -> dict[str, Metric]:
        monkeypatch.setattr(metrics, "inspect", lambda _: replace(info, **fields))  # type: ignore[arg-type]
        registry = CollectorRegistry()
        registry.register(Collector(arena))
        assert list(read_openmetrics(openmetrics.generate_latest(registry).decode()))
        return scrape(arena)

    return show


def test_each_lane_is_in_one_state_and_vacant_ones_are_left_out(shown: Callable[..., dict[str, Metric]]) -> None:
    lanes = (
        _lane(0),
        _lane(1, stopped=True),
        _lane(2, state="dead", held=3, oldest_held=1.5e9),
        _lane(3, state="vacant", reserved=2),
        _lane(4, group="", rank=0, role="private"),
    )
    found = shown(lanes=lanes)
    assert values(found, "shmcache_lanes") == {"alive": 2, "stopped": 1, "dead": 1}
    now = {who for who, value in values(found, "shmcache_lane_state").items() if value}
    assert now == {"g,0,0,alive", "g,1,1,stopped", "g,2,2,dead", ",4,,alive"}
    assert len(values(found, "shmcache_lane_state")) == 4 * 3
    assert values(found, "shmcache_lane_oldest_held_timestamp_seconds") == {"g,2,2": 1.5e9}


@pytest.mark.parametrize("holder", ["alive", "stopped", "dead", None])
def test_the_lock_tells_the_state_of_its_holder(shown: Callable[..., dict[str, Metric]], holder: str | None) -> None:
    lock = LockInfo(lane=1, incarnation=1, pid=4001, alive=holder != "dead") if holder else None
    found = shown(lanes=(_lane(0, stopped=True), _lane(1, stopped=holder == "stopped")), lock=lock)
    assert values(found, "shmcache_lock_held") == {state: state == holder for state in ("alive", "stopped", "dead")}


def test_a_lock_of_no_lane(shown: Callable[..., dict[str, Metric]]) -> None:
    found = shown(lanes=(), lock=LockInfo(lane=200, incarnation=1, pid=1, alive=True))
    assert values(found, "shmcache_lock_held")["alive"] == 1


@pytest.mark.parametrize(
    "text",
    ['"', "\\", "\\n", '"} 1\n# TYPE x gauge\nx 2', "\r\n", "\0", "\x1b[2J", "\u2028", "\ufffd", "{a=b}", "é 語", "🙂"],
)
def test_no_text_breaks_the_format(shown: Callable[..., dict[str, Metric]], text: str) -> None:
    plain = shown(fingerprint="f", lanes=(_lane(0),))
    found = shown(fingerprint=text, lanes=(_lane(0, group=text, command=text),))
    assert {name: len(family.samples) for name, family in found.items()} == {
        name: len(family.samples) for name, family in plain.items()
    }
    expected = "".join(char if char.isprintable() else "?" for char in text)
    assert list(values(found, "shmcache_arena_info")) == [expected]
    assert list(values(found, "shmcache_lane_held_shares")) == [f"{expected},0,0"]


def test_a_real_fingerprint_and_group(arena_name: str) -> None:
    shmcache.create(arena_name, shmcache.ArenaConfig("1MiB", fingerprint='a"\\\nb'))
    with shmcache.attach(arena_name, group='g"\\n}', rank=0):
        found = scrape(arena_name)
    assert list(values(found, "shmcache_arena_info")) == ['a"\\?b']
    assert list(values(found, "shmcache_lane_held_shares")) == ['g"\\n},0,0']


# What cannot be read


def _no_magic(path: Path) -> None:
    with path.open("r+b") as segment:
        segment.write(b"\xff" * 64)


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


DAMAGE: list[Callable[[Path], object]] = [
    _no_magic,
    _link,
    lambda path: os.truncate(path, 100),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"something else entirely\n" * 1000),
    lambda path: path.chmod(0o644),
    Path.unlink,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_read_is_down_and_nothing_else(arena: str, damage: Callable[[Path], object]) -> None:
    assert ups(scrape(arena)) == {arena: 1}
    damage(path_of(arena))
    found = scrape(arena, "not-there")
    assert ups(found) == {arena: 0, "not-there": 0}
    assert sum(len(family.samples) for family in found.values()) == 2
    path_of(arena).unlink(missing_ok=True)


def test_one_bad_arena_does_not_hide_another(arena: str, arena_name: str) -> None:
    other = f"{arena_name}-2"
    shmcache.create(other, shmcache.ArenaConfig("1MiB"))
    try:
        _no_magic(path_of(other))
        found = scrape()
        assert (ups(found)[arena], ups(found)[other]) == (1, 0)
        assert arena in {sample.labels["arena"] for sample in found["shmcache_capacity_bytes"].samples}
    finally:
        shmcache.destroy(other, force=True)


def test_random_damage_never_raises(busy: shmcache.Cache) -> None:
    seed = int(os.environ.get("SHMCACHE_TEST_SEED", random.randrange(1 << 32)))
    print(f"SHMCACHE_TEST_SEED={seed}")
    chance, copy = random.Random(seed), f"{busy.name}-copy"
    whole = path_of(busy.name).read_bytes()
    metadata = len(whole) - 2**20
    try:
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(chance.choice([1, 8, 200])):
                at = chance.randrange(chance.choice([4096, 4096 + 16 * 2048, metadata])) & ~7
                word = chance.choice([0, (1 << 64) - 1, chance.getrandbits(64), 1 << chance.randrange(64)])
                damaged[at : at + 8] = word.to_bytes(8, "little")
            path_of(copy).unlink(missing_ok=True)
            path_of(copy).touch(0o600)
            path_of(copy).write_bytes(damaged)
            assert copy in ups(scrape(copy))
    finally:
        path_of(copy).unlink(missing_ok=True)


# Which arenas


def test_all_arenas_of_this_user_come_and_go(arena_name: str) -> None:
    registry = CollectorRegistry()
    registry.register(Collector())

    def there() -> bool:
        return f'shmcache_up{{arena="{arena_name}"}} 1.0' in generate_latest(registry).decode()

    assert not there()
    shmcache.create(arena_name, shmcache.ArenaConfig("1MiB"))
    assert there()
    shmcache.destroy(arena_name)
    assert not there()


def test_an_arena_that_goes_while_all_are_listed_is_not_down(monkeypatch: pytest.MonkeyPatch, arena: str) -> None:
    monkeypatch.setattr(metrics, "arenas", lambda: [arena, "gone"])
    assert ups(scrape()) == {arena: 1}


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no /dev/shm"), PermissionError(13, "no")])
def test_no_directory_of_segments_is_no_arenas(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def fail(*_: object) -> list[str]:
        raise error

    monkeypatch.setattr(metrics, "arenas", fail)
    assert ups(scrape()) == {}
    monkeypatch.setattr(metrics, "inspect", fail)
    assert ups(scrape("kv")) == {"kv": 0}


def test_names(arena: str) -> None:
    assert len(scrape(arena, arena)["shmcache_up"].samples) == 1
    with pytest.raises(ValueError, match="name"):
        Collector("no name")


# In a registry


def test_to_register_looks_at_nothing(monkeypatch: pytest.MonkeyPatch, arena: str) -> None:
    monkeypatch.setattr(metrics, "inspect", lambda _: pytest.fail("looked"))
    registry = CollectorRegistry(auto_describe=True)
    Gauge("engine_requests", "The engine's own.", registry=registry)
    registry.register(Collector(arena))
    with pytest.raises(ValueError, match="shmcache_up"):
        registry.register(Collector("other"))


def test_describe_tells_every_family_that_collect_gives(busy: shmcache.Cache) -> None:
    collector = Collector(busy.name)

    def about(found: list[Metric]) -> list[tuple[str, str, str]]:
        return [(family.name, family.type, family.documentation) for family in found]

    assert about(collector.describe()) == about(collector.collect())
    assert not any(family.samples for family in collector.describe())
    assert all(family.samples for family in collector.collect())


def test_a_scrape_changes_nothing(busy: shmcache.Cache) -> None:
    before = path_of(busy.name).read_bytes()
    scrape(busy.name)
    scrape()
    assert path_of(busy.name).read_bytes() == before


def test_without_prometheus_client_the_error_says_what_to_install() -> None:
    program = "import sys; sys.modules['prometheus_client'] = None\n"
    done = run_python(program + "import shmcache.metrics")
    assert done.stderr.endswith("shmcache.metrics needs prometheus-client: pip install 'shmcache[metrics]'\n")
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError")
    serve = "from shmcache_tools.stat.__main__ import main; sys.exit(main(['--serve-metrics', '0']))"
    served = run_python(program + serve)
    expected = "shmcache-stat: shmcache.metrics needs prometheus-client: pip install 'shmcache[metrics]'\n"
    assert (served.returncode, served.stdout, served.stderr) == (1, "", expected)


# Names and help, in the spirit of promtool


def test_names_follow_the_conventions(busy: shmcache.Cache) -> None:
    found = Collector(busy.name).collect()
    names = [family.name for family in found]
    assert len(set(names)) == len(names)
    for family in found:
        samples = {sample.name for sample in family.samples}
        assert re.fullmatch(r"shmcache(_[a-z0-9]+)+", family.name)
        assert not re.search(r"_(us|ms|ns|kib|mib|gib|percent|count|total|sum|bucket)$", family.name)
        assert (samples == {f"{family.name}_total"}) is (family.type == "counter")
        if "bytes" in family.name or "seconds" in family.name:
            assert family.name.endswith(("_bytes", "_seconds"))
        if "timestamp" in family.name:
            assert family.name.endswith("_timestamp_seconds")
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        for sample in family.samples:
            assert sample.labels["arena"] == busy.name
            assert not set(sample.labels) & {"instance", "job", "quantile"}
        series = [(sample.name, *sorted(sample.labels.items())) for sample in family.samples]
        assert len(set(series)) == len(series)


def test_every_family_has_its_help(busy: shmcache.Cache) -> None:
    told = dict(re.findall(r"^# HELP (\w+) (.*)$", exposition(busy.name).decode(), re.MULTILINE))
    types = dict(re.findall(r"^# TYPE (\w+) (.*)$", exposition(busy.name).decode(), re.MULTILINE))
    assert told.keys() == types.keys()
    assert all(re.fullmatch(r"\S.{4,}\.", text) for text in told.values())
    hints = {name: metrics._TEXTS[f"stats.counters.{name}"] for name in Counters.__slots__}
    for name, text in hints.items():
        assert told[f"shmcache_{name}_total"].lower() == f"{text}.".lower()
    assert metrics._TEXTS["lane.held_bytes"].lower() in told["shmcache_lane_held_bytes"].lower()


# The endpoint's address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9464", ("127.0.0.1", 9464)),
        ("0", ("127.0.0.1", 0)),
        ("65535", ("127.0.0.1", 65535)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),  # noqa: S104 # it is what somebody may ask for
        ("localhost:1", ("localhost", 1)),
        ("[::1]:9464", ("::1", 9464)),
        ("[fe80::1%eth0]:9464", ("fe80::1%eth0", 9464)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert address(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "x", ":9464", "::1:9464", "host:", "host:x", "65536", "-1", "1.5", "+1", "١", "http://h:1", "h:1/m", "[]:1"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(Exception, match=re.escape("expected [HOST:]PORT, as 9464")) as raised:
        address(text)
    assert type(raised.value).__name__ == "ArgumentTypeError"


# The dashboard


def _expressions(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in dashboard["templating"]["list"]:
        yield variable.get("definition", "")


def _unknown(expression: str, known: dict[str, list[dict[str, str]]]) -> Iterator[str]:
    """The series and labels of a PromQL expression that no scrape gives."""
    for name, matchers in re.findall(r"\b(shmcache_\w+)(?:\{([^}]*)\})?", expression):
        if name not in known:
            yield name
            continue
        for label, how, value in re.findall(r'(\w+)(=~|!=|!~|=)"([^"]*)"', matchers):
            if value.startswith("$"):
                continue
            there = {labels.get(label, "") for labels in known[name]}
            if not any(re.fullmatch(value, text) if "~" in how else value == text for text in there):
                yield f"{name}{{{label}{how}{value}}}"


def _known(*names: str) -> dict[str, list[dict[str, str]]]:
    samples = (sample for family in Collector(*names).collect() for sample in family.samples)
    known: dict[str, list[dict[str, str]]] = {}
    for sample in samples:
        known.setdefault(sample.name, []).append(sample.labels)
    return known


def test_the_dashboard_asks_for_what_there_is(busy: shmcache.Cache) -> None:
    known, dashboard = _known(busy.name), json.loads(DASHBOARD.read_text(encoding="utf-8"))
    expressions = list(_expressions(dashboard))
    assert [wrong for expression in expressions for wrong in _unknown(expression, known)] == []
    assert list(_unknown('shmcache_up{arena="x"} / shmcache_none{a="b"}', known)) == [
        "shmcache_up{arena=x}",
        "shmcache_none",
    ]
    shown = {name for expression in expressions for name in re.findall(r"shmcache_\w+", expression)}
    # What is constant, and what another panel tells better.
    untold = {"arena_info", "created_timestamp_seconds", "block_size_bytes", "layouts", "groups", "reservations_total"}
    untold |= {f"lane_{what}" for what in ("started_timestamp_seconds", "held_shares", "reserved_shares")}
    untold |= {"lane_writing_objects", "pinned_bytes", "region_block_size_bytes"}
    missing = {name for name in known if not re.search(r"_seconds_(sum|count)$", name)} - shown
    assert missing == {f"shmcache_{name}" for name in untold}


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert dashboard["schemaVersion"] == 42
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "instance", "arena"]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert place["x"] + place["w"] <= 24
        assert not taken & cells, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"]
        references = [target["refId"] for target in panel["targets"]]
        assert references == sorted(set(references))
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
            assert '{instance=~"$instance",arena=~"$arena"' in target["expr"]


def test_the_rules_in_the_readme_ask_for_what_there_is(busy: shmcache.Cache) -> None:
    readme = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    (rules,) = re.findall(r"```yaml\n(groups:.*?)```", readme, re.DOTALL)
    assert rules.count("expr:") == rules.count("- alert:") >= 6
    assert list(_unknown(rules, _known(busy.name))) == []
