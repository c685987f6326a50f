"""The supervisor of a round: starts a process for each seat, kills, stops and replaces them, and looks at the arena
while nobody does anything.

It is never attached while it forks, so that no child inherits its lane. Its children die with it.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NoReturn

import shmcache
from shmcache.stats import LaneInfo
from shmcache_tools.torture import worker
from shmcache_tools.torture.history import Audit
from shmcache_tools.torture.log import (
    HEAD_COUNT,
    HEAD_HELD,
    HEAD_LANE,
    HEAD_SERIAL,
    HEAD_WRITING,
    RECORD_WORDS,
    Log,
    Op,
)
from shmcache_tools.torture.plan import Plan, Seat
from shmcache_tools.torture.worker import DRAIN, HOLD, LEAVE, RUN

if TYPE_CHECKING:
    from typing_extensions import Self

_HANG_S: Final = 60.0  #: an operation that takes longer, and was not stopped, hangs
_POLL_S: Final = 0.0005
_LEAST_NAP_S: Final = 0.00002
_AIM_S: Final = 0.001  #: how long to wait for the operation that is to be hit
_AIMED: Final = 0.6  #: of the kills
_PR_SET_PDEATHSIG: Final = 1
_FIRST: Final = -10  #: a nice value
_KINDS: Final = tuple(op for op in Op if op != Op.DEATH)
#: In these it matters most where one is stopped.
_STOPPED_IN: Final = (Op.RESERVE_WRITE, Op.PUBLISH, Op.PUT, Op.READ, Op.RESERVE_READ, Op.DELETE, Op.EVICT, Op.CLEAR)
#: How long operations last at most that last long, microseconds; the others:
_LASTS_US: Final[dict[int, float]] = {Op.ATTACH: 150.0, Op.CLOSE: 60.0, Op.STATS: 150.0, Op.VERIFY: 40.0}
_LASTS_SHORT_US: Final = 3.0


class CrewError(Exception):
    """A process ended, or hangs, without having been told to."""


@dataclass(slots=True)
class Toll:
    """What was done to the processes."""

    deaths: Counter[str] = field(default_factory=Counter)  #: by operation; "" is between two
    stops: int = 0
    killed_stopped: int = 0


@dataclass(slots=True)
class _Process:
    pid: int
    since: float  #: CLOCK_MONOTONIC, seconds: when it was started, or went on
    resume_at: float | None = None  #: it is stopped until then
    killed_ns: int = 0  #: SIGKILL was sent after this


class Crew:
    """The processes of a round. A context manager that leaves none alive."""

    def __init__(self, arena: str, plan: Plan, logs: Sequence[Log], orders: memoryview, toll: Toll) -> None:
        self.faults: list[str] = []
        self.audits: list[Audit] = []
        self._arena = arena
        self._plan = plan
        self._logs = logs
        self._orders = orders
        self._toll = toll
        self._chance = random.Random(f"{plan.seed}-crew")
        self._priority = os.getpriority(os.PRIO_PROCESS, 0)
        self._lives = 0
        self._serial = 0
        self._processes: dict[int, _Process] = {}

    def __enter__(self) -> Self:
        self._order(RUN)
        with suppress(OSError):  # where it may, it goes first: then it strikes at the moment that it meant
            os.setpriority(os.PRIO_PROCESS, 0, _FIRST)
        try:
            for seat in self._plan.seats:
                self._start(seat)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        """Kills all that are left."""
        os.setpriority(os.PRIO_PROCESS, 0, self._priority)
        for slot in self._processes:
            self._send_kill(slot)
        while self._processes:
            self._bury(next(iter(self._processes)))

    # Orders

    def work(self, seconds: float, tick: Callable[[], None]) -> None:
        """Lets them work for so long, and strikes all the time."""
        self._order(RUN)
        now = time.monotonic()
        end, kill_at, stop_at = now + seconds, now, now
        while now < end:
            tick()
            self._watch()
            if now >= stop_at:
                self._stop()
                stop_at = now + self._gap_s(self._plan.stop_gap_ms)
            if now >= kill_at and self._plan.kills:
                self._kill()
                kill_at = now + self._gap_s(self._plan.kill_gap_ms)
            nap_s = min(kill_at if self._plan.kills else end, stop_at) - time.monotonic()
            time.sleep(max(_LEAST_NAP_S, min(nap_s, _POLL_S)))
            now = time.monotonic()

    def _gap_s(self, mean_ms: float) -> float:
        return self._chance.expovariate(1000 / mean_ms)

    def hold(self) -> None:
        """All stand still with what they have: the arena shows just that."""
        self._follow(HOLD)
        self._audit()

    def drain(self) -> None:
        """All stand still, give back what they have, and leave, but for some who are killed before they can."""
        self.hold()
        self._follow(DRAIN)
        self._audit()
        for slot in list(self._processes):
            if self._plan.kills and self._chance.random() < 0.4:
                self._send_kill(slot)
                self._bury(slot)
        self._follow(LEAVE)
        for process in self._processes.values():
            os.waitpid(process.pid, 0)
        self._processes.clear()

    def _order(self, command: int) -> int:
        self._serial += 1
        self._orders[0] = self._serial << 8 | command
        return self._orders[0]

    def _follow(self, command: int) -> None:
        """Gives an order, and returns when all have followed it."""
        order = self._order(command)
        for process in self._processes.values():
            self._resume(process)
        deadline = time.monotonic() + _HANG_S
        for slot in list(self._processes):
            while self._logs[slot].words[HEAD_SERIAL] != order:
                self._watch()
                if time.monotonic() > deadline:
                    self._hangs(slot)
                time.sleep(_POLL_S)

    # Processes

    def _start(self, seat: Seat) -> None:
        self._lives += 1
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._live(seat, parent)
        self._processes[seat.slot] = _Process(pid, time.monotonic())

    def _live(self, seat: Seat, parent: int) -> NoReturn:
        """In the child."""
        try:
            os.setpriority(os.PRIO_PROCESS, 0, self._priority)
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)  # it died before that could be seen
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            for signum in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(signum, signal.SIG_DFL)
            seed = f"{self._plan.seed}-{self._lives}"
            log = self._logs[seat.slot]
            worker.live(worker.Worker(self._arena, self._plan, seat, log, self._orders, seed))
        finally:
            os._exit(1)

    def _send_kill(self, slot: int) -> None:
        """SIGKILL, which may take its time."""
        process = self._processes[slot]
        process.killed_ns = time.monotonic_ns()
        os.kill(process.pid, signal.SIGKILL)

    def _bury(self, slot: int) -> str:
        """Waits until a process is gone, and says so in its log. The operation it died in, or ""."""
        process, log = self._processes.pop(slot), self._logs[slot]
        _, status = os.waitpid(process.pid, 0)
        log.settle()
        pending = log.pending()
        log.note_death(process.killed_ns)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            self.faults.append(self._ended(slot, status))
        return Op(pending[0]).name.lower() if pending else ""

    def _watch(self) -> None:
        """Lets those go on whose time has come; CrewError where one has ended or hangs."""
        now = time.monotonic()
        for slot, process in list(self._processes.items()):
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if process.killed_ns:
                if ended is not None:
                    self._toll.deaths[self._bury(slot)] += 1
                    self._start(self._plan.seats[slot])
                continue
            if ended is not None and (ended.si_status != 0 or self._orders[0] & 0xFF != LEAVE):
                self._bury(slot)  # which tells of it
                raise CrewError(self.faults.pop())
            if process.resume_at is not None:
                if now >= process.resume_at:
                    self._resume(process)
                continue
            pending = self._logs[slot].pending()
            if pending and now - max(process.since, pending[1] / 1e9) > _HANG_S:
                self._hangs(slot)

    def _ended(self, slot: int, status: int) -> str:
        """In words."""
        seat, log = self._plan.seats[slot], self._logs[slot]
        if os.WIFSIGNALED(status):
            how = f"died of {signal.Signals(os.WTERMSIG(status)).name}"
        else:
            how = f"ended with {os.WEXITSTATUS(status)}: {log.text() or 'it says nothing'}"
        return f"{seat.text}: {how} (its last operation: {self._last(slot)})"

    def _hangs(self, slot: int) -> NoReturn:
        raise CrewError(f"{self._plan.seats[slot].text} hangs in {self._last(slot)} for {_HANG_S:.0f} s")

    def _last(self, slot: int) -> str:
        words = self._logs[slot].words
        for number in range(int(words[HEAD_COUNT]), 0, -1):
            op = int(words[number * RECORD_WORDS + 2]) & 0xFF
            if op != Op.DEATH:
                return Op(op).name.lower()
        return "none"

    # Strikes

    def _kill(self) -> None:
        """One of them, stopped or not; it is replaced when it is gone."""
        living = [slot for slot, process in self._processes.items() if not process.killed_ns]
        if not living:
            return
        slot = self._chance.choice(living)
        if self._chance.random() < _AIMED:
            slot = self._aim(living, self._chance.choice(_KINDS), slot)
        self._toll.killed_stopped += self._processes[slot].resume_at is not None
        self._send_kill(slot)

    def _stop(self) -> None:
        """One of those that run, most often in an operation."""
        running = [slot for slot, process in self._processes.items() if not process.killed_ns and not process.resume_at]
        if not running:
            return
        slot = self._aim(running, self._chance.choice(_STOPPED_IN), self._chance.choice(running))
        process = self._processes[slot]
        os.kill(process.pid, signal.SIGSTOP)
        process.resume_at = time.monotonic() + self._chance.uniform(0, self._plan.stop_ms) / 1000
        self._toll.stops += 1

    def _resume(self, process: _Process) -> None:
        if process.resume_at is not None and not process.killed_ns:
            os.kill(process.pid, signal.SIGCONT)
            process.resume_at = None
            process.since = time.monotonic()

    def _aim(self, slots: list[int], wanted: int, otherwise: int) -> int:
        """Waits until one of these has begun an operation of this kind, or at last of any, and then for a moment
        within it: its slot."""
        begun = now = time.perf_counter()
        self._chance.shuffle(slots)
        while now < begun + _AIM_S:
            for slot in slots:
                pending = self._logs[slot].pending()
                if pending and (pending[0] == wanted or now > begun + _AIM_S / 2):
                    lasts_us = _LASTS_US.get(pending[0], _LASTS_SHORT_US)
                    moment = now + self._chance.uniform(0, lasts_us) / 1e6
                    while time.perf_counter() < moment:
                        pass
                    return slot
            now = time.perf_counter()
        return otherwise

    # Audits

    def _audit(self) -> None:
        """Each lane has just what its process says it has."""
        now = time.monotonic_ns()
        lanes = shmcache.inspect(self._arena).lanes
        reserved: dict[int, int] = {}
        for slot, process in self._processes.items():
            seat, words = self._plan.seats[slot], self._logs[slot].words
            lane = lanes[words[HEAD_LANE]]
            if (lane.pid, lane.state) != (process.pid, "alive"):
                self.faults.append(f"{seat.text} lives in lane {lane.index}, which says: pid {lane.pid}, {lane.state}")
            self._compare(seat, lane, int(words[HEAD_HELD]), int(words[HEAD_WRITING]))
            if seat.granted_as is not None:
                reserved[slot] = lane.reserved
            if self._orders[0] & 0xFF == DRAIN and lane.reserved:
                self.faults.append(f"{seat.text} gave all back, and has {lane.reserved} reserved shares")
        self.audits.append(Audit(now, reserved))

    def _compare(self, seat: Seat, lane: LaneInfo, held: int, writing: int) -> None:
        if lane.held != held:
            self.faults.append(f"{seat.text} holds {held} shares, and its lane has {lane.held}")
        # A writer that lost its key may not have had the lock to give its memory back: it stays the lane's.
        # Of several writers one lane counts for all.
        exactly = self._plan.patient and not seat.collects
        if lane.writing < writing or (lane.writing > writing and exactly):
            self.faults.append(f"{seat.text} is writing {writing} objects, and its lane has {lane.writing}")
