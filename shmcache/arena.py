"""Arenas by name: create, attach, destroy, list, inspect."""

from __future__ import annotations

import os
from typing import Final

from shmcache import errors, segment, snapshot
from shmcache._binding import Handle, check, ffi, lib, open_segment, process_state, raise_code
from shmcache.attachment import Attachment, Membership
from shmcache.cache import Cache
from shmcache.config import MAX_LANES, ArenaConfig, check_bool, check_fingerprint, check_name, shown
from shmcache.stats import ArenaInfo

__all__ = ["arenas", "attach", "create", "destroy", "inspect"]

MAX_GROUP: Final = 64  #: bytes of UTF-8
_RACES: Final = 1000  #: how often attach starts over because the arena came or went under it


class _OldArenaError(errors.ArenaDamagedError):
    """It was made before the last boot."""


def create(name: str, config: ArenaConfig) -> None:
    """Makes the arena ``name``. It is there whole or not at all.

    ArenaExistsError if something has the name, also a foreign file or a symbolic link; ArenaSpaceError if
    the directory of segments (/dev/shm, or what SHMCACHE_DIRECTORY names) or the memory cgroup cannot hold it.
    """
    check_name(name)
    segment.build(name, _check_config(config, "config"))


def attach(
    name: str,
    *,
    create: ArenaConfig | None = None,
    fingerprint: str | None = None,
    group: str | None = None,
    rank: int | None = None,
    world_size: int = 1,
    prefault: bool = True,
) -> Cache:
    """Attaches this process to the arena ``name``, by a lane of its own.

    ``create``: makes the arena where none is there; where one is, its geometry wins and only the fingerprint is
    compared. ``fingerprint``: refuse an arena made under another one. ``group`` (1 to 64 bytes of printable UTF-8),
    ``rank`` and ``world_size`` (1 to 256): the lane of that worker of that group, or of a controller where
    ``rank`` is None; without a group, a group of this process alone. ``prefault``: a thread maps what has memory into
    this process, from its first view of an object on, so that few views fault; False where it reads only little.

    ArenaNotFoundError, ArenaPermissionError, ArenaVersionError, ArenaDamagedError, FingerprintError,
    LaneInUseError (the rank's owner lives), NoLaneError, GroupError (another world_size), ArenaBusyError,
    and with ``create`` ArenaSpaceError.
    """
    check_name(name)
    member = _check_member(group, rank, world_size)
    check_bool(prefault, "prefault")
    if create is not None:
        _check_config(create, "create")
        fingerprint = create.fingerprint if fingerprint is None else fingerprint
    if fingerprint is not None:
        check_fingerprint(fingerprint)
    for _ in range(_RACES):
        try:
            cache = _join(name, member, fingerprint, prefault=prefault)
        except errors.ArenaNotFoundError:
            if create is None:
                raise
            _create_unless_there(name, create)
            continue
        if cache is not None:
            return cache
    raise errors.ArenaBusyError(f"arena {name!r}: it was destroyed and made anew {_RACES} times under attach")


def destroy(name: str, *, force: bool = False, inode: int | None = None) -> None:
    """Removes the arena. Its memory is free when the last process that maps it is gone.

    ArenaBusyError while a live lane exists, unless ``force``; those that are attached then keep what they have
    until they close it. What is no readable arena needs ``force``, too. ArenaNotFoundError.

    ``inode``: of the arena that is meant (``ArenaInfo.inode``; 0: of what could not be opened). Where another one has
    the name by now it stays, and ArenaNotFoundError says so.
    """
    check_name(name)
    check_bool(force, "force")
    try:
        fd = segment.open_file(name)
    except errors.ArenaPermissionError:
        if not force or inode:
            raise
        segment.unlink_unread(name)
        return
    try:
        if inode is not None and os.fstat(fd).st_ino != inode:
            raise errors.ArenaNotFoundError(
                f"no arena {name!r} any more: another was made under its name since; look again"
            )
        handle = open_segment(name, fd, writable=True)
        _retire(name, handle, fd, force=force)
    except (errors.ArenaDamagedError, errors.ArenaVersionError):
        if not force:
            raise
        segment.unlink(name, fd)
    finally:
        os.close(fd)


def arenas() -> list[str]:
    """The names of this user's arenas on this host, sorted."""
    return segment.names()


def inspect(name: str, *, objects: bool = False, shares: bool = False) -> ArenaInfo:
    """What can be seen of an arena from outside: takes no lane and no lock, maps nothing writable.

    ``objects``, ``shares``: lists each object with its place, and who holds what since when, too. A damaged arena is
    described by ``ArenaInfo.problem``. ArenaNotFoundError, ArenaPermissionError.
    """
    check_name(name)
    check_bool(objects, "objects")
    check_bool(shares, "shares")
    fd = segment.open_file(name, writable=False)
    path = str(segment.path_of(name))
    try:
        handle = open_segment(name, fd, writable=False)
        info = snapshot.arena_info(name, path, handle, fd, objects=objects, shares=shares)
        check(name, handle, lib.sc_intact(handle))
        _check_boot(name, handle)
    except (errors.ArenaDamagedError, errors.ArenaVersionError) as error:
        old = isinstance(error, _OldArenaError)
        status = os.fstat(fd)
        return ArenaInfo(name, path, status.st_size, problem=str(error), old=old, inode=status.st_ino)
    finally:
        os.close(fd)
    return info


