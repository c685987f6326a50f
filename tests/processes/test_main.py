"""``python -m shmcache``."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
from arena_support import TIMEOUT_S

import shmcache
from shmcache import __main__ as program


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shmcache", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def test_it_lists_the_programs() -> None:
    done = _run()
    assert (done.returncode, done.stderr) == (0, "")
    first, *others = done.stdout.splitlines()
    assert first.startswith(f"shmcache {shmcache.__version__}: ")
    listed = [line.split(maxsplit=1) for line in others if line.startswith("  ")]
    assert [name for name, _ in listed] == ["shmcache-cleanup", "shmcache-stat"]
    assert all(len(what) > 10 and "`" not in what for _, what in listed)
    assert "--help" in others[-1]


def test_version() -> None:
    assert _run("--version").stdout == f"shmcache {shmcache.__version__}\n"


def test_help() -> None:
    done = _run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m shmcache")


def test_it_takes_no_arguments() -> None:
    done = _run("stat")
    assert (done.returncode, done.stdout) == (2, "")
    assert "unrecognized arguments: stat" in done.stderr


def test_where_only_the_source_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(program, "distribution", missing)
    assert program.main([]) == 1
    assert "pip install" in capsys.readouterr().err
