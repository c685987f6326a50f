"""Batches: what ``Cache.read`` and ``Cache.reserve_write`` give back, one entry a key.

Their base, which has the keys, what the core said of them and the memoryviews, is written in C (native/python/batch.c):
there is the common way of a read, from ``with`` to the end of its views. What needs a look at arrays, tensors or device
memory, or has an error to tell, is here.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shmcache import _fast, errors
from shmcache._binding import ffi, lib, new
from shmcache._keys import Packed, unpack
from shmcache.attachment import Attachment
from shmcache.config import check_extra_count
from shmcache.device import Device
from shmcache.device_views import DeviceLoan, complete_streams
from shmcache.later import event_in
from shmcache.layout import Layout
from shmcache.status import OK, Status, statuses
from shmcache.views import Loan, slices_live, when_over

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Self

__all__ = ["ReadBatch", "WriteBatch"]


_has_regions: Final = lib.sc_has_regions  # a function of lib costs a look-up at each use
_REF_POINTER: Final = ffi.typeof("struct sc_ref *")
_REFS: Final = ffi.typeof("struct sc_ref[]")
_REF_BYTES: Final = ffi.sizeof("struct sc_ref")
_REF_STATUS: Final = ffi.offsetof("struct sc_ref", "status")


def codes_of(refs: Any, n: int) -> bytes:
    """The status in each ``struct sc_ref``, one byte a key."""
    raw: bytes = ffi.buffer(refs, n * _REF_BYTES)[:]
    return raw[_REF_STATUS::_REF_BYTES]


def _those_in(layouts: list[Layout | None], regions: list[int] | None, *, near: bool) -> list[Layout | None]:
    """The layouts of what lies in region 0 (near), or of what lies in others; None for the others of the two."""
    if regions is None:
        return layouts
    return [layout if (region == 0) == near else None for region, layout in zip(regions, layouts, strict=True)]


def _give_back(attachment: Attachment, loan: DeviceLoan | None, refs: Any, n: int) -> None:
    """What a stream still reads must not be written over, nor closed: the loan is kept until then."""
    try:
        if loan is not None and not attachment.forked:
            complete_streams(loan.devices())
    finally:
        lib.sc_release(attachment.handle, refs, n)


def _release_late(_loan: DeviceLoan | None, handle: Any, refs: Any, n: int) -> None:
    """For who keeps the loan until then."""
    lib.sc_release(handle, refs, n)


def _when_over(waits: list[Callable[..., object]], then: Callable[[], object]) -> None:
    """Calls ``then`` once nothing that these wait for is alive."""
    if waits:
        waits.pop()(_when_over, waits, then)
        return
    with suppress(errors.DeviceError):  # nobody is there to be told
        then()


class _Batch(_fast.Batch):
    """Keys, their statuses, and the memory of those that are OK."""

    __slots__ = ()

    @property
    def _refs(self) -> Any:
        """What the core said of each key: a ``struct sc_ref *``, good as long as the batch."""
        return ffi.cast(_REF_POINTER, self._address)

    def _own_refs(self) -> Any:
        """The same for who outlives the batch."""
        refs = ffi.new(_REFS, len(self))
        ffi.memmove(refs, self._refs, len(self) * _REF_BYTES)
        return refs

    @property
    def keys(self) -> list[bytes]:
        """The keys, in the order given."""
        return unpack(self._packed)

    @property
    def status(self) -> list[Status]:
        """One a key, as the call that made this batch found it; LOST since the owner of the region that it lies in is
        gone."""
        lost = self._lost()
        if self._ok == len(self) and not lost:
            return [OK] * self._ok
        return [Status.LOST if i in lost else code for i, code in enumerate(statuses(codes_of(self._refs, len(self))))]

    def arrays(self) -> list[Any]:
        """One numpy array a key (a tuple where the layout has several tensors), or None. Without a copy.

        A dtype that numpy lacks (bfloat16, float8) comes as unsigned integers of its width; a plain byte count
        as uint8. None, too, where the object lies in device memory.
        """
        with self._attachment.lock:
            loan = self._lend()
            return loan.arrays(self._starts(), _those_in(self._layouts(), self._regions(), near=True))

    def tensors(self) -> list[Any]:
        """One torch tensor a key (a tuple where the layout has several), or None. Without a copy. Needs torch.

        Objects in regions of device memory give CUDA tensors. A region of this process is read on its own device; one
        of another process on the device of the calling thread's CUDA context (the region's own where it has none),
        where it is opened at the first call: DeviceError where this process cannot read it.
        """
        with self._attachment.lock:
            self._borrow()
            layouts, regions = self._layouts(), self._regions()
            if regions is None:
                return self._lend().tensors(self._starts(), layouts)
            found = self._device_tensors(_those_in(layouts, regions, near=False), regions)
            near = _those_in(layouts, regions, near=True)
            if any(near):
                found = [
                    t if d is None else d
                    for t, d in zip(self._lend().tensors(self._starts(), near), found, strict=True)
                ]
            return found

    def _writable(self) -> bool:
        raise AssertionError

    def _refuse(self) -> None:
        raise errors.ClosedError(f"{type(self).__name__}: its shares are given back, so it has no memory any more")

    def _lend(self) -> Loan:
        """Under the attachment's lock, as is all that looks whether the loan is in use."""
        self._borrow()
        if self._loan is None:
            self._loan = Loan(self._memory)
        return self._loan

    def _starts(self) -> list[int]:
        starts: list[int] = self._words()[:, 0].tolist()
        return starts

    def _layouts(self) -> list[Layout | None]:
        get, words = self._attachment.layout_of, self._words()
        found = zip((words[:, 3] & 0xFFFF).tolist(), words[:, 1].tolist(), (words[:, 3] >> 48).tolist(), strict=True)
        return [get(number, nbytes) if code == OK else None for number, nbytes, code in found]

    def _regions(self) -> list[int] | None:
        """The region that each key's object lies in; None where all lie in region 0."""
        if not _has_regions(self._attachment.handle):  # a share of an object in one would keep it there
            return None
        found = self._words()[:, 3] >> 16 & 0xFFFF
        return found.tolist() if found.any() else None

    def _lost(self) -> set[int]:
        """The indices of objects in regions that do not live any more."""
        regions = self._regions() if self._open else None
        if regions is None:
            return set()
        lives = {region: self._attachment.regions.lives(region) for region in {*regions} - {0}}
        return {i for i, region in enumerate(regions) if region and not lives[region]}

    def _device_tensors(self, layouts: list[Layout | None], regions: list[int]) -> list[Any]:
        """Of the objects that have a layout here; None of others, and of what is lost."""
        attachment, starts = self._attachment, self._starts()
        attachment.check_open()
        if self._device_loan is None:
            self._device_loan = DeviceLoan()
        loan, flat = self._device_loan, dict[int, Any]()
        for region in {*regions} - {0}:
            there = attachment.regions.mapped(region, write=self._writable())
            if there is not None:  # lent at once: to open the next one closes what is lost and not lent
                flat[region] = loan.flat(there)
        return [
            layout.tensors_over(flat[region][start : start + layout.nbytes]) if layout and region in flat else None
            for layout, region, start in zip(layouts, regions, starts, strict=True)
        ]

    def _devices(self) -> list[Device]:
        """Those whose streams may be using tensors made from this batch."""
        if self._device_loan is None or self._attachment.forked:
            return []
        return self._device_loan.devices()

    def _words(self) -> npt.NDArray[np.uint64]:
        """One row a ``struct sc_ref``: offset, nbytes, slot and generation, and layout below region, temporary and
        status."""
        return np.frombuffer(ffi.buffer(self._refs, len(self) * _REF_BYTES), np.uint64).reshape(-1, 4)


