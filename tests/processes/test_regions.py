"""Regions of device memory between processes: read in place, lost with their owner, freed when nobody looks at them.

On the double of the driver, and on a real one where there is one.
"""

# ruff: noqa: ARG001 # most tests need a machine, or an owner, that is there

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_double
import cuda_support
import pytest
from arena_support import Join
from processes._crew import Member, wait_until
from processes._whole import check_whole
from region_support import CAPACITY

import shmcache
from shmcache import Cache, DeviceError, Status

OK, LOST, NOT_FOUND = Status.OK, Status.LOST, Status.NOT_FOUND
Enlist = Callable[..., Member]
HELPERS = """
import torch
def put(keys, region, byte, layout=64):
    batch = cache.reserve_write(keys, layout, region=region)
    for tensor in batch.tensors():
        tensor.view(torch.uint8).fill_(byte)
    del tensor
    return batch.publish()
def contents(batch):
    return [None if t is None else bytes(t.view(torch.uint8).flatten().tolist()) for t in batch.tensors()]
"""


def install(machine: Path, options: str = "") -> str:
    """What a process does to have the double of the driver."""
    return f"import cuda_double; double = cuda_double.install({str(machine)!r}, devices=2, {options})"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Path]:
    """For what only the double can be made to do."""
    with cuda_support.gpus("double", tmp_path):
        yield tmp_path


@pytest.fixture
def worker(enlist: Enlist) -> Callable[..., Member]:
    """A process in the arena that has CUDA."""

    def one(gpus: Any, *member: Any) -> Member:
        made = enlist(*member)
        made.do(
            getattr(gpus, "order", None)
            or f"import cuda_double; double = cuda_double.install({str(gpus)!r}, devices=2)"
        )
        made.do(HELPERS)
        return made

    return one


@pytest.fixture
def owner(gpus: Any, worker: Callable[..., Member]) -> Member:
    """Owns region 1, with the objects a and b in it."""
    made = worker(gpus)
    assert made.do(f"cache.add_region('cuda:0', {CAPACITY})") == 1
    assert made.do("put([b'a', b'b'], 1, 7)") == [OK] * 2
    return made


def contents(gpus: Any, batch: shmcache.ReadBatch) -> list[bytes | None]:
    """Of each object in device memory."""
    return [None if tensor is None else gpus.contents(tensor) for tensor in batch.tensors()]


def freed(gpus: Any) -> bool:
    """No device memory is there any more, as far as the double can tell."""
    return gpus.kind == "real" or cuda_double.allocations(gpus.driver.root) == []


def region(cache: Cache) -> shmcache.RegionInfo | None:
    """The only one, or None."""
    found = shmcache.inspect(cache.name).regions
    return found[0] if found else None


def test_read_in_place_by_others(gpus: Any, owner: Member, cache: Cache, worker: Callable[..., Member]) -> None:
    other = worker(gpus)
    with cache.read([b"a", b"b"]) as batch:
        assert contents(gpus, batch) == [b"\x07" * 64] * 2
        other.do("batch = cache.read([b'a'])")
        assert other.do("contents(batch)") == [b"\x07" * 64]
        found = region(cache)
        assert found is not None
        assert found.opened == (cache.lane, other.do("cache.lane"))
        other.do("tensor = batch.tensors()[0]; tensor.fill_(9)")
        other.do("torch.cuda.synchronize() if torch.cuda.is_available() else None")
        assert contents(gpus, batch) == [b"\x09" * 64, b"\x07" * 64], "it is the same memory"
        other.do("del tensor")
    other.do("batch.release()")
    assert cache.verify() == []


def test_a_handle_is_opened_once(gpus: Any, owner: Member, cache: Cache) -> None:
    for _ in range(3):
        for key in (b"a", b"b"):
            with cache.read([key]) as batch:
                contents(gpus, batch)
    if gpus.kind == "double":
        assert gpus.driver.calls.count("cuIpcOpenMemHandle") == 1
        assert list(gpus.driver.opened.values()) == [1]


