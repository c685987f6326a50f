"""``--print-completion``: the scripts are sound, and bash and fish really complete by them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from arena_support import TIMEOUT_S

_PROGRAMS = ("stat", "cleanup")
_SHELLS = ("bash", "zsh", "fish", "tcsh")

#: Sources the script named first, and completes the last of the other arguments, of a command line made of them.
_COMPLETE_IN_BASH = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
program=${1//-/_}
"_shtab_$program"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def _run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=cwd)


def _need(shell: str) -> str:
    return shutil.which(shell) or pytest.skip(f"{shell} is not installed")


def _script(program: str, shell: str, folder: Path) -> Path:
    done = _run(sys.executable, "-m", f"shmcache_tools.{program}", "--print-completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    path = folder / f"completion.{shell}"
    path.write_text(done.stdout, encoding="utf-8")
    return path


@pytest.mark.parametrize("shell", _SHELLS)
@pytest.mark.parametrize("program", _PROGRAMS)
def test_the_shell_takes_the_script(program: str, shell: str, tmp_path: Path) -> None:
    executable = _need(shell)
    script = _script(program, shell, tmp_path)
    assert f"shmcache-{program}" in script.read_text(encoding="utf-8")
    done = _run(executable, "-n", str(script))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("program", _PROGRAMS)
def test_bash_completes(program: str, arena: str, tmp_path: Path) -> None:
    bash = _need("bash")
    script = _script(program, "bash", tmp_path)
    (tmp_path / "kv.svg").touch()

    def complete(*words: str) -> list[str]:
        command = [bash, "-c", _COMPLETE_IN_BASH, "bash", str(script), f"shmcache-{program}", *words]
        done = _run(*command, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split()

    assert complete(f"{arena[:-1]}") == [arena]
    assert arena in complete("")
    assert complete(f"{arena}-none") == []
    assert complete("--vers") == ["--version"]
    assert complete("--print-completion", "") == ["bash", "zsh", "fish", "tcsh"]
    if program == "stat":
        assert complete("--output", "kv") == ["kv.svg"]
        assert complete("--map", arena[:-1]) == [arena]
    else:
        assert complete("another", "--dry-run", arena[:-1]) == [arena]


def test_fish_completes(arena: str, tmp_path: Path) -> None:
    fish = _need("fish")
    script = _script("cleanup", "fish", tmp_path)
    bin_folder = Path(sys.executable).parent

    def complete(line: str) -> list[str]:
        os_path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
        code = f"set -x PATH (string split : {os_path}); source {script}; complete -C'{line}'"
        done = _run(fish, "--no-config", "-c", code)
        assert (done.returncode, done.stderr) == (0, "")
        return [found.partition("\t")[0] for found in done.stdout.splitlines()]

    assert complete(f"shmcache-cleanup {arena[:-1]}") == [arena]
    assert complete(f"shmcache-cleanup another --dry-run {arena[:-1]}") == [arena]
    assert complete("shmcache-cleanup --for") == ["--force"]


@pytest.mark.parametrize("program", _PROGRAMS)
def test_without_shtab_it_says_what_to_install(program: str) -> None:
    code = (
        "import sys; sys.modules['shtab'] = None; "
        f"from shmcache_tools.{program}.__main__ import main; sys.exit(main(['--print-completion', 'bash']))"
    )
    done = _run(sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'shmcache[completion]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("program", _PROGRAMS)
def test_of_a_shell_that_is_not_known(program: str) -> None:
    done = _run(sys.executable, "-m", f"shmcache_tools.{program}", "--print-completion", "sh")
    assert (done.returncode, done.stdout) == (2, "")
    assert "bash" in done.stderr
