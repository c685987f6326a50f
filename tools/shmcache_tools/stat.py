"""``shmcache-stat``: what the arenas of this user hold, and who is attached.

Reads only: every number comes from ``shmcache.inspect``, which takes no lane and bears any damage.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType

import shmcache
from shmcache.stats import ArenaInfo
from shmcache_tools.look import look_at_all
from shmcache_tools.render import arena_in_full, arenas_table, shares_table
from shmcache_tools.text import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, complain, make_console, make_parser

PROG = "shmcache-stat"

#: Raised when a field of the JSON document changes its meaning or goes away; new fields may appear.
JSON_SCHEMA = 1

_DESCRIPTION = "Show the arenas of this user, or one arena in full. Changes nothing and takes no lane."
_EXAMPLES = """\
  shmcache-stat                   all arenas, one line each
  shmcache-stat engine-0          one arena in full: objects, shares, lanes, lock, counters
  shmcache-stat --shares          who holds shares, in all arenas, most held first
  shmcache-stat --json engine-0   the same for programs

exit codes: 0 done, 1 failed (no such arena, or it cannot be read), 2 usage"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit code."""
    options = _parser().parse_args(argv)
    try:
        infos = [shmcache.inspect(options.name)] if options.name is not None else look_at_all()
    except ValueError as error:
        complain(PROG, str(error))
        return EXIT_USAGE
    except shmcache.ShmcacheError as error:
        complain(PROG, str(error))
        return EXIT_FAILED
    if options.json:
        json.dump(json_document(infos), sys.stdout, indent=2)
        print()
    else:
        make_console().print(_view(options, infos))
    unreadable = options.name is not None and infos[0].problem is not None
    return EXIT_FAILED if unreadable else EXIT_DONE


def json_document(infos: Sequence[ArenaInfo]) -> dict[str, Any]:
    """What ``--json`` prints: always a list of arenas, also for one."""
    return {"schema": JSON_SCHEMA, "arenas": [_json_arena(info) for info in infos]}


def _json_arena(info: ArenaInfo) -> dict[str, Any]:
    document = info.as_dict()
    if info.stats is not None:
        document["stats"]["hit_rate"] = info.stats.hit_rate
    return document


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("name", nargs="?", metavar="NAME", help="the arena to show in full")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of text")
    form.add_argument("--shares", action="store_true", help="only the lanes with shares, most held first")
    return parser


def _view(options: argparse.Namespace, infos: Sequence[ArenaInfo]) -> RenderableType:
    now = time.time()
    if options.shares:
        return shares_table(infos)
    return arena_in_full(infos[0], now) if options.name is not None else arenas_table(infos, now)


if __name__ == "__main__":
    sys.exit(main())