def test_written_by_who_does_not_own_it(gpus: Any, owner: Member, cache: Cache, worker: Callable[..., Member]) -> None:
    other = worker(gpus)
    assert other.do("put([b'c'], 'cuda:0', 3)") == [OK]
    with cache.read([b"c"]) as batch:
        assert contents(gpus, batch) == [b"\x03" * 64]
    assert owner.do("contents(cache.read([b'c']))") == [b"\x03" * 64]


def test_written_together(gpus: Any, owner: Member, worker: Callable[..., Member], cache: Cache) -> None:
    ranks = [worker(gpus, "engine", rank, 2) for rank in range(2)]
    for rank, member in enumerate(ranks):
        member.do("batch = cache.reserve_write([b'k'], 128, region=1, writers=2)")
        member.do(f"batch.tensors()[0][{64 * rank}:{64 * rank + 64}].fill_({rank + 1}).sum().item()")
        assert cache.status([b"k"]) == [Status.IN_FLIGHT]
        member.do("batch.publish_and_reserve_read(1)")
    for member in ranks:
        assert member.do("contents(cache.read([b'k']))") == [b"\x01" * 64 + b"\x02" * 64]
    ranks[0].do("batch = cache.reserve_write([b'l'], 128, region=1, writers=2)")
    with pytest.raises(shmcache.GroupError, match="region"):
        ranks[1].do("cache.reserve_write([b'l'], 128, writers=2)")


# Death


def test_the_owner_dies(gpus: Any, owner: Member, cache: Cache, join: Join, worker: Callable[..., Member]) -> None:
    rank = join("engine", 0, 1)
    assert rank.reserve_read([b"b"]) == [OK]
    batch, late = cache.read([b"a"]), cache.read([b"a"])
    (tensor,) = batch.tensors()
    owner.kill()
    assert cache.status([b"a", b"b"]) == [LOST] * 2
    assert cache.lookup([b"a"]) == 0
    assert cache.read([b"a"]).status == [LOST]
    assert (batch.status, batch.tensors(), late.tensors()) == ([LOST], [None], [None]), "readers are told"
    assert gpus.contents(tensor) == b"\x07" * 64, "what is looked at stays"
    assert cache.reserve_write([b"c"], 8, region=1).status == [LOST]
    cache.reap()
    assert cache.status([b"a", b"b"]) == [LOST] * 2, "somebody has shares"
    assert cache.reserve_write([b"a"], 8).status == [LOST]
    assert rank.read([b"b"]).status == [LOST]
    del tensor
    batch.release()
    late.release()
    assert cache.status([b"a", b"b"]) == [NOT_FOUND] * 2
    wait_until(lambda: freed(gpus))
    wait_until(lambda: region(cache) is None)  # this process closes what it had open
    new = worker(gpus)
    assert new.do(f"cache.add_region('cuda:0', {CAPACITY})") == 1
    assert new.do("put([b'a'], 1, 5)") == [OK]
    with cache.read([b"a"]) as again:
        assert contents(gpus, again) == [b"\x05" * 64]
    rank.close()
    check_whole(cache)


def test_a_forgotten_import_keeps_nothing(gpus: Any, owner: Member, worker: Callable[..., Member]) -> None:
    other = worker(gpus)
    assert other.do("contents(cache.read([b'a']))") == [b"\x07" * 64]
    owner.kill()
    wait_until(lambda: freed(gpus))  # the other one calls nothing


def test_who_looks_at_it_dies(gpus: Any, owner: Member, cache: Cache, worker: Callable[..., Member]) -> None:
    other = worker(gpus)
    other.do("batch = cache.read([b'a']); tensors = batch.tensors()")
    assert cache.delete([b"a"]) == [Status.LOCKED]
    other.kill()
    assert cache.reap().shares == 1
    found = region(cache)
    assert found is not None
    assert (found.state, found.opened) == ("live", ())
    assert cache.delete([b"a"]) == [OK]
    with cache.read([b"b"]) as batch:
        assert contents(gpus, batch) == [b"\x07" * 64]


