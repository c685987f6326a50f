"""The findings as a picture: a bar for the median of each way, a dot a prompt, and the memory of two engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench_plot import INK, OURS, THEIRS, open_figure, save
from vllm_common import Finding, Memory

from shmcache_tools.text import time_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = (9.0, 5.2)


def save_plot(path: Path, title: str, found: Sequence[Finding], memory: Memory | None) -> None:
    """ImportError without matplotlib; OSError or ValueError where the file cannot be written or has no known ending."""
    figure = open_figure(title, INCHES)
    ratios, sizes = figure.subplots(2, 1, height_ratios=(4, 1))
    _draw_ratios(ratios, [one for one in found if one.ttft])
    _draw_memory(sizes, memory)
    save(figure, path)


def _draw_ratios(axes: Axes, found: Sequence[Finding]) -> None:
    for row, one in enumerate(found):
        ratio = median(one.ratios)
        axes.barh(row, ratio, color=_colour(one.what), height=0.6)
        axes.plot(one.ratios, [row] * len(one.ratios), "o", color=INK, markersize=2.5)
        text = f"  {ratio:.1f} x, {time_text(median(one.ttft))}"
        axes.text(max(one.ratios), row, text, va="center", fontsize=8)
    axes.set_yticks(range(len(found)), [one.what for one in found], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("first token, times as fast as computing the prompt again (bar: median; dots: prompts)", fontsize=8)
    axes.margins(x=0.25)
    axes.set_xlim(left=0)


def _draw_memory(axes: Axes, memory: Memory | None) -> None:
    if memory is None:
        axes.set_visible(False)
        return
    rows = {"two engines, an arena each": memory.apart, "two engines, one arena": memory.shared}
    for row, nbytes in enumerate(rows.values()):
        axes.barh(row, nbytes / 2**20, color=OURS if nbytes == memory.shared else THEIRS, height=0.6)
        axes.text(nbytes / 2**20, row, f"  {nbytes / 2**20:,.0f} MiB", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("KV kept on the host, MiB", fontsize=8)
    axes.margins(x=0.25)


def _colour(what: str) -> str:
    return OURS if what.startswith("shmcache") else THEIRS
