"""Views, arrays and tensors: what they show, that nobody can write through them, and that none outlives its share."""

from __future__ import annotations

import pickle
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from arena_support import Join, contents, mapped_as, mappings, pattern, run_all, run_python

from shmcache import Cache, ClosedError, Layout, ReadBatch, Status, ViewInUseError

OK = Status.OK

DTYPES = ["bool", "uint8", "int16", "int64", "float16", "float32", "float64", "complex64"]
FOREIGN = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]


@pytest.fixture
def stored(cache: Cache) -> Cache:
    """A cache with the objects a and b."""
    for key in (b"a", b"b"):
        assert cache.put(key, pattern(key, 1000)) == OK
    return cache


def address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def store(cache: Cache, key: bytes, layout: Layout | int) -> bytes:
    """An object of this layout, of bytes that are sound in every dtype: 0 and 1."""
    with cache.reserve_write([key], layout) as batch:
        view = batch.views[0]
        assert view is not None
        data = bytes(byte & 1 for byte in pattern(key, len(view)))
        view[:] = data
    return data


# What they show


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_have_the_dtype_and_shape_of_the_layout(join: Join, dtype: str) -> None:
    writer, reader = join(), join()
    layout = Layout((3, 5, 2), dtype)
    data = store(writer, b"k", layout)
    with reader.read([b"k", b"zz"]) as batch:
        array, missing = batch.arrays()
        assert missing is None
        assert (array.dtype, array.shape, array.flags.c_contiguous) == (np.dtype(dtype), (3, 5, 2), True)
        assert array.tobytes() == data
        del array


@pytest.mark.parametrize("dtype", DTYPES + FOREIGN)
def test_tensors_have_the_dtype_and_shape_of_the_layout(join: Join, dtype: str) -> None:
    writer, reader = join(), join()
    data = store(writer, b"k", Layout((3, 5, 2), dtype))
    with reader.read([b"zz", b"k"]) as batch:
        missing, tensor = batch.tensors()
        assert missing is None
        assert (tensor.dtype, tuple(tensor.shape), tensor.device.type) == (getattr(torch, dtype), (3, 5, 2), "cpu")
        assert tensor.is_contiguous()
        assert tensor.flatten().view(torch.uint8).numpy().tobytes() == data
        del tensor


@pytest.mark.parametrize("dtype", FOREIGN)
def test_a_dtype_that_numpy_lacks_comes_as_unsigned_integers(cache: Cache, dtype: str) -> None:
    data = store(cache, b"k", Layout((4, 6), dtype))
    with cache.read([b"k"]) as batch:
        array = batch.arrays()[0]
        assert (array.dtype.kind, array.shape) == ("u", (4, 6))
        assert array.tobytes() == data
        del array


def test_bfloat16_values_come_through(join: Join) -> None:
    writer, reader = join(), join()
    expected = torch.linspace(-3, 3, 48).reshape(2, 3, 8).to(torch.bfloat16)
    with writer.reserve_write([b"k"], Layout((2, 3, 8), torch.bfloat16)) as batch:
        batch.tensors()[0].copy_(expected)
    with reader.read([b"k"]) as found:
        assert torch.equal(found.tensors()[0], expected)


def test_several_tensors_lie_one_after_the_other_at_64_bytes(join: Join) -> None:
    writer, reader = join(), join()
    layout = Layout([((3,), "float32"), ((), "int64"), ((5, 7), "bfloat16")])
    with writer.reserve_write([b"k"], layout) as batch:
        first, second, third = batch.tensors()[0]
        first.copy_(torch.tensor([1.0, 2.0, 3.0]))
        second.fill_(-7)
        third.fill_(0.5)
        assert layout.nbytes == 128 + 70
    with reader.read([b"k"]) as found:
        arrays, tensors = found.arrays()[0], found.tensors()[0]
        start = address(arrays[0])
        assert [address(array) - start for array in arrays] == [0, 64, 128]
        assert [tensor.data_ptr() - start for tensor in tensors] == [0, 64, 128]
        assert [tuple(tensor.shape) for tensor in tensors] == [(3,), (), (5, 7)]
        assert (tensors[0].tolist(), int(tensors[1]), float(tensors[2].sum())) == ([1, 2, 3], -7, 17.5)
        del arrays, tensors


def test_a_plain_byte_count_is_uint8(stored: Cache) -> None:
    with stored.read([b"a"]) as batch:
        array, tensor = batch.arrays()[0], batch.tensors()[0]
        assert (array.dtype, array.shape, tensor.dtype, tensor.shape) == (np.uint8, (1000,), torch.uint8, (1000,))
        assert array.tobytes() == tensor.numpy().tobytes() == pattern(b"a", 1000)
        del array, tensor


