"""Caches of chunks that only count: what different rules of eviction would hit, and what the best possible would.

Each serves the requests of a trace in order. A hit is a chunk that is there, and so is every chunk before it in its
chain, when the request comes. Then these are touched, and the rest of the chain is inserted. ``Lru`` and ``Segmented``
follow the arena, which learns of whole chains; ``Sieve``, ``S3Fifo`` and ``Arc`` are as published, and are told of
chunk after chunk.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Final

Chain = Sequence[int]
Request = tuple[int, Chain]  #: milliseconds, and chunks that are named once each

_DEPTH_BITS = 16
_DEPTH_MAX = 2**_DEPTH_BITS - 1
_COUNT_MAX = 3
WINDOW_S = 180.0  #: of the arena, unless it is told another
GHOSTS = 8  #: a slot


class Policy(ABC):
    """A cache of ``slots`` chunks, empty at first."""

    def __init__(self, slots: int) -> None:
        self._slots = slots

    @abstractmethod
    def __contains__(self, chunk: int) -> bool: ...

    @abstractmethod
    def _use(self, time_ms: int, chain: Chain, hits: int) -> None:
        """Touch the first ``hits`` chunks, which are there, and insert the others that are not."""

    def serve(self, time_ms: int, chain: Chain) -> int:
        """How many leading chunks are there; afterwards they are touched, and the rest was inserted."""
        hits = sum(1 for _ in takewhile(self.__contains__, chain))
        self._use(time_ms, chain, hits)
        return hits


class _Scored(Policy):
    """The arena: a score a chunk, the smallest goes first, and nothing goes that the request itself has inserted.

    A score is the time of the last use, ``window_ms`` more for the second and for the third request that used the
    chunk, and the later chunk of a chain counts as older. ``ghosts``: of so many evicted chunks it is remembered how
    many requests had used them. ``lag_us``: by so much the insertions of a request come after its touches.
    """

    def __init__(self, slots: int, window_ms: float, ghosts: int, lag_us: int) -> None:
        super().__init__(slots)
        self._window_us = int(1000 * window_ms)
        self._ghosts_max = ghosts
        self._lag_us = lag_us
        self._now_us = 0
        self._scores: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []  # of score and chunk; only those that _scores has, too, count
        self._ghosts: OrderedDict[int, int] = OrderedDict()  # request counts, the oldest first

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._scores

    def _use(self, time_ms: int, chain: Chain, hits: int) -> None:
        self._now_us = max(1000 * time_ms, self._now_us + 1 + self._lag_us)  # no two requests at one time
        for depth, chunk in enumerate(chain[:hits]):
            self._put(chunk, self._scores[chunk] & _COUNT_MAX, depth, self._now_us)
            heapq.heappush(self._heap, (self._scores[chunk], chunk))
        inserted = []
        for depth, chunk in enumerate(chain[hits:], hits):
            if chunk not in self._scores and (len(self._scores) < self._slots or self._evict()):
                self._put(chunk, self._ghosts.get(chunk, 0), depth, self._now_us + self._lag_us)
                inserted.append(chunk)
        for chunk in inserted:  # from now on they can go
            heapq.heappush(self._heap, (self._scores[chunk], chunk))

    def _put(self, chunk: int, count_before: int, depth: int, now_us: int) -> None:
        count = min(_COUNT_MAX, count_before + 1)
        worth = now_us + self._window_us * (count - 1)
        self._scores[chunk] = worth << (_DEPTH_BITS + 2) | (_DEPTH_MAX - min(depth, _DEPTH_MAX)) << 2 | count

    def _evict(self) -> bool:
        """False: there is nothing that may go."""
        while self._heap:
            score, chunk = heapq.heappop(self._heap)
            if self._scores.get(chunk) == score:
                del self._scores[chunk]
                self._remember(chunk, score & _COUNT_MAX)
                return True
        return False

    def _remember(self, chunk: int, count: int) -> None:
        self._ghosts[chunk] = count
        self._ghosts.move_to_end(chunk)
        if len(self._ghosts) > self._ghosts_max:
            self._ghosts.popitem(last=False)


class Lru(_Scored):
    """The least recently used goes first; of one request the later chunk."""

    def __init__(self, slots: int, lag_us: int = 0) -> None:
        super().__init__(slots, window_ms=0, ghosts=0, lag_us=lag_us)


class Segmented(_Scored):
    """What was used by more requests stays longer, and what comes back is remembered."""

    def __init__(self, slots: int, window_s: float = WINDOW_S, ghosts: int = GHOSTS) -> None:
        super().__init__(slots, window_ms=1000 * window_s, ghosts=ghosts * slots, lag_us=1)


class _ByChunk(Policy):
    """What is told of chunk after chunk, and knows of no chains."""

    def _use(self, time_ms: int, chain: Chain, hits: int) -> None:  # noqa: ARG002 # these rules know neither
        for chunk in chain:
            self._access(chunk)

    @abstractmethod
    def _access(self, chunk: int) -> None: ...


class Sieve(_ByChunk):
    """SIEVE (Zhang et al., NSDI 2024): a queue in the order of insertion, and a hand that walks from old to new.

    The hand takes away the first chunk that was not visited since it last came by.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._visited: dict[int, bool] = {}
        self._queue: list[int | None] = []  # the oldest first; None: was evicted
        self._hand = 0

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._visited

    def _access(self, chunk: int) -> None:
        if chunk in self._visited:
            self._visited[chunk] = True
            return
        if len(self._visited) == self._slots:
            self._evict()
        self._visited[chunk] = False
        self._queue.append(chunk)

    def _evict(self) -> None:
        while (chunk := self._queue[self._hand]) is None or self._visited[chunk]:
            if chunk is not None:
                self._visited[chunk] = False
            self._move_on()
        del self._visited[chunk]
        self._queue[self._hand] = None
        self._move_on()

    def _move_on(self) -> None:
        self._hand += 1
        if self._hand == len(self._queue):  # before what is inserted next
            self._queue = [chunk for chunk in self._queue if chunk is not None]
            self._hand = 0


