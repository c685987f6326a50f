"""FileStore among processes: what the dead leave, a capacity shared, a full disk."""

from __future__ import annotations

import fcntl
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from arena_support import TIMEOUT_S, pattern, run_python, started

from shmcache import Status
from shmcache.storage.file import FileStore

MIB = 1 << 20

# A function `data(key, nbytes)` that gives an object's bytes; the store of the directory in the first argument.
BEGIN = """
import os, sys, logging
from arena_support import pattern
from shmcache import Status
from shmcache.storage.file import FileStore
from shmcache.storage import file_folders

def put(key, nbytes):
    return store.store([key], [memoryview(pattern(key, nbytes))])[0]

def get(key, nbytes):
    view = memoryview(bytearray(nbytes))
    return bytes(view) if store.load([key], [view]) == [Status.OK] else None

root = sys.argv[1]
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs find what tests share; none is run where the checksum is missing."""
    if "CI" not in os.environ:
        pytest.importorskip("xxhash")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "kv"


def get(store: FileStore, key: bytes, nbytes: int) -> bytes | None:
    view = memoryview(bytearray(nbytes))
    return bytes(view) if store.load([key], [view]) == [Status.OK] else None


def temporaries(root: Path) -> list[Path]:
    return list(root.glob("*/.shmcache-*.tmp"))


def objects(root: Path) -> list[Path]:
    return list(root.glob("*/*.safetensors"))


# Deaths

STORE_FOR_EVER = """
store = FileStore(root)
print("ready", flush=True)
while True:
    for i in range(8):
        key = b"%d" % i
        put(key, 4 << 20)
        store.delete([b"%d" % ((i + 4) % 8)])
"""

HALF_WRITTEN = """
path = file_folders.path_of(root, b"key")
os.makedirs(os.path.dirname(path), exist_ok=True)

def stop_half_way(file, parts):
    os.write(file, b"half")
    print("ready", flush=True)
    sys.stdin.read()

from shmcache.storage import file
file._write_all = stop_half_way
store = FileStore(root)
put(b"key", 1000)
"""


def test_whoever_dies_while_storing_leaves_no_half_object(root: Path, chance: random.Random) -> None:
    left, damaged = 0, list[tuple[str, int]]()
    for _ in range(8):
        with started(BEGIN + STORE_FOR_EVER, str(root)) as writer:
            time.sleep(chance.uniform(0.0, 0.1))
            writer.kill()
            writer.wait(TIMEOUT_S)
        left += len(temporaries(root))
        store = FileStore(root)
        assert temporaries(root) == []
        store.bind(memoryview(b""), lambda *count: damaged.append(count))
        for i in range(8):
            key = b"%d" % i
            assert get(store, key, 4 * MIB) == (pattern(key, 4 * MIB) if store.lookup([key])[0] else None)
        assert damaged == []
    print(f"{left} files were left by the dead")


def test_what_the_dead_were_writing_is_removed_at_start(root: Path) -> None:
    with started(BEGIN + HALF_WRITTEN, str(root)) as writer:
        assert [path.stat().st_size for path in temporaries(root)] == [4]
        FileStore(root)
        assert len(temporaries(root)) == 1  # its writer is alive
        writer.kill()
        writer.wait(TIMEOUT_S)
        assert len(temporaries(root)) == 1
        FileStore(root)
        assert temporaries(root) == []


def test_what_the_dead_were_writing_is_removed_by_an_eviction(root: Path) -> None:
    store = FileStore(root, MIB)
    with started(BEGIN + HALF_WRITTEN, str(root)) as writer:
        writer.kill()
        writer.wait(TIMEOUT_S)
    assert len(temporaries(root)) == 1
    assert store.store([b"k"], [memoryview(b"data")]) == [Status.OK]  # the first one looks at the directory
    assert temporaries(root) == []