class ReadBatch(_Batch):
    """Objects that this process reads in place; each OK one carries a held share until :meth:`release`.

    A context manager that releases. A batch that is dropped gives its shares back as soon as nothing made from
    it is alive; where CUDA tensors were made from it, that waits for the current stream of the thread in which the last
    of them dies: release what other streams read.
    """

    __slots__ = ()

    @property
    def hits(self) -> int:
        """How many leading keys are OK."""
        lost = self._lost()
        if self._ok == len(self) and not lost:
            return self._ok
        return next(i for i, code in enumerate(codes_of(self._refs, len(self))) if code or i in lost)

    def release(self) -> None:
        """Gives the shares back and makes the views unusable. Again: nothing.

        ViewInUseError while a tensor, an array or a slice of a view is alive; then the shares are kept. Where device
        memory was read, this first waits for the calling thread's current stream there; :meth:`release_after` waits for
        nothing.
        """
        if not self._end():
            self._release_borrowed()

    def _release_borrowed(self) -> None:
        """Where arrays or tensors were made, or it is not plain that no slice of a view is alive."""
        with self._attachment.lock:  # nobody borrows meanwhile
            if not self._open:
                return
            self._end_loans()
            loan, self._device_loan = self._device_loan, None
        _give_back(self._attachment, loan, self._refs, len(self))

    def release_after(self, stream: Any) -> None:
        """The same once ``stream`` has done all that it was given until now: it returns at once. For copies from the
        views of a pinned arena (:meth:`Cache.pin`), and for kernels that read device memory.

        ``stream``: a ``torch.cuda.Stream``, anything with ``cuda_stream`` or ``__cuda_stream__``, or its handle as int;
        TypeError for others. ViewInUseError as with :meth:`release`: drop the tensors first, the stream goes on with
        their memory. DeviceError where the driver cannot record an event; then the shares are kept. The shares go back
        at the next call of the cache, or a thread of this process sees to it; ``close`` waits for them.
        """
        attachment = self._attachment
        with attachment.lock:
            if not self._open:
                return
            attachment.check_open()
            refs = self._own_refs()
            event = event_in(attachment.regions.driver, stream)
            try:
                self._end_loans()
            except errors.ViewInUseError:
                event.destroy()
                raise
            loan, self._device_loan = self._device_loan, None  # which keeps the region open until then
            attachment.later.add(event, partial(_release_late, loan, attachment.handle, refs, len(self)))

    def _end_loans(self) -> None:
        """ViewInUseError, and nothing is done, while something made from this batch is alive."""
        near, far = self._loan, self._device_loan
        if (
            (far is not None and far.in_use())
            or (near is not None and near.in_use())
            or (self._root is not None and slices_live(self._root, self._views, self._lent))
            or not self._close()
        ):
            raise errors.ViewInUseError(
                f"arena {self._attachment.name!r}: a tensor, an array or a slice of a view of this batch is "
                "still alive, so its shares are kept; drop it (del), then release again"
            )
        self._loan = None

    def _leave(self, kind: type[BaseException] | None) -> None:
        """What ``with`` does at its end where :meth:`_end` does not."""
        if kind is None:
            self._release_borrowed()
            return
        try:
            self._release_borrowed()
        except errors.ViewInUseError:
            # The error in flight is what the caller must see; the shares go back when its frames are gone.
            self._hand_over()
        except errors.DeviceError:
            return  # the same: perhaps it is the one that broke the stream; the shares are back

    def _hand_over(self) -> None:
        """Lets the shares go back as soon as nothing made from this batch is alive. Called by the finalizer, too."""
        if sys.is_finalizing():
            return
        self._open = False
        waits: list[Callable[..., object]] = []
        heir = None
        memory = self._let_go()
        if memory is not None:
            waits.append(partial(when_over, memory))
        if self._device_loan is not None:
            heir = self._device_loan.heir()
            waits.append(self._device_loan.when_over)
        self._loan = self._device_loan = memory = None
        _when_over(waits, partial(_give_back, self._attachment, heir, self._own_refs(), len(self)))

    def _writable(self) -> bool:
        return False