class S3Fifo(_ByChunk):
    """S3-FIFO (Yang et al., SOSP 2023): a small queue for what is new, a main queue, and ghosts of the small one."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._small_max = max(1, slots // 10)
        self._main_max = slots - self._small_max
        # How often each was used since, 3 at most; the oldest first.
        self._small: OrderedDict[int, int] = OrderedDict()
        self._main: OrderedDict[int, int] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._small or chunk in self._main

    def _access(self, chunk: int) -> None:
        for queue in (self._small, self._main):
            if chunk in queue:
                queue[chunk] = min(queue[chunk] + 1, 3)
                return
        while len(self._small) + len(self._main) >= self._slots:
            if len(self._small) >= self._small_max:
                self._evict_small()
            else:
                self._evict_main()
        if chunk in self._ghosts:
            del self._ghosts[chunk]
            self._main[chunk] = 0
        else:
            self._small[chunk] = 0

    def _evict_small(self) -> None:
        while self._small:
            chunk, uses = self._small.popitem(last=False)
            if uses <= 1:
                self._remember(chunk)
                return
            if len(self._main) >= self._main_max:
                self._evict_main()
            self._main[chunk] = 0

    def _evict_main(self) -> None:
        while self._main:
            chunk, uses = self._main.popitem(last=False)
            if not uses:
                return
            self._main[chunk] = uses - 1

    def _remember(self, chunk: int) -> None:
        self._ghosts[chunk] = None
        if len(self._ghosts) > self._main_max:
            self._ghosts.popitem(last=False)


class Arc(_ByChunk):
    """ARC (Megiddo and Modha, FAST 2003): what was used once, what more often, and ghosts that balance the two."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        # As the paper names them: once and more often used, there (t) and evicted (b); the oldest first.
        self._t1: OrderedDict[int, None] = OrderedDict()
        self._t2: OrderedDict[int, None] = OrderedDict()
        self._b1: OrderedDict[int, None] = OrderedDict()
        self._b2: OrderedDict[int, None] = OrderedDict()
        self._p = 0.0  # how many of the slots t1 should have

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._t1 or chunk in self._t2

    def _access(self, chunk: int) -> None:
        if chunk in self._t1 or chunk in self._t2:
            self._t1.pop(chunk, None)
            self._t2.pop(chunk, None)
        elif chunk in self._b1:
            self._p = min(self._slots, self._p + max(len(self._b2) / len(self._b1), 1))
            self._replace(in_b2=False)
            del self._b1[chunk]
        elif chunk in self._b2:
            self._p = max(0, self._p - max(len(self._b1) / len(self._b2), 1))
            self._replace(in_b2=True)
            del self._b2[chunk]
        else:
            self._make_room()
            self._t1[chunk] = None
            return
        self._t2[chunk] = None

    def _make_room(self) -> None:
        """For a chunk of which nothing is known."""
        once = len(self._t1) + len(self._b1)
        known = once + len(self._t2) + len(self._b2)
        if once == self._slots:
            if self._b1:
                self._b1.popitem(last=False)
                self._replace(in_b2=False)
            else:
                self._t1.popitem(last=False)
        elif known >= self._slots:
            if known == 2 * self._slots:
                self._b2.popitem(last=False)
            self._replace(in_b2=False)

    def _replace(self, *, in_b2: bool) -> None:
        if self._t1 and (len(self._t1) > self._p or (in_b2 and len(self._t1) == self._p)):
            chunk, _ = self._t1.popitem(last=False)
            self._b1[chunk] = None
        else:
            chunk, _ = self._t2.popitem(last=False)
            self._b2[chunk] = None


