"""Rows of the literature in a figure: grey, and marked as not measured with this code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from mambascope.plotting import style

NOTE = "published, not reproduced here"


@dataclass(frozen=True)
class PublishedPoint:
    """A model of the literature.

    Attributes:
        label: Its name.
        top1: Accuracy in %.
        gflops: GFLOPs per image, one scan direction.
    """

    label: str
    top1: float
    gflops: float


def draw_published(ax: Axes, points: Sequence[PublishedPoint], fontsize: float = 7) -> None:
    """Draws `points`, if there are any, with their names and one entry of the legend."""
    for point in points:
        ax.plot([point.gflops], [point.top1], "x", color=style.MUTED, ms=6, zorder=2)
        place = (point.gflops, point.top1)
        ax.annotate(point.label, place, xytext=(4, 3), textcoords="offset points", fontsize=fontsize)
    if points:
        ax.plot([], [], "x", color=style.MUTED, label=NOTE)