class WriteBatch(_Batch):
    """Memory that this lane fills; readable for others once published.

    A context manager that publishes what is still reserved, or aborts on an exception. A batch that is dropped
    unfinished is aborted, with a ResourceWarning. After publishing, the views raise ValueError; arrays and
    tensors cannot be taken back, and must not be written to any more.

    Where CUDA tensors were made from it, to publish or abort first waits for the calling thread's current stream on
    their device: what other streams write must have been waited for.
    """

    __slots__ = ("_lock",)

    _lock: threading.Lock  #: of what ends the batch

    @classmethod
    def over(cls, core: _fast.Core, packed: Packed) -> Self:
        """One of these keys, none of which is reserved yet."""
        batch = core.batch(cls, packed, True)
        batch._lock = threading.Lock()  # noqa: SLF001 # C makes it without __init__
        return batch

    def publish_leading(self, n: int, extra_count: int) -> list[Status]:
        """For a load from L2: publishes the first ``n`` of objects that are OK, with shares as below, and tells no
        listener. The others stay reserved; where there are none, the batch is finished."""
        ranks = check_extra_count(extra_count, self._attachment.member.world_size) + 1
        if n == len(self):
            return self._publish(ranks, tell=False)
        codes = new("int8_t[]", n)
        with self._lock:
            self._check_unfinished()
            self._attachment.check(lib.sc_publish(self._attachment.handle, self._refs, n, ranks, codes))
        return statuses(ffi.buffer(codes)[:])

    def publish(self) -> list[Status]:
        """Makes what was reserved readable, or, of several writers, says that this one's part is done. One status a
        key: OK; NOT_FOUND, NOT_OWNER or EXISTS where it was finished otherwise; what it was already where it was not
        reserved."""
        return self._publish(0)

    def publish_and_reserve_read(self, extra_count: int = 0) -> list[Status]:
        """The same, and grants one reserved share each to ranks 0 to ``extra_count`` before anybody can evict."""
        return self._publish(check_extra_count(extra_count, self._attachment.member.world_size) + 1)

    def abort(self) -> list[Status]:
        """Gives what was reserved back. One status a key, as with :meth:`publish`."""
        self._abandon_tensors()
        return statuses(
            self._finish(lambda codes: lib.sc_abort_refs(self._attachment.handle, self._refs, len(self), codes))
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._open:
            return
        if kind is None:
            self.publish()
        else:
            self.abort()

    def __del__(self) -> None:
        if not self._open or self._ok == 0 or sys.is_finalizing():
            return  # a process that ends leaves nothing
        self._abandon_tensors()
        aborted = lib.sc_abort_refs(self._attachment.handle, self._refs, len(self), ffi.NULL)
        if aborted > 0:
            warnings.warn(
                f"a WriteBatch of {aborted} objects of arena {self._attachment.name!r} was dropped unfinished, and "
                "was aborted; publish or abort it",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def _abandon_tensors(self) -> None:
        """What a stream still writes must not become another object's. A broken context runs nothing any more."""
        with suppress(errors.DeviceError):
            complete_streams(self._devices())

    def _publish(self, ranks: int, *, tell: bool = True) -> list[Status]:
        complete_streams(self._devices())
        codes = self._finish(lambda codes: lib.sc_publish(self._attachment.handle, self._refs, len(self), ranks, codes))
        if tell and self._attachment.listeners:
            self._attachment.tell(self.keys, codes)
        return statuses(codes)

    def _check_unfinished(self) -> None:
        if not self._open:
            raise errors.ClosedError("WriteBatch: it was published or aborted already")

    def _finish(self, how: Any) -> bytes:
        codes = new("int8_t[]", len(self))
        with self._lock:
            self._check_unfinished()
            self._attachment.check(how(codes))
            self._open = False
        self._loan = self._device_loan = None
        self._close()
        self._let_go()  # also of what could not be released
        found: bytes = ffi.buffer(codes)[:]
        return found

    def _writable(self) -> bool:
        return True
