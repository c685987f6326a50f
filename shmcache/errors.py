"""Everything that shmcache raises beside TypeError and ValueError (wrong arguments) and TimeoutError.

Catch :class:`ShmcacheError` for all of them. Each message names the arena, what was expected and what
to do. What is ordinary in a cache (a miss, no room, a key in flight) is a ``Status``, not an error.
"""

from __future__ import annotations

__all__ = [
    "ArenaBusyError",
    "ArenaDamagedError",
    "ArenaExistsError",
    "ArenaNotFoundError",
    "ArenaPermissionError",
    "ArenaSpaceError",
    "ArenaVersionError",
    "ClosedError",
    "DeviceError",
    "DirectoryError",
    "FingerprintError",
    "GroupError",
    "LaneInUseError",
    "NoLaneError",
    "ShmcacheError",
    "ViewInUseError",
]


class ShmcacheError(Exception):
    """The base of all errors below."""


class ArenaNotFoundError(ShmcacheError):
    """No arena has this name, for this user on this host.

    Create it first, or attach with ``create=config``, which creates it where it is missing. Containers
    see one another's arenas only where they share ``/dev/shm`` (or ``SHMCACHE_DIRECTORY``).
    """


class ArenaExistsError(ShmcacheError):
    """``create`` found an arena of this name.

    Attach to it (``attach(name, create=config)`` does either), or destroy it first.
    """


class ArenaBusyError(ShmcacheError):
    """Somebody who is alive is in the way.

    Raised by ``destroy`` while a process is attached: stop it, or pass ``force=True``. Raised by a change
    that waited longer than ``lock_timeout_s`` for an arena lock whose holder is stopped, not dead: let the
    process named in the message run on (``kill -CONT``) or kill it. The change was not made; try again.
    """


class ArenaVersionError(ShmcacheError):
    """The arena was made by a build of shmcache with another memory format.

    Use one version of shmcache in all processes; to change it, stop them, destroy the arena and create
    it anew.
    """


class ArenaDamagedError(ShmcacheError):
    """The arena holds values that no correct process writes, or is no arena at all.

    Stop its processes, destroy it with ``force=True`` and create it anew. If it happens again, something
    else writes to the segment.
    """


class ArenaPermissionError(ShmcacheError):
    """The segment belongs to another user, is no regular file, or its mode does not let this user in.

    An arena is its creator's alone (mode 0600): run all processes as one user.
    """


class ArenaSpaceError(ShmcacheError):
    """``/dev/shm`` (or ``SHMCACHE_DIRECTORY``) or the memory cgroup has not enough memory for the arena.

    The message says how much is missing and what to set: a smaller ``capacity``, a larger ``/dev/shm``
    (``docker run --shm-size``, an ``emptyDir`` of medium ``Memory``) or a higher memory limit.
    """


class DeviceError(ShmcacheError):
    """CUDA, or a device, is not there or cannot do what was asked for; nothing of it was done.

    The message has the driver's own word for it. Host memory (region 0, not pinned) works everywhere.
    """


class DirectoryError(ShmcacheError):
    """``SHMCACHE_DIRECTORY`` names no directory that segments may lie in: on a tmpfs, this user's or root's, and not
    open to others unless it is sticky. Name another one, or unset it. Nothing was done."""


class FingerprintError(ShmcacheError):
    """The arena was created under another fingerprint: its objects are of another model, dtype or layout.

    Attach under the arena's own fingerprint, or use another arena.
    """


class LaneInUseError(ShmcacheError):
    """The lane of this group and rank belongs to another process that is alive.

    Give each worker its own rank; wait for a predecessor to end, or kill it.
    """


class NoLaneError(ShmcacheError):
    """All lanes of the arena belong to live processes.

    Detach a process, or create the arena with more ``lanes``.
    """


class GroupError(ShmcacheError):
    """The group, rank and world_size do not fit one another or what the group's other lanes stated.

    All of a group state one ``world_size``; another engine needs another group name.
    """


class ViewInUseError(ShmcacheError):
    """A tensor, array or slice of a view is still alive, so its share was kept.

    Drop it (``del``), and release again. What must outlive the share is to be copied.
    """


class ClosedError(ShmcacheError):
    """The cache was closed, or belongs to the process that this one was forked from.

    Attach again; a forked child attaches for itself.
    """
