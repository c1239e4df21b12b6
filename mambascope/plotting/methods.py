"""Accuracy against cost of several methods: points with their spread, and curves of those that have a threshold."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from mambascope.plotting import style
from mambascope.plotting.published import PublishedPoint, draw_published

_COLOURS = (
    style.COARSE,
    style.FINE,
    "#8a6bbf",
    "#b58900",
    "#c4304b",
    "#4a9aa8",
    "#7f5a3c",
    "#d1719f",
    "#5b6b2f",
    "#46327e",
    "#ff9f1c",
    "#222f5b",
)
# one fewer than colours, so that a method beyond them repeats no pair of both
_MARKERS = ("s", "D", "^", "v", "P", "X", "o", "<", ">", "p", "h")


@dataclass(frozen=True)
class Method:
    """What is drawn of one method.

    Attributes:
        label: In the legend.
        top1: Mean, smallest and largest accuracy over the seeds [P, 3], 0 to 1.
        cost: Per panel, mean, smallest and largest cost of the points [P, 3]; NaN for what was not measured.
        curve_top1: Mean, smallest and largest accuracy along a curve [S, 3]; ``None`` for a method without one.
        curve_cost: Per panel, cost along it [S].
        reference: Whether it is drawn grey, as what the others are judged by.
    """

    label: str
    top1: np.ndarray
    cost: dict[str, np.ndarray]
    curve_top1: np.ndarray | None = None
    curve_cost: dict[str, np.ndarray] = field(default_factory=dict)
    reference: bool = False


def plot_methods(
    methods: Sequence[Method],
    panels: dict[str, tuple[str, str]],
    path: str | os.PathLike[str],
    *,
    published: Sequence[PublishedPoint] = (),
    title: str = "",
) -> Path:
    """Draws top-1 against each cost.

    Args:
        methods: What is drawn; points of a method are joined by a thin line.
        panels: Title and label of the horizontal axis, by the name that the cost has in the methods.
        path: PNG to write.
        published: Rows of the literature (``one_direction`` GFLOPs) for the first panel, grey and marked as such.
        title: Of the whole figure.
    """
    with style.styled():
        figure = style.new_figure(4.7 * len(panels), 5.0)
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=not published)[0]
        for ax, (name, (heading, label)) in zip(axes, panels.items(), strict=True):
            for i, (method, look) in enumerate(zip(methods, _looks(methods), strict=True)):
                _draw(ax, method, name, *look, order=3 + i)
            ax.set_title(heading)
            ax.set_xlabel(label)
            ax.set_xlim(left=0)
        draw_published(axes[0], published, fontsize=6.5)
        axes[0].set_ylabel("top-1 accuracy (%)")
        handles, labels = axes[0].get_legend_handles_labels()
        columns = 5 if sum(map(len, labels)) < 120 else 3  # long labels would run over both edges
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return style.save(figure, path)


def _looks(methods: Sequence[Method]) -> list[tuple[str, str]]:
    """Colour and marker of every method: curves have the colour that dynamic inference has in every figure."""
    looks, curves, points = [], 0, 0
    for method in methods:
        if method.reference:
            looks.append((style.INK, "o"))
        elif method.curve_top1 is not None and curves == 0:
            looks.append((style.DYNAMIC, "."))
            curves += 1
        else:
            looks.append((_COLOURS[points % len(_COLOURS)], _MARKERS[points % len(_MARKERS)]))
            points += 1
    return looks


def _draw(ax: Axes, method: Method, panel: str, colour: str, marker: str, order: int) -> None:
    cost = method.cost[panel]
    measured = ~np.isnan(cost[:, 0])
    (x, *x_range), (y, *y_range) = cost[measured].T, 100 * method.top1[measured].T
    if method.curve_top1 is not None and panel in method.curve_cost:
        line, (mean, low, high) = method.curve_cost[panel], 100 * method.curve_top1.T
        ax.plot(line, mean, color=colour, lw=1.8, zorder=order)
        ax.fill_between(line, low, high, color=colour, alpha=0.15, lw=0, zorder=2)
    order_x = np.argsort(x, kind="stable")
    joined = method.curve_top1 is None
    ax.plot(x[order_x], y[order_x], color=colour, lw=0.9 if joined else 0, alpha=0.6, zorder=order)
    ax.errorbar(
        x,
        y,
        xerr=np.abs(np.array(x_range) - x),
        yerr=np.abs(np.array(y_range) - y),
        fmt=marker,
        color=colour,
        ms=6,
        elinewidth=0.9,
        capsize=1.5,
        label=method.label,
        zorder=order + 0.5,
    )