def test_objects_of_several_layouts_in_one_batch(cache: Cache) -> None:
    layouts: list[Layout | int] = [Layout((2, 2), "float32"), 10, Layout([((2,), "int8"), ((3,), "int16")])]
    with cache.reserve_write([b"a", b"b", b"c"], layouts) as batch:
        for view in batch.views:
            assert view is not None
            view[:] = bytes(len(view))
    with cache.read([b"c", b"b", b"a"]) as found:
        both, plain, matrix = found.arrays()
        assert [array.shape for array in both] == [(2,), (3,)]
        assert (plain.shape, matrix.shape) == ((10,), (2, 2))
        del both, plain, matrix


# Without a copy


def test_nothing_is_mapped_before_somebody_looks(arena: str, join: Join) -> None:
    writer, reader = join(), join()
    writer.put(b"a", b"x")
    before = len(mappings(arena))
    with reader.read([b"a"]) as batch:
        assert len(mappings(arena)) == before
        assert contents(batch) == [b"x"]
        assert len(mappings(arena)) == before + 1


MAKERS: dict[str, Callable[[Any], Any]] = {
    "views": lambda batch: np.frombuffer(batch.views[0], np.uint8),
    "arrays": lambda batch: batch.arrays()[0],
    "tensors": lambda batch: batch.tensors()[0].numpy(),
}


@pytest.mark.parametrize("made", MAKERS)
def test_readers_look_at_the_segment_itself_through_a_read_only_mapping(arena: str, join: Join, made: str) -> None:
    writer, reader = join(), join()
    written = writer.reserve_write([b"k"], 5000)
    source = MAKERS[made](written)
    source[:] = 1
    assert mapped_as(arena, address(source), 5000) == "rw-s"
    assert written.publish() == [OK]
    with reader.read([b"k"]) as batch:
        seen = MAKERS[made](batch)
        assert mapped_as(arena, address(seen), 5000) == "r--s"
        assert seen.sum() == 5000
        source[17] = 200  # what a writer must not do any more shows that it is one memory
        assert seen[17] == 200
        del seen
    del source


@pytest.mark.parametrize("made", ["views", "arrays"])
def test_what_was_read_cannot_be_written(stored: Cache, made: str) -> None:
    with stored.read([b"a"]) as batch:
        seen = getattr(batch, made)[0] if made == "views" else batch.arrays()[0]
        with pytest.raises((TypeError, ValueError), match="read-only|modify"):
            seen[0] = 1
        if made == "arrays":
            with pytest.raises(ValueError, match="WRITEABLE"):
                seen.flags.writeable = True
        del seen
    with stored.read([b"a"]) as batch:
        assert contents(batch) == [pattern(b"a", 1000)]


# torch has no read-only tensors.
SCRIBBLER = """
import sys, shmcache
cache = shmcache.attach(sys.argv[1])
tensor = cache.read([b"a"]).tensors()[0]
print(int(tensor.sum()), flush=True)
tensor[0] = 1
print("written", flush=True)
"""


def test_a_stray_write_ends_the_reader_and_changes_nothing(arena: str, stored: Cache) -> None:
    done = run_python(SCRIBBLER, arena)
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, f"{sum(pattern(b'a', 1000))}\n")
    with stored.read([b"a"]) as batch:
        assert contents(batch) == [pattern(b"a", 1000)]


# None outlives its share

KEEPERS: dict[str, Callable[[Any], Any]] = {
    "a slice of a view": lambda batch: batch.views[0][10:20],
    "a cast view": lambda batch: batch.views[0].cast("H"),
    "a memoryview of a view": lambda batch: memoryview(batch.views[0]),
    "an array over a view": lambda batch: np.frombuffer(batch.views[1], np.uint8),
    "a tensor over a view": lambda batch: torch.from_numpy(np.frombuffer(batch.views[1], np.uint8).reshape(2, 500)[1]),
    "an array": lambda batch: batch.arrays()[0],
    "a slice of an array": lambda batch: batch.arrays()[1][5:],
    "a view of an array": lambda batch: batch.arrays()[1].view(np.uint16).reshape(5, 100).T,
    "a memoryview of an array": lambda batch: memoryview(batch.arrays()[0]),
    "a tensor": lambda batch: batch.tensors()[0],
    "a slice of a tensor": lambda batch: batch.tensors()[1][3],
    "a view of a tensor": lambda batch: batch.tensors()[0].view(torch.int16).reshape(50, 10).t(),
    "an array of a tensor": lambda batch: batch.tensors()[0].numpy(),
    "a dlpack array of a tensor": lambda batch: np.from_dlpack(batch.tensors()[0]),
    "a buffer that cannot be counted": lambda batch: pickle.PickleBuffer(batch.views[1]),
}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("looked_at", [False, True])
@pytest.mark.parametrize("what", KEEPERS)
def test_releasing_while_something_lives_keeps_the_share(stored: Cache, what: str, looked_at: bool) -> None:
    batch = stored.read([b"a", b"b"])
    if looked_at:
        assert batch.views[1] is not None
        assert batch.arrays()[1] is not None
    kept = KEEPERS[what](batch)
    for _ in range(2):
        with pytest.raises(ViewInUseError, match=stored.name):
            batch.release()
        assert stored.stats().held == 2
        assert stored.delete([b"a", b"b"], force=True) == [Status.LOCKED] * 2
    assert contents(batch) == [pattern(b"a", 1000), pattern(b"b", 1000)], "the batch is as usable as before"
    del kept
    batch.release()
    assert stored.stats().held == 0


