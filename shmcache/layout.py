"""Layouts: dtype and shape of an object's tensors, and the arrays and tensors that show an object's bytes.

Tensors of one layout lie one after the other, each at a multiple of 64 bytes from the object's start.
The padding between them counts in ``nbytes``; there is none after the last.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, final, overload

import numpy as np
import numpy.typing as npt

from shmcache.config import shown

if TYPE_CHECKING:
    import torch

ALIGNMENT: Final = 64  #: bytes
MAX_NBYTES: Final = 2**48
MAX_ENCODED: Final = 480  #: bytes that the arena's layout table has for one layout
MAX_NDIM: Final = 32  #: numpy's limit before 2.0

Array: TypeAlias = npt.NDArray[Any]


class _Dtype(NamedTuple):
    itemsize: int  # bytes
    numpy: np.dtype[Any]  # of the same width, the same dtype where numpy has it
    same: bool  # whether it is the same


def _own(*names: str) -> dict[str, _Dtype]:
    return {name: _Dtype(np.dtype(name).itemsize, np.dtype(name), True) for name in names}


def _foreign(stand_in: str, *names: str) -> dict[str, _Dtype]:
    return {name: _Dtype(np.dtype(stand_in).itemsize, np.dtype(stand_in), False) for name in names}


_DTYPES: Final[dict[str, _Dtype]] = {
    **_own("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    **_own("float16", "float32", "float64", "complex64", "complex128"),
    **_foreign("uint16", "bfloat16"),
    **_foreign("uint8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    **_foreign("uint8", "float8_e8m0fnu", "float4_e2m1fn_x2"),  # the latter is two numbers an element
}

_UINT8: Final = np.dtype(np.uint8)
_SPEC: Final = re.compile(r"([a-z0-9_]+)\[((?:[1-9][0-9]{0,14}(?:,[1-9][0-9]{0,14})*)?)\]", re.ASCII)


class TensorSpec(NamedTuple):
    """One tensor of a layout."""

    shape: tuple[int, ...]  #: elements a dimension; () is one element
    dtype: str  #: torch's name without ``torch.``
    offset: int  #: bytes from the object's start, a multiple of 64
    nbytes: int  #: bytes of this tensor, without padding


@final
class Layout:
    """Dtype and shape of the tensors of one object; immutable, hashable.

    ``Layout(shape, dtype)`` or ``Layout([(shape, dtype), ...])``. A shape is a sequence of ints, each at
    least 1. A dtype is torch's name ("bfloat16", "float8_e4m3fn", "float32", ...), a ``torch.dtype`` or a
    numpy dtype in native byte order. TypeError or ValueError names what is wrong: an unknown dtype, a
    dimension below 1, more than 32 dimensions, more than 2**48 bytes, or more tensors than 480 bytes of
    :meth:`encode` can describe.
    """

    __slots__ = ("_encoded", "nbytes", "specs")

    specs: tuple[TensorSpec, ...]  #: the tensors in their order
    nbytes: int  #: bytes of one object: the end of its last tensor
    _encoded: bytes

    @overload
    def __init__(self, shape: Sequence[int], dtype: object) -> None: ...
    @overload
    def __init__(self, shape: Iterable[tuple[Sequence[int], object]]) -> None: ...
    def __init__(self, shape: Sequence[int] | Iterable[tuple[Sequence[int], object]], dtype: object = None) -> None:
        pairs = _pairs(shape) if dtype is None else [(shape, dtype)]
        specs: list[TensorSpec] = []
        end = 0
        for pair_shape, pair_dtype in pairs:
            specs.append(_spec(pair_shape, pair_dtype, _aligned(end)))
            end = specs[-1].offset + specs[-1].nbytes
        if end > MAX_NBYTES:
            raise ValueError(f"layout: expected at most 2**48 bytes, got {end}")
        encoded = ";".join(f"{s.dtype}[{','.join(map(str, s.shape))}]" for s in specs).encode("ascii")
        if len(encoded) > MAX_ENCODED:
            raise ValueError(
                f"layout: expected a description of at most {MAX_ENCODED} bytes, got {len(encoded)} bytes "
                f"for {len(specs)} tensors; those of one shape and dtype can be one with one more dimension"
            )
        for name, value in (("specs", tuple(specs)), ("nbytes", end), ("_encoded", encoded)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Layout is immutable; its {name} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Layout is immutable; its {name} cannot be deleted")

    def __reduce__(self) -> tuple[type[Layout], tuple[list[tuple[tuple[int, ...], str]]]]:
        return Layout, ([(spec.shape, spec.dtype) for spec in self.specs],)

    def __eq__(self, other: object) -> bool:
        return self._encoded == other._encoded if isinstance(other, Layout) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._encoded)

    def __repr__(self) -> str:
        if len(self.specs) == 1:
            return f"Layout({self.specs[0].shape}, {self.specs[0].dtype!r})"
        return f"Layout({[(spec.shape, spec.dtype) for spec in self.specs]})"

    def encode(self) -> bytes:
        """The layout as canonical ASCII text, at most 480 bytes: equal layouts give equal bytes.

        ``b"bfloat16[2,16,128];float32[]"``: dtype and shape of each tensor.
        """
        return self._encoded

    @classmethod
    def decode(cls, encoded: bytes) -> Layout:
        """The layout that :meth:`encode` described; ValueError for whatever it cannot have written."""
        if len(encoded) > MAX_ENCODED:
            raise ValueError(f"encoded layout: expected at most {MAX_ENCODED} bytes, got {len(encoded)}")
        pairs: list[tuple[list[int], str]] = []
        for part in bytes(encoded).decode("ascii", errors="replace").split(";"):
            match = _SPEC.fullmatch(part)
            if match is None or match[1] not in _DTYPES:
                raise ValueError(f"encoded layout: expected dtype[n,n,...], got {shown(part)}")
            pairs.append(([int(n) for n in match[2].split(",")] if match[2] else [], match[1]))
        return cls(pairs)

    def arrays(self, buffer: npt.NDArray[np.uint8], start: int = 0) -> Array | tuple[Array, ...]:
        """numpy arrays over the bytes of one object, without a copy.

        ``buffer``: uint8, one-dimensional, contiguous; the object is ``nbytes`` of it from ``start`` on. Returns one
        array, or a
        tuple where the layout has several tensors; read-only if ``buffer`` is. A dtype that numpy lacks
        (bfloat16, float8) comes as unsigned integers of its width.

        Each array, and each slice of one, refers to ``buffer`` itself where ``buffer`` is the first array
        over its memory (as from ``np.frombuffer``); for a slice of another array numpy refers to that one.
        """
        self._check(buffer, start)
        arrays = [np.ndarray(s.shape, _DTYPES[s.dtype].numpy, buffer, start + s.offset) for s in self.specs]
        return arrays[0] if len(arrays) == 1 else tuple(arrays)

    def tensors(self, buffer: npt.NDArray[np.uint8], start: int = 0) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """torch tensors over the bytes of one object, without a copy; like :meth:`arrays`, with all dtypes.

        torch has no read-only tensors: writing into one whose ``buffer`` is read-only memory ends the
        process (SIGSEGV). Each tensor, and each view of one, refers to ``buffer``.
        """
        self._check(buffer, start)
        arrays: Iterable[Array]
        if buffer.flags.writeable:
            arrays = [np.ndarray(s.shape, _DTYPES[s.dtype].numpy, buffer, start + s.offset) for s in self.specs]
        else:
            address = buffer.__array_interface__["data"][0] + start
            arrays = [np.asarray(_Unguarded(buffer, address + s.offset, s)) for s in self.specs]
        tensors = tuple(map(_tensor, arrays, self.specs))
        return tensors[0] if len(tensors) == 1 else tensors

    def tensors_over(self, memory: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The same over device memory: ``memory`` is one-dimensional, uint8, the bytes of one object."""
        tensors = tuple(
            memory[s.offset : s.offset + s.nbytes].view(_torch_dtype(s.dtype)).view(s.shape) for s in self.specs
        )
        return tensors[0] if len(tensors) == 1 else tensors

    def _check(self, buffer: npt.NDArray[np.uint8], start: int) -> None:
        if not isinstance(buffer, np.ndarray):
            raise TypeError(f"buffer: expected a numpy array, got {type(buffer).__name__}")
        if buffer.dtype != _UINT8 or buffer.ndim != 1 or not buffer.flags.c_contiguous:
            raise ValueError(
                f"buffer: expected a contiguous one-dimensional uint8 array, got {buffer.dtype} of shape {buffer.shape}"
            )
        if not 0 <= start <= buffer.nbytes - self.nbytes:
            raise ValueError(f"buffer: expected {self.nbytes} bytes from {start} on, got {buffer.nbytes} in all")


