"""What tests share that drive the C core itself, without Python around it: it is compiled with a program of theirs."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "native"

#: As in native/build_ffi.py, so that what is tested is what is shipped.
FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-UNDEBUG", "-pthread")


def build_core(
    program: Path, sources: Sequence[Path], *, flags: Sequence[str] = (), compiler: str = "gcc", native: Path = NATIVE
) -> Path:
    """Compiles ``sources`` with every C file of the core to ``program``, which is given back; ``flags`` come last."""
    files = [str(path) for path in (*sources, *sorted(native.glob("*.c")))]
    command = [compiler, *FLAGS, *flags, f"-I{native}", "-o", str(program), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program
