"""The L2 of a program's run: one that a URL names, or files in a directory that is gone when the run is.

The directory is made below ``TMPDIR``, or else below ``/var/tmp``, which is on a disk where ``/tmp`` may be
memory. It is locked (flock) as long as its run lives, so that the next run can remove what a SIGKILL left.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shmcache.config import parse_size
from shmcache.storage import FileStore, L2Adapter, open_adapter
from shmcache_tools.program import RunError, UsageError, size
from shmcache_tools.text import make_console, size_text

_PREFIX = "shmcache-l2-"
_PROBE = b"is anybody there?"
_FILE_OVERHEAD_BYTES = 8192  # a file's header, and the disk's own block for it


def add_l2_options(parser: argparse.ArgumentParser, capacity: str) -> None:
    """``--l2``, ``--l2-capacity`` and ``--no-l2``."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--l2", metavar="URL", help="a path, or a URL such as valkey://host:6379; what is stored stays there"
    )
    which.add_argument(
        "--l2-capacity",
        type=size,
        default=parse_size(capacity, "capacity"),
        metavar="SIZE",
        help=f"of the default L2, files in a temporary directory; default {capacity}",
    )
    which.add_argument("--no-l2", action="store_true", help="the arena alone")


@dataclass(frozen=True, slots=True)
class L2:
    """The L2 of one run."""

    adapters: list[L2Adapter]  #: for a StorageManager, which closes them
    text: str | None  #: what it is; None: there is none


@contextlib.contextmanager
def opened_l2(options: argparse.Namespace, chunks: int) -> Iterator[L2]:
    """The L2 that the options ask for; the directory is removed at the end of the block.

    ``chunks``: how many the run stores. UsageError for a URL that names nothing; RunError for an L2 that does not
    answer, or a disk that is too full.
    """
    if options.no_l2:
        yield L2([], None)
    elif options.l2 is not None:
        adapter = _open(lambda: open_adapter(options.l2))
        yield L2([adapter], repr(adapter))  # a URL may hold a password
    else:
        remove_stale()
        _check_disk(min(options.l2_capacity, chunks * (options.chunk_bytes + _FILE_OVERHEAD_BYTES)))
        with _scratch() as folder:
            adapter = _open(lambda: FileStore(folder, options.l2_capacity))
            yield L2([adapter], f"files in {_parent()}, at most {size_text(options.l2_capacity)}")


def remove_stale() -> None:
    """Remove the directories of runs that were SIGKILLed."""
    for folder in _parent().glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(folder):  # another's, or in use, or gone meanwhile
            make_console(sys.stderr).print(f"removing {folder}, the L2 of a run that was killed")
            shutil.rmtree(folder)


def _open(make: Callable[[], L2Adapter]) -> L2Adapter:
    try:
        adapter = make()
    except (TypeError, ValueError) as error:
        raise UsageError(f"L2: {error}") from None
    except (ImportError, OSError) as error:
        raise RunError(f"L2: {error}") from None
    try:
        adapter.lookup([_PROBE])
    except Exception as error:  # noqa: BLE001 # adapters raise what they like
        adapter.close()
        raise RunError(f"L2: {adapter!r} does not answer: {error}") from None
    return adapter


def _check_disk(nbytes: int) -> None:
    free = shutil.disk_usage(_parent()).free
    if nbytes > free:
        raise RunError(
            f"the files of L2 need {size_text(nbytes)} in {_parent()}, which has {size_text(free)} free: pass "
            "a smaller --l2-capacity, --l2, --no-l2, or set TMPDIR to another disk"
        )


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_parent()))
        except OSError as error:
            raise RunError(f"L2: {error}") from None
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(_locked(folder))
            except FileNotFoundError:
                continue  # another run took it for a stale one before it was locked
            try:
                yield str(folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a directory; BlockingIOError where another run does, FileNotFoundError where it is gone."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise FileNotFoundError(folder)
        yield
    finally:
        os.close(descriptor)


def _parent() -> Path:
    """Where a large file may be for some minutes."""
    if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK):  # noqa: S108 # mkdtemp makes what is used
        return Path("/var/tmp")  # noqa: S108
    return Path(tempfile.gettempdir())
