"""shmcache-cleanup on a terminal: what it shows, what it asks, and what may happen while the question stands."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from arena_support import TIMEOUT_S, Join
from processes._crew import Member

import shmcache


class _Terminal:
    """shmcache-cleanup on a terminal of 80 columns, on which one can read and type."""

    def __init__(self, arguments: tuple[str, ...], stdout: int | None) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shmcache_tools.cleanup", *arguments],
            stdin=theirs,
            stdout=theirs if stdout is None else stdout,
            stderr=theirs,
            env={**os.environ, "COLUMNS": "80", "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""

    def read_until(self, what: str) -> None:
        while what not in self.text:
            assert self._read(), self.text

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def end(self) -> int:
        """The exit code, when all that was written has been read."""
        while self._read():
            pass
        return self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT_S)
        os.close(self._ours)

    def _read(self) -> bool:
        readable, _, _ = select.select([self._ours], [], [], TIMEOUT_S)
        assert readable, f"nothing more comes after: {self.text}"
        try:
            more = os.read(self._ours, 65536)
        except OSError:  # nobody has the other end any more
            return False
        self.text += more.decode(errors="replace").replace("\r\n", "\n")
        return bool(more)


@contextmanager
def _cleanup(*arguments: str, stdout: int | None = None) -> Iterator[_Terminal]:
    """The program, on whose terminal the question stands."""
    terminal = _Terminal(arguments, stdout)
    try:
        terminal.read_until("[y/N] ")
        yield terminal
    finally:
        terminal.close()


def _there(name: str) -> bool:
    return name in shmcache.arenas()


def _words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def stale(arena_name: str, config: shmcache.ArenaConfig) -> Iterator[str]:
    """Another arena, that nobody is attached to."""
    name = f"{arena_name}-stale"
    shmcache.create(name, config)
    yield name
    with suppress(shmcache.ArenaNotFoundError):
        shmcache.destroy(name)


@pytest.mark.parametrize("answer", ["y\n", "yes\n", " Y \n"])
def test_yes(arena: str, answer: str) -> None:
    with _cleanup(arena) as terminal:
        assert _there(arena)
        terminal.type(answer)
        assert terminal.end() == 0
    assert f"{arena}: destroyed" in terminal.text
    assert not _there(arena)


@pytest.mark.parametrize("answer", ["n\n", "\n", "\x04", "yy\n", "ja\n", "\udcff\n"])
def test_anything_else_does_nothing(arena: str, answer: str) -> None:
    with _cleanup(arena) as terminal:
        os.write(terminal._ours, answer.encode(errors="surrogateescape"))
        assert terminal.end() == 1
    assert terminal.text.endswith("nothing was done\n")
    assert "Traceback" not in terminal.text
    assert _there(arena)


def test_interrupted_at_the_question(arena: str) -> None:
    with _cleanup(arena) as terminal:
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 130
    assert terminal.text.endswith("\nshmcache-cleanup: interrupted\n")
    assert "Traceback" not in terminal.text
    assert _there(arena)


def test_it_shows_what_goes_and_what_stays_and_why(arena: str, stale: str, enlist: Callable[..., Member]) -> None:
    live, dead = enlist("engine", 1, 4), enlist("engine", 2, 4)
    for member in (live, dead):
        member.do("cache.put(b'key', b'x'); batch = cache.read([b'key'])")
    dead.kill()
    with _cleanup(arena, stale) as terminal:
        lines = terminal.text.splitlines()
        assert all(len(line) <= 80 for line in lines)
        assert lines[0].split() == ["arena", "size", "objects", "what", "why"]
        text = _words(terminal.text)
        assert f"1 keep 1 live lane, 1 held share pid {live.pid} python, rank 1 of engine stop what" in text
        assert f"pid {dead.pid}" not in text
        assert f"{stale} 3 MiB 0 destroy stale: nobody is attached; created " in text
        assert lines[-1] == "Destroy 1 arena? [y/N] "
        terminal.type("y\n")
        assert terminal.end() == 1
    assert _there(arena)
    assert not _there(stale)


def test_by_force_the_live_are_named(arena: str, enlist: Callable[..., Member]) -> None:
    member = enlist("engine", None, 4)
    with _cleanup("--force", arena) as terminal:
        text = _words(terminal.text)
        assert f"destroy 1 live lane, 0 held shares pid {member.pid} python, controller of engine" in text
        assert "Destroy 1 arena, with 1 live lane? [y/N]" in text
        terminal.type("y\n")
        assert terminal.end() == 0
    assert f"{arena}: destroyed (1 live lane, " in _words(terminal.text)
    assert not _there(arena)


def test_nothing_is_asked_where_nothing_can_be_done(arena: str, join: Join) -> None:
    join()
    terminal = _Terminal((arena,), None)
    assert terminal.end() == 1
    terminal.close()
    assert f"pid {os.getpid()} " in terminal.text
    assert "[y/N]" not in terminal.text
    assert _there(arena)


def test_reaping_asks_too(arena: str, enlist: Callable[..., Member]) -> None:
    member = enlist()
    member.do("cache.put(b'key', b'x'); batch = cache.read([b'key'])")
    member.kill()
    with _cleanup("--reap", arena) as terminal:
        assert f"1 reap 1 dead lane, 1 share, 0 half-written objects pid {member.pid} " in _words(terminal.text)
        assert "Reap 1 arena? [y/N]" in terminal.text
        terminal.type("y\n")
        assert terminal.end() == 0
    stats = shmcache.inspect(arena).stats
    assert stats is not None
    assert (stats.lanes_dead, stats.held, stats.objects) == (0, 0, 1)


def test_where_the_output_is_piped_the_question_stands_on_the_terminal(arena: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as stdout, _cleanup(arena, stdout=stdout.fileno()) as terminal:
        terminal.type("y\n")
        assert terminal.end() == 0
    assert log.read_text(encoding="utf-8").startswith(f"{arena}: destroyed (")


@pytest.mark.parametrize(("force", "damaged"), [([], False), (["--force"], False), (["--force"], True)])
def test_an_arena_made_anew_while_the_question_stands_stays(
    arena: str, config: shmcache.ArenaConfig, force: list[str], *, damaged: bool
) -> None:
    if damaged:
        Path(shmcache.inspect(arena).path).chmod(0o644)
    with _cleanup(*force, arena) as terminal:
        shmcache.destroy(arena, force=True)
        with shmcache.attach(arena, create=config) as cache:
            cache.put(b"key", b"x")
        made = shmcache.inspect(arena)
        terminal.type("y\n")
        assert terminal.end() == 0
    assert f"{arena}: is gone already; another one has its name now, and stays" in _words(terminal.text)
    left = shmcache.inspect(arena)
    assert left.inode == made.inode
    assert left.stats is not None
    assert left.stats.objects == 1


def test_who_attaches_while_the_question_stands_keeps_the_arena(arena: str, join: Join) -> None:
    with _cleanup(arena) as terminal:
        cache = join()
        terminal.type("y\n")
        assert terminal.end() == 1
    assert f"process {os.getpid()} " in terminal.text
    assert _there(arena)
    cache.put(b"key", b"x")


def test_what_is_destroyed_while_the_question_stands_is_no_error(arena: str) -> None:
    with _cleanup(arena) as terminal:
        shmcache.destroy(arena)
        terminal.type("y\n")
        assert terminal.end() == 0
    assert f"{arena}: is gone already\n" in terminal.text
