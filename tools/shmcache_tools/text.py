"""How the programs put numbers, times and foreign text into words, and where they print.

Owns: the units (binary units for sizes of memory, decimal GB for data moved), the console that never
cuts a table when it is piped, and the removal of control characters from text that came out of shared
memory or ``/proc`` (a command line may hold escape sequences).  Knows nothing of arenas.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

#: Wide enough that no table is wrapped or cut when the output is not a terminal.
PIPED_WIDTH = 500

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2

_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_TIME_UNITS = ((1e-6, 1e9, "ns"), (1e-3, 1e6, "us"), (1.0, 1e3, "ms"))
_AGE_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def make_console(file: TextIO | None = None) -> Console:
    """A console on ``file`` (standard output): markup off, as texts from outside may hold brackets."""
    target = file or sys.stdout
    console = Console(file=target, markup=False, highlight=False)
    if console.is_terminal:
        return console
    return Console(file=target, markup=False, highlight=False, width=PIPED_WIDTH)


def make_table(*columns: str, right: Iterable[str] = ()) -> Table:
    """A table without rules; the columns named in ``right`` hold numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        numeric = column in right
        table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric)
    return table


def make_facts(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Two columns without a header: the name of each fact and the fact."""
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, fact in rows:
        table.add_row(name, fact)
    return table


def make_parser(prog: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help ends with examples; wrong usage exits with 2."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def complain(prog: str, message: str) -> None:
    """Say on standard error what went wrong."""
    make_console(sys.stderr).print(f"{prog}: {printable(message)}", soft_wrap=True)


def printable(text: str) -> str:
    """``text`` with every character that a terminal could take as a command replaced."""
    return "".join(char if char.isprintable() else "?" for char in text)


def count_text(count: int) -> str:
    return f"{count:,}"


def plural(count: int, noun: str) -> str:
    """``1 lane``, ``2 lanes``; for nouns that take a plain s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size_text(size: int) -> str:
    """Bytes of memory in binary units: ``512 B``, ``64 KiB``, ``1.5 GiB``."""
    value, unit = float(size), _BINARY_UNITS[0]
    for larger in _BINARY_UNITS[1:]:
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value.is_integer() else f"{value:.1f} {unit}"


def gigabytes_text(size: int) -> str:
    """Bytes moved or read, in units of 10**9."""
    return f"{size / 1e9:,.2f} GB"


def percent_text(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def time_text(seconds: float) -> str:
    """A measured time with three digits or so: ``34 ns``, ``1.25 us``, ``310 ms``, ``12.5 s``."""
    for limit, scale, unit in _TIME_UNITS:
        if seconds < limit:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:,.1f} s"


def age_text(seconds: float) -> str:
    """An age in its two largest units: ``41 s``, ``3 h 12 min``."""
    rest = max(0, int(seconds))
    parts: list[str] = []
    for length, unit in _AGE_UNITS:
        amount, rest = divmod(rest, length)
        if amount or parts:
            parts.append(f"{amount} {unit}")
        if len(parts) == 2:
            break
    return " ".join(part for part in parts if not part.startswith("0 ")) or "0 s"
