"""What a user states in ``kv_connector_extra_config``, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import shmcache
from shmcache.config import parse_size, shown

__all__ = ["Settings"]

_ARENA_FIELDS: Final = frozenset(field.name for field in fields(shmcache.ArenaConfig))


@dataclass(frozen=True)
class Settings:
    """The settings of a connector; ``of`` makes them from what vLLM hands over."""

    arena: str  #: the arena's name
    create: shmcache.ArenaConfig | None  #: how to make it where it is not there
    l2: tuple[str, ...]  #: paths or URLs of second tiers, asked in this order
    sync_load_bytes: int  #: a rank loads up to so much of one request within a step, more between steps; 0: all
    prefetch_timeout_s: float  #: a request waits so long for L2; then it takes what the arena has
    save_timeout_s: float  #: a finished request keeps its blocks so long while the arena has no room for them

    @classmethod
    def of(cls, stated: Mapping[str, Any]) -> Settings:
        """TypeError or ValueError names the setting, what was expected, and what was got."""
        rest = dict(stated)
        arena = rest.pop("arena", None)
        if not isinstance(arena, str):
            raise TypeError(f'kv_connector_extra_config: expected "arena", the name of an arena, got {shown(arena)}')
        l2 = _tiers(rest.pop("l2", ()))
        most = rest.pop("sync_load_bytes", "64MiB")
        sync_load_bytes = 0 if most == 0 and most is not False else parse_size(most, "sync_load_bytes")
        prefetch_timeout_s = _seconds(rest, "prefetch_timeout_s", 10.0)
        save_timeout_s = _seconds(rest, "save_timeout_s", 2.0)
        if unknown := sorted(rest.keys() - _ARENA_FIELDS):
            known = ", ".join(sorted({field.name for field in fields(cls)} - {"create"} | _ARENA_FIELDS))
            raise ValueError(f"kv_connector_extra_config: unknown {', '.join(unknown)}; expected {known}")
        if rest and "capacity" not in rest:
            raise ValueError(
                f"kv_connector_extra_config: {', '.join(sorted(rest))} only matter where the arena is made; state "
                '"capacity", too'
            )
        # Memory that is first given to a block when it is reserved would be given in the scheduler's time.
        create = shmcache.ArenaConfig(**{"populate": True, **rest}) if rest else None
        return cls(arena, create, l2, sync_load_bytes, prefetch_timeout_s, save_timeout_s)

    def attach(self, group: str, rank: int, world_size: int) -> shmcache.Cache:
        """ArenaNotFoundError where the arena is not there, and nothing says how large to make it."""
        try:
            return shmcache.attach(self.arena, create=self.create, group=group, rank=rank, world_size=world_size)
        except shmcache.ArenaNotFoundError as error:
            raise shmcache.ArenaNotFoundError(
                f'{error}; or state "capacity" in kv_connector_extra_config, and the first engine makes it'
            ) from None


def _tiers(stated: Any) -> tuple[str, ...]:
    tiers = (stated,) if isinstance(stated, str) else stated
    if not isinstance(tiers, (list, tuple)) or not all(isinstance(tier, str) for tier in tiers):
        raise TypeError(f"l2: expected a folder, a URL, or a list of them, got {shown(stated)}")
    return tuple(tiers)


def _seconds(stated: dict[str, Any], what: str, default: float) -> float:
    value = stated.pop(what, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what}: expected seconds, got {shown(value)}")
    if not 0 <= value <= 3600:
        raise ValueError(f"{what}: expected 0 to 3600 seconds, got {shown(value)}")
    return float(value)
