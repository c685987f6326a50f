"""Records what a real vLLM engine asks of the connector, for ``unit/test_vllm_replay.py``.

It needs vLLM, which the tests do not, and is run by hand::

    python tests/vllm_record.py NAME --tp 2 --sync-load-bytes 0

All loads of a recording are of one kind, within a step or between steps: a replay's stores may be quicker than those of
the engine were, so that it finds more; the answer is of the same kind all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_support import RECORD_VARIABLE, RECORDINGS, SLOW, SLOW_S

import shmcache
from shmcache_tools.engine.client import Engine, Request, shmcache_connector
from shmcache_tools.engine.models import VOCABULARY, write_llama

BLOCK = 128
ARGUMENTS = {"num_gpu_blocks_override": 28, "max_num_batched_tokens": 512, "max_model_len": 2304}
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--sync-load-bytes", type=int, default=1 << 30)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    arena = f"record-{secrets.token_hex(4)}"
    with TemporaryDirectory() as folder:
        model, lines = Path(folder) / "model", Path(folder) / "lines"
        lines.mkdir()
        write_llama(model, layers=2, hidden=128, heads=4, kv_heads=4)
        connector = shmcache_connector(arena, capacity="256MiB", sync_load_bytes=args.sync_load_bytes)
        connector |= {"kv_connector": "Recorder", "kv_connector_module_path": "vllm_recording"}
        environment = {RECORD_VARIABLE: str(lines), "PYTHONPATH": str(Path(__file__).parent)}
        try:
            with Engine(model, tp=args.tp, connector=connector, arguments=ARGUMENTS, environment=environment) as engine:
                ask(engine, random.Random(args.seed), lines / SLOW)
        finally:
            with contextlib.suppress(shmcache.ArenaNotFoundError):
                shmcache.destroy(arena, force=True)
        calls = merged(lines, args.tp)
    path = RECORDINGS / f"{args.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(packed(folded(calls, args.tp), args.tp, args.sync_load_bytes), encoding="utf-8")
    print(f"{path}: {len(calls)} calls, {path.stat().st_size} bytes")


def ask(engine: Engine, chance: random.Random, slow: Path) -> None:
    """What is rare in a quiet engine: prompts in chunks, preemption, no room, aborts at any time, hits in part."""

    def tokens(n: int) -> list[int]:
        return [chance.randrange(3, VOCABULARY) for _ in range(n)]

    known = [tokens(chance.randrange(3, 12) * BLOCK + chance.randrange(BLOCK)) for _ in range(6)]
    for asked in known:  # one after the other
        engine.generate(asked, 3)
    reset(engine, connector=False)
    for _ in range(ROUNDS):
        mixed(engine, chance, known, tokens)
        reset(engine, connector=False)
    crowded = [tokens(2 * BLOCK + 110) for _ in range(12)]  # nine fit in, until they grow by a block
    for asked in (crowded, crowded):  # computed, and loaded
        running = [engine.submit(one, 30) for one in asked]
        time.sleep(0.05)
        for request in running[9:11]:  # the first that waits was asked for
            request.abort()
        wait_for(running)
        reset(engine, connector=False)
    abort_while_loading(engine, known[0], slow)
    reset(engine, connector=True)
    wait_for([engine.submit(one, 3) for one in known[:2]])


def mixed(engine: Engine, chance: random.Random, known: list[list[int]], tokens: Callable[[int], list[int]]) -> None:
    running: list[Request] = []
    for _ in range(chance.randrange(5, 12)):
        begin = chance.choice(known)
        begin = begin[: chance.choice([len(begin), chance.randrange(len(begin))])]
        asked = begin + tokens(chance.choice([0, 50, 400]))
        running.append(engine.submit(asked or tokens(9), chance.choice([1, 5, 30])))
        if chance.random() < 0.3:
            time.sleep(chance.choice([0.005, 0.05]))
    for request in [running[-1], *chance.sample(running, k=len(running) // 3)]:
        request.abort()
        time.sleep(chance.choice([0.0, 0.01, 0.02]))
    wait_for(running)


def abort_while_loading(engine: Engine, asked: list[int], slow: Path) -> None:
    slow.touch()
    request = engine.submit(asked, 3)
    time.sleep(SLOW_S / 2)
    request.abort()
    wait_for([request])
    slow.unlink()


def wait_for(requests: list[Request]) -> None:
    for request in requests:
        request.result()


def reset(engine: Engine, *, connector: bool) -> None:
    while not engine.reset_prefix_cache(connector=connector):
        time.sleep(0.01)


def merged(folder: Path, tp: int) -> list[list[Any]]:
    """The calls of all processes in the order of time; those of a worker begin with what and its rank."""

    def read(name: str, *rank: int) -> Iterator[list[Any]]:
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            began, what, *said = json.loads(line)
            yield [began, what, *rank, *said]

    ranks = itertools.chain.from_iterable(read(f"rank-{rank}", rank) for rank in range(tp))
    return [call[1:] for call in sorted([*read("scheduler"), *ranks], key=lambda call: call[0])]


def folded(calls: list[list[Any]], tp: int) -> list[list[Any]]:
    """With one call, "ranks", for all that the ranks were asked in a step, where the scheduler was asked nothing
    meanwhile, and no rank had anything to tell."""
    kinds = {"before", "load", "save", "finished", "report"}
    whole = sorted((kind, rank) for kind in kinds for rank in range(tp))
    found: list[list[Any]] = []
    for of_ranks, some in itertools.groupby(calls, lambda call: call[0] in kinds):
        run = list(some)
        quiet = all(call[0] != "finished" or not any(call[3:]) for call in run)
        alike = of_ranks and sorted((call[0], call[1]) for call in run) == whole
        found += [["ranks", run[0][2]]] if alike and quiet else run
    return found


def packed(calls: list[list[Any]], tp: int, sync_load_bytes: int) -> str:
    """As JSON: names and hashes as small numbers, blocks of a request where they are others than before."""
    names, hashes = _Numbers(), _Numbers()
    chains: dict[int, list[int]] = {}
    blocks: dict[int, list[int]] = {}

    def known(name: int, told: list[str]) -> int:
        chain = [hashes[one] for one in told]
        before = chains.setdefault(name, [])
        assert before[: len(chain)] == chain[: len(before)]
        chains[name] = max(before, chain, key=len)
        return len(chain)

    def changed(name: int, now: list[int]) -> list[int] | None:
        same = blocks.get(name) == now
        blocks[name] = now
        return None if same else now

    lines = []
    for what, *said in calls:
        if what in {"match", "alloc", "finish"}:
            said[0] = names[said[0]]
        if what == "match":
            said[3] = known(said[0], said[3])
        elif what in {"alloc", "finish"}:
            blocks[said[0]] = said[1]
        elif what == "step":
            said[1] = [
                [names[name], tokens, computed, n, known(names[name], told), changed(names[name], now)]
                for name, (tokens, computed, n, told, now) in said[1].items()
            ]
        elif what == "done":
            said[1:] = [_named(names, some) for some in said[1:]]
        elif what == "finished":
            said[2:] = [_named(names, some) for some in said[2:]]
        lines.append(json.dumps([what, *said], separators=(",", ":")))
    head = {"tp": tp, "block_tokens": BLOCK, "blocks": ARGUMENTS["num_gpu_blocks_override"]}
    told = {**head, "sync_load_bytes": sync_load_bytes, "requests": [chains.get(i, []) for i in range(len(names))]}
    return json.dumps(told, separators=(",", ":"))[:-1] + ',\n"calls":[\n' + ",\n".join(lines) + "\n]}\n"


def _named(names: _Numbers, some: Iterable[str]) -> list[int]:
    return [names[name] for name in some]


class _Numbers(dict[str, int]):
    """A number for each text, in the order in which they come."""

    def __missing__(self, text: str) -> int:
        self[text] = len(self)
        return self[text]


if __name__ == "__main__":
    main()
