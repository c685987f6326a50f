"""shmcache-stat and shmcache-cleanup on real arenas: live, dead, stale, foreign and damaged."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

import shmcache
from shmcache_tools import cleanup, stat

_HOLDER = """
import sys, time, shmcache
cache = shmcache.attach(sys.argv[1], group="engine", rank=0, world_size=1)
cache.put(b"a", b"x" * 100)
cache.put(b"b", b"x" * 100)
batch = cache.read([b"a", b"b"])
cache.reserve_read([b"a"])
unfinished = cache.reserve_write([b"c"], 100)
print("ready", flush=True)
time.sleep(600)
"""
_numbers = count()
_TIMEOUT_S = 60


@pytest.fixture
def name() -> Iterator[str]:
    """A name for an arena, which is gone after the test."""
    name = f"test-{os.getpid()}-{next(_numbers)}"
    yield name
    with contextlib.suppress(shmcache.ArenaNotFoundError):
        shmcache.destroy(name, force=True)


@pytest.fixture
def arena(name: str) -> str:
    """An arena that nobody is attached to."""
    shmcache.create(name, shmcache.ArenaConfig("1MiB", block_size="4KiB", lanes=8))
    return name


@pytest.fixture
def holder(arena: str) -> Iterator[subprocess.Popen[str]]:
    """A process of that arena with two shares held, one reserved, and an object half-written."""
    process = subprocess.Popen([sys.executable, "-c", _HOLDER, arena], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def _sigkill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(_TIMEOUT_S)


def _run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program as a process of its own, piped."""
    return subprocess.run(
        [sys.executable, "-m", f"shmcache_tools.{module}", *arguments],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )


def _there(name: str) -> bool:
    return name in shmcache.arenas()


def _rows(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def _row(text: str, first: str) -> str:
    """The first line that begins with the word ``first``."""
    return next(row for row in _rows(text) if row.startswith(f"{first} "))


def _damage_header(path: Path) -> None:
    with path.open("r+b") as segment:
        segment.write(b"\xff" * 64)


def _truncate(path: Path) -> None:
    os.truncate(path, 100)


def _overwrite_all(path: Path) -> None:
    path.write_bytes(b"something else entirely\n" * 1000)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


_DAMAGE = [_damage_header, _truncate, _overwrite_all, _empty]


# shmcache-stat


@pytest.mark.usefixtures("holder")
def test_stat_lists_live_arenas(arena: str) -> None:
    done = _run("stat")
    assert (done.returncode, done.stderr) == (0, "")
    row = _row(done.stdout, arena)
    assert row.startswith(f"{arena} 1 MiB")
    assert row.endswith("in use")
    assert " 2 1 0 1 2 100.0 % " in row  # objects, alive, dead, reserved, held, hit rate
    assert "\x1b" not in done.stdout


def test_stat_tells_who_is_attached(arena: str, holder: subprocess.Popen[str]) -> None:
    done = _run("stat", arena)
    assert (done.returncode, done.stderr) == (0, "")
    (lane,) = [row for row in _rows(done.stdout) if f" {holder.pid} " in row]
    assert " rank engine 0 " in lane
    assert lane.endswith("alive 1 1 2 1")  # incarnation, reserved, held, writing
    assert "2 readable, 1 being written" in done.stdout


def test_stat_of_a_dead_process(arena: str, holder: subprocess.Popen[str]) -> None:
    _sigkill(holder)
    done = _run("stat", arena)
    assert done.returncode == 0
    (lane,) = [row for row in _rows(done.stdout) if f" {holder.pid} " in row]
    assert lane.endswith("dead 1 1 2 1")
    assert f"to remove it: shmcache-cleanup {arena}" in done.stdout
    assert _row(_run("stat").stdout, arena).endswith("stale")


@pytest.mark.usefixtures("holder")
def test_stat_shares(arena: str) -> None:
    done = _run("stat", "--shares", arena)
    assert done.returncode == 0
    assert _row(done.stdout, arena).startswith(f"{arena} 2 1 ")
    assert _row(_run("stat", "--shares").stdout, arena).startswith(f"{arena} 2 1 ")


def test_stat_json(arena: str, holder: subprocess.Popen[str]) -> None:
    done = _run("stat", "--json", arena)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["schema"] == stat.JSON_SCHEMA
    (info,) = document["arenas"]
    assert info["name"] == arena
    assert info["stale"] is False
    assert info["problem"] is None
    assert info["stats"]["held"] == 2
    assert info["stats"]["counters"]["publishes"] == 2
    assert info["stats"]["hit_rate"] == 1.0
    (lane,) = [lane for lane in info["lanes"] if lane["state"] == "alive"]
    assert (lane["group"], lane["rank"], lane["pid"]) == ("engine", 0, holder.pid)
    assert arena in {info["name"] for info in json.loads(_run("stat", "--json").stdout)["arenas"]}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_stat_bears_damage(arena: str, damage: Callable[[Path], None]) -> None:
    damage(Path(shmcache.inspect(arena).path))
    done = _run("stat", arena)
    assert (done.returncode, done.stderr) == (1, "")
    assert "cannot be read: " in done.stdout
    assert json.loads(_run("stat", "--json", arena).stdout)["arenas"][0]["problem"]
    listed = _run("stat")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert f"{arena} - - - - - - - - - unreadable" in _rows(listed.stdout)


def test_stat_bears_a_file_that_is_open_to_others(arena: str) -> None:
    Path(shmcache.inspect(arena).path).chmod(0o644)
    done = _run("stat", arena)
    assert done.returncode == 1
    assert "0644" in done.stderr
    assert "Traceback" not in done.stderr
    listed = _run("stat")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "0644" in listed.stdout


def test_stat_of_no_arena(name: str) -> None:
    done = _run("stat", name)
    assert (done.returncode, done.stdout) == (1, "")
    assert name in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [[".hidden"], ["a/b"], ["--json", "--shares"], ["a", "b"], ["--watch"]])
