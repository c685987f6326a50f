"""The views of ``shmcache-stat``: what each needs to be looked at, and how it is drawn once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import RenderableType

from shmcache_tools.look import Observer, Seen
from shmcache_tools.stat.map_view import block_maps
from shmcache_tools.stat.render import arena_in_full, arenas_table
from shmcache_tools.stat.shares_view import shares_table


@dataclass(frozen=True, slots=True)
class View:
    """One way to look at one arena, or at all of this user."""

    name: str | None  #: the arena; None: all
    draw: Callable[[Seen], RenderableType]
    objects: bool = False  #: needs every object
    shares: bool = False  #: needs every share

    def observer(self) -> Observer:
        """Looks at what this view needs."""
        return Observer(self.name, objects=self.objects, shares=self.shares)


def view_of(name: str | None, *, shares: bool, blocks: bool, limit: int | None) -> View:
    """The view that the options ask for. ``limit``: as ``--limit``."""
    if shares:
        return View(name, lambda seen: shares_table(seen, limit), shares=True)
    if blocks:
        return View(name, block_maps, objects=True)
    return View(name, arenas_table if name is None else arena_in_full)
