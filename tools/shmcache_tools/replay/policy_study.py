"""``tools/replay --policy``: how much a cache of some of a trace's chunks hits, by the rule that says what has to go.

This file owns the options, what is run, and in which order: the simulators one after the other, then all arenas of a
span side by side. The rules are in ``policies``, the arenas in ``policy_arena``, what is shown in ``policy_report``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shmcache_tools.program import Display, Interrupts, UsageError, requests_of
from shmcache_tools.replay.policies import SIMULATED, Make, Request, hit_rate
from shmcache_tools.replay.policy_arena import MAX_CHUNKS, run_arenas
from shmcache_tools.replay.policy_report import Findings, SpanFindings, Step, document, progress, report, save_plot
from shmcache_tools.text import EXIT_DONE, EXIT_FAILED, count_text, make_console, printable
from shmcache_tools.trace import TraceRequest, best_hit_rate, distinct_chunks

ARENAS = {"arena-segmented": "segmented", "arena-lru": "lru"}  #: eviction policies of the real arena
POLICIES = (*ARENAS, *SIMULATED)
SIZES = "1,2,5,10,25,50"
SPEED = 60.0  #: an hour of a trace in a minute

_PLOT_KINDS = (".svg", ".png")


def add_study_options(parser: argparse.ArgumentParser) -> None:
    """``--policy``, which asks for a study instead of a replay, and what belongs to it."""
    group = parser.add_argument_group("eviction policies", "with --policy, for one or several traces")
    group.add_argument(
        "--policy",
        type=_policies,
        nargs="?",
        const=POLICIES,
        metavar="NAME,...",
        help=f"compare eviction policies: {', '.join(POLICIES)}; default all. The first two are real arenas, at "
        f"--speed times the trace's speed (default {SPEED:g}); the others are simulated",
    )
    group.add_argument(
        "--sizes",
        type=_sizes,
        metavar="P,...",
        help=f"of the caches, in %% of the trace's distinct chunks; {SIZES}. An arena needs 4 KiB a chunk",
    )
    group.add_argument("--halves", action="store_true", help="each half of a trace by itself, too")
    group.add_argument("--plot", type=_plot, metavar="FILE", help="draw the hit rates; .svg or .png")


def check_study_options(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """UsageError where an option has no meaning with, or without, ``--policy``."""
    only_study = ("sizes", "halves", "plot")
    shared = ("policy", "traces", "requests", "speed", "json")
    others = [name for name in vars(options) if name not in (*only_study, *shared)]
    for name in others if options.policy else only_study:
        if getattr(options, name) != parser.get_default(name):
            raise UsageError(f"--{name.replace('_', '-')}: not {'with' if options.policy else 'without'} --policy")
    if len(options.traces) > 1 and not options.policy:
        raise UsageError("expected one TRACE; several can be studied with --policy")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'shmcache[plot]'")


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace, and the sizes of the caches that are tried with it."""

    path: Path
    trace: Sequence[TraceRequest]
    slots: dict[float, int]  #: by percent of the trace's distinct chunks

    def spans(self, *, halves: bool) -> dict[str, Sequence[TraceRequest]]:
        """The whole trace and, if there is something to halve, its halves."""
        middle = len(self.trace) // 2
        parts = {"first half": self.trace[:middle], "second half": self.trace[middle:]}
        return {"whole": self.trace} | (parts if halves and middle else {})


def read_workload(path: Path, options: argparse.Namespace) -> Workload:
    """OSError, TraceError or ValueError where there is none."""
    trace = requests_of(path, options.requests)
    distinct = distinct_chunks(trace)
    slots = {percent: max(1, round(distinct * percent / 100)) for percent in options.sizes or _sizes(SIZES)}
    if set(options.policy) & set(ARENAS) and max(slots.values()) > MAX_CHUNKS:
        raise ValueError(f"--sizes: an arena has at most {count_text(MAX_CHUNKS)} chunks, got {max(slots.values())}")
    return Workload(path, trace, slots)


