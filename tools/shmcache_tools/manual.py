"""The parser of an installed program, whose ``--help`` is its manual page.

Owns: the sections that all manuals share, and the options that every installed program has.
"""

from __future__ import annotations

import argparse

import shmcache
from shmcache_tools.completion import SHELLS, PrintCompletion
from shmcache_tools.text import make_parser

_ENVIRONMENT = """\
  SHMCACHE_DIRECTORY  a directory on a tmpfs, where arenas lie if not in
                      /dev/shm; the same for engines and for programs
  NO_COLOR            set to anything: no colours
  FORCE_COLOR         set to anything: colours also into a pipe, as for less -R
  TERM                dumb or unknown: no colours, nothing is drawn over
  COLUMNS             the width on a terminal, instead of the terminal's own"""
_FILES = """\
  /dev/shm/shmcache.<uid>.<name>  the segment of arena <name> of user <uid>;
                                  in SHMCACHE_DIRECTORY where that is set"""
_SEE_ALSO = """\
  {others}, python -m shmcache
  README.md of shmcache: quick start, operations, caveats"""
_PROGRAMS = ("shmcache-stat", "shmcache-cleanup")


def make_manual_parser(prog: str, description: str, examples: str, exit_status: str) -> argparse.ArgumentParser:
    """A parser as ``make_parser`` gives, with ``--version``, ``--print-completion`` and a manual page for help."""
    parser = make_parser(prog, description, examples)
    others = ", ".join(f"{other} --help" for other in _PROGRAMS if other != prog)
    sections = {
        "exit status": exit_status,
        "environment": _ENVIRONMENT,
        "files": _FILES,
        "see also": _SEE_ALSO.format(others=others),
    }
    parser.epilog = "\n\n".join([parser.epilog or "", *(f"{title}:\n{text}" for title, text in sections.items())])
    parser.add_argument("--version", action="version", version=f"{prog} {shmcache.__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        metavar="SHELL",
        help=f"print what a shell needs to complete arguments: {', '.join(SHELLS[:-1])} or {SHELLS[-1]}",
    )
    return parser