@pytest.mark.parametrize("times", [1, 7, 8])
def test_a_writer_that_lives_goes_on_when_its_file_is_taken_for_a_leftover(
    root: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Another process starts just when this one has opened its file and not locked it yet."""
    real, starts = fcntl.flock, [FileStore] * times

    def start_another(descriptor: int, operation: int) -> None:
        if starts:
            starts.pop()(root)
        real(descriptor, operation)

    store = FileStore(root)
    monkeypatch.setattr("shmcache.storage.file.flock", start_another)
    if times < 8:
        assert store.store([b"k"], [memoryview(b"data")]) == [Status.OK]
    else:
        with pytest.raises(FileNotFoundError, match="again and again"):
            store.store([b"k"], [memoryview(b"data")])
    assert get(store, b"k", 4) == (b"data" if times < 8 else None)
    assert starts == []
    assert temporaries(root) == []


# Capacity

STORE_MANY = """
store = FileStore(root, "4MiB")
evicted = [0]
def count(name, n):
    assert name != "l2_damaged", name
    evicted[0] += n if name == "l2_evictions" else 0
store.bind(memoryview(b""), count)
mine = sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for i in range(250):
    key = f"{mine}-{i}".encode() if i % 2 else b"shared-%d" % i
    assert put(key, 60_000) in (Status.OK, Status.EXISTS, Status.NO_SPACE)
    for older in (i, i - 3, i - 30):
        name = f"{mine}-{older}".encode() if older % 2 else b"shared-%d" % older
        assert get(name, 60_000) in (None, pattern(name, 60_000))
print("done", evicted[0], flush=True)
"""


def test_processes_store_and_evict_at_once(root: Path) -> None:
    program, path = BEGIN + STORE_MANY, str(root)
    with started(program, path, "a") as a, started(program, path, "b") as b, started(program, path, "c") as c:
        for each in (a, b, c):
            assert each.stdin is not None
            each.stdin.write("go\n")
            each.stdin.flush()
        said = [each.communicate(timeout=TIMEOUT_S)[0] for each in (a, b, c)]
        assert [(each.returncode, text.split()[0]) for each, text in zip((a, b, c), said, strict=True)] == [
            (0, "done")
        ] * 3
    assert sum(int(text.split()[1]) for text in said) > 100
    assert temporaries(root) == []
    one = 4096 + 60_000
    used = sum(file.stat().st_size for file in objects(root))
    assert 3 * MIB < used <= 4 * MIB + 3 * (4 * MIB // 10 + one)
    keys = [bytes.fromhex(file.stem) for file in objects(root)]
    store = FileStore(root, 4 * MIB)
    assert [get(store, key, 60_000) for key in keys] == [pattern(key, 60_000) for key in keys]
    assert store.store([b"last"], [memoryview(bytes(60_000))]) == [Status.OK]
    assert sum(file.stat().st_size for file in objects(root)) <= 4 * MIB


FORKED = """
store = FileStore(root, "1MiB")
for i in range(4):
    put(b"%d" % i, 200 << 10)
pid = os.fork()
if pid == 0:
    with file_folders.evicting(root) as mine:  # so that the child has no way to look at the directory
        assert mine
        assert put(b"child", 50 << 10) == Status.OK  # it has written nothing yet
    assert get(b"3", 200 << 10) == pattern(b"3", 200 << 10)
    assert put(b"again", 50 << 10) == Status.OK
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert get(b"child", 50 << 10) == pattern(b"child", 50 << 10)
assert put(b"parent", 50 << 10) == Status.OK
"""


def test_a_forked_child_goes_on_and_counts_for_itself(root: Path) -> None:
    done = run_python(BEGIN + FORKED, str(root))
    assert done.returncode == 0, done.stderr
    assert sum(file.stat().st_size for file in objects(root)) <= MIB


FORKED_MEANWHILE = """
import time
store = FileStore(root, "1MiB")
with file_folders.evicting(root) as mine:
    assert mine
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
with file_folders.evicting(root) as again:
    print(again)
os.kill(pid, 9)
"""


def test_a_child_forked_during_an_eviction_does_not_keep_the_lock(root: Path) -> None:
    done = run_python(BEGIN + FORKED_MEANWHILE, str(root))
    assert (done.stdout, done.stderr) == ("True\n", "")


# Disks

FULL = """
store = FileStore(root)
logging.basicConfig(stream=sys.stdout, format="%(name)s %(levelname)s %(message)s")
statuses = [put(b"%d" % i, 300_000) for i in range(12)]
print(" ".join(status.name for status in statuses))
for i, status in enumerate(statuses):
    key = b"%d" % i
    assert store.lookup([key]) == [status == Status.OK]
    assert get(key, 300_000) == (pattern(key, 300_000) if status == Status.OK else None)
print(sorted(name for _, _, names in os.walk(root) for name in names if not name.endswith(".safetensors")))
store.delete([b"0", b"1"])
print(put(b"again", 300_000).name)
"""


def test_a_full_disk(root: Path) -> None:
    """A file system of 2 MiB, in a mount namespace that ends with the program."""
    root.mkdir()
    command = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=2m none "$0" && exec "$@"', str(root)]
    able = subprocess.run([*command, "true"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if able.returncode:
        pytest.skip(f"no file system can be mounted here: {able.stderr.strip()}")
    program = [sys.executable, "-c", BEGIN + FULL, str(root)]
    done = subprocess.run([*command, *program], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    warning, statuses, others, again = done.stdout.splitlines()
    assert warning.startswith(f"shmcache.storage WARNING {root}: No space left on device: objects are not stored")
    assert statuses.split() == ["OK"] * 6 + ["NO_SPACE"] * 6
    assert (others, again) == ("[]", "OK")


LIMITED = """
import resource
store = FileStore(root)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    put(b"large", 200_000)
except OSError as error:
    print(error.strerror)
print(put(b"small", 50_000).name, store.lookup([b"large", b"small"]))
"""


def test_a_file_larger_than_allowed_is_an_error_and_leaves_nothing(root: Path) -> None:
    done = run_python(BEGIN + LIMITED, str(root))
    assert (done.stdout, done.stderr) == ("File too large\nOK [False, True]\n", "")
    assert temporaries(root) == []


UNPRIVILEGED = """
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
for path in (root, root + "/below"):
    try:
        FileStore(path)
    except PermissionError as error:
        print(error)
"""


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory that others can pass; pytest's are its user's alone."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        yield Path(path)


def test_a_directory_of_another_user(open_to_all: Path) -> None:
    root = open_to_all / "kv"
    root.mkdir()
    root.chmod(0o555)
    done = run_python(BEGIN + UNPRIVILEGED, str(root))
    assert done.returncode == 0, done.stderr
    written, made = done.stdout.splitlines()
    user = os.geteuid() or 65534
    assert f"cannot be written by user {user};" in written
    assert f"cannot be made by user {user};" in made
    assert "chown" in written
    assert f"'{root}'" in written


READ_ONLY_FILES = """
store = FileStore(root)
put(b"key", 1000)
path = file_folders.path_of(root, b"key")
os.utime(path, (0, 0))
os.chmod(path, 0o644)
os.chmod(os.path.dirname(path), 0o755)
os.chmod(root, 0o755)
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
    print(get(b"key", 1000) == pattern(b"key", 1000), os.stat(path).st_mtime)
else:
    print(True, 0.0)
"""


def test_a_file_whose_time_cannot_be_set_is_read(open_to_all: Path) -> None:
    done = run_python(BEGIN + READ_ONLY_FILES, str(open_to_all / "kv"))
    assert (done.stdout, done.stderr) == ("True 0.0\n", "")