class _Unguarded:
    """Read-only memory that numpy takes for writable, for the way into torch only.

    ``torch.from_numpy`` warns of an array that is not writable, and a warning can only be caught for the
    whole process (``warnings.catch_warnings`` is not thread-safe). ``torch.from_dlpack`` refuses such an
    array unless numpy and torch are both recent. So torch is given an array that says it is writable;
    the memory stays as protected as it was. numpy keeps this object alive as the array's base, and it
    keeps ``buffer``.
    """

    __slots__ = ("__array_interface__", "buffer")

    def __init__(self, buffer: npt.NDArray[np.uint8], address: int, spec: TensorSpec) -> None:
        self.buffer = buffer
        self.__array_interface__ = {
            "version": 3,
            "shape": spec.shape,
            "typestr": _DTYPES[spec.dtype].numpy.str,
            "data": (address, False),
        }


def _tensor(array: Array, spec: TensorSpec) -> torch.Tensor:
    import torch  # noqa: PLC0415 - optional and slow to import, so only where somebody asks for tensors

    tensor = torch.from_numpy(array)
    return tensor if _DTYPES[spec.dtype].same else tensor.view(_torch_dtype(spec.dtype))


def _torch_dtype(name: str) -> torch.dtype:
    import torch  # noqa: PLC0415 - as above

    dtype: torch.dtype | None = getattr(torch, name, None)
    if dtype is None:
        raise TypeError(f"torch {torch.__version__} has no dtype {name}; a later one is needed")
    return dtype


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _pairs(pairs: object) -> list[tuple[Any, Any]]:
    """The (shape, dtype) pairs of ``Layout(pairs)``; what is in them is checked by ``_spec``."""
    if not isinstance(pairs, (list, tuple)):
        raise TypeError(f"layout: expected shape and dtype, or a list of (shape, dtype), got {shown(pairs)}")
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise TypeError(f"layout: expected (shape, dtype), got {shown(pair)}; is the dtype missing?")
    if not pairs:
        raise ValueError("layout: expected at least one tensor, got none")
    return [(shape, dtype) for shape, dtype in pairs]


