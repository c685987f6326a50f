"""The processes of a process group and what they leave, by /proc, and its end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

_GONE_TIMEOUT_S = 10.0
_TRACKER_TIMEOUT_S = 3.0
_SEGMENT = re.compile(r"/dev/shm/vllm_dist_\S+")  # noqa: S108 # where the kernel has them


def members(group: int) -> list[int]:
    """The living processes of a group, without the trackers that remove what the others leave in /dev/shm."""
    return [pid for pid in _living(group) if not _is_tracker(pid)]


def segments(group: int) -> set[Path]:
    """What vLLM for CPUs has in /dev/shm beside what trackers remove: it stays when a worker is killed."""
    found: set[Path] = set()
    for pid in members(group):
        with contextlib.suppress(OSError):  # gone meanwhile
            found.update(map(Path, _SEGMENT.findall(Path(f"/proc/{pid}/maps").read_text(encoding="utf-8"))))
    return found


def send(pids: list[int], signum: int) -> None:
    """A signal to each that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def kill_members(group: int, *, but: int | None = None) -> None:
    """SIGKILL to all of them but one. TimeoutError where one stays."""
    until = time.monotonic() + _GONE_TIMEOUT_S
    while left := [pid for pid in members(group) if pid != but]:  # again, for what was born meanwhile
        send(left, signal.SIGKILL)
        if time.monotonic() > until:
            raise TimeoutError(f"processes {left} do not end by SIGKILL")
        time.sleep(0.01)


def kill_group(group: int) -> None:
    """SIGKILL to all members, then to trackers that are not done by themselves soon."""
    kill_members(group)
    until = time.monotonic() + _TRACKER_TIMEOUT_S
    while _living(group) and time.monotonic() < until:
        time.sleep(0.01)
    send(_living(group), signal.SIGKILL)


def _living(group: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            state, _parent, its_group = (
                stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
            )
            if int(its_group) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return sorted(found)


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
