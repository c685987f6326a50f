"""What a key says beside the tokens: facts of the engine, and weights, of which nothing is trusted."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shmcache.integrations.vllm import identity as identity_module
from shmcache.integrations.vllm.digests import IDENTITY_BYTES, digest, fresh_identity, weights_digest
from shmcache.integrations.vllm.identity import Identity


def tensors(layers: int = 3) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    return {f"layer.{i}": torch.randn(50, 60, generator=chance) for i in range(layers)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "model"
    found.mkdir()
    save_file(tensors(), found / "model.safetensors")
    (found / "config.json").write_text('{"layers": 3}')
    return found


def write_header(folder: Path, header: bytes, size: int | None = None, payload: bytes = b"\0" * 5000) -> None:
    size = len(header) if size is None else size
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + header + payload)


# Facts


def test_a_digest_tells_every_fact_and_not_their_order() -> None:
    facts = {"dtype": "bfloat16", "ranks": 2, "shape": {"parts": [1, 2]}}
    found = digest(facts)
    assert len(found) == IDENTITY_BYTES
    assert found == digest(dict(reversed(facts.items())))
    others = [{**facts, "dtype": "float16"}, {**facts, "ranks": 4}, {**facts, "shape": {"parts": [2, 1]}}, {}]
    assert len({found, *map(digest, others)}) == 5


def test_a_digest_takes_what_is_no_json() -> None:
    assert digest({"path": Path("/a")}) != digest({"path": Path("/b")})


def test_a_fresh_identity_is_new() -> None:
    assert len({fresh_identity() for _ in range(100)}) == 100
    assert len(fresh_identity()) == IDENTITY_BYTES


# Weights


@pytest.mark.parametrize("name", ["layer.0", "layer.1", "layer.2"])
def test_a_changed_tensor_is_found(folder: Path, name: str) -> None:
    before = weights_digest(folder)
    changed = tensors()
    changed[name] += 1
    save_file(changed, folder / "model.safetensors")
    assert weights_digest(folder) != before


def test_a_changed_middle_is_found(folder: Path) -> None:
    """What is read of a large tensor lies in its middle."""
    large = torch.zeros(100_000)
    save_file({"w": large}, folder / "model.safetensors")
    before = weights_digest(folder)
    large[50_000] = 1
    save_file({"w": large}, folder / "model.safetensors")
    assert weights_digest(folder) != before


def test_a_tensor_that_is_called_otherwise_is_found(folder: Path) -> None:
    before = weights_digest(folder)
    save_file({name.replace("2", "7"): tensor for name, tensor in tensors().items()}, folder / "model.safetensors")
    assert weights_digest(folder) != before


def test_where_it_lies_and_since_when_does_not_matter(folder: Path, tmp_path: Path) -> None:
    before = weights_digest(folder)
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    links = tmp_path / "links"
    links.mkdir()
    for path in copy.iterdir():
        (links / path.name).symlink_to(path)
    assert weights_digest(copy) == weights_digest(links) == before


def test_what_tells_no_use_of_the_weights_does_not_matter(folder: Path) -> None:
    before = weights_digest(folder)
    for name in ("README.md", "tokenizer.json", "tokenizer_config.json", "vocab.json", "model.safetensors.index.json"):
        (folder / name).write_text("new")
    (folder / "other.safetensors").mkdir()
    (folder / "large.json").write_bytes(bytes((1 << 20) + 1))
    assert weights_digest(folder) == before


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "generation_config.json"])
def test_what_tells_their_use_counts_whole(folder: Path, name: str) -> None:
    content = bytearray(os.urandom(1 << 20))
    (folder / name).write_bytes(content)
    before = weights_digest(folder)
    content[(1 << 20) - 1] ^= 1
    (folder / name).write_bytes(content)
    changed = weights_digest(folder)
    content[500_000] ^= 1
    (folder / name).write_bytes(content)
    assert len({before, changed, weights_digest(folder)}) == 3


def test_every_file_of_weights_matters(folder: Path) -> None:
    before = weights_digest(folder)
    save_file({"more": torch.ones(3)}, folder / "model-2.safetensors")
    more = weights_digest(folder)
    (folder / "model-2.safetensors").rename(folder / "model-3.safetensors")
    assert len({before, more, weights_digest(folder)}) == 3


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".gguf"])
def test_other_formats_are_sampled(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    content = bytearray(os.urandom(300_000))
    path.write_bytes(content)
    before = weights_digest(tmp_path)
    content[150_000] ^= 1
    path.write_bytes(content)
    changed = weights_digest(tmp_path)
    path.write_bytes(content + b"1")
    assert len({before, changed, weights_digest(tmp_path)}) == 3


def test_a_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"1" * 5000)
    before = weights_digest(path)
    (tmp_path / "other.gguf").write_bytes(b"2")
    assert weights_digest(path) == before
    path.write_bytes(b"1" * 4999 + b"2")
    assert weights_digest(path) != before


def test_a_folder_without_weights_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nothing = weights_digest(tmp_path)
    assert f"{tmp_path}: no weights are known there" in caplog.text
    (tmp_path / "config.json").write_text("{}")
    assert weights_digest(tmp_path) != nothing
    (tmp_path / "model.safetensors").write_bytes(b"")
    caplog.clear()
    weights_digest(tmp_path)
    assert not caplog.text


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing"):
        weights_digest(tmp_path / "nothing.safetensors")


# Headers of which nothing is trusted


def of(spans: Any) -> bytes:
    return json.dumps({"w": {"data_offsets": spans}}).encode()


@pytest.mark.parametrize(
    "header",
    [
        b"no json",
        b"\xff\xfe",
        b"[1, 2]",
        b'"text"',
        b"7",
        b"null",
        b'{"w": 5}',
        b'{"w": {}}',
        b'{"w": null}',
        b"[" * 100_000,
        b'{"w":' * 100_000,
        of([1, 2, 3]),
        of([1]),
        of("ab"),
        of(None),
        of(["1", "2"]),
        of([None, 2]),
        of([0.5, 1.5]),
        of([float("nan"), 1]),
        of([float("inf"), float("inf")]),
        of([True, False]),
        of([[1], [2]]),
        of([-(10**6), -(10**6)]),
        of([10**9, 10**9]),
        of([2**70, 2**70]),
        of([2**63, 2**63 + 5]),
        of([0, 2**200]),
        b'{"__metadata__": 5}',
    ],
)
def test_a_broken_header_is_sampled_like_other_files(tmp_path: Path, header: bytes) -> None:
    write_header(tmp_path, header)
    before = weights_digest(tmp_path)
    assert weights_digest(tmp_path) == before
    write_header(tmp_path, header + b" ")
    assert weights_digest(tmp_path) != before


@pytest.mark.parametrize("header", [b"no json", b"[1, 2]", of([0.5, 1.5]), of([2**70, 2**70]), of([-(10**6), 0])])
def test_bytes_behind_a_broken_header_are_read(tmp_path: Path, header: bytes) -> None:
    write_header(tmp_path, header)
    before = weights_digest(tmp_path)
    write_header(tmp_path, header, payload=b"\0" * 4999 + b"1")
    assert weights_digest(tmp_path) != before


@pytest.mark.parametrize("size", [0, 2**20, 100 << 20, (100 << 20) + 1, 2**63, 2**64 - 1])
def test_a_length_that_lies(tmp_path: Path, size: int) -> None:
    write_header(tmp_path, of([0, 100]), size)
    before = weights_digest(tmp_path)
    assert weights_digest(tmp_path) == before
    write_header(tmp_path, of([0, 101]), size)
    assert weights_digest(tmp_path) != before


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 5)])
def test_a_file_that_is_too_short_for_a_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert weights_digest(tmp_path) == weights_digest(tmp_path)


# An engine


def engine(folder: Path) -> SimpleNamespace:
    """vLLM's configuration, as far as it is looked at."""
    hf_config = SimpleNamespace(to_dict=lambda: dict(hf_config.told), told={"layers": 3, "_name_or_path": "/a"})
    model = SimpleNamespace(
        model=str(folder),
        model_weights="",
        revision=None,
        seed=0,
        hf_config=hf_config,
        max_model_len=4096,
        override_generation_config={},
        multimodal_config=None,
        dtype="bfloat16",
        quantization=None,
    )
    return SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=16),
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=None,
    )


