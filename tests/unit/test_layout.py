"""Layouts: their arithmetic, their text, and the arrays and tensors over an object's bytes."""

from __future__ import annotations

import gc
import mmap
import pickle
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcache.layout import Layout, TensorSpec

INTEGERS = ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]
NUMPY_DTYPES = [*INTEGERS, "float16", "float32", "float64", "complex64", "complex128"]
FLOAT8 = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]
TORCH_ONLY = ["bfloat16", *FLOAT8, "float4_e2m1fn_x2"]
DTYPES = NUMPY_DTYPES + TORCH_ONLY

shapes = st.lists(st.integers(1, 9), max_size=4).map(tuple)
pairs_lists = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=6)


def read_only(nbytes: int) -> npt.NDArray[np.uint8]:
    """An array that owns no memory, over pages that cannot be written: what a reader has."""
    memory = mmap.mmap(-1, max(nbytes, 1), prot=mmap.PROT_READ)
    return np.frombuffer(memoryview(memory)[:nbytes], np.uint8)


def counting(nbytes: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(bytearray(i % 251 for i in range(nbytes)), np.uint8)


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


class TestSpecs:
    def test_one_tensor(self) -> None:
        layout = Layout((2, 16, 128), "bfloat16")
        assert layout.specs == (TensorSpec((2, 16, 128), "bfloat16", 0, 8192),)
        assert layout.nbytes == 8192

    def test_tensors_are_aligned_and_the_last_is_not_padded(self) -> None:
        layout = Layout([((3,), "uint8"), ((65,), "int8"), ((), "float64")])
        assert [(spec.offset, spec.nbytes) for spec in layout.specs] == [(0, 3), (64, 65), (192, 8)]
        assert layout.nbytes == 200

    def test_a_scalar_has_one_element(self) -> None:
        assert Layout((), "float32").nbytes == 4

    @given(pairs_lists)
    def test_arithmetic(self, pairs: list[tuple[tuple[int, ...], str]]) -> None:
        layout = Layout(pairs)
        end = 0
        for spec, (shape, dtype) in zip(layout.specs, pairs, strict=True):
            assert (spec.shape, spec.dtype) == (shape, dtype)
            assert spec.offset % 64 == 0
            assert 0 <= spec.offset - end < 64
            end = spec.offset + spec.nbytes
        assert layout.nbytes == end

    def test_the_largest(self) -> None:
        assert Layout((2**48,), "uint8").nbytes == 2**48


class TestDtypes:
    @pytest.mark.parametrize("name", NUMPY_DTYPES)
    def test_numpy(self, name: str) -> None:
        assert Layout((3,), np.dtype(name)) == Layout((3,), name)
        assert Layout((3,), np.dtype(name).type) == Layout((3,), name)

    @pytest.mark.parametrize("name", DTYPES)
    def test_torch(self, name: str) -> None:
        torch = pytest.importorskip("torch")
        dtype = getattr(torch, name)
        layout = Layout((3, 5), dtype)
        assert layout == Layout((3, 5), name)
        assert layout.nbytes == 15 * dtype.itemsize
        assert Layout(torch.zeros(3, 5).shape, dtype) == layout

    @pytest.mark.parametrize("name", ["", "float", "Float32", "torch.float32", "float33", "qint8", "int4", "str"])
    def test_unknown_names(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"^dtype: expected one of bool, uint8, .* got"):
            Layout((3,), name)

    @pytest.mark.parametrize("dtype", [np.dtype(">f4"), np.dtype("U3"), np.dtype([("a", "u1")]), np.longdouble])
    def test_unknown_numpy_dtypes(self, dtype: Any) -> None:
        with pytest.raises(ValueError, match=r"^dtype: expected one of .* got"):
            Layout((3,), dtype)

    @pytest.mark.parametrize("dtype", [7, float, b"float32", object(), ["float32"]])
    def test_no_dtypes(self, dtype: Any) -> None:
        with pytest.raises(TypeError, match="^dtype: expected torch's name of it"):
            Layout((3,), dtype)

    def test_torch_is_not_imported(self) -> None:
        code = """
import sys, numpy as np
from shmcache.layout import Layout
Layout((2,), np.float32).arrays(np.zeros(8, np.uint8))
Layout((2,), "bfloat16").arrays(np.zeros(4, np.uint8))
sys.exit("torch" in sys.modules)
"""
        subprocess.run([sys.executable, "-c", code], check=True)


class TestShapes:
    @pytest.mark.parametrize("shape", [[2, 3], (np.int64(2), np.uint8(3)), range(2, 4)])
    def test_sequences_of_ints(self, shape: Any) -> None:
        layout = Layout(shape, "uint8")
        assert layout.specs[0].shape == (2, 3)
        assert all(type(dim) is int for dim in layout.specs[0].shape)

    @pytest.mark.parametrize("shape", [(0,), (2, 0), (-1,), (2, -3), (-(2**70),)])
    def test_dimensions_below_one(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="^shape: expected dimensions of at least 1, got"):
            Layout(shape, "uint8")

    @pytest.mark.parametrize("shape", [3, None, "3", b"3", {2, 3}, iter([2]), np.array([2])])
    def test_no_sequences(self, shape: Any) -> None:
        with pytest.raises(TypeError, match="^shape: expected a sequence of ints, got"):
            Layout(shape, "uint8")

    @pytest.mark.parametrize("shape", [(2.0,), (True,), (np.True_,), ("2",), (None,), ((2,),)])
    def test_no_ints(self, shape: Any) -> None:
        with pytest.raises(TypeError, match="^shape: expected ints, got"):
            Layout(shape, "uint8")

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [((2**48 + 1,), "uint8"), ((2**46,), "float64"), ((2**40,) * 32, "int8"), ((10**5000,), "bool")],
    )
    def test_too_large(self, shape: tuple[int, ...], dtype: str) -> None:
        with pytest.raises(ValueError, match=r"^layout: expected at most 2\*\*48 bytes, got"):
            Layout(shape, dtype)

    def test_too_large_together(self) -> None:
        with pytest.raises(ValueError, match=r"^layout: expected at most 2\*\*48 bytes, got 281474976710720"):
            Layout([((2**48 - 1,), "uint8"), ((64,), "uint8")])

    def test_too_many_dimensions(self) -> None:
        assert len(Layout((1,) * 32, "uint8").specs[0].shape) == 32
        with pytest.raises(ValueError, match="^shape: expected at most 32 dimensions, got 33"):
            Layout((1,) * 33, "uint8")


