"""tools/bench/vllm.py and the harness of engines, as far as they go without vLLM: a small program plays the engine."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from safetensors import safe_open

from shmcache_tools.engine import client, models, processes

BENCH = Path(__file__).parents[2] / "tools" / "bench"
TIMEOUT_S = 60.0

# What serve.py does, without vLLM: it echoes prompts, those that begin with 7 two by two in the wrong order, answers 0
# with an error and 1 never; it has a child as vLLM has workers. {start} comes first.
ENGINE = """\
    import json, os, subprocess, sys, time
    {start}
    def answer(request, **more):
        print(json.dumps({{"id": request["id"], **more}}), flush=True)
    def echo(request):
        tokens = request["prompt"][: request["max_tokens"]]
        times = {{"ttft_s": 0.5, "total_s": 1.0}}
        answer(request, result={{"tokens": tokens, **times, "cached_tokens": 0, "finish_reason": "length"}})
    told = json.loads(sys.stdin.readline())
    worker = subprocess.Popen(["sleep", "1000"])
    print(json.dumps({{"ready": {{"server": os.getpid(), "core": worker.pid, "workers": []}}}}), flush=True)
    late = []
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "shutdown":
            break
        if request["op"] == "reset_prefix_cache":
            answer(request, result=request["connector"])
        elif request["prompt"][0] == 0:
            print("told", json.dumps(told), file=sys.stderr, flush=True)
            answer(request, error="ValueError: a prompt of nothing")
        elif request["prompt"][0] == 7 and not late:
            late.append(request)
        elif request["prompt"][0] != 1:
            echo(request)
            if late:
                echo(late.pop())
"""


@pytest.fixture
def engine_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., client.Engine]]:
    """An engine whose Python is a program of ours, which does ``start`` before all else; its folder must go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def make(start: str = "", **more: Any) -> client.Engine:
        program = tmp_path / "engine"
        text = textwrap.dedent(ENGINE).format(start=start)
        program.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
        program.chmod(stat.S_IRWXU)
        return client.Engine(tmp_path / "model", python=program, **more)

    yield make
    assert list(tmp_path.glob("vllm-*")) == []


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _wait_gone(*pids: int) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not all(map(_gone, pids)):
        assert time.monotonic() < until, f"of {pids} some are left"
        time.sleep(0.01)


# The client


def test_answers_come_to_who_asked(engine_of: Callable[..., client.Engine]) -> None:
    with engine_of() as engine:
        requests = [engine.submit([7, n, 9], max_tokens=2) for n in range(10, 30)]
        for n, request in zip(range(10, 30), requests, strict=True):
            assert request.result(TIMEOUT_S) == client.Answer([7, n], 0.5, 1.0, 0, "length")
            assert request.done()
        assert engine.reset_prefix_cache() is False
        assert engine.reset_prefix_cache(connector=True) is True
        pids = engine.pids
    _wait_gone(pids.server, pids.core)


def test_what_the_engine_is_told(engine_of: Callable[..., client.Engine], tmp_path: Path) -> None:
    connector = client.shmcache_connector("kv", capacity="1MiB")
    with (
        engine_of(tp=3, connector=connector, arguments={"seed": 5}) as engine,
        pytest.raises(client.EngineError, match="^the engine answered ValueError: a prompt of nothing;"),
    ):
        engine.generate([0])
    told = json.loads(engine.log().partition("told ")[2])  # the log outlives the engine
    assert told["arguments"]["model"] == str(tmp_path / "model")
    assert told["arguments"]["tensor_parallel_size"] == 3
    assert told["arguments"]["seed"] == 5
    assert told["arguments"]["kv_transfer_config"]["kv_connector_extra_config"] == {"arena": "kv", "capacity": "1MiB"}
    assert not Path(told["folder"]).exists()


def test_an_engine_that_ends_at_its_start(engine_of: Callable[..., client.Engine]) -> None:
    with pytest.raises(client.EngineError) as caught, engine_of("raise ValueError('no such model')"):
        pytest.fail("it has started")
    assert caught.value.reason == "the engine has ended, exit code 1: ValueError: no such model"
    assert "raise ValueError" in str(caught.value)


def test_an_engine_that_does_not_start(engine_of: Callable[..., client.Engine], tmp_path: Path) -> None:
    note = tmp_path / "pid"
    start = f"open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(1000)"
    with pytest.raises(client.EngineError, match="does not answer in 2 s"), engine_of(start, start_timeout_s=2):
        pytest.fail("it has started")
    _wait_gone(int(note.read_text(encoding="utf-8")))


def test_a_python_that_is_none(engine_of: Callable[..., client.Engine], tmp_path: Path) -> None:
    engine = engine_of()
    (tmp_path / "engine").unlink()
    with pytest.raises(FileNotFoundError), engine:
        pytest.fail("it has started")


