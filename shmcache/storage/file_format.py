"""The header of an object's file. The format is safetensors, so that any tool of the field opens the file.

::

    8 bytes     length of the text, little-endian
    text        JSON, padded with spaces so that the object begins at a multiple of 4096
    the object  as it lies in the arena

The text names dtype, shape and place of the tensors "0", "1", ... and, since safetensors allows no holes, of the
padding between them as "pad.0", ... of bytes. What safetensors has no dtype for is bytes, too. ``__metadata__`` says
what the object is: its key in hex, its layout as ``Layout.encode`` has it (with the true dtypes), its checksum.

An object has one header and no other: the same key, layout and checksum give the same bytes. So a header is not parsed
but recognised: it is ours only if it is, byte for byte, what we would have written. Nothing in it is believed.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any, Final, NamedTuple

from shmcache.layout import Layout, TensorSpec

__all__ = ["ALIGNMENT", "Header", "decode_header", "encode_header", "header_nbytes"]

# The safetensors library does not write or read these files: it has no call that reads into memory given to it.

ALIGNMENT: Final = 4096  #: bytes; a page, so that pages of the file are pages of the arena. Most headers are so long.
_MAX_NBYTES: Final = 65536  #: of a header; 480 bytes of encoded layout give 12 KiB at most

_DTYPES: Final = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4",
}

# The checksum and the key, which differ from object to object; then what is the same for all objects of a layout.
_TEXT: Final = re.compile(
    rb'.{8}\{"__metadata__":\{"shmcache":"1","xxh3_64":"([0-9a-f]{16})","key":"([0-9a-f]{2,128})",', re.DOTALL
)
_PADDING: Final = b" " * ALIGNMENT  # and never so much
_LAYOUT: Final = re.compile(rb'"layout":"([a-z0-9_,;\[\]]{1,480})"')


class Header(NamedTuple):
    """What a file says that it holds."""

    key: bytes
    layout: Layout
    checksum: int  #: xxh3_64 of the object's bytes


def encode_header(header: Header) -> bytes:
    """The bytes before the object's."""
    own = f'{{"__metadata__":{{"shmcache":"1","xxh3_64":"{header.checksum:016x}","key":"{header.key.hex()}",'
    text = own.encode("ascii") + _common(header.layout)
    nbytes = _aligned(8 + len(text))
    return (nbytes - 8).to_bytes(8, "little") + text.ljust(nbytes - 8)


def header_nbytes(begin: bytes | bytearray) -> int | None:
    """How long the header is of which at least 8 bytes are given; None if it is none of ours."""
    nbytes = 8 + int.from_bytes(begin[:8], "little")
    return None if nbytes % ALIGNMENT or nbytes > _MAX_NBYTES else nbytes


def decode_header(header: bytes | bytearray) -> Header | None:
    """What a header says, of which is given what :func:`header_nbytes` tells; None if it is none of ours."""
    match = _TEXT.match(header)
    if match is None or len(match[2]) % 2:
        return None
    end = header.rfind(b"}") + 1
    layout = _recognised(bytes(header[match.end() : end]))
    padded = header.endswith(_PADDING[: len(header) - end])
    if layout is None or not padded or len(header) != _aligned(end):
        return None
    return Header(bytes.fromhex(match[2].decode("ascii")), layout, int(match[1], 16))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@lru_cache(maxsize=64)
def _recognised(common: bytes) -> Layout | None:
    """The layout of which this is the text."""
    match = _LAYOUT.match(common)
    try:
        layout = None if match is None else Layout.decode(match[1])
    except ValueError:
        return None
    return layout if layout is not None and _common(layout) == common else None


@lru_cache(maxsize=64)
def _common(layout: Layout) -> bytes:
    """The text from the layout on, without the spaces at the end."""
    entries: dict[str, Any] = {}
    end = 0
    for i, spec in enumerate(layout.specs):
        if spec.offset > end:
            entries[f"pad.{i - 1}"] = _entry("U8", [spec.offset - end], end, spec.offset)
        end = spec.offset + spec.nbytes
        entries[str(i)] = _entry(*_dtype_and_shape(spec), spec.offset, end)
    tensors = json.dumps(entries, separators=(",", ":"))[1:]
    return b'"layout":"%b"},%b' % (layout.encode(), tensors.encode("ascii"))


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _dtype_and_shape(spec: TensorSpec) -> tuple[str, list[int]]:
    """A tensor in the terms of safetensors."""
    dtype, shape = _DTYPES.get(spec.dtype), list(spec.shape)
    if dtype is None:
        return "U8", [spec.nbytes]
    if dtype == "F4":  # counts numbers, where torch counts bytes of two
        return dtype, [*shape[:-1], 2 * shape[-1]] if shape else [2]
    return dtype, shape
