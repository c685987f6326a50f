"""How the programs put numbers, times and foreign text into words, and where they print.

Owns: the units (binary units for sizes of memory, decimal GB for data moved), the console that never
cuts a table when it is piped, and the removal of control characters from text that came out of shared
memory or ``/proc`` (a command line may hold escape sequences).  Knows nothing of arenas.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

#: Wide enough that no table is wrapped or cut when the output is not a terminal.
PIPED_WIDTH = 500

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2

BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_TIME_UNITS = ((1e-6, 1e9, "ns"), (1e-3, 1e6, "us"), (1.0, 1e3, "ms"))
_AGE_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def make_console(file: TextIO | None = None) -> Console:
    """A console on ``file`` (standard output): markup off, as texts from outside may hold brackets."""
    target = _bearing_all(file or sys.stdout)
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


def _bearing_all(file: TextIO) -> TextIO:
    """The stream, on which a character that its encoding lacks is no reason to stop."""
    if isinstance(file, TextIOWrapper):
        file.reconfigure(errors="replace")  # by one character, so that tables stay in line
    return file


def say(message: str, file: TextIO | None = None) -> None:
    """Print a message on ``file`` (standard output), and go on where nobody reads that any more."""
    target = _bearing_all(file or sys.stdout)
    try:
        print(message, file=target, flush=True)
    except BrokenPipeError:
        # What is left in the buffer would fail once more at the end.
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), target.fileno())


def complain(prog: str, message: str) -> None:
    """Say on standard error what went wrong."""
    say(f"{prog}: {printable(message)}", sys.stderr)


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
    value, unit = float(size), BINARY_UNITS[0]
    for larger in BINARY_UNITS[1:]:
        if round(value, 1) < 1024:  # as it will be shown
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


# The same in few cells, for tables on a narrow terminal.


def short_count_text(count: int) -> str:
    """At most 5 cells: ``99999``, ``105k``, ``1.05M``."""
    if count < 100_000:
        return str(count)
    value, unit = float(count), ""
    for larger in "kMGTPE":
        if round(value) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g}{unit}"


def short_size_text(size: int) -> str:
    """Binary units as ``free -h`` has them: ``512B``, ``512Mi``, ``1.5Gi``."""
    return size_text(size).replace(" ", "").replace("iB", "i")


def short_percent_text(fraction: float | None) -> str:
    """Whole percents; 100 only where it is all."""
    if fraction is None:
        return "-"
    return f"{min(round(100 * fraction), 99) if fraction < 1 else round(100 * fraction)}%"


def short_age_text(seconds: float) -> str:
    """An age in the largest unit of which it has three: ``179s``, ``70h``."""
    rest = max(0, int(seconds))
    for length, unit in _AGE_UNITS:
        if rest >= 3 * length:
            return f"{rest // length}{unit}"
    return f"{rest}s"