def test_who_writes_into_it_dies(gpus: Any, owner: Member, cache: Cache, worker: Callable[..., Member]) -> None:
    other = worker(gpus)
    other.do("batch = cache.reserve_write([b'w'], 64, region=1); batch.tensors()[0].fill_(1)")
    other.kill()
    assert cache.reap().writes == 1
    assert cache.status([b"w", b"a"]) == [NOT_FOUND, OK]
    assert cache.verify() == []


def test_the_owners_successor_has_no_part_in_it(gpus: Any, cache: Cache, worker: Callable[..., Member]) -> None:
    first = worker(gpus, "engine", 0, 1)
    first.do(f"cache.add_region('cuda:0', {CAPACITY})")
    assert first.do("put([b'a'], 1, 7)") == [OK]
    lane = first.do("cache.lane")
    batch = cache.read([b"a"])
    first.kill()
    second = worker(gpus, "engine", 0, 1)
    assert second.do("cache.lane") == lane
    assert cache.status([b"a"]) == [LOST]
    with pytest.raises(ValueError, match="this process has added"):
        second.do("cache.remove_region(1)")
    assert second.do(f"cache.add_region('cuda:0', {CAPACITY})") == 2
    batch.release()
    cache.reap()
    assert [r.number for r in shmcache.inspect(cache.name).regions] == [2]


def test_a_region_that_is_lost_while_the_next_is_opened(
    double: cuda_double.Double, tmp_path: Path, cache: Cache, worker: Callable[..., Member]
) -> None:
    owners = [worker(tmp_path), worker(tmp_path)]
    for owner, key in zip(owners, (b"a", b"b"), strict=True):
        number = owner.do(f"cache.add_region('cuda:0', {CAPACITY})")
        assert owner.do(f"put([{key!r}], {number}, 7)") == [OK]
    batch = cache.read([b"a", b"b"])

    def kill_the_first() -> None:
        double.before.clear()
        owners[0].kill()

    double.before["cuMemcpyDtoH"] = kill_the_first  # the probe of its region, which is open by then
    tensors = batch.tensors()
    assert [bytes(t.tolist()) for t in tensors] == [b"\x07" * 64] * 2, "what is lent stays"
    assert batch.status == [LOST, OK]
    del tensors
    batch.release()
    owners[1].kill()
    wait_until(lambda: cuda_double.allocations(tmp_path) == [])


# The owner leaves


def test_the_owner_leaves_while_nobody_looks(gpus: Any, owner: Member, cache: Cache) -> None:
    with cache.read([b"a"]) as batch:
        contents(gpus, batch)
    owner.do("cache.close()")  # waits until this process has closed what it does not look at
    assert freed(gpus)
    assert region(cache) is None
    assert cache.status([b"a"]) == [NOT_FOUND]


def test_the_owner_leaves_while_somebody_looks(gpus: Any, owner: Member, cache: Cache) -> None:
    batch = cache.read([b"a"])
    (tensor,) = batch.tensors()
    owner.do("import warnings; warnings.simplefilter('error')")
    with pytest.raises(RuntimeWarning, match=rf"open in lanes \[{cache.lane}\], so its memory stays allocated"):
        owner.do("cache.close()")
    assert gpus.contents(tensor) == b"\x07" * 64
    assert batch.status == [LOST]
    del tensor
    batch.release()
    owner.kill()
    wait_until(lambda: freed(gpus))


# Memory that cannot be read here


UNREADABLE = [
    ("broken=True", "a copy of what its owner wrote there gave other bytes"),
    ("ipc=False", "CUDA_ERROR"),
    ("visible=[1]", "CUDA_ERROR"),
]


@pytest.mark.parametrize(("options", "why"), UNREADABLE)
def test_memory_that_cannot_be_read_here(
    machine: Path, cache: Cache, worker: Callable[..., Member], enlist: Enlist, options: str, why: str
) -> None:
    owner = worker(machine)
    owner.do(f"cache.add_region('cuda:0', {CAPACITY})")
    owner.do("put([b'a'], 1, 7)")
    other = enlist()
    other.do(install(machine, options))
    with pytest.raises(DeviceError, match=f"{why}.*region 1 of GPU-.* cannot be read on cuda:0 here; .*--ipc=host"):
        other.do("cache.open_region(1)")
    other.do("batch = cache.read([b'a'])")
    with pytest.raises(DeviceError, match=why):
        other.do("batch.tensors()")
    assert other.do("batch.status") == [OK]
    other.do("batch.release()")
    assert other.do("double.opened") == {}
    found = region(cache)
    assert found is not None
    assert found.opened == ()
    assert cache.stats().held == 0


