"""Measures what shmcache costs, beside memcpy and py-lmdb, and says which of its goals are met.

Timings depend on the machine and on who else uses it; a goal that is missed is a line in the report and never
an error. Uses the public API, except for the process that dies with the arena lock (cost_holder.py).
"""

from __future__ import annotations

import json
import os
import platform
import sys
import sysconfig
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cost_peer
import cost_reading
import cost_whole
import cost_writing
from cost_common import Cost
from rich.console import Console
from rich.table import Table
from rich.text import Text

import shmcache
from shmcache_tools.text import (
    EXIT_DONE,
    EXIT_FAILED,
    complain,
    make_console,
    make_facts,
    make_parser,
    make_table,
    time_text,
)

PROG = "cost.py"
EXAMPLES = """\
  .venv/bin/python tools/bench/cost.py                       everything, in a minute or two
  .venv/bin/python tools/bench/cost.py --quick --only reading
  .venv/bin/python tools/bench/cost.py --json cost.json      the same numbers for a program

The peer needs py-lmdb: pip install '.[bench]'. About 1 GiB of /dev/shm is used, and 4 GiB must be free."""
PARTS = ("reading", "writing", "whole")
REPEATS = 60
QUICK_REPEATS = 9
MAX_OBJECTS = 1 << 20
BUSY = 0.5  # of a CPU's load that others may cause before the report says so

Part = Callable[[], Iterator[list[Cost]]]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    facts = machine_facts()
    console = make_console()
    console.print(make_facts([(name, str(fact)) for name, fact in facts.items()]))
    for remark in _remarks():
        console.print(Text(remark, style="yellow"))
    try:
        measured = _measure(args, console)
    except (shmcache.ShmcacheError, RuntimeError, OSError) as error:
        complain(PROG, str(error))
        return EXIT_FAILED
    goals = [cost.met for cost in measured if cost.met is not None]
    console.print(f"\n{sum(goals)} of {len(goals)} goals met")
    if args.json is not None:
        args.json.write_text(json.dumps(as_dict(facts, measured), indent=2) + "\n", encoding="utf-8")
    return EXIT_DONE


def _remarks() -> Iterator[str]:
    """What a reader of the numbers must know."""
    if cost_peer.lmdb is None:
        yield cost_peer.MISSING
    if os.getloadavg()[0] > BUSY:
        yield "other programs use this machine: the medians are theirs as much as ours, the best repeats tell more"


def _parse(argv: Sequence[str] | None) -> Namespace:
    parser = make_parser(PROG, __doc__ or "", EXAMPLES)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--only", choices=PARTS, help="one part of the report")
    parser.add_argument("--objects", type=_objects, default=16384, help="objects that keys are drawn from (16384)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE as well")
    return parser.parse_args(argv)


def _objects(text: str) -> int:
    if not text.isdecimal() or not cost_reading.BATCH <= int(text) <= MAX_OBJECTS:
        raise ArgumentTypeError(f"expected {cost_reading.BATCH} to {MAX_OBJECTS}, got {text!r}")
    return int(text)


def _measure(args: Namespace, console: Console) -> list[Cost]:
    """Prints each part as soon as it is measured."""
    repeats = QUICK_REPEATS if args.quick else REPEATS
    parts: dict[str, Part] = {
        "reading": lambda: cost_reading.costs(args.objects, repeats),
        "writing": lambda: cost_writing.costs(repeats // 3),
        "whole": lambda: cost_whole.costs(repeats // 3),
    }
    measured: list[Cost] = []
    for name in PARTS if args.only is None else (args.only,):
        for costs in parts[name]():
            console.print()
            console.print(costs_table(costs))
            measured += costs
    return measured


def costs_table(costs: Sequence[Cost]) -> Table:
    """Costs that were measured together."""
    numbers = ("median", "best", "CPU", "goal")
    table = make_table(f"cost of one {costs[0].unit}", *numbers, "", "beside it", right=numbers)
    for cost in costs:
        times = (time_text(ns / 1e9) for ns in (cost.median, cost.best, cost.cpu))
        table.add_row(cost.name, *times, _goal(cost), _mark(cost), _peers(cost))
    return table


def _goal(cost: Cost) -> str:
    if cost.goal is not None:
        return time_text(cost.goal / 1e9)
    return "" if cost.least_ratio is None else f"{100 * cost.least_ratio[1]:.0f} %"


def _mark(cost: Cost) -> Text:
    if cost.met is None:
        return Text()
    return Text("met", style="green") if cost.met else Text("missed", style="red")


def _peers(cost: Cost) -> str:
    """memcpy is what cannot be beaten, so its ratio is a share of its speed; others are so many times as slow."""
    return ", ".join(
        f"{name} {time_text(ratio.median / 1e9)} ({100 * ratio.times:.0f} %)"
        if name == "memcpy"
        else f"{name} {time_text(ratio.median / 1e9)} ({ratio.times:.1f} x)"
        for name, ratio in cost.peers.items()
    )


def as_dict(facts: dict[str, object], measured: Sequence[Cost]) -> dict[str, object]:
    """For JSON: times in nanoseconds for one unit, peers' ``times`` as a multiple of ours."""
    return {"machine": facts, "costs": [{**asdict(cost), "met": cost.met} for cost in measured]}


def machine_facts() -> dict[str, object]:
    return {
        "processor": f"{_processor()}, {os.cpu_count()} CPUs",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_version()} ({'' if _optimized() else 'not '}built with --enable-optimizations)",
        "packages": ", ".join(f"{name} {_version(name)}" for name in ("shmcache", "numpy", "cffi", "lmdb")),
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _optimized() -> bool:
    return "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS"))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


if __name__ == "__main__":
    sys.exit(main())
