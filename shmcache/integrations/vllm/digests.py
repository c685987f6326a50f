"""Digests of facts, and of weights wherever they lie. Nothing in a file is trusted."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final

__all__ = ["IDENTITY_BYTES", "digest", "fresh_identity", "weights_digest"]

_log = logging.getLogger("vllm.shmcache")

IDENTITY_BYTES: Final = 16

_WEIGHTS: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_SAMPLE_BYTES: Final = 4096
_SAMPLES: Final = 256  #: of a file whose tensors are not known
_MOST_HEADER_BYTES: Final = 100 << 20  #: as the format's own readers have it


def digest(facts: Mapping[str, object]) -> bytes:
    """16 bytes that differ where any of the facts (as JSON) does."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=IDENTITY_BYTES).digest()


def fresh_identity() -> bytes:
    """An identity that nobody else has, nor ever had."""
    return secrets.token_bytes(IDENTITY_BYTES)


def weights_digest(where: Path) -> str:
    """Of the weights in a folder, or in one file, wherever it lies and whenever it was copied there.

    Of safetensors it reads the headers and 4 KiB out of the middle of every tensor, of other formats 256 times 4 KiB a
    file, so that it takes a second, not minutes; weights that differ nowhere there pass for the same. Small JSON files
    count whole, as they tell how weights are used, but those of the tokenizer, whose tokens keys tell. A folder without
    weights is warned of. OSError where something cannot be read.
    """
    found = hashlib.blake2b(digest_size=IDENTITY_BYTES)
    files = sorted(path for path in where.iterdir() if path.is_file()) if where.is_dir() else [where]
    weights = [path for path in files if path.suffix in _WEIGHTS]
    if not weights:
        _log.warning("%s: no weights are known there, so keys do not tell them; never change them in that place", where)
    for path in [*weights, *filter(_tells_use, files)]:
        found.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            for sample in _samples(file, path):
                found.update(sample)
    return found.hexdigest()


def _tells_use(path: Path) -> bool:
    other = path.name.startswith(("tokenizer", "vocab")) or path.name.endswith(".index.json")
    return path.suffix == ".json" and not other and path.stat().st_size <= _SAMPLES * _SAMPLE_BYTES


def _samples(file: BinaryIO, path: Path) -> Iterator[bytes]:
    places, size = None, path.stat().st_size
    if path.suffix == ".safetensors" and (header := _header(file)):
        yield header
        places = _tensors(header, size)
    if places is None:  # all of it, where it is no larger than the samples together
        apart = max(size // _SAMPLES, _SAMPLE_BYTES)
        places = list(range(0, size, apart))
    for place in places:
        file.seek(place)
        yield file.read(_SAMPLE_BYTES)


def _header(file: BinaryIO) -> bytes | None:
    """The JSON at the head of a file of safetensors; None where it is none."""
    raw = file.read(8)
    size = struct.unpack("<Q", raw)[0] if len(raw) == 8 else 0
    return file.read(size) if 0 < size <= _MOST_HEADER_BYTES else None


def _tensors(header: bytes, size: int) -> list[int] | None:
    """Where in a file of ``size`` bytes the middle of each tensor lies; None where the header says no such thing."""
    try:
        spans = [one["data_offsets"] for name, one in json.loads(header).items() if name != "__metadata__"]
        places = [8 + len(header) + max(start, (start + stop - _SAMPLE_BYTES) // 2) for start, stop in spans]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return places if all(type(place) is int and 0 <= place <= size for place in places) else None
