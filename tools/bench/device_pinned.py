"""What ``pin`` costs, and what it gives: copies between its views and the device, beside torch's own pinned memory.

And whether such copies are asynchronous: done beside a matrix product on another stream, and issued at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cost_common import arena
from device_common import Finding, check_all, in_turn, keys_of, timed

import shmcache
from shmcache_tools.text import size_text

if TYPE_CHECKING:
    from device_gpu import Gpu

EQUAL = 0.98  # of torch's pinned memory's speed
HIDDEN = 0.8  # of what could be: copies are done beside the product
AT_ONCE = 20.0  # times as fast as the transfer
PIECE = 16 << 20  # bytes of an object
PIN_ROUNDS = 3  # torch never gives back what it has page-locked
PAGEABLE_ROUNDS = 5  # these are slow


@dataclass
class Place:
    """Host memory in pieces: those that are copied to the device, and those that are copied to."""

    name: str
    sources: list[Any]
    targets: list[Any]


def pin_findings(gpu: Gpu, nbytes: int) -> list[Finding]:
    """Before anything else is page-locked: torch would use it again."""
    size = size_text(nbytes)
    populated = [_pin(nbytes, populate=True) for _ in range(PIN_ROUNDS)]
    fresh, theirs, held = [], [], []
    for _ in range(PIN_ROUNDS):
        fresh.append(_pin(nbytes, populate=False))
        took, memory = timed(lambda: gpu.pinned(nbytes))
        theirs.append(took)
        held.append(memory)  # or torch would give it again
    return [
        Finding(f"pin {size}, populated", "time", [pin for pin, _ in populated]),
        Finding(f"pin {size}, not populated", "time", [pin for pin, _ in fresh], "torch.empty, pinned", theirs),
        Finding(f"unpin {size}", "time", [unpin for _, unpin in populated]),
    ]


def _pin(nbytes: int, *, populate: bool) -> tuple[float, float]:
    with arena(capacity=nbytes, populate=populate) as name, shmcache.attach(name) as cache:
        return timed(cache.pin)[0], timed(cache.unpin)[0]


def copy_findings(gpu: Gpu, nbytes: int, rounds: int) -> Iterator[tuple[str, list[Finding]]]:
    """Speed, and then asynchrony."""
    piece = min(PIECE, nbytes // 4)
    with _views(gpu, nbytes, piece, pinned=True) as pinned, _views(gpu, nbytes, piece, pinned=False) as pageable:
        theirs = _torch_pinned(gpu, nbytes, piece)
        there = gpu.pieces(gpu.memory(nbytes), piece)
        yield "copies", _speeds(gpu, pinned, theirs, pageable, there, rounds)
        yield "asynchrony", _asynchrony(gpu, pinned, theirs, pageable, there, rounds)


@contextmanager
def _views(gpu: Gpu, nbytes: int, piece: int, *, pinned: bool) -> Iterator[Place]:
    """Tensors in place over an arena's objects; what is copied to them is aborted in the end."""
    written, fresh = (keys_of(what, nbytes // piece) for what in ("there", "fresh"))
    with arena(capacity=2 * nbytes) as name, shmcache.attach(name) as cache:
        with cache.reserve_write(written, piece) as batch:
            for i, tensor in enumerate(batch.tensors()):
                tensor.fill_(_byte(i))
            del tensor
        if pinned:
            cache.pin()
        with cache.read(written) as read, cache.reserve_write(fresh, piece) as reserved:
            check_all(read)
            place = Place("pinned views" if pinned else "views not pinned", read.tensors(), reserved.tensors())
            for tensor in (*place.sources, *place.targets):
                if gpu.is_pinned(tensor) != pinned:
                    raise RuntimeError(f"{place.name}: a tensor says otherwise")
            for target in place.targets:
                target.zero_()  # it has memory from here on
            yield place
            gpu.wait()
            place.sources.clear()
            place.targets.clear()
            del tensor, target
            reserved.abort()


def _torch_pinned(gpu: Gpu, nbytes: int, piece: int) -> Place:
    sources, targets = (gpu.pieces(gpu.pinned(nbytes), piece) for _ in range(2))
    for i, source in enumerate(sources):
        source.fill_(_byte(i))
    for target in targets:
        target.zero_()
    return Place("torch's pinned memory", sources, targets)


def _byte(number: int) -> int:
    return number % 251 + 1


def _copy(targets: list[Any], sources: list[Any]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


def _check(gpu: Gpu, pieces: list[Any]) -> None:
    """RuntimeError unless these are the bytes of the sources."""
    gpu.wait()
    if any(int(piece[at]) != _byte(i) for i, piece in enumerate(pieces) for at in (0, -1)):
        raise RuntimeError("a copy brought wrong bytes")


def _speeds(gpu: Gpu, ours: Place, theirs: Place, pageable: Place, there: list[Any], rounds: int) -> list[Finding]:
    nbytes = sum(piece.nbytes for piece in there)

    def to_device(place: Place) -> Callable[[], float]:
        return lambda: nbytes / gpu.seconds(lambda: _copy(there, place.sources))

    def to_host(place: Place) -> Callable[[], float]:
        return lambda: nbytes / gpu.seconds(lambda: _copy(place.targets, there))

    found = []
    for what, way in (("host to device", to_device), ("device to host", to_host)):
        mine, other = in_turn(rounds, way(ours), way(theirs))
        (slow,) = in_turn(PAGEABLE_ROUNDS, way(pageable))
        copy = f"copy {what}, {size_text(nbytes)}, pinned views"
        found.append(Finding(copy, "rate", mine, theirs.name, other, EQUAL))
        found.append(Finding(copy, "rate", mine, pageable.name, slow))
        _check(gpu, there)
    for place in (ours, theirs, pageable):
        _check(gpu, place.targets)
    return found


@dataclass
class Beside:
    """What was seen of one place's copies in each round."""

    issued: list[float] = field(default_factory=list)  # seconds that the calls took
    alone: list[float] = field(default_factory=list)  # seconds until all was copied
    work: list[float] = field(default_factory=list)  # seconds of the products alone
    both: list[float] = field(default_factory=list)  # seconds of the two together

    def hidden(self) -> list[float]:
        """How much of the shorter of the two was done beside the other."""
        times = zip(self.alone, self.work, self.both, strict=True)
        return [(alone + work - both) / min(alone, work) for alone, work, both in times]


def _asynchrony(gpu: Gpu, ours: Place, theirs: Place, pageable: Place, there: list[Any], rounds: int) -> list[Finding]:
    side = gpu.stream()

    def run(place: Place | None, products: int) -> tuple[float, float]:
        """Copies on the side stream, and then products on the current one: seconds to issue the copies, and in all."""
        gpu.wait()
        began = time.perf_counter()
        if place:
            with gpu.on(side):
                _copy(there, place.sources)
        issued = time.perf_counter() - began
        for _ in range(products):
            gpu.product()
        gpu.wait()
        return issued, time.perf_counter() - began

    for _ in range(2):  # the first one warms up
        products = max(1, round(run(ours, 0)[1] / run(None, 1)[1]))
    seen = {place.name: Beside() for place in (ours, theirs, pageable)}
    for number in range(max(rounds, PAGEABLE_ROUNDS)):
        for place in (ours, theirs, pageable) if number < PAGEABLE_ROUNDS else (ours, theirs):
            issued, alone = run(place, 0)
            beside = seen[place.name]
            beside.issued.append(issued)
            beside.alone.append(alone)
            beside.work.append(run(None, products)[1])
            beside.both.append(run(place, products)[1])
    return _async_findings(seen[ours.name], seen[theirs.name], seen[pageable.name])


def _async_findings(ours: Beside, theirs: Beside, pageable: Beside) -> list[Finding]:
    issue, both, hidden = "issue copies", "copies beside matrix products", "of what could be hidden, hidden"
    transfer = "their transfer"
    alone = list(zip(ours.alone, ours.work, strict=True))
    return [
        Finding(f"{issue}, pinned views", "time", ours.issued, transfer, ours.alone, AT_ONCE),
        Finding(f"{issue}, torch's pinned memory", "time", theirs.issued, transfer, theirs.alone),
        Finding(f"{issue}, views not pinned", "time", pageable.issued, transfer, pageable.alone),
        Finding(both, "time", ours.both, "the longer one alone", [max(times) for times in alone]),
        Finding(both, "time", ours.both, "one after the other", [sum(times) for times in alone]),
        Finding(hidden, "share", ours.hidden(), "torch's pinned memory", theirs.hidden(), least=HIDDEN),
        Finding(hidden, "share", ours.hidden(), "views not pinned", pageable.hidden()),
    ]