def _spec(shape: object, dtype: object, offset: int) -> TensorSpec:
    dims = _check_shape(shape)
    name = _check_dtype(dtype)
    nbytes = math.prod(dims) * _DTYPES[name].itemsize
    if nbytes > MAX_NBYTES:
        raise ValueError(f"layout: expected at most 2**48 bytes, got {name} of shape {shown(dims)}")
    return TensorSpec(dims, name, offset, nbytes)


def _check_shape(shape: object) -> tuple[int, ...]:
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence):
        raise TypeError(f"shape: expected a sequence of ints, got {shown(shape)}")
    if len(shape) > MAX_NDIM:
        raise ValueError(f"shape: expected at most {MAX_NDIM} dimensions, got {len(shape)}")
    return tuple(map(_check_dim, shape))


def _check_dim(dim: object) -> int:
    if isinstance(dim, (bool, np.bool_)) or not hasattr(dim, "__index__"):
        raise TypeError(f"shape: expected ints, got {shown(dim)}")
    value = operator.index(dim)
    if value < 1:
        raise ValueError(f"shape: expected dimensions of at least 1, got {shown(value)}")
    return value


def _check_dtype(dtype: object) -> str:
    name = _dtype_name(dtype)
    if name not in _DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {shown(dtype)}")
    return name


def _dtype_name(dtype: object) -> str:
    if isinstance(dtype, str):
        return dtype
    if isinstance(dtype, type) and issubclass(dtype, np.generic):
        return str(np.dtype(dtype).name)
    if isinstance(dtype, np.dtype):
        # Of another byte order: its str (">f4") is in no table, and says in the error what is wrong.
        return str(dtype.name if dtype.isnative else dtype.str)
    if (type(dtype).__module__, type(dtype).__qualname__) == ("torch", "dtype"):  # without importing torch
        return str(dtype).removeprefix("torch.")
    raise TypeError(f"dtype: expected torch's name of it, a torch.dtype or a numpy dtype, got {shown(dtype)}")
