"""``SHMCACHE_DIRECTORY``: arenas on a tmpfs of the user's choice; what is no fit place for them is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from arena_support import descriptors, pattern

import shmcache
from shmcache import ArenaConfig, ArenaNotFoundError, ArenaPermissionError, ArenaSpaceError, DirectoryError, Status
from shmcache.directory import SHM, VARIABLE, segment_directory
from shmcache.segment import path_of

CONFIG = ArenaConfig("1MiB", block_size="4KiB", lanes=4)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of this test's own, on the tmpfs that there is everywhere."""
    path = Path(tempfile.mkdtemp(prefix="shmcache-test-", dir=SHM))
    monkeypatch.setenv(VARIABLE, str(path))
    yield path
    shutil.rmtree(path)


def test_the_life_of_an_arena(chosen: Path, arena_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    shmcache.create(arena_name, CONFIG)
    file = chosen / f"shmcache.{os.geteuid()}.{arena_name}"
    assert file.stat().st_mode & 0o777 == 0o600
    assert path_of(arena_name) == file
    assert [path.name for path in chosen.iterdir()] == [file.name]
    with shmcache.attach(arena_name) as cache, shmcache.attach(arena_name, create=CONFIG) as other:
        assert cache.put(b"key", pattern(b"key", 5000)) == Status.OK
        with other.read([b"key"]) as batch:
            assert batch.views[0] == pattern(b"key", 5000)
        assert shmcache.arenas() == [arena_name]
        assert shmcache.inspect(arena_name).path == str(file)
        with pytest.raises(shmcache.ArenaBusyError):
            shmcache.destroy(arena_name)
        monkeypatch.delenv(VARIABLE)
        assert arena_name not in shmcache.arenas(), "it is read at each call"
        with pytest.raises(ArenaNotFoundError, match=str(SHM)):
            shmcache.attach(arena_name)
        monkeypatch.setenv(VARIABLE, f"{chosen}/")
        assert cache.put(b"after", b"x") == Status.OK
    shmcache.destroy(arena_name)
    assert list(chosen.iterdir()) == []
    assert descriptors() == before


def test_names_are_apart_in_each_directory(chosen: Path, arena_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shmcache.create(arena_name, CONFIG)
    monkeypatch.setenv(VARIABLE, "")
    assert segment_directory() == SHM
    shmcache.create(arena_name, CONFIG)
    try:
        with shmcache.attach(arena_name) as here:
            here.put(b"key", b"here")
            monkeypatch.setenv(VARIABLE, str(chosen))
            with shmcache.attach(arena_name) as there:
                assert there.lookup([b"key"]) == 0
            with pytest.raises(shmcache.ArenaExistsError, match=str(chosen)):
                shmcache.create(arena_name, CONFIG)
    finally:
        monkeypatch.setenv(VARIABLE, f"{SHM}/")
        shmcache.destroy(arena_name)
    assert arena_name not in shmcache.arenas()


def test_messages_name_it(chosen: Path, arena_name: str) -> None:
    with pytest.raises(ArenaNotFoundError, match=str(chosen)):
        shmcache.attach(arena_name)
    with pytest.raises(ArenaNotFoundError, match=str(chosen)):
        shmcache.destroy(arena_name, force=True)
    with pytest.raises(ArenaSpaceError, match=f"{chosen} has .* a larger {chosen}: mount"):
        shmcache.create(arena_name, ArenaConfig(1 << 46, block_size="1GiB"))
    assert list(chosen.iterdir()) == []


def _link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def _open_to_all(path: Path) -> None:
    path.touch()
    path.chmod(0o644)


def _foreign(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    path.touch(0o600)
    os.chown(path, 12345, 12345)


@pytest.mark.parametrize("make", [_link, _open_to_all, _foreign, os.mkfifo, Path.mkdir])
def test_what_is_no_segment_of_this_user(chosen: Path, arena_name: str, make: Callable[[Path], None]) -> None:
    before = descriptors()
    make(path_of(arena_name))
    for call in (shmcache.attach, shmcache.inspect, shmcache.destroy):
        with pytest.raises(ArenaPermissionError, match=str(chosen)):
            call(arena_name)
    with pytest.raises(ArenaPermissionError):
        shmcache.attach(arena_name, create=CONFIG)
    if path_of(arena_name).is_dir():
        with pytest.raises(ArenaPermissionError, match="by hand"):
            shmcache.destroy(arena_name, force=True)
        path_of(arena_name).rmdir()
    else:
        shmcache.destroy(arena_name, force=True)
        assert list(chosen.iterdir()) == []
    assert descriptors() == before


NAME = f"test-{os.getpid()}-none"


def _refused(place: object, found: str) -> None:
    """Whatever is asked of a place that is not fit, the answer is that, and what to do."""
    before = descriptors()
    calls: list[Callable[[], object]] = [
        lambda: shmcache.create(NAME, CONFIG),
        lambda: shmcache.attach(NAME),
        lambda: shmcache.attach(NAME, create=CONFIG),
        lambda: shmcache.inspect(NAME),
        lambda: shmcache.destroy(NAME),
        lambda: shmcache.destroy(NAME, force=True),
        shmcache.arenas,
    ]
    for call in calls:
        with pytest.raises(DirectoryError) as caught:
            call()
        message = str(caught.value)
        assert message.startswith(f"{VARIABLE}: expected "), message
        assert f"{place}" in message
        assert found in message
        assert f"unset {VARIABLE}" in message
    assert descriptors() == before


def test_a_path_that_is_none(chosen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(chosen.parent)
    monkeypatch.setenv(VARIABLE, chosen.name)
    _refused(chosen.name, "not absolute")
    monkeypatch.setenv(VARIABLE, str(chosen / "missing"))
    _refused(chosen / "missing", "No such file")
    (chosen / "file").touch()
    monkeypatch.setenv(VARIABLE, str(chosen / "file"))
    _refused(chosen / "file", "Not a directory")


def test_a_file_system_that_is_no_tmpfs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/proc/self")
    _refused("/proc/self", "which is on proc")


@pytest.mark.parametrize("mode", [0o777, 0o722, 0o720, 0o702])
def test_a_directory_that_others_may_write_to(chosen: Path, mode: int) -> None:
    chosen.chmod(mode)
    _refused(chosen, f"has mode {mode:04o}")
    chosen.chmod(mode | 0o1000)
    shmcache.create(NAME, CONFIG)
    shmcache.destroy(NAME)


def test_a_directory_of_another_user(chosen: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    os.chown(chosen, 12345, 12345)
    _refused(chosen, "belongs to user 12345")


def _run(module: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"shmcache_tools.{module}", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_programs_look_there(chosen: Path, arena_name: str) -> None:
    shmcache.create(arena_name, CONFIG)
    seen = _run("stat", arena_name)
    assert seen.returncode == 0
    assert str(path_of(arena_name)) in seen.stdout
    gone = _run("cleanup", "--stale", "--yes")
    assert gone.returncode == 0
    assert f"{arena_name}: destroyed" in gone.stdout
    assert list(chosen.iterdir()) == []


def test_programs_say_what_is_wrong_with_it(chosen: Path) -> None:
    chosen.chmod(0o777)
    for done in (_run("stat"), _run("stat", NAME), _run("cleanup", "--stale"), _run("cleanup", "--force", NAME)):
        assert done.returncode == 1
        assert f"{VARIABLE}: expected" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_process_that_may_open_no_more_files(chosen: Path, arena_name: str) -> None:
    shmcache.create(arena_name, CONFIG)
    program = """
import os, resource, sys, shmcache
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    shmcache.attach(sys.argv[1])
except OSError as error:
    os.write(1, str(error.errno).encode())
"""
    command = [sys.executable, "-c", program, arena_name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "24", "")
    with suppress(ArenaNotFoundError):
        shmcache.destroy(arena_name)
    assert list(chosen.iterdir()) == []
