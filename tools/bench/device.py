"""Measures device memory: regions of another process read in place, pinned copies, and release_after, on device 0.

Each is measured beside what it cannot beat, or what torch does by itself, in the same run and in turn: the ratio is how
many times as fast as that ours is. Uses the public API and torch. A goal that is missed is a line in the report and
never an error.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import device_pinned
import device_plot
import device_reading
import device_region
import device_release
from bench_plot import add_plot_option
from cost import machine_facts
from cost_common import arena
from device_common import BLOCK, SHOW, Finding, Side, goal_text, ratio_text
from device_reader import Reader
from rich.console import Console
from rich.table import Table
from rich.text import Text

import shmcache
from shmcache_tools.program import interruptible, size
from shmcache_tools.text import (
    EXIT_DONE,
    EXIT_FAILED,
    complain,
    make_console,
    make_facts,
    make_parser,
    make_table,
    printable,
    size_text,
)

if TYPE_CHECKING:
    from device_gpu import Gpu

PROG = "device.py"
EXAMPLES = """\
  .venv/bin/python tools/bench/device.py                      everything, in a minute or two
  .venv/bin/python tools/bench/device.py --quick --only reading
  .venv/bin/python tools/bench/device.py --json device.json --plot device.svg

Needs an NVIDIA GPU, a torch for it, and the extra: pip install '.[cuda]'. Of the device's memory, 3 times --bytes are
used; of the host's, twice that of --bytes, half of it in /dev/shm."""
PARTS = ("region", "reading", "keys", "release", "pinned")
LEAST_BYTES = 16 << 20
KEY_OBJECTS = 4096


@dataclass(frozen=True)
class Rounds:
    """How often each thing is measured."""

    region: int
    reading: int
    repeats: int  # of many batches each
    release: int
    copies: int


FULL = Rounds(region=7, reading=60, repeats=30, release=40, copies=25)
QUICK = Rounds(region=3, reading=15, repeats=7, release=10, copies=9)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    try:
        gpu = _find_gpu()
    except RuntimeError as error:
        complain(PROG, str(error))
        return EXIT_FAILED
    console = make_console()
    facts = {**machine_facts(), **gpu.facts()}
    console.print(make_facts([(name, printable(str(fact))) for name, fact in facts.items()]))
    parts: dict[str, list[Finding]] = {}
    try:
        with interruptible():
            for name, part in _measure(args, gpu):
                console.print()
                console.print(details_table(name, part))
                parts[name] = part
    except (shmcache.ShmcacheError, RuntimeError, OSError) as error:
        complain(PROG, str(error).partition("\n")[0])  # torch's go on with advice
        return EXIT_FAILED
    except KeyboardInterrupt:
        complain(PROG, "interrupted")
        return EXIT_FAILED
    report(console, [one for part in parts.values() for one in part])
    try:
        _write(args, facts, parts)
    except (ImportError, OSError, ValueError) as error:
        complain(PROG, str(error))
        return EXIT_FAILED
    return EXIT_DONE


def _parse(argv: Sequence[str] | None) -> Namespace:
    parser = make_parser(PROG, __doc__ or "", EXAMPLES)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--only", choices=PARTS, help="one part of the report")
    parser.add_argument(
        "--bytes", type=_bytes, default="4GiB", metavar="SIZE", help="that kernels read; others go by it (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE as well")
    add_plot_option(parser)
    return parser.parse_args(argv)


def _bytes(text: str) -> int:
    nbytes = size(text)
    if nbytes < LEAST_BYTES or nbytes % LEAST_BYTES:
        raise ArgumentTypeError(f"expected a multiple of {size_text(LEAST_BYTES)}, got {text!r}")
    return nbytes


def _find_gpu() -> Gpu:
    """RuntimeError where there is none, or none that can be used."""
    try:
        from device_gpu import Gpu, NoGpuError  # noqa: PLC0415 # torch is optional, and takes seconds
    except ImportError as error:
        raise RuntimeError(f"this needs torch, built for CUDA: pip install torch ({error})") from None
    try:
        return Gpu()
    except NoGpuError as error:
        raise RuntimeError(f"{error}; this measures an NVIDIA GPU") from None