def test_stat_usage(arguments: list[str]) -> None:
    done = _run("stat", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


# shmcache-cleanup


def test_cleanup_refuses_while_somebody_lives(arena: str, holder: subprocess.Popen[str]) -> None:
    for arguments in ([arena], ["--dry-run", arena]):
        done = _run("cleanup", *arguments)
        assert done.returncode == 1
        assert f"pid {holder.pid}" in done.stdout + done.stderr
        assert "rank 0 of group engine" in done.stdout + done.stderr
        assert _there(arena)


def test_cleanup_by_force(arena: str, holder: subprocess.Popen[str]) -> None:
    assert _run("cleanup", "--force", "--dry-run", arena).returncode == 0
    assert _there(arena)
    assert _run("cleanup", "--force", arena).returncode == 0
    assert not _there(arena)
    assert holder.poll() is None


def test_cleanup_after_death_and_again(arena: str, holder: subprocess.Popen[str]) -> None:
    _sigkill(holder)
    dry = _run("cleanup", "--dry-run", arena)
    assert dry.returncode == 0
    assert "would destroy, stale" in dry.stdout
    assert _there(arena)
    first, second = _run("cleanup", arena), _run("cleanup", arena)
    assert (first.returncode, second.returncode) == (0, 0)
    assert f"{arena}: destroyed" in first.stdout
    assert f"{arena}: no such arena" in second.stdout
    assert not _there(arena)


@pytest.mark.parametrize("damage", _DAMAGE)
def test_cleanup_of_damage_needs_force(arena: str, damage: Callable[[Path], None]) -> None:
    damage(Path(shmcache.inspect(arena).path))
    done = _run("cleanup", arena)
    assert done.returncode == 1
    assert "refused, cannot be read" in done.stderr
    assert _there(arena)
    assert _run("cleanup", "--force", arena).returncode == 0
    assert not _there(arena)


def test_cleanup_of_a_file_that_is_open_to_others(arena: str) -> None:
    Path(shmcache.inspect(arena).path).chmod(0o644)
    assert _run("cleanup", arena).returncode == 1
    assert _there(arena)
    assert _run("cleanup", "--force", arena).returncode == 0
    assert not _there(arena)


def _only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """What --all and --stale may see: not the arenas of others who work here."""
    monkeypatch.setattr(shmcache, "arenas", lambda: [name for name in names if _in_dev_shm(name)])


def _in_dev_shm(name: str) -> bool:
    try:
        shmcache.inspect(name)
    except shmcache.ArenaNotFoundError:
        return False
    return True


def test_cleanup_of_all_that_is_stale(
    arena: str,
    holder: subprocess.Popen[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = f"{arena}-stale"
    shmcache.create(other, shmcache.ArenaConfig("1MiB"))
    _only(monkeypatch, arena, other)
    assert cleanup.main(["--stale", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(f"{other}: would destroy, stale")
    assert cleanup.main(["--stale", "--yes"]) == 0
    assert not _in_dev_shm(other)
    assert cleanup.main(["--stale", "--yes"]) == 0
    assert "no stale arenas" in capsys.readouterr().out
    assert cleanup.main(["--all", "--yes"]) == 1
    assert _in_dev_shm(arena)
    _sigkill(holder)
    assert cleanup.main(["--all", "--yes"]) == 0
    assert not _in_dev_shm(arena)


def test_cleanup_reaps(arena: str, holder: subprocess.Popen[str]) -> None:
    assert "reaped 0 dead lanes, 0 shares" in _run("cleanup", "--reap", arena).stdout
    _sigkill(holder)
    what = "1 dead lane, 3 shares, 1 half-written object"
    dry = _run("cleanup", "--reap", "--dry-run", arena)
    assert (dry.returncode, dry.stdout) == (0, f"{arena}: would reap {what}\n")
    done = _run("cleanup", "--reap", arena)
    assert (done.returncode, done.stdout) == (0, f"{arena}: reaped {what}\n")
    stats = shmcache.inspect(arena).stats
    assert stats is not None
    assert (stats.reserved, stats.held, stats.writing, stats.objects) == (0, 0, 0, 2)


def test_cleanup_reap_of_damage(arena: str) -> None:
    _damage_header(Path(shmcache.inspect(arena).path))
    for arguments in (["--reap"], ["--reap", "--dry-run"]):
        done = _run("cleanup", *arguments, arena)
        assert done.returncode == 1
        assert arena in done.stderr
        assert "Traceback" not in done.stderr


def test_two_cleanups_at_once(arena: str) -> None:
    command = [sys.executable, "-m", "shmcache_tools.cleanup", arena]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(_TIMEOUT_S) for process in both] == [0, 0]
    assert not _there(arena)


@pytest.mark.parametrize(("answer", "exit_code"), [("n", 1), ("", 1), ("y", 0), ("\x04", 1)])
def test_cleanup_asks_on_a_terminal(arena: str, answer: str, exit_code: int) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "shmcache_tools.cleanup", arena]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, start_new_session=True) as process:
        seen = b""
        while b"[y/N]" not in seen:
            readable, _, _ = select.select([ours], [], [], _TIMEOUT_S)
            assert readable, seen
            seen += os.read(ours, 4096)
        os.write(ours, f"{answer}\n".encode())
        assert process.wait(_TIMEOUT_S) == exit_code
    os.close(ours)
    os.close(theirs)
    assert _there(arena) is (exit_code != 0)


@pytest.mark.parametrize(
    "arguments",
    ["", "a --all", "--all --stale", "--reap", "--stale --force", "a --reap --force", ".x"],
)
def test_cleanup_usage(arguments: str) -> None:
    done = _run("cleanup", *arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("program", ["stat", "cleanup"])
def test_the_installed_programs_help_with_examples(program: str) -> None:
    script = Path(sys.executable).with_name(f"shmcache-{program}")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    assert "examples:" in done.stdout
    assert f"  shmcache-{program} " in done.stdout
    assert "exit codes: 0 done" in done.stdout
