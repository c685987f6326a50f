"""What a second tier (L2) is: the protocol that every store speaks, and how one is found by its URL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Final, Protocol, TypeAlias, runtime_checkable

from shmcache.config import shown
from shmcache.layout import Layout
from shmcache.status import Status

__all__ = ["ENTRY_POINTS", "Counting", "L2Adapter", "LayoutLike", "open_adapter"]

ENTRY_POINTS: Final = "shmcache.l2"  #: the group under which packages register adapters

LayoutLike: TypeAlias = "Layout | int"
Counting: TypeAlias = Callable[[str, int], None]  #: ``count(name of a counter, by how much)``


@runtime_checkable
class L2Adapter(Protocol):
    """A store of objects behind an arena. Keys are 1 to 64 bytes; a view is the memory of one object, contiguous.

    ``StorageManager`` calls it from several threads at once. A method may block; one that answers nothing for
    ``l2_timeout_s`` counts as hung, and may raise whatever it likes: either costs that call alone. It must not
    keep a view, or anything made from one, after it has returned. An adapter may have, beside the methods below:

    - ``bind(payload, count)``: called once, before all else, with the arena's payload as this process writes it
      (to register it with a network card), and with a function that adds to the counters of ``shmcache-stat``.
    - ``keeps_layouts = True``: then ``store`` is given ``layouts=``, one :class:`Layout` a key.
    - ``from_url(url)``, a class method: what an entry point of the group ``shmcache.l2`` names, for
      :func:`open_adapter`.
    """

    def lookup(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each object is there. A yes binds nobody: load may still not find it."""

    def load(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> list[Status]:
        """Fills each (writable) view with the whole object.

        OK; NOT_FOUND where it is gone, of another size, or its checksum says that it is damaged. What the view
        holds then does not matter.
        """

    def store(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> list[Status]:
        """Keeps a copy of each (read-only) view: OK, EXISTS, or NO_SPACE where the store is full."""

    def delete(self, keys: Sequence[bytes]) -> None:
        """Removes objects; those that are not there are no error."""

    def close(self) -> None:
        """Lets go of connections and threads. Again: nothing."""


def open_adapter(url: str) -> L2Adapter:
    """The adapter that a URL names, such as ``file:///var/cache/kv?capacity=100GiB`` or ``valkey://host:6379/0``.

    The scheme is the name of an entry point of the group ``shmcache.l2``; a path alone means ``file``. ValueError
    where there is none of that name; ImportError where its extra is not installed.
    """
    if not isinstance(url, str):
        raise TypeError(f"l2: expected an adapter or a URL, got {shown(url)}")
    scheme = url.partition(":")[0] if ":" in url.partition("/")[0] else "file"
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if scheme not in found:
        # Not the URL itself: there may be a password in it.
        raise ValueError(f"l2: expected a path, or a URL of {', '.join(sorted(found))}; got one of {shown(scheme)}")
    adapter = found[scheme].load().from_url(url)
    if not isinstance(adapter, L2Adapter):
        raise TypeError(f"l2: {found[scheme].value} has not all methods of an L2Adapter")
    return adapter
