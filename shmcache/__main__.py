"""``python -m shmcache``: which programs come with shmcache, and where to read on.

Knows none of them by name: they are the scripts of the installed distribution, and each is described by the first line
of its module's docstring.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution

import shmcache

_PROG = "python -m shmcache"


def main(argv: Sequence[str] | None = None) -> int:
    """Lists the programs; the exit code."""
    parser = argparse.ArgumentParser(prog=_PROG, description="List the programs that come with shmcache.")
    parser.add_argument("--version", action="version", version=f"shmcache {shmcache.__version__}")
    parser.parse_args(argv)
    try:
        programs = sorted(distribution("shmcache").entry_points.select(group="console_scripts"))
    except PackageNotFoundError:
        print(f"{_PROG}: shmcache is not installed here, and so are no programs: pip install shmcache", file=sys.stderr)
        return 1
    print(_listing(programs))
    return 0


def _listing(programs: Sequence[EntryPoint]) -> str:
    width = max((len(program.name) for program in programs), default=0)
    lines = [f"shmcache {shmcache.__version__}: {_first_line(shmcache.__doc__).removeprefix('shmcache: ')}", ""]
    lines += [f"  {program.name:<{width}}  {_what_it_does(program)}" for program in programs]
    lines += ["", "Each tells more with --help; the library: python -m pydoc shmcache; all of it: README.md."]
    return "\n".join(lines)


def _what_it_does(program: EntryPoint) -> str:
    """A module begins with: ``program``: what it does."""
    line = _first_line(import_module(program.module).__doc__)
    return line.removeprefix(f"``{program.name}``: ").rstrip(".")


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
