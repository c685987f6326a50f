"""Prefetch: one background loop that brings chains of keys from L2 into the arena, with shares for their readers.

Adapters run in the threads of their :class:`Channel` and answer by the loop's inbox. The L1 pass grants what is there;
what is not is looked up, adapter by adapter; what was found gets its slots, a few pieces ahead, and is published in the
order of the chain. Where a task stands is told in ``task.py``.

A slot that is being filled cannot be taken away from the adapter that fills it. Where one takes too long, its piece
becomes a stray: the task goes on without it, and the slot is aborted when the call returns.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

from shmcache import errors
from shmcache.batch import WriteBatch
from shmcache.status import Status
from shmcache.storage.channel import Call, Channel, answers
from shmcache.storage.l1 import L1, Notes
from shmcache.storage.task import Key, Piece, PrefetchResult, PrefetchTask

__all__ = ["PrefetchController"]

# One call loads several objects of up to so many bytes together: few, so that the first are readable soon and all
# threads have work; many, since a call costs some 100 us beside the load.
_PIECE_BYTES: Final = (256 << 10, 4 << 20)
_PIECE_KEYS: Final = 64
_TRIES: Final = 3  #: how often a key that vanishes under a task is looked up
_CANCEL_S: Final = 1.0  #: how long a cancelled task waits for the calls that fill its slots
_POLL_S: Final = 0.001  #: how often keys in another writer's hands are asked for
_REAP_S: Final = 0.05  #: how often dead writers are looked for meanwhile
_TICK_S: Final = 0.05  #: how often calls are looked at that take too long

_log = logging.getLogger("shmcache.storage")


class PrefetchController:
    """Works on up to ``max_in_flight`` tasks at once; the others wait in the order they came.

    ``timeout_s``: how long one call of an adapter may take. ``contend_s``: how long a key is waited for that another
    writer has in hand.
    """

    def __init__(
        self, l1: L1, channels: Sequence[Channel], *, max_in_flight: int, timeout_s: float, contend_s: float
    ) -> None:
        self._l1 = l1
        self._notes = Notes(l1)
        self._channels = channels
        self._max_in_flight = max_in_flight
        self._ahead = sum(channel.threads for channel in channels) + 2  # pieces that a task may have in hand
        self._timeout_s = timeout_s
        self._contend_s = contend_s
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._queued: deque[PrefetchTask] = deque()
        self._active: list[PrefetchTask] = []
        self._calls = 0  # that are not back yet
        self._retries: list[Callable[[], object]] = []  # what a stopped holder of the arena lock is in the way of
        self._next_poll = self._next_reap = self._next_tick = 0.0
        self._gate = threading.Lock()  # so that nothing gets into the inbox behind the end
        self._shut = False
        self._closed = False  # what the loop knows of it
        self._done: threading.Event | None = None  # of who closes
        self._thread = threading.Thread(target=self._run, name="shmcache-prefetch", daemon=True)
        self._thread.start()

    # For any thread

    def submit(self, task: PrefetchTask) -> None:
        """Takes a task on."""
        self._post(partial(self._on_submit, task))

    def cancel(self, task: PrefetchTask) -> None:
        """Gives back all that the task has taken, and returns when that is done."""
        done = threading.Event()
        self._post(partial(self._on_cancel, task, done))
        done.wait()

    def close(self) -> None:
        """Cancels what is not finished, and returns when that is done."""
        done = threading.Event()
        with self._gate:
            self._shut = True
            self._inbox.put(partial(self._on_close, done))
        done.wait()

    def _post(self, handle: Callable[[], None]) -> None:
        with self._gate:
            if self._shut:
                raise errors.ClosedError(f"arena {self._l1.name!r}: this StorageManager is closed; make another")
            self._inbox.put(handle)

    # The loop

    def _run(self) -> None:
        while not self._closed or self._calls or self._active or self._retries:
            try:
                handle = self._inbox.get(timeout=self._pause_s())
                handle()
                del handle
            except queue.Empty:
                pass
            except Exception:  # noqa: BLE001 # the loop must outlive whatever arrives
                _log.exception("the prefetch loop")
            self._keep_time(time.monotonic())
            self._begin_next()
            if self._inbox.empty():
                self._notes.flush()
            if self._done is not None and not self._active:
                self._done.set()

    def _pause_s(self) -> float | None:
        """How long the loop may sleep if nothing arrives."""
        if any(task.waiting_since for task in self._active):
            return _POLL_S
        return _TICK_S if self._calls or self._retries or self._active else None

    def _keep_time(self, now: float) -> None:
        if now >= self._next_poll:
            self._next_poll = now + _POLL_S
            for task in [task for task in self._active if task.waiting_since]:
                self._guard(task, partial(self._ask_again, task, now))
        if now >= self._next_tick:
            self._next_tick = now + _TICK_S
            retries, self._retries = self._retries, []
            for retry in retries:
                self._give(retry)
            for task in list(self._active):
                self._guard(task, partial(self._leave_behind, task, now))

    def _guard(self, task: PrefetchTask, step: Callable[[], None]) -> None:
        """Whatever goes wrong with a task ends that task, with what is ready, and nothing else."""
        if task.result is not None:
            return
        try:
            step()
        except Exception as error:  # noqa: BLE001 # the loop must outlive every task
            if not isinstance(error, errors.ShmcacheError):
                _log.exception("a prefetch failed")
            task.fail(f"{type(error).__name__}: {error}")
            self._abandon(task)

    def _give(self, step: Callable[[], object]) -> None:
        """Does what gives something back: again later where the arena lock cannot be had; never after a close."""
        try:
            step()
        except errors.ArenaBusyError:
            self._retries.append(step)
        except errors.ShmcacheError as error:
            _log.debug("nothing to give back: %s", error)  # a cache that was closed gave all of it back

    # What arrives in the inbox

    def _on_submit(self, task: PrefetchTask) -> None:
        self._notes.count("prefetch_requests")
        self._notes.count("prefetch_keys", len(task.keys))
        self._queued.append(task)
        self._notes.gauge("prefetch_queued", 1)

    def _on_cancel(self, task: PrefetchTask, done: threading.Event) -> None:
        if task.result is None:
            task.answers.append(done)
            self._cancel(task)
            return
        if task.cancelled_at is None:
            self._notes.count("prefetch_cancels")
            task.cancelled_at = time.monotonic()
            self._give(partial(self._l1.give_back, task.keys[: task.result.hits], task.extra_count))
            task.result = PrefetchResult(0, 0, 0, task.error)
            self._notes.flush()
        done.set()

    def _on_close(self, done: threading.Event) -> None:
        self._closed = True
        for task in [*self._queued, *self._active]:
            task.fail("the StorageManager was closed")
            self._cancel(task)
        for channel in self._channels:
            channel.close()
        self._done = done

    def _on_looked_up(self, task: PrefetchTask, call: Call) -> None:
        self._calls -= 1
        self._notes.time("l2_lookup", call.took_s)
        if task.look_up is call:
            self._guard(task, partial(self._take_answer, task, call))

    def _on_loaded(self, task: PrefetchTask, piece: Piece, call: Call) -> None:
        self._calls -= 1
        n = len(piece.batch)
        self._notes.gauge("l2_loading", -n)
        self._notes.time("l2_load", call.took_s)
        piece.loaded = self._leading_ok(task, piece, call)
        if piece.stray:
            self._give(piece.batch.abort)
            if task.pieces.get(piece.start) is piece:
                del task.pieces[piece.start]
        elif piece.loaded < n:
            self._guard(task, partial(self._cut, task, piece.start + piece.loaded))
        self._guard(task, partial(self._advance, task))

    # The life of a task

    def _begin_next(self) -> None:
        while self._queued and len(self._active) < self._max_in_flight:
            task = self._queued.popleft()
            self._active.append(task)
            self._notes.gauge("prefetch_queued", -1)
            self._notes.gauge("prefetch_in_flight", 1)
            self._notes.time("prefetch_queue", time.monotonic() - task.submitted)
            self._guard(task, partial(self._begin, task))

    def _begin(self, task: PrefetchTask) -> None:
        """The L1 pass: what is there is granted at once, so that it stays."""
        self._ask_l1(task, list(range(task.end)))
        self._advance(task)

    def _advance(self, task: PrefetchTask) -> None:
        """Does all that can be done now."""
        if task.result is not None:
            return
        self._publish(task)
        if task.look_up is None and task.stirred and task.cancelled_at is None:
            task.stirred = False
            self._cut_at_first(
                task, [i for i in task.indices(Key.ABSENT) if not task.use_l2 or task.tries[i] == _TRIES]
            )
            absent = task.indices(Key.ABSENT)
            task.tries.update(absent)
            self._look_up(task, 0, absent)
        self._load(task)
        if task.ready == task.end and not task.pieces:
            self._finish(task)

    def _ask_l1(self, task: PrefetchTask, indices: list[int]) -> None:
        """Grants what is readable now."""
        task.stirred = True
        found = self._l1.grant([task.keys[i] for i in indices], task.extra_count)
        now = time.monotonic()
        for i, status in zip(indices, found, strict=True):
            if status is Status.IN_FLIGHT:
                task.states[i] = Key.WAITING
                task.waiting_since.setdefault(i, now)
                continue
            task.waiting_since.pop(i, None)
            task.states[i] = Key.GRANTED if status is Status.OK else Key.ABSENT
        full = [i for i, status in zip(indices, found, strict=True) if status is Status.NO_SHARE]
        if full:
            task.fail(f"a rank has 65,535 shares of key {task.keys[full[0]].hex()} already; are shares given back?")
        self._cut_at_first(task, full)

    def _ask_again(self, task: PrefetchTask, now: float) -> None:
        """Asks for the keys that another writer had in hand."""
        if now >= self._next_reap:
            self._next_reap = now + _REAP_S
            self._l1.reap()
        waiting = task.indices(Key.WAITING)
        task.waiting_since = {i: task.waiting_since[i] for i in waiting}
        self._ask_l1(task, waiting)
        if len(task.waiting_since) < len(waiting):  # the writer makes headway
            task.waiting_since = dict.fromkeys(task.waiting_since, now)
        late = [i for i, since in task.waiting_since.items() if now - since > self._contend_s]
        if late:
            mine = self._in_hand(task)
            self._contend(task, [i for i in late if task.keys[i] not in mine])
        self._advance(task)

    def _contend(self, task: PrefetchTask, late: list[int]) -> None:
        """Tries once to load what another writer did not publish in time: who is stuck beyond the write lease loses
        the key to who reserves it."""
        self._notes.count("prefetch_contended", bool(late) and not task.contended)
        self._cut_at_first(task, [i for i in late if i in task.contended or not task.use_l2])
        for i in late:
            if i < task.end:
                task.contended.add(i)
                task.states[i] = Key.ABSENT
                del task.waiting_since[i]
                task.stirred = True

    def _in_hand(self, waiting: PrefetchTask) -> set[bytes]:
        """The keys that this loop will publish or give up, without a limit of the task that waits: those that are being
        loaded, under a deadline of their own, and those of earlier tasks, which do not wait for later ones so."""
        earlier = self._active[: self._active.index(waiting)]
        pieces = ((task, piece) for task in self._active for piece in task.pieces.values() if not piece.stray)
        sure = ((task, piece) for task, piece in pieces if piece.loaded is None or task in earlier)
        return {key for task, piece in sure for key in task.keys[piece.start : piece.stop]}

    def _look_up(self, task: PrefetchTask, place: int, indices: list[int]) -> None:
        """Asks one adapter after the other; the answer comes by ``_on_looked_up``."""
        task.look_up = None
        if not indices:
            return
        while place < len(self._channels) and self._channels[place].hangs(self._timeout_s):
            task.fail(f"{self._channels[place].name}: hangs; no call was made")
            place += 1
        if place == len(self._channels):
            self._cut(task, indices[0])
            return
        task.looked_at = (place, indices)
        adapter, keys = self._channels[place].adapter, [task.keys[i] for i in indices]
        self._notes.count("l2_lookups", len(keys))
        task.look_up = self._call(place, lambda: adapter.lookup(keys), partial(self._on_looked_up, task))

    def _take_answer(self, task: PrefetchTask, call: Call) -> None:
        place, indices = task.looked_at
        answer = call.value
        if call.error is None and not answers(answer, len(indices), bool, np.bool_):
            call.error = f"{self._channels[place].name}: lookup: expected a list of {len(indices)} bools"
        self._channels[place].note(call.error)
        if call.error is not None:
            self._notes.count("l2_lookup_errors")
            task.fail(call.error)
            answer = [False] * len(indices)
        for i, there in zip(indices, answer, strict=True):
            if there and task.states[i] is Key.ABSENT:
                task.states[i] = Key.FOUND
                task.places[i] = place
        self._notes.count("l2_lookup_hits", int(sum(answer)))
        self._look_further(task, place, indices)

    def _look_further(self, task: PrefetchTask, place: int, indices: list[int]) -> None:
        """The next adapter is asked for what this one does not have."""
        task.cursor = 0
        rest = [i for i in indices if i < task.end and task.states[i] is Key.ABSENT]
        self._look_up(task, place + 1, rest)
        if task.look_up is None:
            self._advance(task)

    def _load(self, task: PrefetchTask) -> None:
        """Reserves slots for what was found, and no more, and begins to fill them: a few pieces ahead, so that the
        first are published while the last are not yet begun."""
        if task.look_up is not None or task.cancelled_at is not None:
            return
        i = max(task.cursor, task.ready)
        while i < task.end and len(task.pieces) < self._ahead:
            i = self._load_piece(task, i) if task.states[i] is Key.FOUND else i + 1
        task.cursor = i

    def _load_piece(self, task: PrefetchTask, start: int) -> int:
        """Begins to load the keys from ``start`` on that one call can; where to go on."""
        place = task.places[start]
        stop = self._piece_end(task, start)
        if self._channels[place].hangs(self._timeout_s):
            task.fail(f"{self._channels[place].name}: hangs; no call was made")
            self._cut(task, start)
            return start
        batch = self._reserve(task, start, stop)
        if batch is None:
            return start  # the state of its key tells why
        piece = task.pieces[start] = Piece(start, batch)
        task.states[piece.start : piece.stop] = [Key.LOADING] * len(batch)
        adapter, keys = self._channels[place].adapter, batch.keys
        views = [view for view in batch.views if view is not None]  # none is
        self._notes.gauge("l2_loading", len(batch))
        piece.call = self._call(place, lambda: adapter.load(keys, views), partial(self._on_loaded, task, piece))
        return piece.stop

    def _piece_end(self, task: PrefetchTask, start: int) -> int:
        """The end of the keys from ``start`` on that one call loads."""
        least, most = _PIECE_BYTES
        share = task.nbytes // (2 * self._channels[task.places[start]].threads)
        limit = least if start == 0 else min(max(share, least), most)
        stop = min(task.end, start + _PIECE_KEYS)
        nbytes = task.sizes[start]
        for i in range(start + 1, stop):
            nbytes += task.sizes[i]
            if task.states[i] is not Key.FOUND or task.places[i] != task.places[start] or nbytes > limit:
                return i
        return stop

    def _reserve(self, task: PrefetchTask, start: int, stop: int) -> WriteBatch | None:
        """Slots for the keys from ``start`` on, as far as they can be had; None: not even for the first."""
        while stop > start:
            batch = self._l1.reserve(task.keys[start:stop], task.layouts[start:stop], temporary=task.temporary)
            found = batch.status
            got = next((i for i, status in enumerate(found) if status is not Status.OK), len(found))
            if got == len(found):
                return batch
            self._give(batch.abort)
            stop = start + got
        if found[0] is Status.NO_SPACE:
            self._make_room(task, start)
        elif start in task.contended:
            self._cut(task, start)
        else:  # somebody was faster: EXISTS, IN_FLIGHT
            task.states[start] = Key.WAITING
            task.waiting_since.setdefault(start, time.monotonic())
        return None

    def _make_room(self, task: PrefetchTask, start: int) -> None:
        """Gives up the last key that the task has from L1, so that it can be evicted; where there is none, the prefix
        ends."""
        granted = [i for i in task.indices(Key.GRANTED) if i > start]
        self._notes.count("prefetch_no_space", not task.short_of_room)
        task.short_of_room = True
        self._cut(task, granted[-1] if granted else start)

    def _leading_ok(self, task: PrefetchTask, piece: Piece, call: Call) -> int:
        """How many leading objects of a piece are whole."""
        n, channel = len(piece.batch), self._channels[task.places[piece.start]]
        if call.error is None and not answers(call.value, n, Status):
            call.error = f"{channel.name}: load: expected a list of {n} Statuses"
        channel.note(call.error)
        if call.error is not None:
            self._notes.count("l2_load_errors")
            task.fail(call.error)
            return 0
        loaded = [status is Status.OK for status in call.value]
        sizes = task.sizes[piece.start : piece.stop]
        self._notes.count("l2_loads", sum(loaded))
        self._notes.count("l2_loaded_bytes", sum(size for size, ok in zip(sizes, loaded, strict=True) if ok))
        self._notes.count("l2_load_misses", n - sum(loaded))
        return next((i for i, ok in enumerate(loaded) if not ok), n)

    def _publish(self, task: PrefetchTask) -> None:
        """Moves ``ready`` on, as far as all is there."""
        before = task.ready
        while task.ready < task.end:
            if task.states[task.ready] is Key.GRANTED:
                task.ready += 1
                continue
            piece = task.pieces.get(task.ready)
            if piece is None or piece.loaded is None:
                break
            self._publish_piece(task, piece)
        if before == 0 < task.ready:
            self._notes.time("prefetch_first_key", time.monotonic() - task.submitted)

    def _publish_piece(self, task: PrefetchTask, piece: Piece) -> None:
        wanted = min(task.end, piece.stop) - piece.start
        found = piece.batch.publish_leading(wanted, task.extra_count)
        published = next((i for i, status in enumerate(found) if status is not Status.OK), wanted)
        task.states[piece.start : piece.start + published] = [Key.PUBLISHED] * published
        task.ready += published
        self._next_poll = 0.0  # another task may wait for these
        if published < wanted:
            task.fail(f"key {task.keys[task.ready].hex()} was lost to the write lease while it was loaded")
            granted = [key for key, status in zip(piece.batch.keys, found, strict=False) if status is Status.OK]
            self._give(partial(self._l1.give_back, granted[published:], task.extra_count))
        del task.pieces[piece.start]
        if wanted < len(piece.batch):
            self._give(piece.batch.abort)
        if published < wanted:
            self._cut(task, task.ready)

    def _finish(self, task: PrefetchTask) -> None:
        states = task.states[: task.ready]
        l1_hits, l2_hits = states.count(Key.GRANTED), states.count(Key.PUBLISHED)
        self._notes.count("prefetch_l1_hits", l1_hits)
        self._notes.count("prefetch_l2_hits", l2_hits)
        self._notes.count("prefetch_errors", task.error is not None)
        self._notes.time("prefetch_total", time.monotonic() - task.submitted)
        task.result = PrefetchResult(task.ready, l1_hits, l2_hits, task.error)
        if task in self._active:
            self._active.remove(task)
            self._notes.gauge("prefetch_in_flight", -1)
        self._notes.flush()  # so that who waits finds it counted
        task.over.set()
        for done in task.answers:
            done.set()

    # Giving back

    def _cut_at_first(self, task: PrefetchTask, indices: list[int]) -> None:
        if indices:
            self._cut(task, min(indices))

    def _cut(self, task: PrefetchTask, end: int) -> None:
        """Gives up the keys from ``end`` on, with all that was taken for them."""
        if end >= task.end:
            return
        granted = [task.keys[i] for i in range(end, task.end) if task.states[i] is Key.GRANTED]
        self._give(partial(self._l1.give_back, granted, task.extra_count))
        task.states[end : task.end] = [Key.ABSENT] * (task.end - end)
        task.waiting_since = {i: since for i, since in task.waiting_since.items() if i < end}
        task.end = end
        for piece in [piece for piece in task.pieces.values() if piece.start >= end]:
            if piece.loaded is not None or self._call_off(piece):
                del task.pieces[piece.start]
                self._give(piece.batch.abort)
            else:
                piece.stray = True  # the task waits for it all the same, for a while

    def _call_off(self, piece: Piece) -> bool:
        """Whether the load of a piece had not begun, and never will."""
        if piece.call is None or not piece.call.call_off():
            return False
        self._calls -= 1
        self._notes.gauge("l2_loading", -len(piece.batch))
        return True

    def _cancel(self, task: PrefetchTask) -> None:
        self._notes.count("prefetch_cancels", task.cancelled_at is None)
        task.cancelled_at = task.cancelled_at or time.monotonic()
        task.look_up = None
        if task in self._queued:
            self._queued.remove(task)
            self._notes.gauge("prefetch_queued", -1)
        taken, task.ready = task.keys[: task.ready], 0
        self._give(partial(self._l1.give_back, taken, task.extra_count))
        task.states[: len(taken)] = [Key.ABSENT] * len(taken)
        self._cut(task, 0)
        if not task.pieces:
            self._finish(task)

    def _leave_behind(self, task: PrefetchTask, now: float) -> None:
        """Goes on without the calls that take too long."""
        if task.look_up is not None and self._overdue(task.look_up, task.looked_at[0]):
            self._lose(task, task.look_up, task.looked_at[0], "lookup")
            self._look_further(task, *task.looked_at)
        given_up = task.cancelled_at is not None and now - task.cancelled_at > _CANCEL_S
        for piece in list(task.pieces.values()):
            place = task.places[piece.start]
            if piece.loaded is not None or piece.call is None or task.pieces.get(piece.start) is not piece:
                continue
            if not given_up:
                if not self._overdue(piece.call, place):
                    continue
                self._lose(task, piece.call, place, "load")
            self._cut(task, piece.start)
            if task.pieces.pop(piece.start, None) is not None:
                piece.stray = True
        self._advance(task)

    def _overdue(self, call: Call, place: int) -> bool:
        return call.runs_longer_than(self._timeout_s) or self._channels[place].hangs(self._timeout_s)

    def _lose(self, task: PrefetchTask, call: Call, place: int, what: str) -> None:
        error = f"{self._channels[place].name}: {what}: no answer within {self._timeout_s:g} s"
        self._notes.count("l2_timeouts")
        self._channels[place].note(error)
        task.fail(error)
        if what == "lookup" and call.call_off():
            self._calls -= 1

    def _abandon(self, task: PrefetchTask) -> None:
        """Ends a task as it is, after an error of ours or of the arena."""
        task.look_up = None
        self._cut(task, task.ready)
        for piece in task.pieces.values():
            piece.stray = True
            if piece.loaded is not None or piece.call is None:
                self._give(piece.batch.abort)
        task.pieces.clear()
        self._finish(task)

    def _call(self, place: int, run: Callable[[], Any], then: Callable[[Call], None]) -> Call:
        """Has an adapter's thread run ``run()``, and this loop ``then(call)`` when it is back."""
        call = self._channels[place].submit(run, lambda call: self._inbox.put(partial(then, call)))
        self._calls += 1
        return call
