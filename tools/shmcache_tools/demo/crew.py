"""The demo's worker processes: started, told things, listened to, killed, and started again.

Owns the processes and the scheduler's ends of their pipes; knows nothing of requests or shares.
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

from shmcache_tools.demo.wire import Answer, Ready, Task, decode_answer

_STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Death:
    """A worker process that is gone; what it had said before has been delivered."""

    rank: int
    exit_code: int  #: negative: the signal that killed it
    at: float  #: when we killed it, or when its death was seen; ``time.perf_counter()``


@dataclass(slots=True)
class Worker:
    """One worker process and our end of its pipe."""

    rank: int
    process: subprocess.Popen[bytes]
    pipe: Connection
    ready: bool = False
    killed_at: float | None = None


@dataclass(slots=True)
class Crew:
    """The workers of one arena, one a rank."""

    arena: str
    world_size: int
    chunk_bytes: int
    workers: list[Worker] = field(default_factory=list)
    pipe_bytes: int = 0  #: all that went through the pipes, both ways

    def start(self) -> None:
        """Start every rank; each says Ready when it has attached."""
        for rank in range(self.world_size):
            self.workers.append(self._spawn(rank))

    def restart(self, rank: int) -> None:
        """Start a new process for the rank of a dead one."""
        self.workers[rank] = self._spawn(rank)

    def tell(self, rank: int, task: Task) -> None:
        """Send a task. A worker that died meanwhile gets nothing; ``listen`` will tell of its death."""
        message = task.encode()
        with contextlib.suppress(ConnectionError):
            self.workers[rank].pipe.send_bytes(message)
            self.pipe_bytes += len(message)

    def kill(self, rank: int) -> None:
        """SIGKILL a worker; ``listen`` tells of the death once it has happened."""
        worker = self.workers[rank]
        worker.ready = False
        worker.killed_at = time.perf_counter()
        worker.process.kill()

    def listen(self, timeout_s: float) -> Iterator[tuple[int, Answer] | Death]:
        """What the workers say within ``timeout_s``, a message each at most; deaths included."""
        for pipe in wait([worker.pipe for worker in self.workers], timeout_s):
            worker = next(worker for worker in self.workers if worker.pipe is pipe)
            try:
                message = worker.pipe.recv_bytes()
            except (EOFError, ConnectionError):
                yield self._bury(worker)
                continue
            self.pipe_bytes += len(message)
            answer = decode_answer(message)
            if isinstance(answer, Ready):
                worker.ready = worker.killed_at is None
            yield worker.rank, answer

    def stop(self) -> list[int]:
        """Let every worker end by itself; their exit codes."""
        for worker in self.workers:
            worker.pipe.close()
        return [worker.process.wait(_STOP_TIMEOUT_S) for worker in self.workers]

    def abandon(self) -> None:
        """End every worker at once, whatever it does; harmless after ``stop``."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.wait()
            worker.pipe.close()

    def _spawn(self, rank: int) -> Worker:
        ours, theirs = Pipe()
        command = [sys.executable, "-m", "shmcache_tools.demo.worker", self.arena]
        command += map(str, (rank, self.world_size, self.chunk_bytes, theirs.fileno()))
        with theirs:
            # A session of its own: the terminal's Ctrl-C goes to the scheduler, which ends its workers.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        return Worker(rank, process, ours)

    def _bury(self, worker: Worker) -> Death:
        """Take leave of a worker whose pipe has ended."""
        worker.ready = False
        worker.pipe.close()
        # Its pipe ends a moment before the process does: its locks are gone only after this.
        exit_code = worker.process.wait(_STOP_TIMEOUT_S)
        return Death(worker.rank, exit_code, worker.killed_at or time.perf_counter())


class Killer:
    """SIGKILLs a random worker every ``period_s`` seconds; None: never."""

    def __init__(self, crew: Crew, period_s: float | None, seed: int) -> None:
        self._crew = crew
        self._period_s = period_s
        self._rng = random.Random(seed)
        self._next = time.perf_counter() + (period_s or 0.0)

    def tick(self) -> None:
        """Kill one, if it is time and one has attached."""
        if self._period_s is None or time.perf_counter() < self._next:
            return
        ready = [worker.rank for worker in self._crew.workers if worker.ready]
        if ready:
            self._crew.kill(self._rng.choice(ready))
            self._next = time.perf_counter() + self._period_s


def describe_exit(exit_code: int) -> str:
    """``exit code 1``, or the name of the signal."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-exit_code).name
    return f"signal {-exit_code}"