class TestLists:
    @pytest.mark.parametrize("pairs", [[], ()])
    def test_none(self, pairs: Any) -> None:
        with pytest.raises(ValueError, match="^layout: expected at least one tensor"):
            Layout(pairs)

    @pytest.mark.parametrize("pairs", [7, None, "bfloat16", {"a": 1}, np.zeros(2)])
    def test_no_list(self, pairs: Any) -> None:
        with pytest.raises(TypeError, match="^layout: expected shape and dtype, or a list"):
            Layout(pairs)

    @pytest.mark.parametrize("pairs", [[(2, 3, 4)], (2, 16), [((2,),)], ["ab"], [None]])
    def test_no_pairs(self, pairs: Any) -> None:
        with pytest.raises(TypeError, match=r"^layout: expected \(shape, dtype\), got"):
            Layout(pairs)

    def test_too_many_tensors(self) -> None:
        with pytest.raises(ValueError, match="^layout: expected a description of at most 480 bytes, got"):
            Layout([((100, 100), "bfloat16")] * 40)


class TestIdentity:
    @given(pairs_lists, pairs_lists)
    def test_equal_when_the_same(self, one: Any, other: Any) -> None:
        assert (Layout(one) == Layout(other)) == (one == other)
        assert Layout(one) == Layout(list(one))
        assert hash(Layout(one)) == hash(Layout(list(one)))

    @given(pairs_lists)
    def test_repr_and_pickle(self, pairs: Any) -> None:
        layout = Layout(pairs)
        assert eval(repr(layout), {"Layout": Layout}) == layout  # noqa: S307 - our own text
        assert pickle.loads(pickle.dumps(layout)) == layout  # noqa: S301 - our own bytes

    def test_not_equal_to_others(self) -> None:
        assert Layout((2,), "uint8") != b"uint8[2]"
        assert Layout((2,), "uint8") != 2

    def test_a_list_of_one_is_that_one(self) -> None:
        assert Layout([((2,), "uint8")]) == Layout((2,), "uint8")
        assert repr(Layout([((2,), "uint8")])) == "Layout((2,), 'uint8')"

    def test_immutable(self) -> None:
        layout = Layout((2,), "uint8")
        with pytest.raises(AttributeError, match="immutable"):
            layout.nbytes = 3
        with pytest.raises(AttributeError, match="immutable"):
            del layout.specs
        with pytest.raises(AttributeError, match="immutable"):
            layout.other = 3