def test_an_export_that_python_cannot_count_keeps_the_share_until_it_ends(stored: Cache) -> None:
    batch = stored.read([b"a", b"b"])
    assert batch.views[1] is not None
    exported = pickle.PickleBuffer(batch.views[1])
    with pytest.raises(ViewInUseError):
        batch.release()
    assert stored.stats().held == 2
    assert exported.raw() == pattern(b"b", 1000)
    exported.release()
    batch.release()
    assert stored.stats().held == 0


@pytest.mark.parametrize(
    "copy",
    [
        lambda batch: bytes(batch.views[0]),
        lambda batch: batch.views[0][5:10].tobytes(),
        lambda batch: batch.arrays()[0].copy(),
        lambda batch: batch.arrays()[0].astype(np.float32),
        lambda batch: batch.tensors()[0].clone(),
        lambda batch: batch.tensors()[0].sum(),
    ],
)
def test_copies_keep_nothing(stored: Cache, copy: Callable[[Any], Any]) -> None:
    with stored.read([b"a"]) as batch:
        kept = copy(batch)
    assert kept is not None
    assert stored.stats().held == 0


def test_views_of_a_released_batch_cannot_be_used(stored: Cache) -> None:
    batch = stored.read([b"a", b"b"])
    views = batch.views
    batch.release()
    for view in views:
        assert view is not None
        with pytest.raises(ValueError, match="released"):
            bytes(view)


def look_together(batch: ReadBatch, made: str) -> list[list[Any]]:
    """What two threads get from a batch that nobody has looked at before."""
    together = threading.Barrier(2)
    found: list[list[Any]] = []

    def look() -> None:
        together.wait()
        found.append(batch.views if made == "views" else batch.arrays())

    run_all([look, look])
    return found


def is_refused(batch: ReadBatch) -> bool:
    try:
        batch.release()
    except ViewInUseError:
        return True
    return False


@pytest.mark.usefixtures("hasty_switches")
@pytest.mark.parametrize("made", ["views", "arrays"])
def test_two_threads_may_look_at_one_batch_at_once(cache: Cache, made: str) -> None:
    keys = [b"%d" % i for i in range(50)]
    for key in keys:
        cache.put(key, key)
    incomplete = released_under_a_view = 0
    for i in range(60):
        batch = cache.read(keys)
        found = look_together(batch, made)
        incomplete += any(len(seen) != 50 for seen in found)
        kept = [view[:1] for view in found[i % 2][7:8]]
        del found
        released_under_a_view += not is_refused(batch)
        del kept
        batch.release()
    assert (incomplete, released_under_a_view) == (0, 0)


def look_and_release(batch: ReadBatch, pause: int) -> tuple[list[Any], bool]:
    """What one thread gets from a batch that another releases meanwhile, and whether that one was refused."""
    together = threading.Barrier(2)
    found: list[Any] = []
    refused: list[bool] = []

    def release() -> None:
        together.wait()
        for _ in range(pause):
            pass
        refused.append(is_refused(batch))

    def look() -> None:
        together.wait()
        with suppress(ClosedError):
            found.extend(batch.arrays())

    run_all([release, look])
    return found, refused[0]


@pytest.mark.usefixtures("hasty_switches")
def test_looking_at_a_batch_while_another_thread_releases_it(stored: Cache) -> None:
    outlived = 0
    for i in range(400):
        batch = stored.read([b"a", b"b"])
        found, refused = look_and_release(batch, i % 40)
        outlived += bool(found) and not refused
        del found
        batch.release()
    assert outlived == 0
    assert stored.stats().held == 0


def test_the_same_views_come_again(stored: Cache) -> None:
    with stored.read([b"a", b"zz"]) as batch:
        assert batch.views[0] is batch.views[0]
        assert batch.views[1] is None