def identity(config: SimpleNamespace, **request: Any) -> bytes:
    return Identity(config, {"layout": "LBNHC"}).of(SimpleNamespace(**request))


Change = Callable[[Any], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda config: setattr(config.model_config, "dtype", "float16"),
        lambda config: setattr(config.model_config, "quantization", "fp8"),
        lambda config: setattr(config.cache_config, "cache_dtype", "fp8"),
        lambda config: setattr(config.cache_config, "block_size", 32),
        lambda config: setattr(config.model_config, "override_generation_config", {"attn_temperature_tuning": True}),
        lambda config: setattr(config.model_config, "multimodal_config", SimpleNamespace(mm_processor_kwargs={"a": 1})),
        lambda config: config.model_config.hf_config.told.update(rope_theta=5),
        lambda config: setattr(config.load_config, "load_format", "dummy"),
        lambda config: save_file({"w": torch.ones(3)}, Path(config.model_config.model) / "more.safetensors"),
    ],
)
def test_facts_that_make_another_engine(folder: Path, change: Change) -> None:
    config = engine(folder)
    before = identity(config)
    assert len(before) == IDENTITY_BYTES
    change(config)
    assert identity(config) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda config: setattr(config.model_config, "seed", 7),
        lambda config: setattr(config.model_config, "max_model_len", 8192),
        lambda config: setattr(config.load_config, "load_format", "safetensors"),
        lambda config: config.model_config.hf_config.told.update(_name_or_path="/b"),
        lambda config: setattr(config.model_config, "revision", "main"),
    ],
)
def test_facts_that_do_not(folder: Path, change: Change) -> None:
    config = engine(folder)
    before = identity(config)
    change(config)
    assert identity(config) == before


