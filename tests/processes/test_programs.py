"""shmcache-stat and shmcache-cleanup on real arenas: live, dead, stale, foreign and damaged."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import jsonschema
import pytest

import shmcache
from shmcache_tools.cleanup import __main__ as cleanup
from shmcache_tools.stat.documents import json_schema

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


def _run_installed(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same, as a user starts it."""
    script = Path(sys.executable).with_name(f"shmcache-{program}")
    return subprocess.run([script, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)


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
    assert " 2 1 1 0 1 2 100.0 % - " in row  # objects, groups, live, dead, reserved, held, hit rate, now
    assert "\x1b" not in done.stdout


def test_stat_tells_who_is_attached(arena: str, holder: subprocess.Popen[str]) -> None:
    done = _run("stat", arena)
    assert (done.returncode, done.stderr) == (0, "")
    (lane,) = [row for row in _rows(done.stdout) if f" {holder.pid} " in row]
    assert " engine 0 " in lane
    assert " alive " in lane
    assert " 1 1 2 8 KiB 1 " in lane  # incarnation, reserved, held, held bytes, writing
    assert "2 readable, 1 being written" in done.stdout


def test_stat_of_a_dead_process(arena: str, holder: subprocess.Popen[str]) -> None:
    _sigkill(holder)
    done = _run("stat", arena)
    assert done.returncode == 0
    (lane,) = [row for row in _rows(done.stdout) if f" {holder.pid} " in row]
    assert " dead " in lane
    assert " 1 1 2 8 KiB 1 " in lane
    assert f"to remove it: shmcache-cleanup {arena}" in done.stdout
    assert _row(_run("stat").stdout, arena).endswith("stale")


def test_stat_of_a_stopped_process(arena: str, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGSTOP)
    os.waitpid(holder.pid, os.WUNTRACED)
    for arguments in ([arena], [arena, "--shares"]):
        done = _run("stat", *arguments)
        assert done.returncode == 0
        assert all(" stopped " in f"{row} " for row in _rows(done.stdout) if f" {holder.pid} python" in row)
        assert f"to continue: kill -CONT {holder.pid}\n" in done.stdout
    holder.send_signal(signal.SIGCONT)


def test_stat_shares(arena: str, holder: subprocess.Popen[str]) -> None:
    done = _run("stat", "--shares", arena)
    assert (done.returncode, done.stderr) == (0, "")
    lanes = [row for row in _rows(done.stdout) if f" engine 0 {holder.pid} " in row]
    assert len(lanes) == 5  # the holder, and what it has
    assert " alive 2 1 1 300 B " in lanes[0]  # held, writing, reserved, bytes
    kinds = [row.split()[0] for row in lanes[1:]]
    assert sorted(kinds[:3]) == ["held", "held", "writing"]
    assert kinds[3] == "reserved"
    shmcache.create(f"{arena}-2", shmcache.ArenaConfig("1MiB"))  # of one arena alone the name is not repeated
    of_all = _rows(_run("stat", "--shares", "--limit", "0").stdout)
    shmcache.destroy(f"{arena}-2")
    assert [row.split()[0] for row in of_all if f" engine 0 {holder.pid} " in row] == [arena] * 5


def test_stat_shares_of_a_dead_process(arena: str, holder: subprocess.Popen[str]) -> None:
    with shmcache.attach(arena):
        _sigkill(holder)
        done = _run("stat", "--shares", arena, "--limit", "1")
    assert len([row for row in _rows(done.stdout) if row.endswith(" dead") and f" {holder.pid} " in row]) == 1
    assert "3 more shares; --limit 0 shows all" in done.stdout
    assert f"to reap: shmcache-cleanup --reap {arena}\n" in done.stdout


@pytest.mark.parametrize("what", [[], ["--shares"], ["--map"]])
def test_stat_json(arena: str, holder: subprocess.Popen[str], what: list[str]) -> None:
    done = _run_installed("stat", "--json", arena, *what)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    jsonschema.Draft202012Validator(json_schema()).validate(document)
    (info,) = document["arenas"]
    assert info["name"] == arena
    assert info["stale"] is False
    assert info["problem"] is None
    assert info["stats"]["held"] == 2
    assert info["stats"]["counters"]["publishes"] == 2
    assert info["stats"]["hit_rate"] == 1.0
    (lane,) = [lane for lane in info["lanes"] if lane["state"] == "alive"]
    assert (lane["group"], lane["rank"], lane["pid"]) == ("engine", 0, holder.pid)
    assert (info["shares"] is not None) is (what == ["--shares"])
    assert {share["key"] for share in info["shares"] or ()} <= {b"a".hex(), b"b".hex(), b"c".hex()}
    standings = [found["standing"] for found in info["objects"] or ()]
    assert standings == (["held", "held", "writing"] if what == ["--map"] else [])


def test_stat_json_of_all(arena: str) -> None:
    document = json.loads(_run_installed("stat", "--json").stdout)
    jsonschema.Draft202012Validator(json_schema()).validate(document)
    assert arena in {info["name"] for info in document["arenas"]}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_stat_bears_damage(arena: str, damage: Callable[[Path], None]) -> None:
    damage(Path(shmcache.inspect(arena).path))
    done = _run("stat", arena)
    assert (done.returncode, done.stderr) == (1, "")
    assert "cannot be read: " in done.stdout
    assert json.loads(_run("stat", "--json", arena).stdout)["arenas"][0]["problem"]
    listed = _run("stat")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert f"{arena} - - - - - - - - - - - unreadable" in _rows(listed.stdout)


def test_stat_bears_a_file_that_is_open_to_others(arena: str) -> None:
    Path(shmcache.inspect(arena).path).chmod(0o644)
    done = _run("stat", arena)
    assert (done.returncode, done.stderr) == (1, "")
    assert "0644; remove it: shmcache-cleanup --force" in done.stdout
    listed = _run("stat")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "0644" in listed.stdout


def test_stat_of_no_arena(name: str) -> None:
    done = _run("stat", name)
    assert (done.returncode, done.stdout) == (1, "")
    assert name in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [[".hidden"], ["a/b"], ["--map", "--shares"], ["a", "b"], ["--limit", "3"], ["--watch", "0"]]
)
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
        assert "rank 0 of engine" in done.stdout + done.stderr
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
    assert "destroy stale: nobody is attached; " in _row(dry.stdout, arena)
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
    assert [row.split()[0] for row in _rows(capsys.readouterr().out)] == ["arena", other]
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
    assert _run("cleanup", "--reap", arena).stdout == f"{arena}: no dead lanes: nothing to reap\n"
    _sigkill(holder)
    what = "1 dead lane, 3 shares, 1 half-written object"
    dry = _run("cleanup", "--reap", "--dry-run", arena)
    assert dry.returncode == 0
    assert f" reap {what}; pid {holder.pid} " in _row(dry.stdout, arena)
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
        assert "cannot be read: " in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_two_cleanups_at_once(arena: str) -> None:
    command = [sys.executable, "-m", "shmcache_tools.cleanup", arena]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(_TIMEOUT_S) for process in both] == [0, 0]
    assert not _there(arena)


