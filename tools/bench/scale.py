"""What one arena would do on a large host: unit costs of this machine, arithmetic for that one, its lock as a queue.

Measures what a key, a slot, a lane and a byte cost here, reckons what engines on the described host ask for, simulates
the arena lock under bursts of their steps, and says what breaks first and what would be changed. Numbers of the
described host are as good as its description: its memory, caches and page faults are not this machine's.
"""

from __future__ import annotations

import json
import secrets
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench_plot import add_plot_option
from cost import machine_facts
from rich.text import Text
from scale_costs import UnitCosts, measure
from scale_host import MODELS, Case, Host, Model
from scale_limits import Outlook, outlook
from scale_lock import bursts, traffic_of
from scale_tables import host_text, tables, verdict

import shmcache
from shmcache.config import parse_size
from shmcache_tools.text import (
    EXIT_DONE,
    EXIT_FAILED,
    complain,
    make_console,
    make_parser,
)
from shmcache_tools.trace import TraceError

PROG = "scale.py"
EXAMPLES = (
    """\
  .venv/bin/python tools/bench/scale.py                          2 TB, 8 GPUs, 256 cores; in less than a minute
  .venv/bin/python tools/bench/scale.py --quick --case llama-8b:4x2
  .venv/bin/python tools/bench/scale.py --memory 512GB --gpus 4 --nodes 1 --case llama-8b:4x1 --hit-rate 0.8
  .venv/bin/python tools/bench/scale.py --model mine=98304,14 --case mine:8x1 --token-block 64
  .venv/bin/python tools/bench/scale.py --trace conversation.jsonl --json scale.json --plot scale.png

About 1 GiB of /dev/shm is used. A case is MODEL:ENGINESxTP; the models are """
    + ", ".join(MODELS)
    + "."
)
CASES = ("llama-8b:8x1", "llama-70b:1x8", "llama-70b:4x2", "deepseek-v3:1x8", "qwen2.5-0.5b:8x1")
MOST_CASES = 7  # that can be told apart in a picture
LOADS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32, 64)
QUICK_LOADS = (1 / 16, 1 / 4, 1, 4, 16, 64)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    console = make_console()
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    try:
        traffic = traffic_of(args.trace, seed)
        costs = measure(quick=args.quick)
    except (shmcache.ShmcacheError, TraceError, RuntimeError, OSError) as error:
        complain(PROG, str(error))
        return EXIT_FAILED
    host: Host = (
        args.host if args.hit_rate or traffic.hit_rate is None else replace(args.host, hit_rate=traffic.hit_rate)
    )
    costs = costs if args.wake is None else replace(costs, wake=args.wake)
    sizes, loads = bursts(traffic, host), QUICK_LOADS if args.quick else LOADS
    outlooks = [outlook(case, host, costs, sizes, loads, seed) for case in args.case]
    facts = {**machine_facts(), "seed": seed, "requests": traffic.source, "hit rate": f"{host.hit_rate:.3f}"}
    for table in tables(facts, host, costs, outlooks):
        console.print(table)
        console.print()
    for one in outlooks:
        console.print(Text(verdict(one)))
    try:
        _write(args, facts, host, costs, outlooks)
    except OSError as error:
        complain(PROG, str(error))
        return EXIT_FAILED
    return EXIT_DONE


def _write(args: Namespace, facts: dict[str, Any], host: Host, costs: UnitCosts, outlooks: Sequence[Outlook]) -> None:
    if args.json is not None:
        document = as_dict(facts, host, costs, outlooks)
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if args.plot is not None:
        from scale_plot import save_plot  # noqa: PLC0415 # an extra

        save_plot(args.plot, f"One arena on a host of {host_text(host)}", outlooks)


