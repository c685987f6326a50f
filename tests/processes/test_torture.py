"""``tools/torture`` as a person runs it: nothing is found where nothing is wrong, and each wrong is found."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shmcache

_TIMEOUT_S = 90
_COMMAND = [sys.executable, "-m", "shmcache_tools.torture"]

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the program, or another one that runs it; what is left of it after the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start_one(*arguments: str, command: list[str] = _COMMAND) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        started.append(subprocess.Popen([*command, *arguments], stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run(start: Start) -> Callable[..., tuple[int, str, str]]:
    """Runs it to its end: exit code, output, errors. The arena is gone."""

    def run_one(*arguments: str, command: list[str] = _COMMAND) -> tuple[int, str, str]:
        torture = start(*arguments, command=command)
        out, err = torture.communicate(timeout=_TIMEOUT_S)
        print(out, err)
        assert _arena_of(torture) not in shmcache.arenas()
        return torture.returncode, out, err

    return run_one


def _arena_of(torture: subprocess.Popen[str]) -> str:
    return f"torture-{torture.pid}"


def _seed() -> int:
    """Another one each time, unless it is given as SHMCACHE_TEST_SEED."""
    seed = int(os.environ.get("SHMCACHE_TEST_SEED", random.randrange(1 << 32)))
    print(f"SHMCACHE_TEST_SEED={seed}")
    return seed


def _document(ran: tuple[int, str, str]) -> dict[str, Any]:
    exit_code, out, _ = ran
    document: dict[str, Any] = json.loads(out)
    assert (exit_code, document["violations"]) == (0, [])
    return document


@pytest.mark.parametrize("seed", [1, None], ids=["seed 1", "any seed"])
def test_nothing_is_found(run: Callable[..., Any], seed: int | None) -> None:
    """Some kinds of rounds, too short to prove much, and long enough to have all that is checked in them."""
    chosen = str(_seed() if seed is None else seed)
    shown = _document(run("--seed", chosen, "--seconds", "7", "--round-seconds", "0.9", "--json"))
    assert str(shown["seed"]) == chosen
    assert shown["rounds"] >= 1
    assert shown["audits"] >= 4 * shown["rounds"]
    assert min(shown["kills"], shown["kills_inside"], shown["stops"]) > 0
    assert shown["kills"] == sum(shown["kills_by_operation"].values())
    assert min(shown["reads_checked"], shown["releases_checked"]) > 0
    for operation in ("reserve_write", "publish", "put", "read", "reserve_read", "finish_read", "delete"):
        assert shown["answers"][operation]["OK"] > 0
    assert shown["counters"]["evictions"] > 0


def test_the_report(run: Callable[..., Any]) -> None:
    exit_code, out, err = run("--seed", "5", "--seconds", "1", "--processes", "4", "--first-round", "3")
    assert (exit_code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "seed 5, 4 processes, 1 s"
    assert "violations: 0" in lines
    assert any(line.startswith("killed 0") for line in lines), "a round of stops"
    assert any(line.startswith("reserve_write ") for line in lines)
    assert "\x1b" not in out


# What is wrong is found: the program runs with a part of it exchanged for one that does wrong.

_PROGRAM = """
import sys
from shmcache import Status, batch, cache
from shmcache._binding import lib
from shmcache_tools.torture import __main__ as torture, worker
from shmcache_tools.torture.worker import Worker

{sabotage}

sys.exit(torture.main(sys.argv[1:]))
"""

_SABOTAGE = {
    # A reader gives its shares back at once, and reads on.
    "reads without a share": """
real = cache.Cache.read
def read(self, keys, **options):
    found = real(self, keys, **options)
    lib.sc_release(self._handle, found._refs, len(found))
    return found
cache.Cache.read = read
""",
    # Where it has two shares of an object, the second goes with the first.
    "releases twice": """
real = batch.ReadBatch.release
def release(self):
    again = self._open
    real(self)
    if again:
        lib.sc_release(self._attachment.handle, self._refs, len(self))
batch.ReadBatch.release = release
""",
    # A writer that writes on after it published.
    "changes a byte": """
class Bad(Worker):
    def release(self):
        for read in self.reads[:1]:
            payload = self.cache._attachment.payload(writable=True)
            payload[read.batch._refs[0].offset + 20] ^= 1
        super().release()
worker.Worker = Bad
""",
    "grants in word only": """
real = cache.Cache.reserve_read
def reserve_read(self, keys, extra_count=0):
    return self.status(keys) if len(keys) > 1 else real(self, keys, extra_count)
