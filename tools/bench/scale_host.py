"""A host that is only described, the models that it serves, and what they ask of one arena.

Engines are bound by their GPUs: they compute so many tokens a second, and each of those is saved; where they find a
share ``hit_rate`` of what they look for, they look for 1 / (1 - hit_rate) times as much. Once the arena is full, every
object that is saved evicts one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from scale_costs import UnitCosts
from scale_layout import MAX_SLOTS, index_bytes, metadata_bytes

POPULATE_THREADS = 64  # of shmcache/segment.py
PADDING = 0.05  # of an object that its last block may leave empty
FLOPS_A_PARAMETER = 2.0  # and token


@dataclass(frozen=True)
class Model:
    name: str
    bytes_a_token: int  # of KV cache, in all layers and of all ranks
    billions: float  # parameters that one token meets
    replicated: bool = False  # every rank needs all of it (MLA): one rank stores, all read


MODELS = {
    model.name: model
    for model in (
        Model("llama-70b", 80 * 8 * 128 * 2 * 2, 70.6),
        Model("llama-8b", 32 * 8 * 128 * 2 * 2, 8.0),
        Model("deepseek-v3", 61 * 576 * 2, 37.0, replicated=True),
        Model("qwen2.5-0.5b", 24 * 2 * 64 * 2 * 2, 0.49),
    )
}


@dataclass(frozen=True)
class Host:
    memory: int = 2 * 10**12
    share: float = 0.75  # of the memory that is the arena's
    gpus: int = 8
    cores: int = 256
    nodes: int = 2
    node_rate: float = 300e9  # bytes a second of a NUMA node's memory
    link_rate: float = 100e9  # bytes a second into a NUMA node from the others
    gpu_rate: float = 50e9  # bytes a second between a GPU and the host
    gpu_flops: float = 400e12  # that a GPU reaches in prefill
    hit_rate: float = 0.5
    tokens_a_second: float | None = None  # computed by a GPU; None: as gpu_flops and the model's size allow
    token_block: int = 16  # tokens an object
    step_tokens: int = 8192  # at most computed, and saved, in one step of an engine
    lanes: int | None = None  # of the arena; None: as the engines need and a quarter more
    pin_gib: float = 0.20  # seconds to page-lock a GiB


@dataclass(frozen=True)
class Case:
    """Engines of one model: ``engines`` times ``tp`` GPUs."""

    model: Model
    engines: int
    tp: int

    @property
    def label(self) -> str:
        return f"{self.model.name}, {self.engines} x TP {self.tp}"

    @property
    def writers(self) -> int:
        return 1 if self.model.replicated else self.tp


@dataclass(frozen=True)
class Needs:
    """What a case asks of an arena on a host; rates are a second, times seconds, sizes bytes."""

    capacity: int
    object_bytes: int
    block_size: int
    objects: int  # that the capacity has room for
    slots: int  # that there can be
    lanes: int
    metadata: int
    index: int
    hot: int  # index, slots and scores: what a lookup and a read touch
    tokens: float  # computed
    saved: float  # objects
    reserved: float  # keys, by all ranks that write
    looked_up: float
    read: float
    saved_bytes: float
    read_bytes: float
    turnover: float
    populate: float
    pin: float
    rebuild: float
    inspect: float
    verify: float
    scan: float
    reading_cores: float  # busy with lookups, grants and reads
    memory_share: float  # of the bandwidth of all nodes
    remote_rate: float  # bytes a second into a node from the others, where pages lie anywhere
    gpu_rate: float  # bytes a second to the busiest GPU


def block_for(object_bytes: int) -> int:
    """The largest size of blocks, a power of two, that wastes at most PADDING of an object."""
    block = 4096
    while -(-object_bytes // (2 * block)) * 2 * block <= object_bytes * (1 + PADDING):
        block *= 2
    return block


def needs(case: Case, host: Host, costs: UnitCosts) -> Needs:
    model, gpus = case.model, case.engines * case.tp
    object_bytes = model.bytes_a_token * host.token_block
    block = block_for(object_bytes)
    stored = ceil(object_bytes / block) * block
    capacity = int(host.memory * host.share) // block * block
    objects = capacity // stored
    slots = min(objects, MAX_SLOTS)
    processes = case.engines * (case.tp + 1)  # ranks, and a scheduler
    lanes = host.lanes or ceil(processes * 1.25)
    tokens = gpus * (host.tokens_a_second or host.gpu_flops / (FLOPS_A_PARAMETER * model.billions * 1e9))
    saved = tokens / host.token_block
    looked_up = saved / (1 - host.hit_rate)
    read = looked_up * host.hit_rate
    copies = case.tp if model.replicated else 1  # of an object's bytes that go to GPUs
    saved_bytes, read_bytes = saved * object_bytes, read * object_bytes * copies
    populate_rate = min(min(POPULATE_THREADS, host.cores) * costs.populate_rate, host.nodes * host.node_rate)
    moved = saved_bytes + read_bytes
    remote = moved / host.nodes * (host.nodes - 1) / host.nodes
    reading = looked_up * costs.lookup_key + read * case.tp * (costs.grant_share + costs.read_key)
    return Needs(
        capacity=capacity,
        object_bytes=object_bytes,
        block_size=block,
        objects=objects,
        slots=slots,
        lanes=processes,
        metadata=metadata_bytes(slots, lanes, capacity // block),
        index=index_bytes(slots),
        hot=index_bytes(slots) + slots * (128 + 8),
        tokens=tokens,
        saved=saved,
        reserved=saved * case.writers,
        looked_up=looked_up,
        read=read,
        saved_bytes=saved_bytes,
        read_bytes=read_bytes,
        turnover=slots / saved,
        populate=capacity / populate_rate,
        pin=capacity / 2**30 * host.pin_gib,
        rebuild=slots * costs.rebuild_slot,
        inspect=slots * costs.inspect_slot.at(processes),
        verify=slots * costs.verify_slot.at(processes),
        scan=slots * costs.scan_slot.at(processes),
        reading_cores=reading,
        memory_share=moved / (host.nodes * host.node_rate),
        remote_rate=remote,
        gpu_rate=moved / gpus,
    )