class TestText:
    def test_example(self) -> None:
        layout = Layout([((2, 16, 128), "bfloat16"), ((), "float32")])
        assert layout.encode() == b"bfloat16[2,16,128];float32[]"

    @given(pairs_lists)
    def test_round_trip(self, pairs: Any) -> None:
        layout = Layout(pairs)
        assert Layout.decode(layout.encode()) == layout

    @pytest.mark.parametrize(
        "encoded",
        [
            b"",
            b";",
            b"uint8",
            b"uint8[",
            b"uint8]",
            b"uint8[2",
            b"uint8[2]]",
            b"uint8[2];",
            b";uint8[2]",
            b"uint8[,]",
            b"uint8[2,]",
            b"uint8[,2]",
            b"uint8[02]",
            b"uint8[0]",
            b"uint8[-1]",
            b"uint8[+1]",
            b"uint8[ 2]",
            b"uint8 [2]",
            b"uint8[2] ",
            b"uint8[2]\n",
            b"uint8[2]\x00",
            b"\x00" * 480,
            b"\xff" * 480,
            b"uint9[2]",
            b"uint8[1_0]",
            b"uint8[1.0]",
            b"uint8[2][2]",
            b"uint8[2],uint8[2]",
            "uint8[٢]".encode(),
            b"uint8[999999999999999]",
            b"uint8[1234567890123456]",
            b"int64[99999999,99999999]",
            b"uint8[" + b"1," * 32 + b"1]",
            b"uint8[2];" * 60 + b"uint8[2]",
        ],
    )
    def test_damage(self, encoded: bytes) -> None:
        with pytest.raises(ValueError, match="expected"):
            Layout.decode(encoded)

    @given(st.binary(max_size=600))
    def test_any_bytes(self, encoded: bytes) -> None:
        try:
            layout = Layout.decode(encoded)
        except ValueError:
            return
        assert layout.encode() == encoded

    @given(pairs_lists, st.data())
    def test_flipped_bytes(self, pairs: Any, data: st.DataObject) -> None:
        encoded = bytearray(Layout(pairs).encode())
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
        try:
            layout = Layout.decode(bytes(encoded))
        except ValueError:
            return
        assert layout.encode() == encoded


class TestArrays:
    @given(pairs_lists)
    def test_the_bytes_in_place(self, pairs: Any) -> None:
        layout = Layout(pairs)
        buffer = counting(layout.nbytes + 3)
        for array, spec in zip(as_tuple(layout.arrays(buffer)), layout.specs, strict=True):
            assert array.shape == spec.shape
            assert array.tobytes() == buffer[spec.offset : spec.offset + spec.nbytes].tobytes()
            assert np.shares_memory(array, buffer)
            assert array.flags.writeable

    def test_one_or_several(self) -> None:
        assert isinstance(Layout((2,), "uint8").arrays(counting(2)), np.ndarray)
        assert isinstance(Layout([((2,), "uint8")] * 2).arrays(counting(66)), tuple)

    @pytest.mark.parametrize("name", NUMPY_DTYPES)
    def test_dtype(self, name: str) -> None:
        array = as_tuple(Layout((2,), name).arrays(counting(32)))[0]
        assert array.dtype == np.dtype(name)

    @pytest.mark.parametrize("name", TORCH_ONLY)
    def test_stand_in(self, name: str) -> None:
        array = as_tuple(Layout((2,), name).arrays(counting(32)))[0]
        assert array.dtype == (np.uint16 if name == "bfloat16" else np.uint8)

    def test_writing_goes_through(self) -> None:
        buffer = counting(64)
        as_tuple(Layout((4,), "uint32").arrays(buffer))[0][:] = 0x01020304
        assert buffer[:4].tobytes() in (b"\1\2\3\4", b"\4\3\2\1")

    def test_read_only(self) -> None:
        for array in as_tuple(Layout([((2,), "float32"), ((2,), "bfloat16")]).arrays(read_only(68))):
            assert not array.flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1

    def test_a_living_array_or_slice_keeps_the_buffer(self) -> None:
        buffer = read_only(4096)
        alone = sys.getrefcount(buffer)
        array = as_tuple(Layout((4, 256), "float32").arrays(buffer))[0]
        assert sys.getrefcount(buffer) > alone
        part = array[1:, 3]
        del array
        assert sys.getrefcount(buffer) > alone
        assert part.base is buffer
        del part
        assert sys.getrefcount(buffer) == alone


