"""``shmcache-stat --watch`` as people see it: in a terminal that tmux holds, and into pipes."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from arena_support import TIMEOUT_S
from processes._crew import Member, state_of, wait_until
from processes._tmux import Tmux, tmux_window

import shmcache
from shmcache.segment import path_of

_STAT = (sys.executable, "-m", "shmcache_tools.stat")
_WORK = """
import threading
def work():
    while True:
        with cache.read([b"a", b"b", b"missing"]):
            time.sleep(0.001)
cache.put(b"a", b"x" * 100000)
cache.put(b"b", b"x" * 100000)
threading.Thread(target=work, daemon=True).start()
"""


@pytest.fixture
def window() -> Iterator[Tmux]:
    with tmux_window() as window:
        yield window


@pytest.fixture
def worker(enlist: Callable[..., Member]) -> Member:
    """Rank 0 of ``engine``, which reads all the time and hits two keys of three."""
    member = enlist("engine", 0, 1)
    member.do(_WORK)
    return member


def _watch(window: Tmux, *options: str) -> None:
    window.run(*_STAT, *options, "--watch", "0.1")
    window.wait_full_screen()


def _check_restored(window: Tmux, code: int) -> None:
    """The program has ended with that code, and the terminal is as before."""
    window.wait_for(f"ended={code}")
    assert not window.full_screen
    assert window.cursor_shown
    window.type("echo still'-'fine")
    window.wait_for("still-fine", "echo still'-'fine")  # what is typed is seen
    assert {"icanon", "echo", "isig", "icrnl"} <= window.modes()


# what is seen


def test_one_arena(window: Tmux, arena: str, worker: Member) -> None:
    _watch(window, arena)
    text = window.wait_match(r"^keys read/s [\d.]+k? [▁▂▃▄▅▆▇█]{3,} max [\d.]+k?$")
    assert re.search(rf"^{arena} 1 lane alive .* old \d\d:\d\d:\d\d$", text, re.MULTILINE)
    assert re.search(r"^hit rate 6[67]% [▅▆]+ max", text, re.MULTILINE)
    assert re.search(rf"^engine 0 {worker.pid} alive [\d.]+k? ", text, re.MULTILINE)
    assert "every 0.1 s" in text
    assert not window.cursor_shown


def test_all_arenas(window: Tmux, arena: str, worker: Member) -> None:
    window.resize(120, 100)  # others of this user may be there, too
    _watch(window)
    window.wait_match(rf"^{arena} \S+ 20% (?:- )?6[67]% [\d.]+k? [\d.]+ .* 0 [▁▂▃▄▅▆▇█]+$")
    assert re.match(r"\d+ arenas? .* used of ", window.text())
    worker.kill()
    window.wait_for(f"shmcache-cleanup {arena}")  # it is stale


def test_the_dead_and_the_stopped_stand_out(
    window: Tmux, arena: str, worker: Member, enlist: Callable[..., Member]
) -> None:
    other = enlist("other", 0, 1)
    other.do("batch = cache.read([b'a'])")
    _watch(window, arena)
    window.wait_for(f"other 0 {other.pid} alive")
    worker.stop()
    window.wait_for(f"engine 0 {worker.pid} stopped")
    other.kill()
    window.wait_for(f"other 0 {other.pid} dead", "1 lane alive 1 dead", f"shmcache-cleanup --reap {arena}")
    coloured = next(line for line in window.lines(escapes=True) if f" {other.pid} " in line)
    assert re.search(r"\x1b\[[\d;]*7[\d;]*m.*dead", coloured)  # reversed
    worker.resume()
    window.wait_for(f"engine 0 {worker.pid} alive")


@pytest.mark.usefixtures("worker")
def test_shares_and_map(window: Tmux, arena: str) -> None:
    _watch(window, arena, "--map")
    window.wait_for("held", "free", "every 0.1 s")
    window.press("q")
    window.wait_for("ended=0")
    _watch(window, arena, "--shares")
    window.wait_match(r"^held .* engine 0 ")
    window.press("q")
    _check_restored(window, 0)


# sizes and keys


@pytest.mark.usefixtures("worker")
def test_another_size_is_drawn_at_once(window: Tmux, arena: str) -> None:
    window.run(*_STAT, arena, "--watch", "1000")
    window.wait_for("every 1000 s", "engine 0")
    clock = re.compile(r"\d\d:\d\d:\d\d$")
    for width, height in ((120, 40), (20, 5), (4, 2), (1, 1), (200, 50), (80, 24)):
        window.resize(width, height)
        if width >= 80:
            window.wait(lambda: bool(clock.search(line := window.lines()[0])) and len(line) == width)  # noqa: B023
            assert "every 1000 s" in window.lines()[height - 1]
    window.press("q")
    _check_restored(window, 0)


def test_a_long_list_scrolls(window: Tmux, arena: str, start: Callable[[], Member]) -> None:
    member = start()
    for number in range(14):
        member.do(f"cache{number} = shmcache.attach({arena!r}, group='group-{number:02}', rank=0, world_size=1)")
    window.resize(80, 16)
    _watch(window, arena)
    window.wait_for("group-00", " of 14")
    seen = _groups(window)
    assert seen[0] == "00"
    assert len(seen) < 14
    window.press("Down")
    window.wait_until(lambda _: _groups(window)[0] == "01", "one down")
    window.press("PageDown")
    window.wait_until(lambda _: _groups(window)[0] == f"{1 + len(seen):02}", "a page down")
    window.press("End")
    window.wait_until(lambda _: _groups(window)[-1] == "13", "the end")
    window.press("PageUp", "Up")
    window.wait_until(lambda _: _groups(window)[-1] == f"{13 - len(seen) - 1:02}", "a page and a line up")
    window.press("Home")
    window.wait_until(lambda _: _groups(window) == seen, "the begin")
    window.resize(80, 60)
    window.wait_until(lambda text: len(_groups(window)) == 14 and " of 14" not in text, "all of them")


def _groups(window: Tmux) -> list[str]:
    return re.findall(r"^group-(\d\d) 0 ", window.text(), re.MULTILINE)


@pytest.mark.usefixtures("worker")
def test_a_pause_holds_what_is_seen(window: Tmux, arena: str) -> None:
    _watch(window, arena)
    window.wait_for("engine 0")
    window.press("Space")
    window.wait_for("PAUSED")
    before = window.lines()[:-1]
    shmcache.destroy(arena, force=True)
    time.sleep(0.5)  # some intervals
    assert window.lines()[:-1] == before
    window.press("Space")
    window.wait_for("gone since")
    assert "PAUSED" not in window.text()


@pytest.mark.usefixtures("worker")
def test_the_interval_and_the_keys(window: Tmux, arena: str) -> None:
    _watch(window, arena)
    window.wait_for("every 0.1 s")
    window.press("+", "+")
    window.wait_for("every 0.5 s")
    window.press("-")
    window.wait_for("every 0.2 s")
    window.press("?")
    window.wait_for("q, Ctrl-C", "PgUp PgDn")
    window.press("h")
    window.wait_for("engine 0")
    window.press("x", "Left", "F5", "M-a", "é")  # no keys of ours
    window.press("+")
    window.wait_for("every 0.5 s", "engine 0")


# arenas that come and go


def test_an_arena_that_is_not_there_yet(window: Tmux, arena_name: str, config: shmcache.ArenaConfig) -> None:
    _watch(window, arena_name)
    window.wait_for(arena_name, "no such arena yet")
    shmcache.create(arena_name, config)
    window.wait_for(f"{arena_name} stale", "no lane in use")


def test_an_arena_that_is_made_anew(
    window: Tmux, arena: str, worker: Member, config: shmcache.ArenaConfig, enlist: Callable[..., Member]
) -> None:
    _watch(window, arena)
    window.wait_for(f"engine 0 {worker.pid}")
    worker.kill()
    shmcache.destroy(arena)
    window.wait_for(arena, "gone since")
    shmcache.create(arena, config)
    successor = enlist("engine", 0, 1)
    window.wait_for(f"engine 0 {successor.pid} alive")
    assert f" {worker.pid} " not in window.text()


@pytest.mark.usefixtures("worker")
def test_an_arena_that_is_damaged_under_it(window: Tmux, arena: str) -> None:
    _watch(window, arena)
    window.wait_for("engine 0")
    with path_of(arena).open("r+b") as segment:
        header = segment.read(4096)
        segment.seek(0)
        segment.write(b"\xff" * 4096)
        segment.flush()
        window.wait_for(f"{arena} unreadable", "cannot be read")
        segment.seek(0)
        segment.write(header)
    window.wait_for("engine 0", "keys read/s")
    window.press("q")
    _check_restored(window, 0)


def test_looks_that_fail(window: Tmux) -> None:
    _watch(window)
    window.wait_match("^[0-9]+ arena")
    usual = resource.prlimit(window.child, resource.RLIMIT_NOFILE)
    resource.prlimit(window.child, resource.RLIMIT_NOFILE, (3, usual[1]))
    assert "every 0.1 s" in window.wait_for("cannot look: ", "Too many open files", " arena")
    resource.prlimit(window.child, resource.RLIMIT_NOFILE, usual)
    window.wait_until(lambda text: "cannot look" not in text, "a look that succeeds")


# the end


@pytest.mark.parametrize("key", ["q", "C-c"])
@pytest.mark.parametrize("options", [[], ["--map"], ["--shares"]])
def test_keys_that_end_it(window: Tmux, arena: str, key: str, options: list[str]) -> None:
    window.type("echo 'seen before'")
    _watch(window, arena, *options)
    assert {"-icanon", "-echo", "isig"} <= window.modes()
    window.press(key)
    _check_restored(window, 0)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_signals_that_end_it(window: Tmux, arena: str, signum: int) -> None:
    _watch(window, arena)
    os.kill(window.child, signum)
    _check_restored(window, 128 + signum)


def test_an_error_ends_it(window: Tmux, arena: str) -> None:
    program = (
        "from shmcache_tools.stat import __main__ as stat; from shmcache_tools.stat.watch import live; "
        "live.Live._press = lambda self, key: 1 / 0; "
        f"raise SystemExit(stat.main(['{arena}', '--watch']))"
    )
    window.run(sys.executable, "-c", program)
    window.wait_full_screen()
    window.press("x")
    window.wait_for("ZeroDivisionError")
    _check_restored(window, 1)


def test_it_is_stopped_and_goes_on(window: Tmux, arena: str) -> None:
    _watch(window, arena)
    window.wait_for(arena)
    window.press("C-z")
    window.wait(lambda: not window.full_screen)
    window.wait(lambda: "icanon" in window.modes())
    window.type("echo shell'-'again")
    window.wait_for("shell-again")
    window.type("fg")
    window.wait(lambda: window.full_screen and "-icanon" in window.modes())
    window.wait_for(arena, "every 0.1 s")
    window.press("q")
    window.wait(lambda: not window.full_screen)
    assert {"icanon", "echo"} <= window.modes()


def test_its_terminal_goes_away(window: Tmux, arena: str) -> None:
    _watch(window, arena)
    pid = window.child
    window.close()
    wait_until(lambda: state_of(pid) in {"", "Z"})


# terminals of other kinds


def test_without_a_keyboard(window: Tmux, arena: str) -> None:
    window.type(f"clear; echo q | {' '.join(_STAT)} {arena} --watch 0.1; echo ended'='$?")
    window.wait_full_screen()
    text = window.wait_for(arena, "every 0.1 s")
    assert "q quit" not in text
    window.press("C-c")
    _check_restored(window, 0)


def test_without_colours(window: Tmux, arena: str) -> None:
    _watch(window, arena)
    window.wait_for("free")
    colour = re.compile(r"\x1b\[(\d+;)*(3[0-8]|4[0-8])[;m]")
    assert any(colour.search(line) for line in window.lines(escapes=True))
    window.press("q")
    window.wait_for("ended=0")
    window.run("env", "NO_COLOR=1", *_STAT, arena, "--watch", "0.1")
    window.wait_full_screen()
    window.wait_for("free", "every 0.1 s")
    assert not any(colour.search(line) for line in window.lines(escapes=True))


def test_without_unicode(window: Tmux, arena: str) -> None:
    window.run("env", "PYTHONIOENCODING=ascii", *_STAT, arena, "--watch", "0.1")
    text = window.wait_for("keys read/s 0 _", "every 0.1 s")
    assert text.isascii()


def test_a_dumb_terminal_gets_lines(window: Tmux, arena: str) -> None:
    window.resize(160, 24)
    window.run("env", "TERM=dumb", *_STAT, arena, "--watch", "0.1")
    window.wait_until(lambda text: text.count(f" {arena} ") >= 3, "three lines")
    assert not window.full_screen
    window.press("C-c")
    window.wait_for("ended=0")


# pipes


@contextlib.contextmanager
def _piped(*options: str) -> Iterator[subprocess.Popen[str]]:
    command = [*_STAT, *options, "--watch", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_pipe_gets_a_line_each_time(arena: str, worker: Member) -> None:
    with _piped(arena) as process:
        assert _line(process).split()[:4] == ["time", "arena", "used", "objects"]
        for _ in range(3):
            line = _line(process)
            assert re.fullmatch(rf"[-\d]{{10}} [:\d]{{8}} {arena} .*\n", line)
            used, objects, looked_up, read, hits, *_ = line.split()[3:]
            assert (used, objects, looked_up) == ("19.5%", "2", "0")
            assert float(read) > 0
            assert 60 < float(hits.removesuffix("%")) < 70
        worker.kill()
        shmcache.destroy(arena)
        while "is not there" not in _line(process):
            pass


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_a_pipe_quietly(arena: str, signum: int, code: int) -> None:
    with _piped(arena) as process:
        _line(process)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, errors) == (code, "")


@pytest.mark.parametrize("options", [(), ("--map",), ("--shares",)])
def test_a_reader_that_leaves_ends_it_quietly(arena: str, options: tuple[str, ...]) -> None:
    with _piped(arena, *options) as process:
        assert process.stdout is not None
        _line(process)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(TIMEOUT_S) == 0


def test_a_full_disk_is_said() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*_STAT, "--watch", "0.1"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False
        )
    assert done.returncode == 1
    assert re.fullmatch(r"shmcache-stat: .*No space left on device\n", done.stderr)


@pytest.mark.parametrize(("option", "words"), [("--map", "free"), ("--shares", "engine")])
def test_views_into_a_pipe(arena: str, worker: Member, option: str, words: str) -> None:
    worker.do("kept = cache.read([b'a'])")
    with _piped(arena, option) as process:
        before, view = "\n", ""
        times = 0
        while times < 4:
            line = _line(process)
            if re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", line):
                assert before == "\n"
                assert words in view or times == 0
                times, view = times + 1, ""
            before, view = line, view + line