def run_study(workloads: Sequence[Workload], options: argparse.Namespace, interrupts: Interrupts) -> int:
    """Try every policy on every trace, report; the exit code."""
    console = make_console(sys.stderr if options.json else sys.stdout)
    spans = [(work, name, span) for work in workloads for name, span in work.spans(halves=options.halves).items()]
    step = Step(spans=len(spans))
    display = Display(console, lambda: progress(step))

    def tick() -> None:
        interrupts.check()
        display.tick()

    with display:
        study = _Study(options, step, tick)
        findings = Findings(list(options.policy), [study.try_all(*span) for span in spans])
    if options.plot:
        save_plot(options.plot, findings)
    if options.json:
        json.dump(document(findings), sys.stdout, indent=2)
        print()
    else:
        console.print(report(findings))
    return EXIT_FAILED if findings.faults else EXIT_DONE


class _Study:
    """What the runs of one study share."""

    def __init__(self, options: argparse.Namespace, step: Step, tick: Callable[[], None]) -> None:
        self._policies: Sequence[str] = options.policy
        self._speed: float = options.speed or SPEED
        self._step = step
        self._tick = tick

    def try_all(self, work: Workload, name: str, span: Sequence[TraceRequest]) -> SpanFindings:
        """Every policy and size on one span of a trace."""
        where = f"{printable(work.path.name)}, {name}"
        requests = [(request.timestamp_ms, request.hash_ids.tolist()) for request in span]
        found = SpanFindings(
            trace=str(work.path),
            span=name,
            requests=len(span),
            chunks=sum(len(chain) for _, chain in requests),
            distinct=distinct_chunks(work.trace),
            slots=work.slots,
            endless=best_hit_rate(span),
            speed=self._speed,
        )
        for policy in self._policies:
            if policy in SIMULATED:
                found.hit_rates[policy] = [
                    self._simulate(SIMULATED[policy], slots, requests, f"{where}: {policy}, {percent:g} %")
                    for percent, slots in work.slots.items()
                ]
        self._run_arenas(found, requests, f"{where}: arenas, at {self._speed:g} times its speed")
        self._step.finish()
        return found

    def _simulate(self, make: Make, slots: int, requests: Sequence[Request], what: str) -> float:
        self._step.begin(what, len(requests))
        return hit_rate(make(slots, requests), requests, self._served)

    def _run_arenas(self, found: SpanFindings, requests: Sequence[Request], what: str) -> None:
        names = [policy for policy in self._policies if policy in ARENAS]
        if not names:
            return
        self._step.begin(what, len(requests))
        slots = list(dict.fromkeys(found.slots.values()))
        ran = run_arenas(requests, [ARENAS[name] for name in names], slots, self._speed, self._served)
        for name in names:
            found.hit_rates[name] = [ran.hit_rates[ARENAS[name], size] for size in found.slots.values()]
        found.late_s = ran.late_s
        found.faults += ran.faults

    def _served(self, requests: int) -> None:
        self._step.served = requests
        self._tick()


# The options


def _policies(text: str) -> Sequence[str]:
    """An argparse type: names of policies, in the order of a report."""
    names = text.split(",")
    if unknown := [name for name in names if name not in POLICIES]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(POLICIES)}, got {unknown[0]!r}; put TRACE first")
    return [name for name in POLICIES if name in names]


def _sizes(text: str) -> list[float]:
    """An argparse type: different percentages, rising."""
    sizes = sorted({float(part) for part in text.split(",")})
    if not all(0 < size <= 100 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most 100 %, got {text}")
    return sizes


def _plot(text: str) -> Path:
    """An argparse type: a file for a picture."""
    path = Path(text)
    if path.suffix not in _PLOT_KINDS:
        raise argparse.ArgumentTypeError(f"expected a name that ends in {' or '.join(_PLOT_KINDS)}, got {text}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path