def on_device(member: Member, ordinal: int) -> None:
    """Gives the member's thread the context of a device."""
    member.do(f"driver = double.module(); driver.cuInit(0); device = driver.cuDeviceGet({ordinal})[1]")
    member.do("driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(device)[1])")


@pytest.mark.parametrize("broken", [False, True])
def test_on_another_device(
    machine: Path, cache: Cache, worker: Callable[..., Member], enlist: Enlist, broken: bool
) -> None:
    owner = worker(machine)
    owner.do(f"cache.add_region('cuda:0', {CAPACITY})")
    owner.do("put([b'a'], 1, 7)")
    other = enlist()
    other.do(install(machine, f"broken_peer={broken}"))
    other.do(HELPERS)
    on_device(other, 1)
    if broken:
        with pytest.raises(DeviceError, match="other bytes.*cannot be read on cuda:1 here"):
            other.do("cache.open_region(1)")
        return
    assert other.do("contents(cache.read([b'a']))") == [b"\x07" * 64]


def test_without_a_path_between_devices(
    machine: Path, cache: Cache, worker: Callable[..., Member], enlist: Enlist
) -> None:
    owner = worker(machine)
    owner.do(f"cache.add_region('cuda:0', {CAPACITY})")
    other = enlist()
    other.do(install(machine, "peers=set()"))
    on_device(other, 1)
    with pytest.raises(DeviceError, match="cuda:1 has no peer access to cuda:0"):
        other.do("cache.open_region('cuda:0')")
    assert other.do("'cuIpcOpenMemHandle' in double.calls") is False
    on_device(other, 0)
    other.do("cache.open_region('cuda:0')")


def test_memory_of_another_length(machine: Path, cache: Cache, worker: Callable[..., Member]) -> None:
    owner, other = worker(machine), worker(machine)
    owner.do(f"cache.add_region('cuda:0', {CAPACITY})")
    other.do(f"from shmcache import device; device.Device.length = lambda self, address: {CAPACITY}")
    with pytest.raises(DeviceError, match="another length than its owner recorded"):
        other.do("cache.open_region(1)")
    assert other.do("double.opened") == {}


def test_an_owner_that_dies_while_it_is_opened(machine: Path, cache: Cache, worker: Callable[..., Member]) -> None:
    owner, other = worker(machine), worker(machine)
    owner.do(f"cache.add_region('cuda:0', {CAPACITY})")
    owner.do("put([b'a'], 1, 7)")
    other.do("batch = cache.read([b'a'])")
    other.do(
        "import signal\n"
        f"def kill(): os.kill({owner.pid}, signal.SIGKILL); double.before.clear(); time.sleep(0.1)\n"
        "double.before['cuIpcOpenMemHandle'] = kill"
    )
    assert other.do("import os, time") is None
    assert other.do("batch.tensors()") == [None]
    assert other.do("batch.status") == [LOST]
    assert other.do("double.opened") == {}
    owner.kill()


def test_a_thread_without_a_device_reads_on_the_regions_own(
    machine: Path, cache: Cache, worker: Callable[..., Member]
) -> None:
    owner, other = worker(machine), worker(machine)
    owner.do(f"cache.add_region('cuda:1', {CAPACITY})")
    other.do("cache.open_region('cuda:1')")
    assert other.do("[mapping.context - 1000 for mapping in double.memory.mappings.values()]") == [1]


def test_open_on_one_device_and_not_on_another(
    machine: Path, cache: Cache, worker: Callable[..., Member], enlist: Enlist
) -> None:
    owner = worker(machine)
    owner.do(f"cache.add_region('cuda:0', {CAPACITY})")
    other = enlist()
    other.do(install(machine, "broken_peer=True"))
    on_device(other, 0)
    other.do("cache.open_region(1)")
    on_device(other, 1)
    with pytest.raises(DeviceError, match="cannot be read on cuda:1 here"):
        other.do("cache.open_region(1)")
    found = region(cache)
    assert found is not None
    assert found.opened == (other.do("cache.lane"),), "it is open on the first"


