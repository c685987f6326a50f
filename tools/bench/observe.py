"""Measures what looking at an arena costs: who looks, and the engine that is looked at.

Uses the public API. Timings depend on the machine and on who else uses it: the ratios are taken in turn, in one run.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import observe_hits
import observe_plot
import observe_scrape
from bench_plot import add_plot_option
from cost import machine_facts
from observe_engine import BATCH
from rich.progress import Progress
from rich.table import Table

import shmcache
from shmcache_tools.program import number, real
from shmcache_tools.text import (
    EXIT_DONE,
    EXIT_FAILED,
    complain,
    count_text,
    make_console,
    make_facts,
    make_parser,
    make_table,
    printable,
    time_text,
)

PROG = "observe.py"
EXAMPLES = """\
  .venv/bin/python tools/bench/observe.py                        everything, in two minutes or so
  .venv/bin/python tools/bench/observe.py --only scrape --objects 8192
  .venv/bin/python tools/bench/observe.py --json observe.json --plot observe.svg

Needs the extra: pip install '.[metrics]'. 4 KiB of /dev/shm are used for each object, and metadata."""
PARTS = ("scrape", "hits")
OBJECTS = 65536
REPEATS = 60
ROUNDS = 8
SECONDS = 3.0

Tick = Callable[[], object]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    console = make_console()
    facts = machine_facts()
    console.print(make_facts([(name, printable(str(fact))) for name, fact in facts.items()]))
    looks: list[observe_scrape.Look] = []
    phases: list[observe_hits.Phase] = []
    try:
        if args.only != "hits":
            with _progress("looking", args.repeats) as tick:
                looks = observe_scrape.looks(args.objects, args.repeats, tick)
            console.print()
            console.print(looks_table(looks, args.objects))
        if args.only != "scrape":
            with _progress("reading", args.rounds * len(observe_hits.PERIODS)) as tick:
                phases = observe_hits.phases(args.objects, args.rounds, args.seconds, tick)
            console.print()
            console.print(phases_table(phases))
        _write(args, facts, looks, phases)
    except (shmcache.ShmcacheError, ImportError, RuntimeError, OSError, ValueError) as error:
        complain(PROG, str(error))
        return EXIT_FAILED
    return EXIT_DONE


def _parse(argv: Sequence[str] | None) -> Namespace:
    parser = make_parser(PROG, __doc__ or "", EXAMPLES)
    parser.add_argument("--only", choices=PARTS, help="one part of the report")
    objects = number(BATCH, 1 << 20)
    parser.add_argument("--objects", type=objects, default=OBJECTS, metavar="N", help="in the arena (%(default)s)")
    repeats = number(1, 10**6)
    parser.add_argument("--repeats", type=repeats, default=REPEATS, metavar="N", help="of each look (%(default)s)")
    parser.add_argument("--rounds", type=repeats, default=ROUNDS, metavar="N", help="of all phases (%(default)s)")
    seconds = real(0.1, 3600, "seconds")
    parser.add_argument("--seconds", type=seconds, default=SECONDS, metavar="S", help="of a phase (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE as well, in ns")
    add_plot_option(parser)
    return parser.parse_args(argv)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Tick]:
    """Shows on a terminal how far it is; what is yielded says that it is one step further."""
    console = make_console(sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def _write(
    args: Namespace,
    facts: dict[str, object],
    looks: Sequence[observe_scrape.Look],
    phases: Sequence[observe_hits.Phase],
) -> None:
    """The files that were asked for."""
    if args.json is not None:
        document: dict[str, object] = {"machine": facts, "objects": args.objects}
        document |= {"scrape": [asdict(look) for look in looks]} if looks else {}
        document |= {"hits": [asdict(phase) for phase in phases]} if phases else {}
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if args.plot is not None:
        observe_plot.save_plot(args.plot, str(facts["processor"]), args.objects, looks, phases)


def looks_table(looks: Sequence[observe_scrape.Look], objects: int) -> Table:
    numbers = ("median", "best", "CPU", "CPU of reading")
    table = make_table(f"look at {count_text(objects)} objects", *numbers, right=numbers)
    for look in looks:
        times = (time_text(ns / 1e9) for ns in (look.median, look.best, look.cpu))
        table.add_row(look.name, *times, f"{look.times:.1f} x")
    return table


def phases_table(phases: Sequence[observe_hits.Phase]) -> Table:
    """What a batch costs the engine in each phase, and how many times as much as while nobody looks."""
    quiet = phases[0]
    numbers = ("median", "", "p99", " ", "batches", "scrapes")
    table = make_table(f"{BATCH} keys read, released", *numbers, right=numbers)
    for phase in phases:
        cells: list[str] = []
        for what in ("median", "p99"):
            cells += [time_text(phase.of(what) / 1e9), f"{phase.times(what, quiet):.2f} x"]
        batches = sum(int(found["batches"]) for found in phase.rounds)
        table.add_row(phase.name, *cells, count_text(batches), count_text(phase.scrapes))
    return table


if __name__ == "__main__":
    sys.exit(main())
