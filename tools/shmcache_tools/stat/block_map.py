"""Where a region's blocks stand: runs of blocks, cells that stand for several of them, and how fragmented they are.

Pure. Memory and time go with the objects and the cells, not with the blocks, of which there may be 2**31. Nothing is
trusted: objects listed while they changed, or out of a damaged arena, may overlap or lie outside; what lies outside is
cut off, and of objects that overlap the first one has the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shmcache.stats import ArenaInfo, ObjectInfo, RegionInfo
from shmcache_tools.stat.standings import STANDINGS

#: A standing as a number: its place in ``STANDINGS``. The later is the stronger.
CODES: Final = {standing.name: code for code, standing in enumerate(STANDINGS)}
_FREE: Final = CODES["free"]
_DEAD: Final = CODES["dead"]

#: What a write can have: it evicts what is ready and reaps the dead, if there is no room otherwise.
OBTAINABLE: Final = ("free", "ready", "dead")

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class BlockMap:
    """The blocks by place, in runs without gaps: each is one object, or all that is free between two."""

    block_size: int  #: bytes
    edges: Numbers  #: the first block of each run, and the end of the last
    codes: NDArray[np.int8]  #: the standing of each run

    @property
    def blocks(self) -> int:
        """Of the whole region."""
        return int(self.edges[-1])

    def totals(self) -> list[tuple[int, int]]:
        """For each of ``STANDINGS`` how many runs (objects, if it is not free), and of how many blocks."""
        lengths = np.diff(self.edges)
        masks = [self.codes == code for code in range(len(STANDINGS))]
        return [(int(mask.sum()), int(lengths[mask].sum())) for mask in masks]

    def runs(self, *standings: str) -> Numbers:
        """How long the runs are that consist of blocks of these standings only, by place."""
        inside = np.zeros(len(self.codes) + 2, np.bool_)
        inside[1:-1] = np.isin(self.codes, [CODES[standing] for standing in standings])
        turns = np.flatnonzero(inside[1:] != inside[:-1])
        return self.edges[turns[1::2]] - self.edges[turns[0::2]]

    def cells(self, blocks_per_cell: int) -> NDArray[np.int8]:
        """What each cell shows: the standing of most of its blocks, of two the stronger; dead, if any block is."""
        counts = self._counts(blocks_per_cell)
        shown = len(STANDINGS) - 1 - np.argmax(counts[::-1], axis=0)
        return np.where(counts[_DEAD] > 0, _DEAD, shown).astype(np.int8)

    def _counts(self, blocks_per_cell: int) -> Numbers:
        """The blocks of each standing (rows) in each cell (columns)."""
        n = -(-self.blocks // blocks_per_cell)
        bounds = np.minimum(np.arange(n + 1) * blocks_per_cell, self.blocks)
        run = np.minimum(np.searchsorted(self.edges, bounds, side="right"), len(self.codes)) - 1
        into = bounds - self.edges[run]
        counts = np.empty((len(STANDINGS), n), np.int64)
        for code in range(len(STANDINGS)):
            lengths = np.where(self.codes == code, np.diff(self.edges), 0)
            before = np.cumsum(lengths) - lengths
            counts[code] = np.diff(before[run] + np.where(self.codes[run] == code, into, 0))
        return counts


def block_map(objects: Sequence[ObjectInfo], capacity: int, block_size: int) -> BlockMap:
    """The map of a region of ``capacity`` bytes, from its objects in any order."""
    blocks = capacity // block_size
    n = len(objects)
    begins = np.fromiter((min(o.block, blocks) for o in objects), np.int64, n)
    ends = np.fromiter((min(o.block + o.blocks, blocks) for o in objects), np.int64, n)
    codes = np.fromiter((CODES[o.standing] for o in objects), np.int8, n)
    order = np.argsort(begins, kind="stable")
    begins, ends, codes = begins[order], ends[order], codes[order]
    begins[1:] = np.maximum(begins[1:], np.maximum.accumulate(ends)[:-1])
    there = begins < ends
    return _with_gaps(begins[there], ends[there], codes[there], blocks, block_size)


def _with_gaps(begins: Numbers, ends: Numbers, codes: NDArray[np.int8], blocks: int, block_size: int) -> BlockMap:
    """Free runs put between objects that are in order and do not overlap."""
    edges = np.zeros(2 * len(codes) + 2, np.int64)
    edges[1:-1:2], edges[2:-1:2], edges[-1] = begins, ends, blocks
    kinds = np.full(2 * len(codes) + 1, _FREE, np.int8)
    kinds[1::2] = codes
    there = np.diff(edges) > 0
    return BlockMap(block_size, np.append(edges[:-1][there], blocks), kinds[there])


@dataclass(frozen=True, slots=True)
class Fragmentation:
    """How torn the free memory is, and what a write can have nevertheless."""

    free: int  #: bytes
    runs: int  #: of free blocks
    largest: int  #: bytes of the largest of them
    obtainable: int  #: bytes of the largest run of blocks that are free, can be evicted, or are kept by the dead

    @property
    def fraction(self) -> float | None:
        """How much of the free memory is not in its largest run, 0 to 1; None where nothing is free."""
        return 1 - self.largest / self.free if self.free else None


def fragmentation(region: BlockMap) -> Fragmentation:
    """Told of the whole region."""
    free, obtainable = region.runs("free"), region.runs(*OBTAINABLE)
    total, *largest = (int(blocks) * region.block_size for blocks in (free.sum(), _largest(free), _largest(obtainable)))
    return Fragmentation(total, len(free), *largest)


def _largest(runs: Numbers) -> int:
    return int(runs.max(initial=0))


@dataclass(frozen=True, slots=True)
class Sizes:
    """The payload bytes of some objects."""

    objects: int
    smallest: int
    median: int  #: of at least half of them it is no less than their size
    largest: int
    padding: float  #: how much of their blocks they do not fill, 0 to 1


def object_sizes(objects: Sequence[ObjectInfo], block_size: int) -> Sizes | None:
    """None of no objects."""
    if not objects:
        return None
    sizes = np.sort(np.fromiter((min(o.nbytes, o.blocks * block_size) for o in objects), np.float64, len(objects)))
    taken = sum(o.blocks for o in objects) * block_size
    padding = 1 - float(sizes.sum()) / taken if taken else 0.0
    return Sizes(len(sizes), int(sizes[0]), int(sizes[(len(sizes) - 1) // 2]), int(sizes[-1]), padding)


@dataclass(frozen=True, slots=True, eq=False)
class Chart:
    """A region of an arena, and what is drawn of it."""

    region: RegionInfo | None  #: None: host memory
    objects: Sequence[ObjectInfo]
    blocks: BlockMap

    @property
    def lost(self) -> bool:
        """Nobody can have anything of it any more."""
        return self.region is not None and self.region.state == "lost"


def charts_of(info: ArenaInfo) -> list[Chart]:
    """Host memory and then the regions of device memory, of an arena whose objects were looked at."""
    if info.stats is None or info.objects is None:
        return []
    lie: dict[int, list[ObjectInfo]] = {}
    for found in info.objects:
        lie.setdefault(found.region, []).append(found)
    host = lie.get(0, [])
    return [
        Chart(None, host, block_map(host, info.stats.capacity, info.stats.block_size)),
        *(_device_chart(region, lie.get(region.number, [])) for region in info.regions if region.capacity),
    ]


def _device_chart(region: RegionInfo, objects: Sequence[ObjectInfo]) -> Chart:
    return Chart(region, objects, block_map(objects, region.capacity, region.block_size))


@dataclass(frozen=True, slots=True)
class Grid:
    """How the blocks are laid out in rows of cells, so that every row begins at a round address."""

    columns: int  #: cells of a row; a round number
    blocks_per_cell: int  #: a round number

    def rows(self, blocks: int) -> int:
        """How many rows so many blocks take."""
        return -(-blocks // (self.columns * self.blocks_per_cell))


def grid_for(blocks: int, columns: int, rows: int) -> Grid:
    """The finest grid of round numbers that fits into so many columns and rows."""
    wide = max(n for n in _round_numbers(max(columns, 1)) if n <= max(columns, 1))
    fewest = -(-blocks // (wide * max(rows, 1)))
    return Grid(wide, min(n for n in _round_numbers(fewest) if n >= fewest))


def _round_numbers(most: int) -> list[int]:
    """Powers of two and three times these, up to ``most`` and a bit beyond: 1, 2, 3, 4, 6, 8, 12, ..."""
    return sorted(times << power for power in range(most.bit_length() + 1) for times in (1, 3))
