"""One look for all figures, and saving without a display or a half-written file."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from mambascope._names import printable
from mambascope.utils import atomic_path

# the same three things have the same three colours in every figure; told apart also without colour vision
COARSE, FINE, DYNAMIC = "#3b76b5", "#c4552d", "#14866d"
INK, MUTED, FAINT = "#22262b", "#6b7280", "#d9dde2"
RIGHT, WRONG = "#14866d", "#c4304b"
HEAT, CELLS = "autumn_r", "#12b3d6"  # outlines must not drown in the heat colours

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2.0,
    "figure.facecolor": "white",
    # names of files and classes are no TeX: $5_vs_$6
    "text.parse_math": False,
    "text.usetex": False,
}
DPI = 150


def new_figure(width: float, height: float) -> Figure:
    """A figure of `width` x `height` inches with its own canvas: no global state, no window system."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def styled() -> AbstractContextManager[None]:
    """Context in which figures of this package are drawn."""
    return rc_context(RC)


def image_axes(ax: Axes) -> Axes:
    """Strips ticks, grid and frame from axes that show a picture."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes a PNG under a temporary name and moves it into place.

    Raises:
        OSError: The folder cannot be made or written.
    """
    for text in figure.findobj(Text):
        text.set_text(printable(text.get_text()))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})
    return Path(path)
