"""Measures how soon a real vLLM engine answers a prompt that somebody has computed before, with and without shmcache.

Time to first token, beside computing the prompt again, in one run: vLLM's own prefix cache, its offloading connectors,
and shmcache, after a reset of that cache, after a crash, in a second engine, and from L2. And the memory that two
engines need. A goal that is missed is a line in the report and never an error.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import vllm_plot
from bench_plot import add_plot_option
from cost import BUSY, machine_facts
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from vllm_common import Finding, Memory
from vllm_engines import MAX_TOKENS, WARM_UP, Measurement, Plan

import shmcache
from shmcache_tools.engine.client import EngineError, find_vllm
from shmcache_tools.engine.models import write_llama
from shmcache_tools.program import interruptible, number
from shmcache_tools.text import (
    EXIT_DONE,
    EXIT_FAILED,
    complain,
    make_console,
    make_facts,
    make_parser,
    make_table,
    percent_text,
    printable,
    size_text,
    time_text,
)

PROG = "vllm.py"
EXAMPLES = """\
  .venv/bin/python tools/bench/vllm.py                       seven starts of an engine: eight minutes on two cores
  .venv/bin/python tools/bench/vllm.py --quick               fewer prompts, and as many starts
  .venv/bin/python tools/bench/vllm.py --json vllm.json --plot vllm.png

vLLM is taken from SHMCACHE_VLLM_PYTHON, or from .venv-vllm, which tools/test --vllm sets up. The model is a small
Llama with random weights. Nothing is left behind."""
PROMPTS, QUICK_PROMPTS = 9, 3
LAYERS, HIDDEN = 8, 512
MIB = 1 << 20
TOKEN_BYTES = 2 * LAYERS * HIDDEN * 2  # of KV: keys and values, bfloat16


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    console = make_console()
    try:
        facts = {**machine_facts(), **_facts(args)}
    except EngineError as error:
        complain(PROG, str(error))
        return EXIT_FAILED
    console.print(make_facts([(name, printable(str(fact))) for name, fact in facts.items()]))
    if os.getloadavg()[0] > BUSY:
        console.print(Text("other programs use this machine: the ratios tell more than the times", style="yellow"))
    with TemporaryDirectory(prefix="shmcache-bench-") as folder:
        measurement, failure = _measure(args, Path(folder), console)
    if measurement.findings:
        report(console, measurement.findings, measurement.memory)
    failure = failure or _written(args, facts, measurement)
    if failure:
        complain(PROG, failure)
        return EXIT_FAILED
    return EXIT_DONE


def _parse(argv: Sequence[str] | None) -> Namespace:
    parser = make_parser(PROG, __doc__ or "", EXAMPLES)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PROMPTS} prompts, unless --prompts says more")
    parser.add_argument("--prompts", type=number(1, 100), metavar="N", help=f"that are measured; default {PROMPTS}")
    parser.add_argument(
        "--prompt-tokens", type=number(256, 4000), default=1800, metavar="N", help="of each; default %(default)s"
    )
    parser.add_argument("--tp", type=number(1, 8), default=2, metavar="N", help="workers; default %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE as well")
    add_plot_option(parser)
    args = parser.parse_args(argv)
    if args.prompts is None:
        args.prompts = QUICK_PROMPTS if args.quick else PROMPTS
    return args


def _facts(args: Namespace) -> dict[str, object]:
    return {
        "vllm": find_vllm(),
        "model": f"Llama, {LAYERS} layers, hidden {HIDDEN}, bfloat16, {args.tp} workers",
        "prompts": f"{args.prompts} of {args.prompt_tokens:,} tokens after {WARM_UP} to warm up; "
        f"{MAX_TOKENS} tokens are generated",
    }


def _measure(args: Namespace, folder: Path, console: Console) -> tuple[Measurement, str]:
    """What was measured, and why not all of it was."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task("")
    measurement = Measurement(_plan(args, folder), lambda what: progress.update(task, description=what))
    try:
        with interruptible(), progress:
            measurement.run()
    except (EngineError, shmcache.ShmcacheError, OSError) as error:
        return measurement, str(error)
    except KeyboardInterrupt:
        return measurement, "interrupted"
    return measurement, ""