@pytest.mark.parametrize(
    "arguments",
    ["", "a --all", "--all --stale", "--reap", "--stale --force", "a --reap --force", ".x"],
)
def test_cleanup_usage(arguments: str) -> None:
    done = _run("cleanup", *arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("program", ["stat", "cleanup"])
def test_the_installed_programs_have_a_manual(program: str) -> None:
    script = Path(sys.executable).with_name(f"shmcache-{program}")
    wide = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True, env=wide)
    sections = ["usage", "options", "examples", "exit status", "environment", "files", "see also"]
    places = [done.stdout.index(f"{section}:") for section in sections]
    assert places == sorted(places)
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    assert f"  shmcache-{program} " in done.stdout
    version = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    assert version.stdout == f"shmcache-{program} {shmcache.__version__}\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_cleanup_does_its_work_when_nobody_reads_of_it(arena: str, stream: str) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    other = f"{arena}-none"
    command = [sys.executable, "-m", "shmcache_tools.cleanup", other, arena, other, "--yes"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: theirs}
    with subprocess.Popen(command, text=True, **streams) as process:
        os.close(theirs)
        said = "".join(text or "" for text in process.communicate(timeout=_TIMEOUT_S))
    assert process.returncode == 0
    assert "Error" not in said
    assert not _there(arena)


@pytest.mark.parametrize(
    ("program", "told"), [("stat", "gr??e"), ("stat --shares", "gr??e"), ("cleanup --force", "rank 0 of gr??e")]
)
def test_where_the_encoding_lacks_a_character(
    arena: str, program: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with shmcache.attach(arena, group="größe", rank=0) as cache:
        cache.put(b"k", b"x")
        cache.reserve_read([b"k"])
        done = _run(*program.split(), arena)
    assert (done.returncode, done.stderr) == (0, "")
    assert told in done.stdout


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_cleanup_without_a_standard_stream(arena: str, closed: str) -> None:
    command = f'exec "$0" -m shmcache_tools.cleanup "$1" {closed}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, arena], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not _there(arena)


def test_cleanup_reaps_only_by_a_lane(
    arena: str, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it saw dead has found successors meanwhile, and no lane is left."""
    _sigkill(holder)
    seen = shmcache.inspect(arena)
    monkeypatch.setattr(cleanup, "look", lambda _: seen)
    with contextlib.ExitStack() as lanes:
        for _ in range(8):
            lanes.enter_context(shmcache.attach(arena))
        assert cleanup.main(["--reap", arena]) == 1
    assert "no free lane" in capsys.readouterr().err
