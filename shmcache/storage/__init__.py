"""L2: prefetch from slower tiers into an arena, and stores back to them.

::

    with StorageManager(cache, l2=[FileStore("/var/cache/kv", capacity="100GiB")]) as storage:
        task = storage.submit_prefetch_task(keys, layout, extra_count=3)
        hits = storage.wait_prefetch_status(task).hits
"""

from shmcache.storage.adapter import L2Adapter, open_adapter
from shmcache.storage.file import FileStore
from shmcache.storage.manager import StorageManager
from shmcache.storage.mooncake import MooncakeStore
from shmcache.storage.task import PrefetchResult, PrefetchTask
from shmcache.storage.valkey import ValkeyStore

__all__ = [
    "FileStore",
    "L2Adapter",
    "MooncakeStore",
    "PrefetchResult",
    "PrefetchTask",
    "StorageManager",
    "ValkeyStore",
    "open_adapter",
]
