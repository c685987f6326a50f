"""What the pictures of all benches share: the option, a figure in one style, its colours, and its file.

matplotlib (the extra ``plot``) is imported when a figure is opened. ``add_plot_option`` refuses at the command line
what could not be saved in the end, for a measurement takes minutes.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")
OURS, THEIRS, LIMIT, INK = "#0072b2", "#9aa0a6", "#5f6368", "#202124"
MET, MISSED = "#00734f", "#c2410c"  # what is said of goals
PALETTE = ("#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d31")  # colour-blind-safe, beside OURS
STYLE = {
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": THEIRS,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#e8eaed",
    "xtick.color": LIMIT,
    "ytick.color": LIMIT,
    "svg.hashsalt": "shmcache",  # the same numbers make the same file but for the last digits of its layout
}


def add_plot_option(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--plot", type=_plot_path, metavar="FILE", help="draw them into FILE, a .png or .svg; needs matplotlib"
    )


def _plot_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in ENDINGS:
        raise ArgumentTypeError(f"expected a name that ends in {' or '.join(ENDINGS)}, got {text!r}")
    if not path.parent.is_dir():
        raise ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    if find_spec("matplotlib") is None:
        raise ArgumentTypeError("a plot needs matplotlib: pip install 'shmcache[plot]'")
    return path


def open_figure(title: str, inches: tuple[float, float]) -> Figure:
    """An empty figure, whatever style the user has set for other pictures; ImportError without matplotlib."""
    import matplotlib as mpl  # noqa: PLC0415 # an extra
    from matplotlib.figure import Figure  # noqa: PLC0415

    mpl.rcdefaults()
    mpl.rcParams.update(STYLE)
    figure = Figure(figsize=inches, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def save(figure: Figure, path: Path) -> None:
    """OSError where the file cannot be written, ValueError where its ending is unknown."""
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
