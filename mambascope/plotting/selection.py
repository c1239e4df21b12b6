"""How much of the objects lies in the cells that are read again, against the share of cells."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mambascope.plotting import style


def plot_selection(
    curve: Sequence[Mapping[str, float]], path: str | os.PathLike[str], alpha: float, title: str = ""
) -> Path:
    """Draws the shares of object pixels in selected, random and best cells.

    Args:
        curve: Rows with ``alpha``, ``selected``, ``random``, ``fixed`` and ``best``, 0 to 1.
        path: The picture.
        alpha: The model's own share of cells, marked.
        title: Above the picture.
    """
    with style.styled():
        figure = style.new_figure(5.2, 4.0)
        ax = figure.add_subplot()
        x = [100 * row["alpha"] for row in curve]
        for name, colour, line, label in (
            ("best", style.MUTED, "--", "best possible cells"),
            ("selected", style.DYNAMIC, "-", "selected cells"),
            ("fixed", style.MUTED, "-.", "the same cells of every image"),
            ("random", style.MUTED, ":", "random cells"),
        ):
            ax.plot(x, [100 * row[name] for row in curve], line, color=colour, label=label)
        ax.axvline(100 * alpha, color=style.FINE, linewidth=1, label=f"the model's α, {alpha:g}")
        ax.set(xlim=(0, 100), ylim=(0, 102), xlabel="cells read again (%)", ylabel="object pixels in them (%)")
        ax.legend(loc="lower right")
        if title:
            ax.set_title(title)
        return style.save(figure, path)
