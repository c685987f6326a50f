"""The endpoint of ``shmcache-stat --serve-metrics`` as a process, asked over HTTP while arenas come and go."""

from __future__ import annotations

import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from arena_support import TIMEOUT_S, run_all
from processes._crew import Member, wait_until
from processes._segment import Segment
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

import shmcache
from shmcache.segment import path_of

Enlist = Callable[..., Member]

STORM_S = 3.0
_LINE = re.compile(r"serving (http://127\.0\.0\.1:(\d+)/metrics) of (.*); dashboard: (.*)\n")


@dataclass
class Endpoint:
    """A process that serves metrics."""

    process: subprocess.Popen[str]
    url: str
    port: int
    what: str
    dashboard: Path

    def fetch(self, accept: str = "text/plain") -> tuple[str, str]:
        """The type and the text of an answer."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(self.url, headers={"Accept": accept})  # noqa: S310 # http, as made above
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            assert answer.status == 200
            return answer.headers["Content-Type"], answer.read().decode()

    def scrape(self) -> dict[str, Metric]:
        return {family.name: family for family in read_text(self.fetch()[1])}

    def states(self, family: str, arena: str) -> dict[str, float]:
        """The values of a family of one arena by its label ``state``."""
        samples = [sample for sample in self.scrape()[family].samples if sample.labels["arena"] == arena]
        return {sample.labels["state"]: sample.value for sample in samples}

    def ups(self) -> dict[str, float]:
        return {sample.labels["arena"]: sample.value for sample in self.scrape()["shmcache_up"].samples}

    def end(self, *signals: int) -> tuple[int, str, str]:
        """Sends the signals: the exit code, and what was printed since the first line."""
        for signum in signals:
            self.process.send_signal(signum)
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, out, err


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "shmcache_tools.stat", *arguments]


@pytest.fixture
def serve() -> Iterator[Callable[..., Endpoint]]:
    """Starts an endpoint on a free port: of the arena that is named, or of all."""
    processes: list[subprocess.Popen[str]] = []

    def start(*names: str, by: tuple[str, ...] = ()) -> Endpoint:
        command = [*by, *_command(*names, "--serve-metrics", "0")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        said = _LINE.fullmatch(process.stdout.readline())
        assert said is not None
        return Endpoint(process, said[1], int(said[2]), said[3], Path(said[4]))

    yield start
    for process in processes:
        with process:
            process.kill()


def test_it_says_what_it_serves_and_where(serve: Callable[..., Endpoint], arena: str) -> None:
    everything, one = serve(), serve(arena)
    assert (everything.what, one.what) == ("all arenas of this user", f"the arena {arena}")
    assert everything.dashboard.read_text(encoding="utf-8").startswith("{")
    assert everything.ups()[arena] == 1
    assert one.ups() == {arena: 1}


def test_both_formats_are_served(serve: Callable[..., Endpoint], arena: str) -> None:
    endpoint = serve(arena)
    kind, text = endpoint.fetch("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    new = {family.name for family in read_openmetrics(text)}
    kind, text = endpoint.fetch()
    assert kind.startswith("text/plain")
    plain = {family.name for family in read_text(text)}
    assert "shmcache_capacity_bytes" in new & plain
    assert "process_cpu_seconds" in new  # what looking costs


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT] * 3])
def test_a_signal_ends_it(serve: Callable[..., Endpoint], arena: str, signals: list[int]) -> None:
    endpoint = serve(arena)
    endpoint.scrape()
    assert endpoint.end(*signals) == (0, "", "")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", endpoint.port), TIMEOUT_S)


def test_nohup_is_heeded(serve: Callable[..., Endpoint], arena: str) -> None:
    endpoint = serve(arena, by=("nohup",))
    endpoint.process.send_signal(signal.SIGHUP)
    assert endpoint.ups() == {arena: 1}
    assert endpoint.end(signal.SIGTERM)[:2] == (0, "")


def test_a_client_that_says_nothing_does_not_keep_it(serve: Callable[..., Endpoint], arena: str) -> None:
    endpoint = serve(arena)
    with socket.create_connection(("127.0.0.1", endpoint.port), TIMEOUT_S):
        assert endpoint.ups() == {arena: 1}
        assert endpoint.end(signal.SIGTERM)[0] == 0


def test_a_port_that_is_taken_is_an_error(serve: Callable[..., Endpoint]) -> None:
    port = serve().port
    done = subprocess.run(
        _command("--serve-metrics", f"{port}"), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    expected = f"shmcache-stat: cannot serve on 127.0.0.1:{port}: Address already in use; give another [HOST:]PORT\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


@pytest.mark.parametrize("host", ["192.0.2.1", "[::ffff:192.0.2.1]", "a..b"])
def test_a_host_that_is_not_here_is_an_error(host: str) -> None:
    done = subprocess.run(
        _command("--serve-metrics", f"{host}:0"), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"shmcache-stat: cannot serve on {re.escape(host)}:0: .+; give .+\n", done.stderr)


def test_processes_live_stop_and_die(serve: Callable[..., Endpoint], arena: str, enlist: Enlist) -> None:
    endpoint, first, second = serve(), enlist("engine", 0, 2), enlist("engine", 1, 2)
    second.do("cache.put(b'k', b'x')")
    second.do("batch = cache.read([b'k'])")
    assert endpoint.states("shmcache_lanes", arena) == {"alive": 2, "stopped": 0, "dead": 0}
    first.stop()
    assert endpoint.states("shmcache_lanes", arena) == {"alive": 1, "stopped": 1, "dead": 0}
    first.resume()
    second.kill()
    assert endpoint.states("shmcache_lanes", arena) == {"alive": 1, "stopped": 0, "dead": 1}
    found = endpoint.scrape()
    (dead,) = [
        sample.labels
        for sample in found["shmcache_lane_state"].samples
        if sample.labels["arena"] == arena and sample.labels["state"] == "dead" and sample.value
    ]
    assert (dead["group"], dead["rank"]) == ("engine", "1")
    since = [
        sample.value
        for sample in found["shmcache_lane_oldest_held_timestamp_seconds"].samples
        if {**sample.labels, "state": "dead"} == dead
    ]
    assert since == [pytest.approx(time.time(), abs=TIMEOUT_S)]
    first.do("cache.reap()")
    assert endpoint.states("shmcache_lanes", arena) == {"alive": 1, "stopped": 0, "dead": 0}


def test_a_lock_whose_holder_is_stopped(serve: Callable[..., Endpoint], arena: str, enlist: Enlist) -> None:
    endpoint, member, segment = serve(arena), enlist(), Segment(arena)
    assert set(endpoint.states("shmcache_lock_held", arena).values()) == {0}
    segment.take_lock(int(member.do("cache.lane")))
    assert endpoint.states("shmcache_lock_held", arena) == {"alive": 1, "stopped": 0, "dead": 0}
    member.stop()
    assert endpoint.states("shmcache_lock_held", arena) == {"alive": 0, "stopped": 1, "dead": 0}
    member.kill()
    assert endpoint.states("shmcache_lock_held", arena) == {"alive": 0, "stopped": 0, "dead": 1}


def test_it_takes_no_lane_and_is_in_nobodys_way(serve: Callable[..., Endpoint], arena: str) -> None:
    endpoint = serve(arena)
    assert endpoint.ups() == {arena: 1}
    assert shmcache.inspect(arena).lanes == ()
    shmcache.destroy(arena)  # which a live lane would refuse
    assert endpoint.ups() == {arena: 0}


def test_an_arena_made_anew_starts_at_nothing(serve: Callable[..., Endpoint], arena: str) -> None:
    endpoint = serve(arena)

    def publishes() -> list[float]:
        return [sample.value for sample in endpoint.scrape()["shmcache_publishes"].samples]

    with shmcache.attach(arena) as cache:
        cache.put(b"k", b"x")
    assert publishes() == [1]
    shmcache.destroy(arena)
    assert publishes() == []
    shmcache.create(arena, shmcache.ArenaConfig("2MiB"))
    assert publishes() == [0]


def test_scrapes_at_once_and_one_after_another_leave_nothing_behind(
    serve: Callable[..., Endpoint], arena: str, enlist: Enlist
) -> None:
    enlist()
    endpoint = serve(arena)
    endpoint.scrape()

    def look() -> None:
        for _ in range(10):
            assert endpoint.ups() == {arena: 1}

    folder = Path(f"/proc/{endpoint.process.pid}/fd")
    before = len(list(folder.iterdir()))
    run_all([look] * 4)
    wait_until(lambda: len(list(folder.iterdir())) <= before)
    maps = Path(f"/proc/{endpoint.process.pid}/maps").read_text(encoding="utf-8")
    assert str(path_of(arena)) not in maps


# What each of the crew does until it is killed.
_LIFE = """
def live(names, seed):
    import random
    rng = random.Random(seed)
    while True:
        config = shmcache.ArenaConfig("1MiB", block_size="4KiB", lanes=rng.choice([2, 8]))
        name = rng.choice(names)
        try:
            cache = shmcache.attach(name, create=config, group=rng.choice(["a", "b", None]))
            cache.put(b"%d" % rng.randrange(9), b"x" * 5000)
            batch = cache.read([b"%d" % rng.randrange(9) for _ in range(5)])
            if rng.random() < 0.5:
                batch.release()
                cache.close()
                shmcache.destroy(name, force=rng.random() < 0.5)
        except shmcache.ShmcacheError:
            pass
"""


def test_a_storm(
    serve: Callable[..., Endpoint], arena_name: str, start: Callable[[], Member], chance: random.Random
) -> None:
    names = [f"{arena_name}-{i}" for i in range(3)]
    everything, one = serve(), serve(names[0])
    over = threading.Event()
    seen: list[float] = []

    def watch() -> None:
        while not over.is_set():
            mine = {name: up for name, up in everything.ups().items() if name in names}
            assert set(mine.values()) <= {0, 1}
            assert one.ups().keys() == {names[0]}
            seen.extend(mine.values())

    def rage() -> None:
        try:
            deadline = time.monotonic() + STORM_S
            while time.monotonic() < deadline:
                member = start()
                member.do(_LIFE)
                member.begin(f"live({names!r}, {chance.randrange(1 << 32)})")
                time.sleep(0.05 + 0.1 * chance.random())
                member.kill()
        finally:
            over.set()

    try:
        run_all([rage, watch])
        assert 1 in seen
        for endpoint in (everything, one):
            assert endpoint.end(signal.SIGTERM) == (0, "", "")
    finally:
        for name in names:
            with suppress(shmcache.ArenaNotFoundError):
                shmcache.destroy(name, force=True)
