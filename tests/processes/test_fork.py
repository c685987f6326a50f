"""Children of a process that is attached: none keeps its parent's lane alive, uses it, or takes anything from it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from arena_support import pattern, run_python
from processes._crew import Member, state_of, wait_until
from processes._whole import check_whole

from shmcache import ArenaConfig, Cache, ReapReport, Status

OK, LOCKED = Status.OK, Status.LOCKED
Enlist = Callable[..., Member]

# A function `in_child(f)` that calls f in a forked child, and gives its exit code and what it returned.
IN_CHILD = """
def in_child(f):
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(theirs, repr(f()).encode())
        os._exit(0)
    os.close(theirs)
    with open(ours) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said

def refusals():
    uses = {
        "put": lambda: cache.put(b"x", b"x"), "read": lambda: cache.read([b"a"]),
        "lookup": lambda: cache.lookup([b"a"]), "reserve_read": lambda: cache.reserve_read([b"a"]),
        "reap": cache.reap, "verify": cache.verify, "stats": cache.stats,
        "evict": lambda: cache.evict(1), "delete": lambda: cache.delete([b"a"]),
        "publish": unfinished.publish, "abort": unfinished.abort,
    }
    allowed = []
    for name, use in uses.items():
        try:
            use()
            allowed.append(name)
        except shmcache.ClosedError:
            pass
    return allowed
"""


@pytest.fixture
def parent(cache: Cache, enlist: Enlist) -> Member:
    """Holds a share of a, has one reserved, and is writing w."""
    assert cache.put(b"a", pattern(b"a", 5000)) == OK
    member = enlist()
    member.do("batch = cache.read([b'a'])")
    assert member.do("cache.reserve_read([b'a'])") == [OK]
    member.do("unfinished = cache.reserve_write([b'w'], 5000)")
    member.do(IN_CHILD)
    return member


def _check_nothing_taken(cache: Cache, parent: Member) -> None:
    assert cache.stats().lanes_dead == 0
    assert (cache.stats().held, cache.stats().reserved, cache.stats().writing) == (1, 1, 1)
    assert cache.delete([b"a"], force=True) == [LOCKED]
    assert parent.do("bytes(batch.views[0]) == pattern(b'a', 5000)")
    assert parent.do("unfinished.publish()") == [OK]
    assert parent.do("cache.finish_read([b'a'])") == [OK]
    assert parent.do("batch.release()") is None
    assert cache.delete([b"a", b"w"]) == [OK] * 2


def _is_alive(pid: int) -> bool:
    return state_of(pid) not in ("", "Z")


BIRTHS = """
import multiprocessing, subprocess, sys

def fork():
    return os.fork() or time.sleep(600)

def posix_spawn():
    return os.posix_spawn("/bin/sleep", ["sleep", "600"], {})

def start_program():
    return subprocess.Popen(["sleep", "600"], close_fds=False)

def start_python():
    return subprocess.Popen([sys.executable, "-c", "import os, time; os.fork() and time.sleep(600)"])

def start_with_multiprocessing(how):
    process = multiprocessing.get_context(how).Process(target=time.sleep, args=(600,))
    process.start()
    return process