def test_memory_makes_another_engine(folder: Path) -> None:
    config, request = engine(folder), SimpleNamespace()
    found = {Identity(config, memory).of(request) for memory in ({"layout": "LBNHC"}, {"layout": "LBHNC"}, {})}
    assert len(found) == 3


@pytest.mark.parametrize("told", [{"rope_scaling": {"rope_type": "longrope"}}, {"model_type": "llama4"}])
def test_where_the_length_matters(folder: Path, told: dict[str, object]) -> None:
    config = engine(folder)
    config.model_config.hf_config.told.update(told)
    before = identity(config)
    config.model_config.max_model_len = 8192
    assert identity(config) != before


def test_weights_that_are_made_up_come_from_the_seed(folder: Path) -> None:
    config = engine(folder)
    config.load_config.load_format = "dummy"
    before = identity(config)
    config.model_config.seed = 7
    assert identity(config) != before


def test_the_folder_does_not_matter(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert identity(engine(folder)) == identity(engine(copy))


def test_models_of_the_hub(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def hub(name: str, revision: str | None, commit: str | None = None, weights: str = "") -> bytes:
        config = engine(folder)
        config.model_config.model, config.model_config.revision = name, revision
        config.model_config.hf_config._commit_hash = commit
        config.model_config.model_weights = weights
        return identity(config)

    assert not caplog.text
    found = [hub("org/a", "main"), hub("org/b", "main"), hub("org/a", "v2"), hub("org/a", "main", "1f2e")]
    assert not caplog.text
    found += [hub("org/a", None), hub("org/a", None, weights="s3://bucket/a")]
    assert "model org/a: no revision is known" in caplog.text
    assert "model s3://bucket/a: no revision is known" in caplog.text
    assert len(set(found)) == 6
    assert hub("org/a", "v3", "1f2e") == found[3]


def test_a_draft_model(folder: Path, tmp_path: Path) -> None:
    def with_draft(model: Path | None) -> bytes:
        config = engine(folder)
        draft = model and SimpleNamespace(model=str(model), revision=None)
        config.speculative_config = SimpleNamespace(draft_model_config=draft)
        return identity(config)

    draft = tmp_path / "draft"
    draft.mkdir()
    save_file({"w": torch.ones(3)}, draft / "model.safetensors")
    one = with_draft(draft)
    save_file({"w": torch.zeros(3)}, draft / "model.safetensors")
    assert len({one, with_draft(draft), identity(engine(folder))}) == 3
    assert with_draft(None) == with_draft(folder) == identity(engine(folder))


def test_adapters(folder: Path, tmp_path: Path) -> None:
    found = Identity(engine(folder), {})

    def of(path: Path) -> bytes:
        return found.of(SimpleNamespace(lora_request=SimpleNamespace(lora_path=str(path))))

    paths = [tmp_path / name for name in ("one", "two", "three")]
    for number, path in enumerate(paths):
        path.mkdir()
        save_file({"w": torch.full((3,), number // 2)}, path / "adapter_model.safetensors")
    base = found.of(SimpleNamespace(lora_request=None))
    assert base == found.of(SimpleNamespace())
    one, same, other = map(of, paths)
    assert one == same
    assert len({base, one, other}) == 3
    save_file({"w": torch.full((3,), 9)}, paths[0] / "adapter_model.safetensors")
    changed = of(paths[0])
    assert changed not in {base, one, other}, "vLLM loads adapters anew in their place"
    assert of(paths[0]) == changed


def test_an_adapter_that_cannot_be_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its KV is the engine's own."""
    one, other = Identity(engine(folder), {}), Identity(engine(folder), {})

    def unreadable(_: Path) -> str:
        raise PermissionError("not yours")

    monkeypatch.setattr(identity_module, "weights_digest", unreadable)
    request = SimpleNamespace(lora_request=SimpleNamespace(lora_path=str(folder)))
    assert len({one.of(request), other.of(request), one.of(SimpleNamespace())}) == 3
    assert "its KV is not shared, as it cannot be read: not yours" in caplog.text
