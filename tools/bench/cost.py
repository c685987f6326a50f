"""Measures what shmcache costs, beside peers and limits of the same run, and says which of its goals are met.

A limit is what cannot be beaten: loops in C of the same atomics, a bare call, memcpy, other memory. Ratios to limits
and peers travel, nanoseconds do not: timings depend on the machine and on who else uses it, and a goal that is missed
is a line in the report and never an error. Where one thread does the work, goals, ratios and the best repeat are of
its CPU time; other times are medians over repeats. Uses the public API, except for the process that dies with the
arena lock (cost_holder.py).
"""

from __future__ import annotations

import json
import os
import platform
import sys
import sysconfig
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import bench_plot
import cost_eviction
import cost_limits
import cost_objects
import cost_peer
import cost_plot
import cost_readers
import cost_reading
import cost_whole
import cost_writing
from cost_common import Cost, Report
from cost_text import costs_table
from rich.console import Console
from rich.text import Text

import shmcache
from shmcache_tools.text import EXIT_DONE, EXIT_FAILED, complain, make_console, make_facts, make_parser

PROG = "cost.py"
EXAMPLES = """\
  .venv/bin/python tools/bench/cost.py                       everything, in four minutes or less
  .venv/bin/python tools/bench/cost.py --quick --only reading
  .venv/bin/python tools/bench/cost.py --json cost.json --plot cost.svg
  .venv/bin/python tools/bench/cost.py --only reading        a key looked up, granted, read: batches, single keys
  .venv/bin/python tools/bench/cost.py --only writing        put of 4 KiB to 4 MiB beside memcpy
  .venv/bin/python tools/bench/cost.py --only readers        1, 2, 4 processes that read at once
  .venv/bin/python tools/bench/cost.py --only objects        a key among 1,000 to 1,000,000 objects
  .venv/bin/python tools/bench/cost.py --only eviction       an evicted object, of up to 1,048,576
  .venv/bin/python tools/bench/cost.py --only whole          attach, page faults, populate, a death with the lock

The peer needs py-lmdb: pip install '.[bench]'; the limits a C compiler and Python's headers; a plot matplotlib.
Up to 5 GiB of /dev/shm are used at a time, and 9 GiB should be free; what has no room is left out, with a line."""
REPEATS = 60
QUICK_REPEATS = 9
POPULATED = 2 << 30  # bytes
QUICK_POPULATED = 256 << 20
MAX_OBJECTS = 1 << 20
BUSY = 0.5  # of a CPU's load that others may cause before the report says so

# How each part is measured; in the order of the report.
PARTS: dict[str, Callable[[Namespace, int], Report]] = {
    "reading": lambda args, repeats: cost_reading.costs(args.objects, repeats),
    "writing": lambda _, repeats: cost_writing.costs(repeats // 3),
    "readers": lambda _, repeats: cost_readers.costs(repeats // 2),
    "objects": lambda _, repeats: cost_objects.costs(repeats // 3),
    "eviction": lambda _, repeats: cost_eviction.costs(repeats // 3),
    "whole": lambda args, repeats: cost_whole.costs(repeats // 3, QUICK_POPULATED if args.quick else POPULATED),
}


@dataclass
class Findings:
    """What was measured so far."""

    costs: dict[str, list[list[Cost]]]  # by part, and by what belongs together
    remarks: list[str]

    def all(self) -> Iterator[tuple[str, Cost]]:
        for part, tables in self.costs.items():
            for costs in tables:
                for cost in costs:
                    yield part, cost


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    facts = machine_facts()
    console = make_console()
    console.print(make_facts([(name, str(fact)) for name, fact in facts.items()]))
    findings = Findings({}, [])
    try:
        for remark in _remarks():
            _note(remark, findings, console)
        _measure(args, findings, console)
        console.print(f"\n{goals_text(findings)}")
        if args.json is not None:
            args.json.write_text(json.dumps(as_dict(facts, findings), indent=2) + "\n", encoding="utf-8")
        if args.plot is not None and findings.costs:
            cost_plot.save_plot(args.plot, f"what shmcache costs: {facts['processor']}", findings.costs)
    except (shmcache.ShmcacheError, RuntimeError, OSError) as error:
        complain(PROG, str(error))
        return EXIT_FAILED
    return EXIT_DONE


def _remarks() -> Iterator[str]:
    """What a reader of the numbers must know."""
    if cost_peer.lmdb is None:
        yield cost_peer.MISSING
    if cost_limits.load()[0] is None:
        yield cost_limits.load()[1]
    if os.getloadavg()[0] > BUSY:
        yield "other programs use this machine: wall times are theirs as much as ours, CPU times tell more"


def _note(remark: str, findings: Findings, console: Console) -> None:
    findings.remarks.append(remark)
    console.print(Text(remark, style="yellow"))


def _parse(argv: Sequence[str] | None) -> Namespace:
    parser = make_parser(PROG, __doc__ or "", EXAMPLES)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--only", choices=PARTS, help="one part of the report")
    parser.add_argument("--objects", type=_objects, default=16384, help="objects that keys are drawn from (16384)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE as well")
    bench_plot.add_plot_option(parser)
    return parser.parse_args(argv)


def _objects(text: str) -> int:
    if not text.isdecimal() or not cost_reading.BATCH <= int(text) <= MAX_OBJECTS:
        raise ArgumentTypeError(f"expected {cost_reading.BATCH} to {MAX_OBJECTS}, got {text!r}")
    return int(text)


def _measure(args: Namespace, findings: Findings, console: Console) -> None:
    """Prints each table as soon as it is measured."""
    for part in PARTS if args.only is None else (args.only,):
        try:
            _measure_part(part, args, findings, console)
        except shmcache.ArenaSpaceError as error:
            _note(f"{part}: {error}", findings, console)


def _measure_part(part: str, args: Namespace, findings: Findings, console: Console) -> None:
    for measured in PARTS[part](args, QUICK_REPEATS if args.quick else REPEATS):
        if isinstance(measured, str):
            _note(measured, findings, console)
        elif measured:
            console.print()
            console.print(costs_table(measured))
            findings.costs.setdefault(part, []).append(measured)


def goals_text(findings: Findings) -> str:
    met = [cost.met(goal) for _, cost in findings.all() for goal in cost.goals]
    known = [one for one in met if one is not None]
    rest = "" if len(known) == len(met) else f"; {len(met) - len(known)} could not be judged"
    return f"{sum(known)} of {len(known)} goals met{rest}"


def as_dict(facts: dict[str, object], findings: Findings) -> dict[str, object]:
    """For JSON: times in nanoseconds for one unit, ``times`` of peers and limits as a multiple of ours."""
    return {
        "machine": facts,
        "remarks": findings.remarks,
        "costs": [{"part": part, **asdict(cost), "goals": _goals(cost)} for part, cost in findings.all()],
    }


def _goals(cost: Cost) -> list[dict[str, object]]:
    return [{**asdict(goal), "met": cost.met(goal)} for goal in cost.goals]


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
