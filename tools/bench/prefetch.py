"""Measures prefetch from each L2 beside what its peer does alone: the same objects into the same memory of the arena.

The peers: preadv of the same files by as many threads; the Valkey client's own GET; Mooncake's own get. Each pair takes
its rounds in turn, so that what disturbs the machine disturbs both; the ratio is the median over pairs of rounds.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import prefetch_plot
from bench_plot import add_plot_option
from cost import machine_facts
from cost_common import arena, new_keys
from prefetch_stores import STORES, Missing, Store
from rich.console import Console
from rich.table import Table
from rich.text import Text

import shmcache
from shmcache.storage import StorageManager
from shmcache_tools.program import interruptible, number, size
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
    time_text,
)

PROG = "prefetch.py"
EXAMPLES = """\
  .venv/bin/python tools/bench/prefetch.py                          all stores, in two minutes or so
  .venv/bin/python tools/bench/prefetch.py --only file --threads 1
  .venv/bin/python tools/bench/prefetch.py --sizes 1MiB,16MiB --json prefetch.json --plot prefetch.svg

Valkey needs a redis-server or valkey-server on the PATH, Mooncake the extra: pip install '.[file,valkey,mooncake]'."""
GOAL = 0.9  # of preadv, for files of 1 MiB and more
GOAL_BYTES = 1 << 20


@dataclass
class Throughput:
    """Objects of one size from one store."""

    store: str
    peer: str
    object_bytes: int
    threads: int
    bytes_per_s: float  # median over the rounds
    peer_bytes_per_s: float
    ratio: float  # median over pairs of rounds
    first_key_s: float  # mean, from submit to the first readable key of a long chain
    one_key_s: float  # median, from submit to the result of a chain of one key
    goal: float | None

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.ratio >= self.goal


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    console = make_console()
    facts = machine_facts()
    console.print(make_facts([(name, printable(str(fact))) for name, fact in facts.items()]))
    measured: list[Throughput] = []
    try:
        with interruptible():
            for name in STORES if args.only is None else (args.only,):
                console.print()
                measured += _measure_store(name, args, console)
        _write(args, facts, measured)
    except (shmcache.ShmcacheError, ImportError, RuntimeError, OSError, ValueError) as error:
        complain(PROG, str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        complain(PROG, "interrupted")
        return EXIT_FAILED
    return EXIT_DONE


def _parse(argv: Sequence[str] | None) -> Namespace:
    parser = make_parser(PROG, __doc__ or "", EXAMPLES)
    parser.add_argument("--only", choices=sorted(STORES), help="one store")
    parser.add_argument(
        "--sizes", type=_sizes, default="64KiB,256KiB,1MiB,4MiB", help="of the objects; default %(default)s"
    )
    parser.add_argument(
        "--total", type=size, default="256MiB", metavar="SIZE", help="loaded in one round; default %(default)s"
    )
    threads, rounds = number(1, 256), number(1, 10**6)
    parser.add_argument("--threads", type=threads, default=2, metavar="N", help="of either side; default %(default)s")
    parser.add_argument("--rounds", type=rounds, default=9, metavar="N", help="default %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE as well")
    add_plot_option(parser)
    return parser.parse_args(argv)


def _sizes(text: str) -> list[int]:
    return [size(one) for one in text.split(",")]


def _measure_store(name: str, args: Namespace, console: Console) -> list[Throughput]:
    """Prints them, too. Nothing where the store is not there; RuntimeError where it fails."""
    try:
        with TemporaryDirectory(prefix="shmcache-bench-") as folder, STORES[name](Path(folder)) as store:
            found = [_measure(store, nbytes, args.total, args) for nbytes in args.sizes]
    except Missing as missing:
        console.print(Text(f"{name}: {missing}", style="yellow"))
        return []
    except (shmcache.ShmcacheError, RuntimeError, OSError) as error:
        raise RuntimeError(f"{name}: {error}") from error
    console.print(throughput_table(found))
    return found


def _measure(store: Store, nbytes: int, total: int, args: Namespace) -> Throughput:
    keys = new_keys(max(1, total // nbytes))
    with arena(capacity=2 * total, block_size=65536, populate=True) as name, shmcache.attach(name) as cache:
        adapter = store.adapter()
        with StorageManager(cache, [adapter], io_threads=args.threads, store=None) as storage:
            _fill(cache, storage, keys, nbytes)
            ours, theirs = [], []
            for _ in range(args.rounds + 1):
                ours.append(_prefetch(cache, storage, keys, nbytes))
                theirs.append(_peer(cache, store, keys, nbytes, args.threads))
            before = cache.stats().histograms.prefetch_first_key
            _prefetch(cache, storage, keys, nbytes)
            after = cache.stats().histograms.prefetch_first_key
            alone = median(_prefetch(cache, storage, keys[:1], nbytes) for _ in range(50))
            adapter.delete(keys)
    loaded = len(keys) * nbytes
    pairs = list(zip(ours, theirs, strict=True))[1:]  # the first round warms up
    return Throughput(
        store=store.name,
        peer=store.peer,
        object_bytes=nbytes,
        threads=args.threads,
        bytes_per_s=loaded / median(ours[1:]),
        peer_bytes_per_s=loaded / median(theirs[1:]),
        ratio=median(their_s / our_s for our_s, their_s in pairs),
        first_key_s=(after.sum_s - before.sum_s) / max(1, after.count - before.count),
        one_key_s=alone,
        goal=GOAL if store.name == "file" and nbytes >= GOAL_BYTES else None,
    )


def _fill(cache: shmcache.Cache, storage: StorageManager, keys: list[bytes], nbytes: int) -> None:
    """Stores random objects. RuntimeError where the store has not taken all."""
    rng = np.random.default_rng(0)
    for batch_keys in _batches(keys, 16):
        with cache.reserve_write(batch_keys, nbytes) as batch:
            for array in batch.arrays():
                array[:] = rng.integers(0, 256, nbytes, np.uint8)
            del array
    storage.store(keys)
    storage.flush()
    stored = cache.stats().counters.l2_stores
    if stored != len(keys):
        raise RuntimeError(f"expected {len(keys)} objects stored, got {stored}")


def _prefetch(cache: shmcache.Cache, storage: StorageManager, keys: list[bytes], nbytes: int) -> float:
    cache.clear()
    began = time.perf_counter()
    task = storage.submit_prefetch_task(keys, nbytes)
    result = storage.wait_prefetch_status(task)
    took = time.perf_counter() - began
    if result.l2_hits != len(keys):
        raise RuntimeError(f"expected {len(keys)} objects from L2, got {result}")
    storage.cancel_prefetch(task)
    return took


def _peer(cache: shmcache.Cache, store: Store, keys: list[bytes], nbytes: int, threads: int) -> float:
    cache.clear()
    batch = cache.reserve_write(keys, nbytes)
    views = [view for view in batch.views if view is not None]
    took = store.load(keys, views, threads)
    del views
    batch.abort()
    return took


def _batches(keys: list[bytes], count: int) -> Iterator[list[bytes]]:
    for start in range(0, len(keys), count):
        yield keys[start : start + count]


def _write(args: Namespace, facts: dict[str, object], measured: Sequence[Throughput]) -> None:
    """The files that were asked for."""
    if args.json is not None:
        document = {"machine": facts, "findings": [{**asdict(line), "met": line.met} for line in measured]}
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if args.plot is not None:
        prefetch_plot.save_plot(args.plot, str(facts["processor"]), measured)


def throughput_table(lines: Sequence[Throughput]) -> Table:
    """What one store gave."""
    peer = lines[0].peer
    numbers = ("prefetch", peer, "of it", "goal", "first key", "one key")
    table = make_table(f"{lines[0].store}, objects of", *numbers[:4], "", *numbers[4:], right=numbers)
    for line in lines:
        goal = "" if line.goal is None else f"{100 * line.goal:.0f} %"
        met = Text() if line.met is None else Text("met", "green") if line.met else Text("missed", "red")
        rates = map(prefetch_plot.rate_text, (line.bytes_per_s, line.peer_bytes_per_s))
        times = map(time_text, (line.first_key_s, line.one_key_s))
        table.add_row(size_text(line.object_bytes), *rates, f"{100 * line.ratio:.0f} %", goal, met, *times)
    return table


if __name__ == "__main__":
    sys.exit(main())