def _measure(args: Namespace, gpu: Gpu) -> Iterator[tuple[str, list[Finding]]]:
    """Each part as soon as it is measured."""
    wanted = PARTS if args.only is None else (args.only,)
    rounds = QUICK if args.quick else FULL
    if {*wanted} - {"pinned"}:
        yield from _measure_regions(wanted, args.bytes, rounds, gpu)
    if "pinned" in wanted:
        part = args.bytes // 4
        yield "page-locking", device_pinned.pin_findings(gpu, part)
        yield from device_pinned.copy_findings(gpu, part, rounds.copies)


def _measure_regions(
    wanted: Sequence[str], total: int, rounds: Rounds, gpu: Gpu
) -> Iterator[tuple[str, list[Finding]]]:
    """What takes two processes."""
    objects = min(max(256, total // BLOCK // 2), KEY_OBJECTS)
    # Small blocks, so that there are as many as a region is to have, and little host memory.
    config = {"capacity": total // 16 + (1 << 20), "block_size": 4096, "slots": total // BLOCK + 2 * objects + 16}
    with arena(**config) as name, shmcache.attach(name) as cache, Reader(name) as reader:
        side = Side(gpu, cache)
        if "region" in wanted:
            yield "regions", device_region.findings(side, reader, [total // 4, 2 * total], rounds.region)
        if wanted == ("region",):
            return
        region = cache.add_region(gpu.device, total)
        if "reading" in wanted:
            yield "reading in place", device_reading.findings(side, reader, region, total, rounds.reading)
        if {"keys", "release"} & {*wanted}:
            device, host = device_reading.write_key_objects(side, region, objects)
        if "keys" in wanted:
            yield "keys", device_reading.key_findings(reader, device, host, rounds.repeats)
        if "release" in wanted:
            args = (device, host, rounds.release, rounds.repeats)
            yield "release_after", device_release.findings(side, reader, *args)


# The report


def details_table(name: str, found: Sequence[Finding]) -> Table:
    """What was measured together."""
    numbers = ("median", "a tenth below", "a tenth above", "peer's", "ratio")
    table = make_table(name, *numbers[:3], "peer", *numbers[3:], "", right=numbers)
    for one in found:
        show = SHOW[one.kind]
        cells = (show(value) for value in (median(one.ours), *one.spread()))
        table.add_row(one.what, *cells, one.peer, _peers(one), ratio_text(one), _mark(one))
    return table


def report(console: Console, found: Sequence[Finding]) -> None:
    """All that has a peer or a goal, and how many goals are met."""
    numbers = ("shmcache", "peer's", "ratio", "goal")
    table = make_table("what", numbers[0], "peer", *numbers[1:], "met", right=numbers)
    for one in found:
        if one.theirs or one.met is not None:
            ours = SHOW[one.kind](median(one.ours))
            table.add_row(one.what, ours, one.peer, _peers(one), ratio_text(one), goal_text(one), _mark(one))
    console.print()
    console.print(table)
    goals = [one.met for one in found if one.met is not None]
    console.print(f"\n{sum(goals)} of {len(goals)} goals met")


def _peers(one: Finding) -> str:
    return SHOW[one.kind](median(one.theirs)) if one.theirs else ""


def _mark(one: Finding) -> Text:
    if one.met is None:
        return Text()
    return Text("met", style="green") if one.met else Text("missed", style="red")


def _write(args: Namespace, facts: dict[str, object], parts: dict[str, list[Finding]]) -> None:
    """The files that were asked for."""
    if args.json is not None:
        found = [one for part in parts.values() for one in part]
        args.json.write_text(json.dumps(as_dict(facts, found), indent=2) + "\n", encoding="utf-8")
    if args.plot is not None:
        device_plot.save_plot(args.plot, str(facts["device"]), parts)


def as_dict(facts: dict[str, object], found: Sequence[Finding]) -> dict[str, object]:
    """For JSON: seconds, and bytes a second."""
    lines = [
        {**asdict(one), "median": median(one.ours), "spread": one.spread(), "ratio": one.ratio, "met": one.met}
        for one in found
    ]
    return {"machine": facts, "findings": lines}


if __name__ == "__main__":
    sys.exit(main())