def test_an_answer_that_does_not_come(engine_of: Callable[..., client.Engine]) -> None:
    with engine_of() as engine:
        request = engine.submit([1])
        with pytest.raises(client.EngineError, match="does not answer in 0.1 s"):
            request.result(0.1)
        assert not request.done()


def test_an_engine_that_is_killed(engine_of: Callable[..., client.Engine]) -> None:
    with engine_of() as engine:
        request = engine.submit([1])
        engine.kill("all")
        with pytest.raises(client.EngineError, match="has ended, exit code -9"):
            request.result(TIMEOUT_S)
        with pytest.raises(client.EngineError, match="has ended, exit code -9"):
            engine.generate([5])
        _wait_gone(engine.pids.server, engine.pids.core)


def test_the_core_alone_is_killed(engine_of: Callable[..., client.Engine]) -> None:
    with engine_of() as engine:
        engine.kill("core")
        _wait_gone(engine.pids.core)
        assert engine.generate([5]).tokens == [5]
        with pytest.raises(IndexError):
            engine.kill("worker", rank=0)


def test_an_error_of_the_caller_ends_the_engine(engine_of: Callable[..., client.Engine]) -> None:
    with pytest.raises(KeyboardInterrupt), engine_of() as engine:
        raise KeyboardInterrupt
    _wait_gone(engine.pids.server, engine.pids.core)


def test_first_error() -> None:
    log = """\
(Worker_TP1 pid=7) ERROR 11-26 21:02:10 [multiproc_executor.py:1063]     raise Exception(
(Worker_TP1 pid=7) ERROR 11-26 21:02:10 [multiproc_executor.py:1063] Exception: only on GPUs
(EngineCore pid=6) ERROR 11-26 21:02:11 [core.py:1510] RuntimeError: Worker failed with error 'only on GPUs'
RuntimeError: Engine core initialization failed.
"""
    assert client.first_error(log) == "Exception: only on GPUs"
    assert client.first_error("Traceback (most recent call last):\nmodule.SomeError: it\n") == "module.SomeError: it"
    assert client.first_error("all is well\n") == "no exception in its log"


@pytest.mark.parametrize(
    ("cores", "tp", "bind"),
    [
        ({0, 1}, 2, "0|1"),
        ({0, 1}, 1, "0,1"),
        ({3}, 2, "3|3"),
        ({0, 2, 4, 6, 8}, 2, "0,2|4,6"),
        ({0, 1, 2}, 4, "0|1|2|0"),
    ],
)
def test_cores_of_ranks(monkeypatch: pytest.MonkeyPatch, cores: set[int], tp: int, bind: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: cores)
    assert client._cores(tp) == bind


# Where vLLM is


def test_a_named_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(client.VARIABLE, sys.executable)
    assert client.find_vllm() == Path(sys.executable)
    monkeypatch.setenv(client.VARIABLE, str(tmp_path / "python"))
    with pytest.raises(client.EngineError, match=f"^{client.VARIABLE}=.*: no program that can be run"):
        client.find_vllm()


def test_the_venv_of_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(client.VARIABLE, raising=False)
    monkeypatch.setattr(client, "__file__", str(tmp_path / "tools" / "package" / "client.py"))
    with pytest.raises(client.EngineError, match="^found no vLLM: expected SHMCACHE_VLLM_PYTHON"):
        client.find_vllm()
    python = tmp_path / client.VENV
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert client.find_vllm() == python


# Processes


def test_a_group_is_killed_whole() -> None:
    children = "[subprocess.Popen(['sleep', '1000']) for _ in '12']"
    program = f"import signal, subprocess; {children}; print(flush=True); signal.pause()"
    with subprocess.Popen(
        [sys.executable, "-c", program], start_new_session=True, stdout=subprocess.PIPE, bufsize=0
    ) as leader:
        assert leader.stdout is not None
        leader.stdout.readline()
        pids = processes.members(leader.pid)
        assert len(pids) == 3
        processes.kill_members(leader.pid, but=leader.pid)
        assert processes.members(leader.pid) == [leader.pid]
        processes.kill_group(leader.pid)
        assert processes.members(leader.pid) == []
    _wait_gone(*pids)


# The models


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 # no mapping


def test_llama(tmp_path: Path) -> None:
    models.write_llama(tmp_path, layers=3, hidden=64, heads=4, kv_heads=2)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["hidden_size"]) == (3, 64)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    shapes = _shapes(tmp_path)
    assert shapes["lm_head.weight"] == (models.VOCABULARY, 64)
    assert shapes["model.layers.2.self_attn.k_proj.weight"] == (32, 64)
    assert len(shapes) == 3 + 3 * 9


