"""Batches: what ``Cache.read`` and ``Cache.reserve_write`` give back, one entry a key."""

from __future__ import annotations

import sys
import threading
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shmcache import errors
from shmcache._binding import ffi, lib, new
from shmcache._keys import Packed, unpack
from shmcache.attachment import Attachment
from shmcache.config import check_extra_count
from shmcache.layout import Layout
from shmcache.status import OK, Status, statuses
from shmcache.views import Loan

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Self

__all__ = ["ReadBatch", "WriteBatch"]


_sc_release: Final = lib.sc_release  # a function of lib costs a look-up at each use
_REF_BYTES: Final = ffi.sizeof("struct sc_ref")
_REF_STATUS: Final = ffi.offsetof("struct sc_ref", "status")


def codes_of(refs: Any) -> bytes:
    """The status in each ``struct sc_ref``, one byte a key."""
    raw: bytes = ffi.buffer(refs)[:]
    return raw[_REF_STATUS::_REF_BYTES]


class _Batch:
    """Keys, their statuses, and the memory of those that are OK."""

    __slots__ = ("__weakref__", "_attachment", "_loan", "_ok", "_open", "_packed", "_refs")

    def __init__(self, attachment: Attachment, packed: Packed, refs: Any, ok: int) -> None:
        self._attachment = attachment
        self._packed = packed
        self._refs = refs
        self._ok = ok
        self._loan: Loan | None = None
        self._open = True

    def found(self, ok: int) -> None:
        """For who made the batch: how many keys are OK."""
        self._ok = ok

    def __len__(self) -> int:
        return self._packed[3]

    @property
    def keys(self) -> list[bytes]:
        """The keys, in the order given."""
        return unpack(self._packed)

    @property
    def status(self) -> list[Status]:
        """One a key, as the call that made this batch found it."""
        if self._ok == len(self):
            return [OK] * self._ok
        return statuses(codes_of(self._refs))

    @property
    def views(self) -> list[memoryview | None]:
        """One memoryview of bytes a key, or None where the status is not OK. Made at the first call."""
        with self._attachment.lock:
            return self._borrow().views

    def arrays(self) -> list[Any]:
        """One numpy array a key (a tuple where the layout has several tensors), or None. Without a copy.

        A dtype that numpy lacks (bfloat16, float8) comes as unsigned integers of its width; a plain byte count
        as uint8.
        """
        with self._attachment.lock:
            return self._borrow().arrays(self._layouts())

    def tensors(self) -> list[Any]:
        """One torch tensor a key (a tuple where the layout has several), or None. Without a copy. Needs torch."""
        with self._attachment.lock:
            return self._borrow().tensors(self._layouts())

    def _writable(self) -> bool:
        raise AssertionError

    def _borrow(self) -> Loan:
        if not self._open:
            raise errors.ClosedError(f"{type(self).__name__}: its shares are given back, so it has no memory any more")
        if self._loan is None:
            self._loan = Loan(self._attachment.payload(writable=self._writable()), *self._spans(), self._ok)
        return self._loan

    def _spans(self) -> tuple[list[int], list[int]]:
        """Where each key's bytes start and stop; the latter 0 where the status is not OK."""
        if self._ok == len(self) == 1:  # the common read of one key needs no numpy
            ref = self._refs[0]
            return [ref.offset], [ref.offset + ref.nbytes]
        words = self._words()
        stops = words[:, 0] + words[:, 1]
        if self._ok < len(self):
            stops[words[:, 3] >> 48 != OK] = 0
        return words[:, 0].tolist(), stops.tolist()

    def _layouts(self) -> list[Layout | None]:
        get, words = self._attachment.layout_of, self._words()
        numbers, sizes, codes = words[:, 3] & 0xFFFFFFFF, words[:, 1], words[:, 3] >> 48
        found = zip(numbers.tolist(), sizes.tolist(), codes.tolist(), strict=True)
        return [get(number, nbytes) if code == OK else None for number, nbytes, code in found]

    def _words(self) -> npt.NDArray[np.uint64]:
        """One row a ``struct sc_ref``: offset, nbytes, slot and generation, and layout below temporary and status."""
        return np.frombuffer(ffi.buffer(self._refs), np.uint64).reshape(-1, 4)


class ReadBatch(_Batch):
    """Objects that this process reads in place; each OK one carries a held share until :meth:`release`.

    A context manager that releases. A batch that is dropped gives its shares back as soon as nothing made from
    it is alive.
    """

    __slots__ = ()

    @property
    def hits(self) -> int:
        """How many leading keys are OK."""
        if self._ok == len(self):
            return self._ok
        return next(i for i, code in enumerate(codes_of(self._refs)) if code)

    def release(self) -> None:
        """Gives the shares back and makes the views unusable. Again: nothing.

        ViewInUseError while a tensor, an array or a slice of a view is alive; then the shares are kept.
        """
        with self._attachment.lock:  # nobody borrows meanwhile
            if not self._open:
                return
            if self._loan is not None:
                if self._loan.in_use() or not self._loan.end():
                    raise errors.ViewInUseError(
                        f"arena {self._attachment.name!r}: a tensor, an array or a slice of a view of this batch is "
                        "still alive, so its shares are kept; drop it (del), then release again"
                    )
                self._loan = None
            self._open = False
        _sc_release(self._attachment.handle, self._refs, self._packed[3])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.release()
            return
        try:
            self.release()
        except errors.ViewInUseError:
            # The error in flight is what the caller must see; the shares go back when its frames are gone.
            self._hand_over()

    def __del__(self) -> None:
        if self._open and not sys.is_finalizing():
            self._hand_over()

    def _hand_over(self) -> None:
        """Lets the shares go back as soon as nothing made from this batch is alive."""
        self._open = False
        loan, self._loan = self._loan, None
        if loan is None:
            lib.sc_release(self._attachment.handle, self._refs, self._packed[3])
        else:
            loan.when_over(lib.sc_release, self._attachment.handle, self._refs, self._packed[3])

    def _writable(self) -> bool:
        return False


class WriteBatch(_Batch):
    """Memory that this lane fills; readable for others once published.

    A context manager that publishes what is still reserved, or aborts on an exception. A batch that is dropped
    unfinished is aborted, with a ResourceWarning. After publishing, the views raise ValueError; arrays and
    tensors cannot be taken back, and must not be written to any more.
    """

    __slots__ = ("_lock",)

    def __init__(self, attachment: Attachment, packed: Packed, refs: Any, ok: int) -> None:
        super().__init__(attachment, packed, refs, ok)
        self._lock = threading.Lock()

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
        return statuses(
            self._finish(lambda codes: lib.sc_abort_refs(self._attachment.handle, self._refs, len(self), codes))
        )

    def __enter__(self) -> Self:
        return self

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
        aborted = lib.sc_abort_refs(self._attachment.handle, self._refs, len(self), ffi.NULL)
        if aborted > 0:
            warnings.warn(
                f"a WriteBatch of {aborted} objects of arena {self._attachment.name!r} was dropped unfinished, and "
                "was aborted; publish or abort it",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def _publish(self, ranks: int, *, tell: bool = True) -> list[Status]:
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
        if self._loan is not None:
            self._loan.end()
            self._loan = None
        found: bytes = ffi.buffer(codes)[:]
        return found

    def _writable(self) -> bool:
        return True
