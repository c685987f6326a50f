"""A cache as a whole: removing objects, statistics, close, threads and forks."""

from __future__ import annotations

from arena_support import Join, run_python

from shmcache import Status

OK = Status.OK

# Puts large objects in one thread while another closes the cache.
CLOSER = """
import sys, threading, time, shmcache
data = b"x" * (16 << 20)
def work(cache, started):
    started.set()
    try:
        for i in range(1000):
            cache.put(b"%d" % i, data)
            cache.delete([b"%d" % i])
    except shmcache.ClosedError:
        pass
for i in range(20):
    cache = shmcache.attach(sys.argv[1], create=shmcache.ArenaConfig("64MiB", block_size="64KiB", lanes=2))
    started = threading.Event()
    thread = threading.Thread(target=work, args=(cache, started))
    thread.start()
    started.wait()
    time.sleep(0.02)
    cache.close()
    thread.join()
with shmcache.attach(sys.argv[1]) as cache:
    print(cache.verify(), cache.stats().writing)
"""


def test_closing_while_another_thread_puts(arena_name: str) -> None:
    done = run_python(CLOSER, arena_name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[] 0\n", "")


def test_a_forced_delete_that_is_refused_takes_nothing(join: Join) -> None:
    first, second = join("engine", 0, 2), join("engine", 1, 2)
    for reader in (first, second):
        first.put(b"k", b"x")
        first.reserve_read([b"k"], 1)
        with reader.read([b"k"]):
            assert first.delete([b"k"], force=True) == [Status.LOCKED]
            assert first.stats().reserved == 1, "a share that was granted is still there"
        assert first.delete([b"k"], force=True) == [OK]