def _plan(args: Namespace, folder: Path) -> Plan:
    model, l2 = folder / "model", folder / "l2"
    l2.mkdir()
    write_llama(model, layers=LAYERS, hidden=HIDDEN)
    capacity = 2 * (args.prompts + WARM_UP) * args.prompt_tokens * TOKEN_BYTES  # all fits, and as much again
    return Plan(model, l2, args.tp, args.prompts, args.prompt_tokens, -(-capacity // MIB) * MIB)


# The report


def report(console: Console, found: Sequence[Finding], memory: Memory | None) -> None:
    console.print()
    console.print(times_table(found))
    for one in found:
        if one.problem:
            console.print(f"\n{one.what.partition(':')[0]} does not run here: {one.problem}", soft_wrap=True)
    if memory is not None:
        console.print()
        console.print(memory_table(memory))
    goals = [one.met for one in found if one.met is not None] + ([memory.met] if memory else [])
    console.print(f"\n{sum(goals)} of {len(goals)} goals met")


def times_table(found: Sequence[Finding]) -> Table:
    numbers = ("first token", "best", "worst", "from cache", "of vLLM's own", "ratio", "goal")
    table = make_table("a request with a known prompt", *numbers, "", "tokens", right=numbers)
    for one in found:
        if one.ratio is None:
            table.add_row(one.what, "-")
            continue
        times = (time_text(seconds) for seconds in (median(one.ttft), min(one.ttft), max(one.ttft)))
        cached = f"{median(one.cached):,.0f}"
        table.add_row(
            one.what,
            *times,
            cached,
            percent_text(one.of_bound),
            f"{one.ratio:.2f} x",
            _goal(one),
            _mark(one.met),
            _same(one),
        )
    return table


def memory_table(memory: Memory) -> Table:
    numbers = ("bytes", "saved", "goal")
    table = make_table("KV that the host keeps", *numbers, "", right=numbers)
    table.add_row("one engine", size_text(memory.one_engine))
    table.add_row("two engines, an arena each", size_text(memory.apart))
    goal = f"at least {percent_text(memory.least_saving)}"
    saved = percent_text(memory.saving)
    table.add_row("two engines, one arena", size_text(memory.shared), saved, goal, _mark(memory.met))
    return table


def _goal(one: Finding) -> str:
    return "" if one.least_ratio is None else f"at least {one.least_ratio:g} x"


def _mark(met: bool | None) -> Text:
    if met is None:
        return Text()
    return Text("met", style="green") if met else Text("missed", style="red")


def _same(one: Finding) -> Text:
    if all(one.same):
        return Text("same")
    return Text(f"{one.same.count(False)} of {len(one.same)} differ", style="red")


def _written(args: Namespace, facts: dict[str, object], measured: Measurement) -> str:
    """Writes the files asked for; why that failed, or nothing."""
    try:
        if args.json is not None:
            document = as_dict(facts, measured.findings, measured.memory)
            args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if args.plot is not None:
            vllm_plot.save_plot(
                args.plot, f"vLLM, {facts['model']}\n{facts['prompts']}", measured.findings, measured.memory
            )
    except (ImportError, OSError, ValueError) as error:
        return str(error)
    return ""


def as_dict(facts: dict[str, object], found: Sequence[Finding], memory: Memory | None) -> dict[str, object]:
    """For JSON: seconds, and bytes."""
    lines = [
        {
            **asdict(one),
            "median": median(one.ttft) if one.ttft else None,
            "ratio": one.ratio,
            "of_bound": one.of_bound,
            "met": one.met,
        }
        for one in found
    ]
    kept = None if memory is None else {**asdict(memory), "saving": memory.saving, "met": memory.met}
    return {"machine": {name: str(fact) for name, fact in facts.items()}, "findings": lines, "memory": kept}


if __name__ == "__main__":
    sys.exit(main())
