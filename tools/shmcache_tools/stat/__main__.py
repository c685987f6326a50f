"""``shmcache-stat``: what the arenas of this user hold, who holds it, and how it goes.

Reads only: every number comes from ``shmcache.inspect``, which takes no lane and bears any damage.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import shmcache
from shmcache.config import check_name
from shmcache_tools.completion import complete_arenas, complete_files
from shmcache_tools.look import Seen
from shmcache_tools.manual import make_manual_parser
from shmcache_tools.program import number, real
from shmcache_tools.stat.documents import json_document, json_schema
from shmcache_tools.stat.map_plot import PlotError, save_maps
from shmcache_tools.stat.serve import address, serve_metrics
from shmcache_tools.stat.views import View, view_of
from shmcache_tools.stat.watch import watch
from shmcache_tools.text import EXIT_DONE, EXIT_FAILED, complain, make_console, say

PROG = "shmcache-stat"

NOW_S = 0.25  #: over which the table of arenas tells what goes on now

_DESCRIPTION = """\
Show the arenas of this user, or the arena NAME in full. Reads only: takes no
lane and no lock, changes nothing, and bears any damage."""
_EXAMPLES = """\
  shmcache-stat                          all arenas, one line each
  shmcache-stat kv                       one in full: occupancy, lanes, counters
  shmcache-stat kv --shares              who holds what, longest first
  shmcache-stat kv --map                 its blocks, coloured by state
  shmcache-stat kv --map --output m.svg  the same as a picture (.svg or .png)
  shmcache-stat kv --watch               live; q quits
  shmcache-stat --watch 5 | tee log      a line an arena every 5 seconds
  shmcache-stat --json kv | jq .arenas   for programs
  shmcache-stat --serve-metrics 9464     to Prometheus: 127.0.0.1:9464/metrics"""
_EXIT_STATUS = """\
  0    shown
  1    there is no such arena, it cannot be read, or it failed
  2    wrong usage"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if problem := _misuse(options):
        parser.error(problem)
    try:
        return _run(options)
    except (shmcache.ShmcacheError, PlotError, OSError) as error:
        complain(PROG, str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_FAILED


def _run(options: argparse.Namespace) -> int:
    if options.json_schema:
        say(json.dumps(json_schema(), indent=2))
        return EXIT_DONE
    if options.serve_metrics is not None:
        return serve_metrics(options.name, *options.serve_metrics)
    view = view_of(options.name, shares=options.shares, blocks=options.map, limit=options.limit)
    if options.watch is not None:
        return watch(view, options.watch)
    seen = _look(view, twice=options.name is None and not (options.json or options.shares or options.map))
    if options.json:
        say(json.dumps(json_document(seen.infos), indent=2))
    elif options.output is not None:
        save_maps(seen, options.output)
    else:
        make_console().print(view.draw(seen))
    unreadable = options.name is not None and seen.infos[0].problem is not None
    return EXIT_FAILED if unreadable else EXIT_DONE


def _look(view: View, *, twice: bool) -> Seen:
    """Looks once, or also a moment before, to tell what goes on. ShmcacheError where the one arena cannot be opened."""
    observer = view.observer()
    seen = observer.look()
    while view.name is not None and not seen.infos:
        shmcache.inspect(view.name)  # says what is wrong; where the arena has come meanwhile, it is looked at
        seen = observer.look()
    if twice and seen.infos:
        time.sleep(NOW_S)
        return observer.look()
    return seen


def _misuse(options: argparse.Namespace) -> str | None:
    """What is wrong with options that do not go together."""
    if options.name is not None:
        try:
            check_name(options.name)
        except ValueError as error:
            return str(error)
    if options.output is not None and not options.map:
        return "--output: the picture is of the map; give --map, too"
    if options.limit is not None and not options.shares:
        return "--limit: only for --shares"
    ways = {"--watch": options.watch, "--json": options.json or None, "--output": options.output}
    chosen = [name for name, value in {**ways, "--serve-metrics": options.serve_metrics}.items() if value is not None]
    if len(chosen) > 1:
        return f"{' and '.join(chosen)} do not go together"
    if options.serve_metrics is not None and (options.shares or options.map):
        return "--serve-metrics serves numbers: it does not go with --shares or --map"
    return None


def _parser() -> argparse.ArgumentParser:
    parser = make_manual_parser(PROG, _DESCRIPTION, _EXAMPLES, _EXIT_STATUS)
    name = parser.add_argument("name", nargs="?", metavar="NAME", help="the arena; without it all of this user")
    complete_arenas(name)
    what = parser.add_argument_group("what is shown").add_mutually_exclusive_group()
    what.add_argument(
        "--shares", action="store_true", help="who holds shares, for which key, since when; longest first"
    )
    what.add_argument("--map", action="store_true", help="the blocks, coloured by state, and how fragmented they are")
    how = parser.add_argument_group("how it is shown")
    how.add_argument("--limit", type=number(0, 10**9), metavar="N", help="with --shares: so many at most; 0: all")
    seconds = real(0.1, 86400, "seconds")
    how.add_argument(
        "--watch", nargs="?", type=seconds, const=1.0, metavar="S", help="live, every S seconds; default 1"
    )
    how.add_argument(
        "--json", action="store_true", help="print JSON instead of text; with --shares or --map each of them"
    )
    how.add_argument("--json-schema", action="store_true", help="print the JSON Schema of what --json prints")
    output = how.add_argument("--output", type=Path, metavar="FILE", help="with --map: a picture, .svg or .png")
    complete_files(output)
    how.add_argument(
        "--serve-metrics",
        type=address,
        metavar="[HOST:]PORT",
        help="serve Prometheus metrics until interrupted; HOST is 127.0.0.1 unless given",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
