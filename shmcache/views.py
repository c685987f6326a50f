"""Memory on loan: arrays and tensors over the payload, and whether any of them, or a slice of a view, is still alive.

All arrays and tensors of one batch refer to one numpy array (the loan's base), all its memoryviews to one managed
buffer, so that counting references to these two tells, for a batch of any size, whether something outlives the batch.
CPython counts references exactly; that is what this module stands on, and native/python/batch.c, which makes the views.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from shmcache.layout import Layout

if TYPE_CHECKING:
    import numpy.typing as npt

_UINT8 = np.dtype(np.uint8)

#: References to an object that has one owner, as sys.getrefcount sees them when the owner asks.
ALONE = 2


def managed_buffer(view: memoryview) -> Any:
    """What a memoryview shares with its slices: CPython's managed buffer, of which each is a reference."""
    return gc.get_referents(view)[0]


def _unreleased(view: memoryview) -> bool:
    try:
        view.nbytes  # noqa: B018 # raises where the view was released
    except ValueError:
        return False
    return True


def slices_live(root: memoryview, views: list[memoryview | None], lent: int) -> bool:
    """Whether a memoryview of the same buffer is alive besides ``root`` and the ``lent`` ones in ``views``."""
    shared = managed_buffer(root)
    return sys.getrefcount(shared) > ALONE + 1 + lent and _others_live(shared, [root, *views])


def _others_live(shared: Any, ours: list[memoryview | None]) -> bool:
    """There are more memoryviews than ours. Those that somebody released, but still names, do not count."""
    known = {id(view) for view in ours}
    others = (obj for obj in gc.get_referrers(shared) if isinstance(obj, memoryview))
    return any(_unreleased(view) for view in others if id(view) not in known)


def when_over(memory: object, then: Callable[..., object], *args: object) -> None:
    """Calls ``then`` once ``memory`` is not alive, nor anything that refers to it; not at the process's end."""
    weakref.finalize(memory, then, *args).atexit = False


class Loan:
    """The memory of one batch as arrays and tensors."""

    __slots__ = ("_base",)

    def __init__(self, memory: Any) -> None:
        # The first array over its memory, so that every array made from it names it as its base.
        self._base: npt.NDArray[np.uint8] = np.frombuffer(memory, _UINT8)

    def arrays(self, starts: list[int], layouts: list[Layout | None]) -> list[Any]:
        """One array (or tuple of them) a key, by the key's layout; None where the key has none."""
        spans = zip(starts, layouts, strict=True)
        return [None if layout is None else layout.arrays(self._base, start) for start, layout in spans]

    def tensors(self, starts: list[int], layouts: list[Layout | None]) -> list[Any]:
        """The same as torch tensors."""
        spans = zip(starts, layouts, strict=True)
        return [None if layout is None else layout.tensors(self._base, start) for start, layout in spans]

    def in_use(self) -> bool:
        """Whether an array or a tensor is alive."""
        return sys.getrefcount(self._base) > ALONE
