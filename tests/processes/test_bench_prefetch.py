"""tools/bench/prefetch.py in small, and the servers that it starts and ends; what it measures is never judged."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from shutil import which
from types import ModuleType
from typing import Any

import pytest
from processes import _packages

import shmcache

BENCH = Path(__file__).parents[2] / "tools" / "bench"
TIMEOUT_S = 120
SMALL = ("--total", "4MiB", "--rounds", "1", "--sizes", "1MiB,64KiB")


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module with the stores, which does not stay known."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("prefetch_stores")
    del sys.modules["prefetch_stores"]


def _start(tmp_path: Path, *args: str) -> subprocess.Popen[str]:
    """In a group of its own, whose temporary folders lie in ``tmp_path``."""
    return subprocess.Popen(
        [sys.executable, str(BENCH / "prefetch.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    )


def _programs_in(folder: Path) -> list[int]:
    """Processes that were told of the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has ended
    return found


def _check_clean(pid: int, tmp_path: Path) -> None:
    assert not [name for name in shmcache.arenas() if name.startswith(f"bench-{pid}-")]
    assert _programs_in(tmp_path) == []
    assert list(tmp_path.glob("shmcache-bench-*")) == []


def _wait_for(there: Callable[[], object]) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not there():
        assert time.monotonic() < until
        time.sleep(0.01)


# The program


def test_files_with_json_and_plot(tmp_path: Path) -> None:
    _packages.need("matplotlib")
    _packages.need("xxhash")
    document, picture = tmp_path / "prefetch.json", tmp_path / "prefetch.svg"
    with _start(tmp_path, "--only", "file", *SMALL, "--json", str(document), "--plot", str(picture)) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (0, "")
    _check_clean(process.pid, tmp_path)
    assert "file, objects of" in out
    found = json.loads(document.read_text(encoding="utf-8"))
    assert set(found["machine"]) >= {"processor", "packages", "load"}
    large, small = found["findings"]
    assert (large["store"], large["object_bytes"], large["goal"]) == ("file", 1 << 20, 0.9)
    assert isinstance(large["met"], bool)
    assert (small["object_bytes"], small["goal"], small["met"]) == (65536, None, None)
    drawn = picture.read_text(encoding="utf-8")
    assert f"{100 * small['ratio']:.0f} % of preadv" in drawn


@pytest.mark.parametrize(
    "wrong",
    [
        ["--sizes", "1MiB,much"],
        ["--total", "much"],
        ["--threads", "0"],
        ["--rounds", "0"],
        ["--only", "tape"],
        ["more"],
    ],
)
def test_usage(wrong: list[str], tmp_path: Path) -> None:
    with _start(tmp_path, *wrong) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (2, "")
    assert "error: " in err


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    _packages.need("xxhash")
    with _start(tmp_path, "--only", "file", *SMALL, "--json", str(tmp_path)) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "file, objects of" in out
    assert err.startswith("prefetch.py: ")
    assert str(tmp_path) in err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("after_s", [0.0, 1.0])
def test_an_interrupted_run_leaves_nothing(signum: int, after_s: float, tmp_path: Path) -> None:
    """The whole group is told, as by a terminal: the server is not in it, and goes with the program."""
    _packages.need("valkey")
    _packages.need("xxhash")
    if not (which("valkey-server") or which("redis-server")):
        pytest.skip("there is no server")
    with _start(tmp_path, "--only", "valkey", "--rounds", "1000") as process:
        _wait_for(lambda: _programs_in(tmp_path))
        time.sleep(after_s)
        os.killpg(process.pid, signum)
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert err.splitlines() == ["prefetch.py: interrupted"]
    _check_clean(process.pid, tmp_path)


# Servers


def _run_server(stores: ModuleType, stack: ExitStack, note: Path) -> int:
    """Its pid."""
    program = f"echo $$ > {note}.new; mv {note}.new {note}; exec sleep 1000"
    stores.run_until_end(stack, ["sh", "-c", program], note.exists)
    return int(note.read_text(encoding="utf-8"))


def test_a_server_runs_until_the_end(stores: ModuleType, tmp_path: Path) -> None:
    with ExitStack() as stack:
        pid = _run_server(stores, stack, tmp_path / "pid")
        assert os.getsid(pid) == pid, "a terminal's Ctrl-C would end it too early"
    assert not Path(f"/proc/{pid}").exists()


def test_a_server_that_ends_at_its_start(stores: ModuleType) -> None:
    with ExitStack() as stack, pytest.raises(RuntimeError, match="^false ended with 1$"):
        stores.run_until_end(stack, ["false"], lambda: False)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_store_that_fails_at_its_start(error: type[BaseException], stores: ModuleType, tmp_path: Path) -> None:
    pids: list[int] = []

    def start(store: Any) -> None:
        pids.append(_run_server(stores, store.stack, tmp_path / "pid"))
        raise error

    store = type("Half", (stores.Files,), {"start": start})(tmp_path)
    with pytest.raises(error), store:
        pytest.fail("it has started")
    assert not Path(f"/proc/{pids[0]}").exists()