class Optimum(Policy):
    """The best that can be done by who knows the future (Belady): what is used again last goes first, or is not stored.

    Of two chunks that the same request uses next, the later in its chain goes. A chunk is used again no later than
    those behind it: so what stays are whole prefixes, and every hit that there can be counts.
    """

    _NEVER = 2**63

    def __init__(self, slots: int, requests: Sequence[Request]) -> None:
        super().__init__(slots)
        self._next_uses = iter(self._look_ahead(requests))
        self._there: dict[int, int] = {}  # when each is used again
        self._heap: list[tuple[int, int]] = []  # of that, negative, and chunk; only those that _there has, too, count

    @classmethod
    def _look_ahead(cls, requests: Sequence[Request]) -> list[list[int]]:
        """For each request when each of its chunks is used again: in which request, and how deep in its chain."""
        later: dict[int, int] = {}
        found = []
        for number, (_, chain) in reversed(list(enumerate(requests))):
            found.append([later.get(chunk, cls._NEVER) for chunk in chain])
            later.update((chunk, number << _DEPTH_BITS | depth) for depth, chunk in enumerate(chain))
        return found[::-1]

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._there

    def _use(self, time_ms: int, chain: Chain, hits: int) -> None:  # noqa: ARG002 # who knows the future needs neither
        for chunk, use in zip(chain, next(self._next_uses), strict=True):
            self._there.pop(chunk, None)
            if use != self._NEVER and (len(self._there) < self._slots or self._evict(use)):
                self._there[chunk] = use
                heapq.heappush(self._heap, (-use, chunk))

    def _evict(self, before: int) -> bool:
        """Evict what is used again last, unless all are used again before that."""
        while self._there.get(self._heap[0][1]) != -self._heap[0][0]:
            heapq.heappop(self._heap)
        use, chunk = self._heap[0]
        if -use < before:
            return False
        del self._there[chunk]
        return True


Make = Callable[[int, Sequence[Request]], Policy]


def _blind(policy: Callable[[int], Policy]) -> Make:
    """Of a policy that does not know the requests to come."""
    return lambda slots, _: policy(slots)


#: By the name that users give it.
SIMULATED: Final[dict[str, Make]] = {
    "lru": _blind(Lru),
    "segmented": _blind(Segmented),
    "sieve": _blind(Sieve),
    "s3-fifo": _blind(S3Fifo),
    "arc": _blind(Arc),
    "optimum": Optimum,
}


def hit_rate(
    policy: Policy, requests: Sequence[Request], on_request: Callable[[int], None] = lambda _served: None
) -> float:
    """Prefix hits of all chunks that are asked for. ``on_request`` is told before each how many were served."""
    hits = 0
    for served, (time_ms, chain) in enumerate(requests):
        on_request(served)
        hits += policy.serve(time_ms, chain)
    return hits / sum(len(chain) for _, chain in requests)