class TestTensors:
    @pytest.fixture(autouse=True)
    def _torch(self) -> None:
        self.torch = pytest.importorskip("torch")

    @pytest.mark.parametrize("name", DTYPES)
    @pytest.mark.parametrize("writable", [True, False])
    def test_the_bytes_in_place(self, name: str, writable: bool) -> None:
        layout = Layout([((3,), "uint8"), ((2, 3), name), ((), name)])
        buffer = counting(layout.nbytes)
        buffer.flags.writeable = writable
        tensors = as_tuple(layout.tensors(buffer))
        assert len(tensors) == 3
        for tensor, spec in zip(tensors, layout.specs, strict=True):
            assert tensor.dtype == getattr(self.torch, spec.dtype)
            assert tuple(tensor.shape) == spec.shape
            assert tensor.data_ptr() == buffer.ctypes.data + spec.offset
            assert tensor.is_contiguous()
            flat = tensor.reshape(-1).view(self.torch.uint8)
            assert bytes(flat.tolist()) == buffer[spec.offset : spec.offset + spec.nbytes].tobytes()

    def test_one_or_several(self) -> None:
        assert isinstance(Layout((2,), "uint8").tensors(counting(2)), self.torch.Tensor)
        assert isinstance(Layout([((2,), "uint8")] * 2).tensors(counting(66)), tuple)

    def test_values(self) -> None:
        buffer = np.frombuffer(bytearray(np.array([0x3F80, 0xC000], np.uint16).tobytes()), np.uint8)
        tensor = as_tuple(Layout((2,), "bfloat16").tensors(buffer))[0]
        assert tensor.tolist() == [1.0, -2.0]
        tensor[0] = 2.0
        assert as_tuple(Layout((2,), "bfloat16").arrays(buffer))[0][0] == 0x4000

    @pytest.mark.parametrize("name", ["float32", "uint8", "bfloat16", "float8_e4m3fn"])
    @pytest.mark.parametrize("writable", [True, False])
    def test_a_living_tensor_or_view_keeps_the_buffer(self, name: str, writable: bool) -> None:
        buffer = counting(4096) if writable else read_only(4096)
        alone = sys.getrefcount(buffer)
        tensor = as_tuple(Layout((4, 256), name).tensors(buffer))[0]
        assert sys.getrefcount(buffer) > alone
        part = tensor[1:]
        del tensor
        assert sys.getrefcount(buffer) > alone
        assert part.shape == (3, 256)
        copy = part.clone()
        array = part.view(self.torch.uint8).numpy()
        del part
        assert sys.getrefcount(buffer) > alone, "an array made of a tensor counts, too"
        del array
        gc.collect()
        assert sys.getrefcount(buffer) == alone, "a copy does not"
        assert copy.shape == (3, 256)

    def test_no_warning_for_read_only_memory(self) -> None:
        """In a process of its own, because torch warns once a process."""
        code = """
import warnings
warnings.simplefilter("error")
import mmap, numpy as np, torch
warnings.simplefilter("error")
from shmcache.layout import Layout
buffer = np.frombuffer(mmap.mmap(-1, 4096, prot=mmap.PROT_READ), np.uint8)
assert not buffer.flags.writeable
assert Layout((4, 8), "bfloat16").tensors(buffer).sum() == 0
assert Layout((4, 8), "float32").tensors(buffer).sum() == 0
"""
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_filters_are_left_alone(self) -> None:
        before = list(warnings.filters)
        Layout((2,), "uint8").tensors(read_only(2))
        assert warnings.filters == before

    def test_a_torch_without_the_dtype(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(self.torch, "float8_e8m0fnu")
        with pytest.raises(TypeError, match="has no dtype float8_e8m0fnu; a later one is needed"):
            Layout((2,), "float8_e8m0fnu").tensors(counting(2))


@pytest.mark.parametrize("method", ["arrays", "tensors"])
class TestBuffers:
    def make(self, method: str, buffer: Any) -> Any:
        return getattr(Layout((4,), "float32"), method)(buffer)

    @pytest.mark.parametrize("buffer", [b"x" * 16, bytearray(16), memoryview(bytes(16)), None])
    def test_another_type(self, method: str, buffer: Any) -> None:
        with pytest.raises(TypeError, match="^buffer: expected a numpy array, got"):
            self.make(method, buffer)

    @pytest.mark.parametrize(
        "buffer",
        [np.zeros(16, np.int8), np.zeros((4, 4), np.uint8), np.zeros(32, np.uint8)[::2], np.zeros(4)],
    )
    def test_another_array(self, method: str, buffer: Any) -> None:
        with pytest.raises(ValueError, match="^buffer: expected a contiguous one-dimensional uint8 array, got"):
            self.make(method, buffer)

    @pytest.mark.parametrize("nbytes", [0, 15])
    def test_too_short(self, method: str, nbytes: int) -> None:
        with pytest.raises(ValueError, match=f"^buffer: expected 16 bytes from 0 on, got {nbytes} in all$"):
            self.make(method, np.zeros(nbytes, np.uint8))
