"""A vLLM engine that answers JSON lines; the child of ``client.Engine``, run by the Python that has vLLM.

The first line on stdin has the arguments of AsyncEngineArgs, and the folder that goes with the engine. Each further
line is a request with an ``id`` and an ``op``; its answer is a line with that id, as soon as it is there. What vLLM
prints goes to stderr. Where stdin ends without ``shutdown``, the parent is gone, and all of this process group goes.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import prometheus_client
from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from shmcache_tools.engine import processes


class Server:
    def __init__(self, engine: AsyncLLM, answers: Any) -> None:
        self._engine = engine
        self._answers = answers
        self._tasks: set[asyncio.Task[None]] = set()

    def say(self, **answer: object) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()

    async def run(self, requests: asyncio.Queue[dict[str, Any]]) -> None:
        """Answer until ``shutdown``; several requests at once."""
        while True:
            request = await requests.get()
            if request["op"] == "shutdown":
                return
            task = asyncio.create_task(self._answer(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: dict[str, Any]) -> None:
        number = request.pop("id")
        try:
            op = getattr(self, "op_" + request.pop("op"))
            self.say(id=number, result=await op(**request))
        except Exception as error:  # noqa: BLE001 # the client is told whatever it is
            self.say(id=number, error=f"{type(error).__name__}: {error}")

    async def op_generate(self, name: str, prompt: list[int], max_tokens: int) -> dict[str, object]:
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        began = time.perf_counter()
        ttft_s = None
        tokens: list[int] = []
        async for output in self._engine.generate(TokensPrompt(prompt_token_ids=prompt), params, name):
            (completion,) = output.outputs
            if completion.token_ids and ttft_s is None:
                ttft_s = time.perf_counter() - began
            tokens += completion.token_ids
        return {
            "tokens": tokens,
            "ttft_s": ttft_s,
            "total_s": time.perf_counter() - began,
            "cached_tokens": output.num_cached_tokens or 0,
            "finish_reason": completion.finish_reason,
        }

    async def op_abort(self, name: str) -> None:
        await self._engine.abort(name)

    async def op_reset_prefix_cache(self, connector: bool) -> bool:
        return bool(await self._engine.reset_prefix_cache(reset_connector=connector))

    async def op_metrics(self) -> str:
        """As Prometheus would read them. vLLM writes them to its log, too, when told to."""
        await self._engine.do_log_stats()
        return prometheus_client.generate_latest().decode()

    async def op_rpc(self, method: str, args: list[object]) -> list[object]:
        """A method of the workers, by name."""
        answers: list[object] = await self._engine.collective_rpc(method, timeout=60, args=tuple(args))
        return answers


def pids_of(engine: AsyncLLM) -> dict[str, Any]:
    """The engine core's pid, and the workers' by rank; none where the core does their work itself."""
    (core,) = engine.engine_core.resources.engine_manager.processes
    children = Path(f"/proc/{core.pid}/task/{core.pid}/children").read_text(encoding="utf-8").split()
    # Rank 0 is started first, and pids rise.
    workers = sorted(
        int(pid) for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    return {"server": os.getpid(), "core": core.pid, "workers": workers}


def read_requests(loop: asyncio.AbstractEventLoop, requests: asyncio.Queue[dict[str, Any]], folder: str) -> None:
    """Passes lines of stdin on; at its end without a shutdown, the parent is dead: nothing may stay."""
    request: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        loop.call_soon_threadsafe(requests.put_nowait, request)
    if request.get("op") != "shutdown":
        segments = processes.segments(os.getpgrp())
        processes.kill_members(os.getpgrp(), but=os.getpid())
        for segment in segments:
            segment.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGKILL)


async def serve(arguments: dict[str, Any], folder: str, answers: Any) -> None:
    requests: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    reading = (asyncio.get_running_loop(), requests, folder)
    threading.Thread(target=read_requests, args=reading, daemon=True).start()
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    try:
        server = Server(engine, answers)
        server.say(ready=pids_of(engine))
        await server.run(requests)
    finally:
        engine.shutdown()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM and its children print
    asyncio.run(serve(**json.loads(sys.stdin.readline()), answers=answers))


if __name__ == "__main__":
    main()
