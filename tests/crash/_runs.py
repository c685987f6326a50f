"""The program ``crash``, compiled with the core as it is shipped, and what its runs told."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from core_support import build_core

HERE = Path(__file__).parent
PROCESSES = 2  #: at a time
TIMEOUT_S = 280  #: of one process; pytest's own limit of a test lies above
REFUSED = 77  #: the exit code where ptrace is refused

#: What the terminal shows at the end.
SUMMARY: list[str] = []


def lacking(what: str, *, program: bool) -> NoReturn:
    """Skips; but where CI is set, a missing program fails."""
    if program and os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def build(folder: Path) -> Path:
    """The program; skips where it cannot be had."""
    if platform.machine() != "x86_64":
        lacking(f"single-stepping is written for x86_64, not for {platform.machine()}", program=False)
    if shutil.which("gcc") is None:
        lacking("gcc is not installed", program=True)
    # As setup builds with gcc; bound at the start, so that no step is the dynamic linker's.
    return build_core(folder / "crash", sorted(HERE.glob("*.c")), flags=["-flto=auto", "-g", "-Wl,-z,now"])


@dataclasses.dataclass
class Told:
    """What some processes of one mode told."""

    scenarios: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    neighbours: Counter[str] = dataclasses.field(default_factory=Counter)

    def total(self, what: str) -> int:
        return sum(row[what] for row in self.scenarios)

    def effects(self) -> Counter[str]:
        """What the core counted while the operations ran undisturbed."""
        effects: Counter[str] = Counter()
        for row in self.scenarios:
            effects.update(row["effects"])
        return effects

    def line(self, mode: str) -> str:
        """Operations x states x instructions x distinct images."""
        kinds = {key: len({row[key] for row in self.scenarios}) for key in ("op", "state")}
        return (
            f"{mode}: {kinds['op']} operations, {kinds['state']} states, {len(self.scenarios)} scenarios of them; "
            f"{self.total('instructions'):,} instructions, {self.total('stops'):,} changed something, "
            f"{self.total('distinct'):,} distinct images, {self.total('checks'):,} checks of them"
        )


def run(program: Path, mode: str, *options: str, parts: Sequence[str] | None = None) -> Told:
    """Runs a mode, shared out among some processes; ``parts``: which shares, all of them by default."""
    parts = [f"{i}/{PROCESSES}" for i in range(PROCESSES)] if parts is None else parts
    commands = [[str(program), mode, *options, "--part", part] for part in parts]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    told = Told()
    try:
        for command, process in zip(commands, processes, strict=True):
            _gather(told, command, process)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return told


def _named(program: str, text: str) -> str:
    """Addresses of the program with the function and the line that they are in."""

    def name(found: re.Match[str]) -> str:
        command = ["addr2line", "-f", "-s", "-e", program, found[1]]
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        return f"{found[0]} ({' '.join(lines)})"

    return re.sub(r"address (0x[0-9a-f]+)", name, text) if shutil.which("addr2line") else text


def _gather(told: Told, command: list[str], process: subprocess.Popen[str]) -> None:
    again = " ".join(["crash", *command[1:]])
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        told.problems.append(f"{again}: not done after {TIMEOUT_S} s; the last lines:\n{out[-1000:]}")
        return
    if process.returncode == REFUSED:
        lacking(f"ptrace is refused here: {err.strip()}", program=False)
    for row in map(json.loads, out.splitlines()):
        if "op" in row:
            told.scenarios.append(row)
            if row["findings"]:
                told.problems.append(f"{again}: {row['op']} in {row['state']}:\n{_named(command[0], row['findings'])}")
        else:
            del row["mode"]
            told.neighbours.update(row)
    if process.returncode not in (0, 1) or err:
        told.problems.append(f"{again}: exit code {process.returncode}; {err}")
