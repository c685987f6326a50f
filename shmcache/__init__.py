"""shmcache: one copy of KV-cache objects for all processes of a host, read in place.

::

    config = shmcache.ArenaConfig(capacity="8GiB")
    with shmcache.attach("kv", create=config) as cache:
        cache.put(b"key", b"bytes")
        with cache.read([b"key"]) as batch:
            batch.views[0]
"""

from shmcache.arena import arenas, attach, create, destroy, inspect
from shmcache.batch import ReadBatch, WriteBatch
from shmcache.cache import Cache
from shmcache.config import ArenaConfig
from shmcache.errors import (
    ArenaBusyError,
    ArenaDamagedError,
    ArenaExistsError,
    ArenaNotFoundError,
    ArenaPermissionError,
    ArenaSpaceError,
    ArenaVersionError,
    ClosedError,
    DeviceError,
    DirectoryError,
    FingerprintError,
    GroupError,
    LaneInUseError,
    NoLaneError,
    ShmcacheError,
    ViewInUseError,
)
from shmcache.layout import Layout
from shmcache.stats import ArenaInfo, Counters, LaneInfo, LockInfo, ObjectInfo, ReapReport, RegionInfo, ShareInfo, Stats
from shmcache.status import Status

__version__ = "0.1.0"

__all__ = [
    "ArenaBusyError",
    "ArenaConfig",
    "ArenaDamagedError",
    "ArenaExistsError",
    "ArenaInfo",
    "ArenaNotFoundError",
    "ArenaPermissionError",
    "ArenaSpaceError",
    "ArenaVersionError",
    "Cache",
    "ClosedError",
    "Counters",
    "DeviceError",
    "DirectoryError",
    "FingerprintError",
    "GroupError",
    "LaneInUseError",
    "LaneInfo",
    "Layout",
    "LockInfo",
    "NoLaneError",
    "ObjectInfo",
    "ReadBatch",
    "ReapReport",
    "RegionInfo",
    "ShareInfo",
    "ShmcacheError",
    "Stats",
    "Status",
    "ViewInUseError",
    "WriteBatch",
    "arenas",
    "attach",
    "create",
    "destroy",
    "inspect",
]