def _create_unless_there(name: str, config: ArenaConfig) -> None:
    try:
        segment.build(name, config)
    except errors.ArenaExistsError:
        # What cannot be attached to would be found missing and existing for ever: a dangling symbolic link.
        if segment.path_of(name).is_symlink():
            segment.open_file(name)


def _join(name: str, member: Membership, fingerprint: str | None, *, prefault: bool) -> Cache | None:
    """None: the arena lost its name meanwhile; look again."""
    fd = segment.open_file(name)
    try:
        handle = open_segment(name, fd, writable=True)
        try:
            if _take_lane(name, handle, fd, member, fingerprint):
                return Cache(Attachment(name, member, handle, os.dup(fd), prefault=prefault))
        except BaseException:
            lib.sc_segment_shut(handle)  # now, not when the traceback is gone: it holds the lane
            raise
        lib.sc_segment_shut(handle)
        return None
    finally:
        os.close(fd)


def _take_lane(name: str, handle: Handle, fd: int, member: Membership, fingerprint: str | None) -> bool:
    _check_boot(name, handle)
    if fingerprint is not None:
        _check_same(name, handle, fingerprint)
    pid = ffi.new("uint32_t *")
    rank = -1 if member.rank is None else member.rank
    group = member.group.encode()
    code = lib.sc_join(handle, group, len(group), rank, member.world_size, pid)
    if code == lib.SC_E_RETIRED:
        # Who destroyed it died before the name was gone, or is about to take it.
        _retire(name, handle, fd, force=True)
    elif code < 0:
        _refuse(name, member, code, pid[0], ffi.errno, handle)
    return code >= 0 and os.fstat(fd).st_nlink > 0


def _retire(name: str, handle: Handle, fd: int, *, force: bool) -> None:
    pid = ffi.new("uint32_t *")
    code = lib.sc_retire(handle, force, pid)
    if code == lib.SC_E_BUSY and pid[0]:
        raise errors.ArenaBusyError(
            f"arena {name!r}: process {pid[0]} ({process_state(pid[0])}) is attached, or comes or goes at this moment; "
            f"stop it{'' if force else ', or use force'}"
        )
    if code < 0:
        raise_code(name, code, error=ffi.errno)
    segment.unlink(name, fd)
    lib.sc_door_close(handle)


def _refuse(name: str, member: Membership, code: int, pid: int, error: int, handle: Handle) -> None:
    if code == lib.SC_E_LANE_IN_USE:
        raise errors.LaneInUseError(
            f"arena {name!r}: rank {member.rank} of group {member.group!r} belongs to process {pid} "
            f"({process_state(pid)}); give each worker its own rank, or wait until it is gone"
        )
    if code == lib.SC_E_NO_LANE:
        raise errors.NoLaneError(
            f"arena {name!r}: no free lane for {member}; live processes and their groups have them all; close one, "
            "or create the arena with more lanes"
        )
    if code == lib.SC_E_WORLD_SIZE:
        raise errors.GroupError(
            f"arena {name!r}: expected the world_size that the live members of group {member.group!r} stated, "
            f"got {member.world_size}; use another group name for another engine"
        )
    raise_code(name, code, handle=handle, pid=pid, error=error)


def _check_same(name: str, handle: Handle, fingerprint: str) -> None:
    info = ffi.new("struct sc_info *")
    lib.sc_get_info(handle, info)
    found = bytes(ffi.buffer(info.fingerprint, info.fingerprint_bytes)).decode("utf-8", "replace")
    if found != fingerprint:
        raise errors.FingerprintError(
            f"arena {name!r}: expected fingerprint {shown(fingerprint)}, it was created under {shown(found)}; "
            "its objects are of another model, dtype or layout: use another arena"
        )


def _check_boot(name: str, handle: Handle) -> None:
    info = ffi.new("struct sc_info *")
    lib.sc_get_info(handle, info)
    if bytes(ffi.buffer(info.boot_id, 16)) != segment.boot_id():
        raise _OldArenaError(
            f"arena {name!r}: it was made before the last boot, so nothing in it is current; remove it with "
            f"shmcache-cleanup {name}"
        )


def _check_config(config: ArenaConfig, what: str) -> ArenaConfig:
    if not isinstance(config, ArenaConfig):
        raise TypeError(f"{what}: expected an ArenaConfig, got {shown(config)}")
    return config


def _check_member(group: str | None, rank: int | None, world_size: int) -> Membership:
    for what, value in (("rank", rank), ("world_size", world_size)):
        if value is None and what == "rank":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{what}: expected int, got {shown(value)}")
    if not 1 <= world_size <= MAX_LANES:
        raise ValueError(f"world_size: expected 1 to {MAX_LANES}, got {shown(world_size)}")
    if rank is not None and not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1}, as world_size is {world_size}, got {shown(rank)}")
    if group is None:
        if world_size != 1:
            raise ValueError(f"world_size: expected 1 without a group, got {world_size}; state the group's name")
        return Membership("", 0, 1)
    if not isinstance(group, str):
        raise TypeError(f"group: expected str, got {shown(group)}")
    if not 1 <= len(group.encode("utf-8", "ignore")) <= MAX_GROUP or not group.isprintable():
        raise ValueError(f"group: expected 1 to {MAX_GROUP} bytes of printable text in UTF-8, got {shown(group)}")
    return Membership(group, rank, world_size)