"""


@pytest.mark.parametrize(
    "birth",
    [
        "fork()",
        "posix_spawn()",
        "start_program()",
        "start_python()",
        "start_with_multiprocessing('fork')",
        "start_with_multiprocessing('spawn')",
    ],
)
def test_a_child_does_not_keep_its_parents_lane(cache: Cache, parent: Member, birth: str) -> None:
    parent.do(BIRTHS)
    parent.do(f"born = {birth}")
    child = parent.do("getattr(born, 'pid', born)")
    try:
        assert _is_alive(child)
        assert cache.stats().lanes_dead == 0
        parent.kill()
        assert _is_alive(child)
        wait_until(lambda: cache.stats().lanes_dead == 1)
        assert _is_alive(child)
        assert cache.reap() == ReapReport(lanes=1, shares=2, writes=1)
        check_whole(cache)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_cannot_use_its_parents_cache(cache: Cache, parent: Member) -> None:
    assert parent.do("in_child(refusals)") == (0, "[]")
    assert parent.do("in_child(cache.close)") == (0, "None")
    assert parent.do("in_child(batch.release)") == (0, "None")
    _check_nothing_taken(cache, parent)
    check_whole(cache)


def test_a_child_may_look_at_its_parents_objects(cache: Cache, parent: Member) -> None:
    assert parent.do("bytes(batch.views[0]) == pattern(b'a', 5000)")
    assert parent.do("in_child(lambda: bytes(batch.views[0]) == pattern(b'a', 5000))") == (0, "True")
    _check_nothing_taken(cache, parent)


def test_a_child_attaches_for_itself(cache: Cache, parent: Member) -> None:
    parent.do(
        "def attach_again():\n"
        "    with shmcache.attach(cache.name) as own, own.read([b'a']) as read:\n"
        "        assert bytes(read.views[0]) == pattern(b'a', 5000)\n"
        "        return own.lane != cache.lane, own.put(b'b', b'x'), own.stats().held, own.stats().lanes_alive"
    )
    assert parent.do("in_child(attach_again)") == (0, repr((True, OK, 2, 3)))
    _check_nothing_taken(cache, parent)
    check_whole(cache)


def test_many_generations(cache: Cache, parent: Member) -> None:
    """Each child attaches, takes a share, waits for a child of its own, and is gone without a close."""
    parent.do(
        "kept = []\n"
        "def generation(n):\n"
        "    own = shmcache.attach(cache.name)\n"
        "    kept.append((own, own.read([b'a'])))\n"
        "    return in_child(lambda: generation(n - 1)) if n else (own.stats().lanes_alive, own.stats().held)"
    )
    said = repr((7, 6))
    for _ in range(4):
        said = repr((0, said))
    assert parent.do("in_child(lambda: generation(4))") == (0, said)
    assert cache.stats().lanes_dead == 5
    assert cache.reap() == ReapReport(lanes=5, shares=5)
    _check_nothing_taken(cache, parent)
    check_whole(cache)


# What Python does at the end of a process, in the parent and in a child that leaves through it.
EXITS = """
import os, sys, warnings, shmcache
warnings.simplefilter("error")
cache = shmcache.attach(sys.argv[1])
batch = cache.read([b"a"])
views = batch.views
unfinished = cache.reserve_write([b"w"], 5000)
pid = os.fork()
if pid == 0:
    del batch, views
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
stats = cache.stats()
print(stats.held, stats.writing, bytes(views[0][:1]))
print(unfinished.publish())
"""


def test_a_child_that_leaves_by_way_of_pythons_exit(arena: str, cache: Cache) -> None:
    assert cache.put(b"a", b"x" * 100) == OK
    done = run_python(EXITS, arena)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "1 1 b'x'\n[<Status.OK: 0>]\n"
    cache.reap()
    assert cache.delete([b"a", b"w"]) == [OK] * 2
    check_whole(cache)


THREADS = """
import os, sys, threading, warnings, shmcache
warnings.simplefilter("ignore", DeprecationWarning)  # that a process with threads forks is what this is about
cache = shmcache.attach(sys.argv[1])
enough = threading.Event()

def work(n):
    keys = [b"%d %d" % (n, i) for i in range(20)]
    while not enough.is_set():
        cache.reserve_write(keys, 5000).publish()
        cache.read(keys).release()
        cache.delete(keys)

threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
for thread in threads:
    thread.start()
for i in range(30):
    pid = os.fork()
    if pid == 0:
        with shmcache.attach(sys.argv[1]) as own:
            assert own.put(b"child %d" % i, b"x") == 0
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
enough.set()
for thread in threads:
    thread.join()
cache.close()
"""


def test_forks_while_threads_work(arena: str, cache: Cache) -> None:
    done = run_python(THREADS, arena)
    assert (done.returncode, done.stderr) == (0, "")
    assert cache.lookup([b"child %d" % i for i in range(30)]) == 30
    assert cache.stats().lanes_dead == 0
    check_whole(cache)


# Children are born while another thread attaches. A child lets go as soon as it runs, which may take it a moment.
ATTACHING = """
import os, sys, threading, time, warnings, shmcache
warnings.simplefilter("ignore", DeprecationWarning)
enough = threading.Event()
children = []

def bear():
    while not enough.is_set():
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        children.append(pid)
        time.sleep(0.001)

thread = threading.Thread(target=bear)
thread.start()
for _ in range(200):
    shmcache.attach(sys.argv[1]).close()
enough.set()
thread.join()
with shmcache.attach(sys.argv[1]) as cache:
    deadline = time.monotonic() + 10
    while cache.stats().lanes_alive > 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    print(cache.stats().lanes_alive)
for pid in children:
    os.kill(pid, 9)
"""


@pytest.mark.parametrize("config", [ArenaConfig("1MiB", block_size="4KiB", lanes=256)])
def test_forks_while_another_thread_attaches(arena: str, cache: Cache) -> None:
    done = run_python(ATTACHING, arena)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "2\n", "children keep lanes of their parent"
    check_whole(cache)