def _parse(argv: Sequence[str] | None) -> Namespace:
    default = Host()
    parser = make_parser(PROG, __doc__ or "", EXAMPLES)
    positive = _number(above=0)
    parser.add_argument("--quick", action="store_true", help="smaller arenas, fewer loads")
    parser.add_argument("--memory", type=_size, default=default.memory, help="of the host (2TB)")
    parser.add_argument("--share", type=_number(above=0, upto=1), default=default.share, help="of it: the arena (0.75)")
    for name, what in (("gpus", "GPUs (8)"), ("cores", "cores (256)"), ("nodes", "NUMA nodes (2)")):
        parser.add_argument(f"--{name}", type=_count, default=getattr(default, name), help=what)
    parser.add_argument("--node-rate", type=_size, default=default.node_rate, help="a node's memory, a second (300GB)")
    parser.add_argument("--link-rate", type=_size, default=default.link_rate, help="into a node, a second (100GB)")
    parser.add_argument("--gpu-rate", type=_size, default=default.gpu_rate, help="host to a GPU, a second (50GB)")
    parser.add_argument(
        "--gpu-tflops", type=positive, default=default.gpu_flops / 1e12, help="that a GPU reaches in prefill (400)"
    )
    parser.add_argument(
        "--tokens", type=positive, metavar="N", help="a GPU computes a second, in place of --gpu-tflops"
    )
    parser.add_argument("--hit-rate", type=_number(above=0, below=1), help="of tokens looked for (the trace's, or 0.5)")
    parser.add_argument("--token-block", type=_count, default=default.token_block, help="tokens an object (16)")
    parser.add_argument("--step-tokens", type=_count, default=default.step_tokens, help="a step at most (8192)")
    parser.add_argument("--lanes", type=_count, help="of the arena (the processes and a quarter more)")
    parser.add_argument("--pin", type=positive, default=default.pin_gib, help="seconds to page-lock a GiB (0.20)")
    parser.add_argument("--wake", type=positive, help="seconds until a sleeper runs (measured)")
    parser.add_argument("--model", type=_model, action="append", default=[], metavar="NAME=BYTES_A_TOKEN,BILLIONS")
    parser.add_argument("--case", action="append", metavar="MODEL:ENGINESxTP", help=f"({' '.join(CASES)})")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="requests as Mooncake's traces have them")
    parser.add_argument("--seed", type=int, help="of the simulation (random, printed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE as well")
    add_plot_option(parser)
    args = parser.parse_args(argv)
    models = MODELS | {model.name: model for model in args.model}
    try:
        args.host = _host(args)
        args.case = [_case(text, models, args.host.gpus) for text in args.case or _fitting(args.gpus)]
    except ValueError as error:
        parser.error(str(error))
    if len(args.case) > MOST_CASES:
        parser.error(f"expected at most {MOST_CASES} cases, got {len(args.case)}")
    return args


def _host(args: Namespace) -> Host:
    if args.step_tokens < args.token_block:
        raise ValueError("--step-tokens: expected at least --token-block")
    same = (
        "memory",
        "share",
        "gpus",
        "cores",
        "nodes",
        "node_rate",
        "link_rate",
        "gpu_rate",
        "token_block",
        "step_tokens",
    )
    return Host(
        **{name: getattr(args, name) for name in same},
        gpu_flops=args.gpu_tflops * 1e12,
        tokens_a_second=args.tokens,
        hit_rate=args.hit_rate or Host.hit_rate,
        lanes=args.lanes,
        pin_gib=args.pin,
    )


def _fitting(gpus: int) -> list[str]:
    """The cases for 8 GPUs, or one engine a GPU of the smaller models on another host."""
    return list(CASES) if gpus == 8 else [f"{name}:{gpus}x1" for name in ("llama-8b", "qwen2.5-0.5b")]


def _case(text: str, models: dict[str, Model], gpus: int) -> Case:
    name, _, shape = text.partition(":")
    engines, _, tp = shape.partition("x")
    if name not in models or not engines.isdecimal() or not tp.isdecimal() or not 1 <= int(engines) * int(tp) <= gpus:
        raise ValueError(f"--case: expected MODEL:ENGINESxTP with a known model and at most {gpus} GPUs, got {text!r}")
    return Case(models[name], int(engines), int(tp))


def _model(text: str) -> Model:
    name, _, numbers = text.partition("=")
    nbytes, _, billions = numbers.partition(",")
    try:
        model = Model(name, int(nbytes), float(billions))
    except ValueError:
        model = Model("", 0, 0)
    if not (model.name and model.bytes_a_token > 0 and model.billions > 0):
        raise ArgumentTypeError(f"expected NAME=BYTES_A_TOKEN,BILLIONS, got {text!r}")
    return model


def _size(text: str) -> int:
    try:
        return parse_size(text, "size")
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 20:
        raise ArgumentTypeError(f"expected a number from 1 on, got {text!r}")
    return int(text)


def _number(*, above: float, upto: float = 1e12, below: float = float("inf")) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = above
        if not (above < value <= upto and value < below):
            raise ArgumentTypeError(f"expected a number above {above:g} and up to {min(upto, below):g}, got {text!r}")
        return value

    return number


def as_dict(facts: dict[str, Any], host: Host, costs: UnitCosts, outlooks: Sequence[Outlook]) -> dict[str, Any]:
    """For JSON: seconds, bytes, and rates a second."""
    cases = [asdict(one) for one in outlooks]
    return {"machine": facts, "host": asdict(host), "costs": asdict(costs), "cases": cases}


if __name__ == "__main__":
    sys.exit(main())