cache.Cache.reserve_read = reserve_read
""",
    "publishes before it writes": """
class Bad(Worker):
    def fill(self, batch, keys, own):
        views = [bytes(view or b"") for view in batch.views]
worker.Worker = Bad
""",
    "deletes in word only": """
real = cache.Cache.delete
def delete(self, keys, *, force=False):
    return self.status(keys) if Status.OK in self.status(keys) else real(self, keys, force=force)
cache.Cache.delete = delete
""",
    "never finds anything": """
real = cache.Cache.status
def status(self, keys):
    return [Status.NOT_FOUND for _ in keys]
cache.Cache.status = status
""",
    "dies of itself": """
import os, signal
class Bad(Worker):
    def evict(self):
        os.kill(os.getpid(), signal.SIGSEGV)
worker.Worker = Bad
""",
    "raises": """
class Bad(Worker):
    def evict(self):
        raise RuntimeError("what a pity")
worker.Worker = Bad
""",
}

#: One of these tells it, whichever comes first.
_HELD = (
    "shares, and its lane has",
    "bytes of no version of this key",
    "there at the same time",
    "there must have been a share of it",
    "counter releases is",
)
_FOUND = {
    "reads without a share": _HELD,
    "releases twice": _HELD,
    "changes a byte": ("bytes of no version of this key",),
    "grants in word only": ("a reserved share was lost", "reserved shares, and there must be", "counter grants is"),
    "publishes before it writes": ("bytes of no version of this key",),
    "deletes in word only": ("deleted an object that was there afterwards",),
    "never finds anything": ("not found, and it was there all the time",),
    "dies of itself": ("died of SIGSEGV",),
    "raises": ("what a pity",),
}


@pytest.mark.parametrize("wrong", _SABOTAGE)
def test_what_is_wrong_is_found(run: Callable[..., Any], wrong: str) -> None:
    """Within a round or two, most often; it ends with the round in which it is found."""
    command = [sys.executable, "-c", _PROGRAM.format(sabotage=_SABOTAGE[wrong])]
    seed = str(_seed())
    arguments = ("--seed", seed, "--seconds", "40", "--round-seconds", "0.6")
    exit_code, out, _ = run(*arguments, command=command)
    assert exit_code == 1
    violations = [line for line in out.splitlines() if line.startswith("VIOLATION: ")]
    assert any(found in violation for violation in violations for found in _FOUND[wrong])
    assert f"to repeat that round: tools/torture --seed {seed} " in out


# However it ends


def _wait_until_running(torture: subprocess.Popen[str]) -> list[int]:
    """Its processes, once they have done something."""
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        assert torture.poll() is None
        if _arena_of(torture) in shmcache.arenas():
            stats = shmcache.inspect(_arena_of(torture)).stats
            if stats and stats.counters.releases > 10:
                children = Path(f"/proc/{torture.pid}/task/{torture.pid}/children").read_text(encoding="ascii")
                return [int(pid) for pid in children.split()]
        time.sleep(0.01)
    pytest.fail("it did not start")


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < deadline, "its processes outlive it"
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        command = Path(f"/proc/{pid}/cmdline").read_bytes()  # the number may be another's by now
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX" and b"shmcache_tools.torture" in command


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(start: Start, signum: signal.Signals) -> None:
    torture = start("--seconds", "60")
    pids = _wait_until_running(torture)
    torture.send_signal(signum)
    _, err = torture.communicate(timeout=_TIMEOUT_S)
    assert torture.returncode == 128 + signum
    assert err == f"torture: ended by {signum.name}; nothing is left behind\n"
    assert _arena_of(torture) not in shmcache.arenas()
    _wait_until_gone(pids)


def test_its_processes_die_with_it(start: Start) -> None:
    torture = start("--seconds", "60")
    pids = _wait_until_running(torture)
    torture.kill()
    torture.communicate(timeout=_TIMEOUT_S)
    _wait_until_gone(pids)
    shmcache.destroy(_arena_of(torture))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--seconds", "0"], "expected 0.5 to"),
        (["--seed", "x"], "invalid"),
        (["--processes", "3"], "expected 4 to 32"),
        (["--round-seconds", "0"], "expected 0.2 to"),
        (["more"], "unrecognized"),
    ],
)
def test_usage(run: Callable[..., Any], arguments: list[str], why: str) -> None:
    exit_code, out, err = run(*arguments)
    assert (exit_code, out) == (2, "")
    assert why in err