def test_mla(tmp_path: Path) -> None:
    models.write_mla(tmp_path, layers=1)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["DeepseekV2ForCausalLM"]
    assert config["kv_lora_rank"] + config["qk_rope_head_dim"] == 576
    shapes = _shapes(tmp_path)
    assert shapes["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == (576, config["hidden_size"])
    assert not [name for name in shapes if "experts" in name]


def test_a_seed_makes_a_model(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        models.write_llama(tmp_path / name, layers=1, hidden=64, heads=4, seed=seed)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1]
    assert files[0] != files[2]


# The bench


def _found(common: ModuleType) -> tuple[list[Any], Any]:
    kept = common.Finding(
        common.KEPT,
        ttft=[0.01, 0.02, 0.04],
        recomputed=[0.2, 0.2, 0.2],
        kept=[0.01, 0.02, 0.04],
        cached=[1792] * 3,
        same=[True] * 3,
    )
    more: dict[str, Any] = {"recomputed": [0.2, 0.3], "kept": [0.02, 0.01]}
    slow = common.Finding(common.RESET, [0.1, 0.1], cached=[1792, 0], same=[True, True], least_ratio=4.0, **more)
    wrong = common.Finding(common.L2, [0.01, 0.01], cached=[1792, 1792], same=[True, False], least_ratio=2.0, **more)
    none = common.Finding("vLLM's Connector: emptied", problem="ValueError: not on this device")
    return [kept, slow, wrong, none], common.Memory(one_engine=100 << 20, shared=100 << 20, apart=200 << 20)


def test_goals(bench: Callable[[str], ModuleType]) -> None:
    (kept, slow, wrong, none), memory = _found(bench("vllm_common"))
    assert (kept.ratio, kept.of_bound, kept.met) == (10, 1, None)
    assert (slow.ratio, slow.met) == (2.5, False)
    assert slow.of_bound == pytest.approx(0.15)
    assert wrong.ratio == 25
    assert wrong.met is False, "wrong tokens meet no goal"
    assert (none.ratio, none.of_bound, none.met) == (None, None, None)
    assert memory.saving == 0.5
    assert memory.met


def test_report(bench: Callable[[str], ModuleType]) -> None:
    found, memory = _found(bench("vllm_common"))
    file = io.StringIO()
    bench("vllm").report(Console(file=file, width=160, markup=False, highlight=False), found, memory)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert lines[1].split()[-3:] == ["ratio", "goal", "tokens"]
    (row,) = [line for line in lines if line.startswith("shmcache: arena gone")]
    assert row.split("  ")[-1].strip() == "1 of 2 differ"
    assert "missed" in row
    assert "vLLM's Connector does not run here: ValueError: not on this device" in lines
    (row,) = [line for line in lines if line.startswith("shmcache: vLLM's cache emptied")]
    assert " ".join(row.split()[4:]) == "100 ms 100 ms 100 ms 896 15.0 % 2.50 x at least 4 x missed same"
    (row,) = [line for line in lines if line.startswith("two engines, one arena")]
    assert " ".join(row.split()) == "two engines, one arena 100 MiB 50.0 % at least 45.0 % met"
    assert lines[-1] == "1 of 3 goals met"


def test_json(bench: Callable[[str], ModuleType]) -> None:
    found, memory = _found(bench("vllm_common"))
    document = json.loads(json.dumps(bench("vllm").as_dict({"vllm": Path("/python")}, found, memory)))
    assert document["machine"] == {"vllm": "/python"}
    assert [line["ratio"] for line in document["findings"]] == [10, 2.5, 25, None]
    assert document["findings"][0]["median"] == 0.02
    assert document["findings"][3]["median"] is None
    assert document["memory"]["saving"] == 0.5


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot(bench: Callable[[str], ModuleType], tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    found, memory = _found(bench("vllm_common"))
    path = tmp_path / f"plot.{ending}"
    bench("vllm_plot").save_plot(path, "title", found, memory)
    assert path.stat().st_size > 5000


def _run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "vllm.py"), *args]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False)


@pytest.mark.parametrize(
    "wrong", [["--prompts", "0"], ["--prompt-tokens", "5000"], ["--tp", "x"], ["--plot", "vllm.pdf"], ["more"]]
)
def test_usage(wrong: list[str]) -> None:
    found = _run(*wrong)
    assert found.returncode == 2
    assert "error: " in found.stderr
    assert found.stdout == ""


def test_without_vllm_it_says_so(tmp_path: Path) -> None:
    found = _run(SHMCACHE_VLLM_PYTHON=str(tmp_path / "none"))
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr.startswith("vllm.py: SHMCACHE_VLLM_PYTHON=")


def test_an_engine_that_ends() -> None:
    found = _run("--quick", SHMCACHE_VLLM_PYTHON="/bin/false")
    assert found.returncode == 1
    assert found.stderr.startswith("vllm.py: the engine has ended, exit code 1: ")
    assert "goals" not in found.stdout
