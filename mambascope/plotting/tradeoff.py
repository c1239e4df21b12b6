"""Accuracy against cost of one model at every threshold, with its measured times.

T thresholds, ascending: from all images exiting (η = 0) to all refined (η = 1).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from mambascope.plotting import style
from mambascope.plotting.published import PublishedPoint, draw_published


@dataclass(frozen=True)
class Tradeoff:
    """What accuracy costs at T thresholds.

    Attributes:
        top1: Accuracy [T], 0 to 1.
        share_refined: Share of the images that are refined [T].
        gflops: Mean GFLOPs per image [T].
        convention: Which GFLOPs these are, in words.
    """

    top1: np.ndarray
    share_refined: np.ndarray
    gflops: np.ndarray
    convention: str


@dataclass(frozen=True)
class ChosenPoint:
    """The threshold in use.

    Attributes:
        threshold: η.
        top1: Accuracy at it, 0 to 1.
        gflops: Mean GFLOPs per image at it.
    """

    threshold: float
    top1: float
    gflops: float


@dataclass(frozen=True)
class TimedPoint:
    """Measured time of one mode.

    Attributes:
        mode: ``"coarse"``, ``"refine_all"`` or ``"dynamic"``.
        batch_size: Images per call.
        ms, ms_low, ms_high: Median and quartiles of the milliseconds per image.
        top1: Accuracy of the mode, 0 to 1.
        threshold: η of a dynamic mode.
    """

    mode: str
    batch_size: int
    ms: float
    ms_low: float
    ms_high: float
    top1: float
    threshold: float | None = None


def plot_tradeoff(
    curve: Tradeoff,
    path: str | os.PathLike[str],
    *,
    chosen: ChosenPoint | None = None,
    timed: Sequence[TimedPoint] = (),
    published: Sequence[PublishedPoint] = (),
    title: str = "",
) -> Path:
    """Draws top-1 against GFLOPs and, if there are measured times, against milliseconds per image.

    Args:
        curve: All thresholds.
        path: PNG to write.
        chosen: The threshold in use, marked in every panel.
        timed: Measured modes, one panel per batch size.
        published: Models of the literature, for a curve of the same GFLOPs.
        title: Of the whole figure.
    """
    sizes = sorted({point.batch_size for point in timed}, reverse=True)
    with style.styled():
        figure = style.new_figure(4.6 * (1 + len(sizes)), 3.9)
        axes = figure.subplots(1, 1 + len(sizes), squeeze=False, sharey=not published)[0]
        _gflops_panel(axes[0], curve, chosen, published)
        for ax, size in zip(axes[1:], sizes, strict=True):
            ax.set_title(f"measured time, batch {size}")
            points = [point for point in timed if point.batch_size == size]
            _time_panel(ax, points, curve, None if chosen is None else chosen.threshold)
        axes[0].set_ylabel("top-1 accuracy (%)")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return style.save(figure, path)


def _ends(ax: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    """The two stages and the line between them, which a coin toss as gate would reach."""
    ax.plot(x, y, color=style.MUTED, lw=1.2, ls=(0, (4, 3)), label="random gate", zorder=2)
    ax.plot(*zip((x[0], y[0]), strict=True), "s", color=style.COARSE, ms=9, label="coarse only", zorder=4)
    ax.plot(*zip((x[1], y[1]), strict=True), "D", color=style.FINE, ms=8, label="refine everything", zorder=4)


def _callout(ax: Axes, x: float, y: float, text: str) -> None:
    """Text in the upper left corner, which a rising, concave curve leaves empty, and a line to its point."""
    ax.annotate(
        text,
        (x, y),
        xytext=(0.03, 0.97),
        textcoords="axes fraction",
        ha="left",
        va="top",
        fontsize=9,
        arrowprops={"arrowstyle": "-", "color": style.MUTED, "lw": 0.8, "shrinkB": 7},
        zorder=7,
    )


def _headroom(ax: Axes, low: float, high: float) -> None:
    """Room above the curve for the callout."""
    span = max(high - low, 1.0)
    ax.set_ylim(low - 0.08 * span, high + 0.22 * span)


def _saving(cost: float, full: float) -> str:
    word = "less" if cost <= full else "more"
    return f"{100 * abs(1 - cost / full):.0f} % {word} than refining all"


def _gflops_panel(ax: Axes, curve: Tradeoff, chosen: ChosenPoint | None, published: Sequence[PublishedPoint]) -> None:
    x, y = curve.gflops, 100 * curve.top1
    ax.plot(x, y, color=style.DYNAMIC, label="dynamic, every η", zorder=3)
    _ends(ax, (x[0], x[-1]), (y[0], y[-1]))
    if chosen is not None:
        top1 = 100 * chosen.top1
        ax.plot(chosen.gflops, top1, "*", color=style.DYNAMIC, ms=16, mec="white", mew=0.8, zorder=6)
        text = f"η = {chosen.threshold:.3f}: {top1:.1f} %\n{_saving(chosen.gflops, float(x[-1]))}"
        _callout(ax, chosen.gflops, top1, text)
    draw_published(ax, published)
    ax.set_title("computation")
    ax.set_xlabel(f"GFLOPs per image ({curve.convention})")
    ax.set_xlim(left=0)
    _headroom(ax, y.min(), max(y.max(), *(point.top1 for point in published)) if published else y.max())
    ax.legend(loc="lower right")


def _time_panel(ax: Axes, points: Sequence[TimedPoint], curve: Tradeoff, threshold: float | None) -> None:
    ends = {point.mode: point for point in points if point.mode != "dynamic"}
    dynamic = sorted((point for point in points if point.mode == "dynamic"), key=lambda point: point.ms)
    coarse, full = ends["coarse"], ends["refine_all"]
    _ends(ax, (coarse.ms, full.ms), (100 * coarse.top1, 100 * full.top1))
    between = coarse.ms + curve.share_refined * (full.ms - coarse.ms)
    ax.plot(
        between, 100 * curve.top1, color=style.DYNAMIC, lw=1.2, alpha=0.45, label="if splitting were free", zorder=3
    )
    ax.errorbar(
        [point.ms for point in dynamic],
        [100 * point.top1 for point in dynamic],
        xerr=np.array([[p.ms - p.ms_low for p in dynamic], [p.ms_high - p.ms for p in dynamic]]),
        fmt="o",
        color=style.DYNAMIC,
        ms=6,
        elinewidth=1.2,
        capsize=2,
        label="dynamic (quartiles)",
        zorder=5,
    )
    for point in dynamic:
        if point.threshold == threshold:
            top1 = 100 * point.top1
            ax.plot(point.ms, top1, "*", color=style.DYNAMIC, ms=16, mec="white", mew=0.8, zorder=6)
            _callout(ax, point.ms, top1, f"{point.ms:.2f} ms\n{_saving(point.ms, full.ms)}")
    _headroom(ax, 100 * curve.top1.min(), 100 * curve.top1.max())
    ax.set_xlabel("ms per image")
    ax.set_xlim(left=0)
    ax.legend(loc="lower right")
