"""Memory on loan: memoryviews, arrays and tensors over the payload, and whether any of them is still alive.

A :class:`Loan` is made for one batch. All that is made from it refers to one numpy array (the loan's base) or
to one managed buffer (its root), so that counting references to these two tells, for a batch of any size,
whether something outlives the batch. CPython counts references exactly; that is what this module stands on.
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


class Loan:
    """The memory of one batch, as views, arrays and tensors.

    Key i has bytes ``starts[i]`` to ``stops[i]`` of the payload, or none where the latter is 0; ``lent`` keys have
    some.
    """

    __slots__ = ("_base", "_lent", "_root", "_starts", "_stops", "_views")

    def __init__(self, payload: memoryview, starts: list[int], stops: list[int], lent: int) -> None:
        # The first array over its memory, so that every array made from it names it as its base.
        self._base: npt.NDArray[np.uint8] = np.frombuffer(payload, _UINT8)
        self._root: memoryview | None = None
        self._views: list[memoryview | None] = []
        self._lent = lent
        self._starts = starts
        self._stops = stops

    @property
    def views(self) -> list[memoryview | None]:
        """One memoryview a key, made at the first call; the same ones after."""
        if self._root is None:
            root = self._root = memoryview(self._base)  # type: ignore[arg-type] # numpy's hints know no Buffer
            spans = zip(self._starts, self._stops, strict=True)
            if self._lent == len(self._stops):
                self._views = [root[start:stop] for start, stop in spans]
            else:
                self._views = [root[start:stop] if stop else None for start, stop in spans]
        return self._views

    def arrays(self, layouts: list[Layout | None]) -> list[Any]:
        """One array (or tuple of them) a key, by the key's layout; None where the key has none."""
        spans = zip(self._starts, layouts, strict=True)
        return [None if layout is None else layout.arrays(self._base, start) for start, layout in spans]

    def tensors(self, layouts: list[Layout | None]) -> list[Any]:
        """The same as torch tensors."""
        spans = zip(self._starts, layouts, strict=True)
        return [None if layout is None else layout.tensors(self._base, start) for start, layout in spans]

    def in_use(self) -> bool:
        """Whether an array, a tensor or a slice of a view is alive. The views themselves do not count."""
        root = self._root
        if root is None:
            return sys.getrefcount(self._base) > ALONE
        if sys.getrefcount(self._base) > ALONE + 1:
            return True
        shared = managed_buffer(root)
        return sys.getrefcount(shared) > ALONE + 1 + self._lent and self._others_live(shared)

    def _others_live(self, shared: Any) -> bool:
        """There are more memoryviews than ours. Those that somebody released, but still names, do not count."""
        ours = {id(view) for view in (self._root, *self._views)}
        others = (obj for obj in gc.get_referrers(shared) if isinstance(obj, memoryview))
        return any(_unreleased(view) for view in others if id(view) not in ours)

    def end(self) -> bool:
        """Releases the views, so that a use after this raises ValueError.

        False if one cannot be released, since its buffer is exported in a way that only the export shows.
        """
        try:
            for view in self._views:
                if view is not None:
                    view.release()
        except BufferError:
            self._restore()
            return False
        if self._root is not None:
            self._root.release()
        return True

    def _restore(self) -> None:
        """Makes the views anew that were released before one could not be."""
        assert self._root is not None  # noqa: S101 # there are views
        for i, view in enumerate(self._views):
            if view is not None and not _unreleased(view):
                self._views[i] = self._root[self._starts[i] : self._stops[i]]

    def when_over(self, then: Callable[..., object], *args: object) -> None:
        """Calls ``then`` once nothing made from this loan is alive, nor the loan; not at the process's end."""
        weakref.finalize(self._base, then, *args).atexit = False
