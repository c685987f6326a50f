"""shmcache-stat --map of a real arena whose blocks are in all six states."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from arena_support import TIMEOUT_S
from processes._crew import Member

import shmcache
from shmcache import Status

_BLOCK = 4096
_MAP = """\
  0 KiB ----------------........rrrrrrrrrrrrrrrrwwwwwwwwwwwwwwwwHHHHHHHH
256 KiB HHHHHHHHXXXXXXXXXXXXXXXX........................................
512 KiB ................................................................
768 KiB ................................................................
a cell is a block, 4 KiB
"""
_SHARES = """\
. free - 704 KiB 68.8 %
- ready 1 64 KiB 6.2 %
r reserved 1 64 KiB 6.2 %
w writing 1 64 KiB 6.2 %
H held 1 64 KiB 6.2 %
X dead 1 64 KiB 6.2 %
"""


def _stat(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The installed program, piped."""
    script = Path(sys.executable).with_name("shmcache-stat")
    return subprocess.run([script, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def _rows(text: str) -> str:
    """With one space between words."""
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


@pytest.fixture
def six(arena: str, cache: shmcache.Cache, enlist: Callable[..., Member]) -> str:
    """An arena of objects of 16 blocks each in the order of the states, and a hole of 8 blocks after the first."""
    writer, dead = enlist(), enlist()
    cache.put(b"ready", bytes(16 * _BLOCK))
    cache.put(b"hole", bytes(8 * _BLOCK))
    cache.put(b"reserved", bytes(16 * _BLOCK))
    writer.do(f"writing = cache.reserve_write([b'writing'], {16 * _BLOCK})")
    cache.put(b"held", bytes(16 * _BLOCK))
    cache.put(b"dead", bytes(16 * _BLOCK))
    cache.delete([b"hole"])
    assert cache.reserve_read([b"reserved"]) == [Status.OK]
    writer.do("held = cache.read([b'held'])")
    dead.do("held = cache.read([b'dead'])")
    dead.kill()
    return arena


def test_every_block_in_its_state(six: str) -> None:
    done = _stat(six, "--map")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{six}  1 MiB in 256 blocks of 4 KiB\n{_MAP}")
    legend = _rows(done.stdout)
    assert all(row in legend for row in _SHARES.splitlines())
    assert "fragmentation 4.5 %: 2 free runs, the largest 672 KiB" in legend
    assert "one write at most 736 KiB" in legend
    assert "\x1b" not in done.stdout


def test_what_a_write_can_get_is_true(six: str, cache: shmcache.Cache) -> None:
    told = re.search(r"one write +at most (\d+) KiB", _stat(six, "--map").stdout)
    assert told is not None
    most = int(told[1]) * 1024
    assert cache.put(b"most", bytes(most)) == Status.OK  # reaps the dead, evicts what they kept
    assert cache.delete([b"most"]) == [Status.OK]
    assert cache.put(b"more", bytes(most + _BLOCK)) == Status.NO_SPACE


def test_all_arenas_of_the_user(six: str, tmp_path: Path) -> None:
    damaged = f"{six}-damaged"
    shmcache.create(damaged, shmcache.ArenaConfig("1MiB"))
    path = Path(shmcache.inspect(damaged).path)
    try:
        path.write_bytes(b"something else entirely\n")
        done = _stat("--map")
        alone = _stat(damaged, "--map")
        drawn = _stat(damaged, "--map", "--output", tmp_path / "m.svg")
    finally:
        path.unlink()
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{six}  1 MiB in 256 blocks of 4 KiB\n{_MAP}" in done.stdout
    assert f"{damaged} cannot be read: " in done.stdout
    assert alone.returncode == 1
    assert alone.stdout.startswith(f"{damaged} cannot be read: ")
    assert drawn.returncode == 1
    assert drawn.stderr.startswith(f"shmcache-stat: {damaged} cannot be read: ")
    assert not any(tmp_path.iterdir())


def test_a_picture_for_a_report(six: str, tmp_path: Path) -> None:
    svg, png = tmp_path / "m.svg", tmp_path / "m.png"
    for path in (svg, png):
        done = _stat(six, "--map", "--output", path)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"wrote {path}\n", "")
    title = ET.fromstring(svg.read_text(encoding="utf-8")).findtext(".//{*}title")  # noqa: S314 # we wrote it
    assert title == f"shmcache {six}"
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert png.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("m.jpg", "expected a name that ends in .svg or .png"),
        ("nowhere/m.svg", "cannot be written: No such file or directory"),
    ],
)
def test_no_picture(arena: str, tmp_path: Path, name: str, told: str) -> None:
    done = _stat(arena, "--map", "--output", tmp_path / name)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{tmp_path / name}: {told}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())