# At every call of the driver

LIVES = {
    "an owner": (
        f"cache.add_region('cuda:0', {CAPACITY}); put([b'a', b'b'], 1, 7); cache.remove_region(1); "
        f"cache.add_region('cuda:1', {CAPACITY}); put([b'a'], 1, 7); cache.close()"
    ),
    "a reader": (
        "cache.open_region(1); batch = cache.read([b'x']); contents(batch); batch.release(); "
        "batch = cache.read([b'x']); contents(batch); batch.release_after(double.make_stream(0)); put([b'y'], 1, 3); "
        "cache.close()"
    ),
}


@pytest.mark.parametrize("life", LIVES)
def test_killed_at_every_call_of_the_driver(
    machine: Path, cache: Cache, worker: Callable[..., Member], life: str
) -> None:
    other = worker(machine)
    if life == "a reader":
        other.do(f"cache.add_region('cuda:0', {CAPACITY})")
        assert other.do("put([b'x'], 1, 5)") == [OK]
    deaths = 0
    while True:
        dying = worker(machine)
        dying.do(
            f"import signal; left = [{deaths}]\n"
            "def count():\n"
            "    left[0] -= 1\n"
            "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
            "double.before.update({name: count for name in dir(double) if name.startswith('cu')})"
        )
        dying.begin(LIVES[life])
        try:
            dying.answer()
        except EOFError:
            deaths += 1
            dying.wait()
        else:
            break
        cache.reap()
        assert cache.verify() == []
        regions = shmcache.inspect(cache.name).regions
        stats = cache.stats()
        assert (stats.held, stats.reserved, stats.writing, stats.lanes_dead) == (0, 0, 0, 0)
        if life == "an owner":
            assert regions == ()
            assert cache.status([b"a", b"b"]) == [NOT_FOUND] * 2
            assert cuda_double.allocations(machine) == []
        else:
            assert [(r.state, r.opened) for r in regions] == [("live", ())]
            assert cache.status([b"x"]) == [OK]
            cache.delete([b"y"])
    print(f"{life}: {deaths} deaths")
    assert deaths > 20, "a death at each call"
    other.do("cache.close()")
    assert cuda_double.allocations(machine) == []
    check_whole(cache)


def test_a_storm_of_owners(machine: Path, cache: Cache, worker: Callable[..., Member], chance: Any) -> None:
    """Owners come, write, and are killed at any time, while this process reads what it finds: never other bytes."""
    owners: list[Member] = []
    deadline = time.monotonic() + 8
    reads = lost = 0
    while time.monotonic() < deadline:
        if len(owners) < 2:
            owners.append(worker(machine))
            owners[-1].do("import random")
            owners[-1].begin(
                f"number = cache.add_region('cuda:0', {CAPACITY})\n"
                "while True:\n"
                "    key = random.randrange(40)\n"
                "    batch = cache.reserve_write([b'%d' % key], 4096, region=number)\n"
                "    if batch.status == [0]: batch.tensors()[0].fill_(key)\n"
                "    batch.publish()\n"
                "    cache.delete([b'%d' % random.randrange(40)])\n"
            )
        for _ in range(chance.randrange(100)):
            keys = [b"%d" % chance.randrange(40) for _ in range(4)]
            with cache.read(keys) as batch:
                for key, tensor in zip(keys, batch.tensors(), strict=True):
                    if tensor is not None:
                        assert set(tensor.tolist()) == {int(key)}
                        reads += 1
                tensor = None
                lost += batch.status.count(LOST)
        if chance.random() < 0.3:
            owners.pop(chance.randrange(len(owners))).kill()
    for member in owners:
        member.kill()
    print(f"{reads} reads, {lost} lost")
    assert reads > 0
    wait_until(lambda: cuda_double.allocations(machine) == [])
    cache.reap()
    assert shmcache.inspect(cache.name).regions == ()
    check_whole(cache)
