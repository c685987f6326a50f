"""Measures shmcache beside whatever else gives objects to the processes of one host, and beside what nobody can beat.

All systems do the same work in one run, in turn: the ratio is the median over pairs of repeats. A system that is not
there is a line of the report. Timings depend on the machine and on who else uses it.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import peers_plot
import peers_report
from bench_plot import add_plot_option
from cost import BUSY, machine_facts
from peers_common import Finding, Missing, System
from peers_iceoryx import Iceoryx
from peers_limits import Call, Memcpy, Preadv
from peers_lmcache import LMCache
from peers_lmdb import Lmdb
from peers_ours import Ours
from peers_ray import Ray
from peers_segments import Segments
from peers_valkey import Valkey
from peers_work import FULL, QUICK, WORKLOADS, measure
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from shmcache_tools.program import interruptible
from shmcache_tools.text import EXIT_DONE, EXIT_FAILED, complain, make_console, make_facts, make_parser, printable

PROG = "peers.py"
EXAMPLES = """\
  .venv/bin/python tools/bench/peers.py                       everything, in three minutes or so
  .venv/bin/python tools/bench/peers.py --quick --json peers.json --plot peers.svg
  .venv/bin/python tools/bench/peers.py --only hits --only cycle --peers lmdb,ray

The peers need pip install '.[peers]', and redis-server or valkey-server on the PATH; who is missing is left out.
LMCache takes part where it is installed. Up to 1.5 GiB of /dev/shm are used. Nothing is left behind."""
PEERS: dict[str, type[System]] = {
    "lmdb": Lmdb,
    "valkey": Valkey,
    "ray": Ray,
    "iceoryx2": Iceoryx,
    "shared_memory": Segments,
    "lmcache": LMCache,
}
LIMITS: tuple[type[System], ...] = (Memcpy, Preadv, Call)


@dataclass
class Report:
    """What was measured."""

    findings: list[Finding] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)  # systems that took part
    missing: dict[str, str] = field(default_factory=dict)  # why others did not


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    console = make_console()
    facts = {**machine_facts(), "peers": peers_report.versions()}
    console.print(make_facts([(name, printable(str(fact))) for name, fact in facts.items()]))
    if os.getloadavg()[0] > BUSY:
        console.print(Text("other programs use this machine: the ratios tell more than the times", style="yellow"))
    report = Report()
    failure = _measured(args, console, report) or _written(args, facts, report)
    if failure:
        complain(PROG, failure)
        return EXIT_FAILED
    return EXIT_DONE


def _parse(argv: Sequence[str] | None) -> Namespace:
    parser = make_parser(PROG, __doc__ or "", EXAMPLES)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, and shorter ones")
    parser.add_argument(
        "--only", action="append", choices=list(WORKLOADS), metavar="WORKLOAD", help=f"one of {', '.join(WORKLOADS)}"
    )
    parser.add_argument(
        "--peers", type=_peers, default=list(PEERS), metavar="A,B", help=f"some of {','.join(PEERS)}; default all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE as well")
    add_plot_option(parser)
    return parser.parse_args(argv)


def _peers(text: str) -> list[str]:
    names = text.split(",") if text else []
    for name in names:
        if name not in PEERS:
            raise ArgumentTypeError(f"expected some of {','.join(PEERS)}, got {name!r}")
    return [name for name in PEERS if name in names]


def _measured(args: Namespace, console: Console, report: Report) -> str:
    """Prints tables as they are measured; why not all of them were."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task("")

    def tell(what: str) -> None:
        progress.update(task, description=what)

    try:
        # A server may still write into the folder when it is told to end.
        folders = TemporaryDirectory(prefix="shmcache-bench-", ignore_cleanup_errors=True)
        with interruptible(), progress, folders as folder, ExitStack() as stack:
            systems = list(_started(args.peers, Path(folder), stack, report, tell))
            console.print()
            console.print(make_facts([*report.about.items(), *_left_out(report)]))
            for findings in measure(systems, args.only or list(WORKLOADS), QUICK if args.quick else FULL, tell):
                report.findings += findings
                for title, table in peers_report.tables(findings):
                    console.print(Text(f"\n{title}", style="bold"))
                    console.print(table)
    except KeyboardInterrupt:
        return "interrupted"
    except Exception as error:  # noqa: BLE001 # each peer has its own kinds
        return f"{type(error).__name__}: {error}"
    return ""


def _started(
    peers: Sequence[str], folder: Path, stack: ExitStack, report: Report, tell: Callable[[str], None]
) -> Iterator[System]:
    """shmcache, the peers that are there, and the limits."""
    for kind in (Ours, *(PEERS[name] for name in peers), *LIMITS):
        tell(f"{kind.name}: starting")
        try:
            yield stack.enter_context(kind(folder))
        except Missing as missing:
            report.missing[kind.name] = str(missing)
        except Exception as error:  # noqa: BLE001 # each peer has its own kinds
            report.missing[kind.name] = f"does not start: {type(error).__name__}: {error}"
        else:
            report.about[kind.name] = ("limit: " if kind.limit else "") + kind.about


def _left_out(report: Report) -> Iterator[tuple[str, Text]]:
    for name, why in report.missing.items():
        yield name, Text(f"left out: {printable(why)}", style="yellow")


def _written(args: Namespace, facts: dict[str, object], report: Report) -> str:
    """Writes the files asked for; why that failed, or nothing."""
    try:
        if args.json is not None:
            args.json.write_text(json.dumps(_as_dict(facts, report), indent=2) + "\n", encoding="utf-8")
        if args.plot is not None:
            peers_plot.save_plot(args.plot, str(facts["processor"]), report.findings)
    except (ImportError, OSError, ValueError) as error:
        return str(error)
    return ""


def _as_dict(facts: dict[str, object], report: Report) -> dict[str, object]:
    """For JSON: times in nanoseconds for one unit, ``times`` as a multiple of shmcache's."""
    return {
        "machine": facts,
        "systems": report.about,
        "missing": report.missing,
        "units": {name: workload.unit for name, workload in WORKLOADS.items()},
        "findings": [asdict(finding) for finding in report.findings],
    }


if __name__ == "__main__":
    sys.exit(main())
