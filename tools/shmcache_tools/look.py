"""Looking at arenas from outside, for the programs that go through many: nothing found there stops them."""

from __future__ import annotations

import shmcache
from shmcache.stats import ArenaInfo


def look(name: str) -> ArenaInfo | None:
    """What ``inspect`` sees; None where no such arena is. What may not be opened is a problem, too."""
    try:
        return shmcache.inspect(name)
    except shmcache.ArenaNotFoundError:
        return None
    except shmcache.ArenaPermissionError as error:
        return ArenaInfo(name, path="", segment_bytes=0, problem=str(error))


def look_at_all() -> list[ArenaInfo]:
    """All arenas of this user, without those that went away meanwhile."""
    return [info for info in map(look, shmcache.arenas()) if info is not None]
