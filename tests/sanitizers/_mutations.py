"""What one may leave out of the core or weaken in it, each of which must make a check fail: an order of an atomic
access, a fence, the order of two steps."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from core_support import NATIVE


@dataclass(frozen=True)
class Mutation:
    """Of files of native/, each of `edits` is (file, what is there, what is there instead)."""

    name: str
    edits: tuple[tuple[str, str, str], ...]

    def apply(self, folder: Path) -> Path:
        """A copy of native/ with this mutation."""
        native = folder / "native"
        shutil.copytree(NATIVE, native, ignore=shutil.ignore_patterns("__pycache__"))
        for name, old, new in self.edits:
            text = (native / name).read_text(encoding="utf-8")
            assert old in text, f"{name} has changed: {old!r} is not in it any more"
            (native / name).write_text(text.replace(old, new), encoding="utf-8")
        return native


def _one(name: str, file: str, old: str, new: str) -> Mutation:
    return Mutation(name, ((file, old, new),))


def _weaker(name: str, file: str, args: str) -> Mutation:
    relaxed = f"atomic_compare_exchange_strong_explicit({args}, memory_order_relaxed, memory_order_relaxed)"
    return _one(name, file, f"sc_cas({args})", relaxed)


PUBLISH = _weaker("publish releases nothing", "write.c", "w, &state, sc_published(state)")
RELEASE = _weaker("giving a share back releases nothing", "share.c", "w, &old, old - 1")
BOTH_LOOKS = Mutation(
    "a reader's two looks at the state acquire nothing",
    (
        ("index.c", "sc_load_acquire(&r->state)", "sc_peek(&r->state)"),
        ("share.c", "uint64_t state = sc_load(w); /*", "uint64_t state = sc_peek(w); /*"),
    ),
)
LAYOUT_RELEASE = _one(
    "a layout is counted before it is whole",
    "arena.c",
    "sc_store_release32(&sc_header(s)->layouts, n + 1)",
    "sc_poke32(&sc_header(s)->layouts, n + 1)",
)
LAYOUT_ACQUIRE = _one(
    "a layout is read before it is whole",
    "arena.c",
    "sc_load_acquire32(&sc_header(s)->layouts)",
    "sc_peek32(&sc_header(s)->layouts)",
)
SCAN = _one(
    "the evictor's look at the shares acquires nothing",
    "share.c",
    "uint64_t word = sc_load(sc_share(s, lane, slot));",
    "uint64_t word = sc_peek(sc_share(s, lane, slot));",
)

REGION_CLOSED = _one(
    "who has closed a region says so without release",
    "region.c",
    "        sc_and(w, ~own);\n    return",
    "        atomic_fetch_and_explicit(w, ~own, memory_order_relaxed);\n    return",
)

#: Of the order of accesses to plain memory: what ThreadSanitizer is there for.
FOR_THREADS = (PUBLISH, RELEASE, BOTH_LOOKS, LAYOUT_RELEASE, LAYOUT_ACQUIRE, SCAN, REGION_CLOSED)

#: Of the order of atomic accesses among themselves: for the simulated memory.
FOR_FIBERS = (
    PUBLISH,
    _one(
        "the arena lock is given without release",
        "lock.c",
        "sc_swap(word, 0)",
        "atomic_exchange_explicit(word, 0, memory_order_relaxed)",
    ),
    _weaker("the arena lock is taken without acquire", "lock.c", "word, &seen, mine"),
    _one(
        "a reader's second look is not sequentially consistent",
        "share.c",
        "uint64_t state = sc_load(w); /*",
        "uint64_t state = sc_load_acquire(w); /*",
    ),
    BOTH_LOOKS,
    _one(
        "a reader's share is not sequentially consistent",
        "share.c",
        "sc_cas(w, &old, new)",
        "atomic_compare_exchange_strong_explicit(w, &old, new, memory_order_acq_rel, memory_order_acquire)",
    ),
    _one(
        "the evictor's look is not sequentially consistent",
        "share.c",
        "uint64_t word = sc_load(sc_share(s, lane, slot));",
        "uint64_t word = sc_load_acquire(sc_share(s, lane, slot));",
    ),
    _one(
        "who is about to open a region does not say so in one order with its look at the state",
        "region.c",
        "sc_or(w, own)",
        "atomic_fetch_or_explicit(w, own, memory_order_relaxed)",
    ),
    _one(
        "an owner's look at who has its region open is not sequentially consistent",
        "region.c",
        "sc_load(&sc_region(s, region)->opened[lane / 64])",
        "sc_load_acquire(&sc_region(s, region)->opened[lane / 64])",
    ),
    _one(
        "a region is none while somebody has it open",
        "region.c",
        "        opened_by(s, region, lanes))\n        return;",
        "        (opened_by(s, region, lanes) && !s))\n        return;",
    ),
    _one(
        "who asks again to open what is lost is said to have closed it",
        "region.c",
        "!lives && !known",
        "!lives && (!known || known)",
    ),
    _one(
        "a region is said to live before its fields are there",
        "region.c",
        "sc_store(&r->state, state);",
        "sc_poke(&r->state, state);",
    ),
)
