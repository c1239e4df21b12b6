"""Accuracy against cost: what the exit threshold trades."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from mambascope.evaluation.published import PublishedRow
from mambascope.evaluation.sweep import SweepCurve
from mambascope.evaluation.throughput import Timing
from mambascope.plotting import style


def plot_frontier(
    curve: SweepCurve,
    path: str | os.PathLike[str],
    *,
    chosen: SweepCurve | None = None,
    convention: str = "both_directions",
    timings: Sequence[Timing] = (),
    timed_top1: Sequence[float] = (),
    published: Sequence[PublishedRow] = (),
    title: str = "",
) -> Path:
    """Draws top-1 against GFLOPs and, if there are `timings`, against measured milliseconds per image.

    Args:
        curve: The sweep.
        path: PNG to write.
        chosen: The sweep at the chosen threshold alone.
        convention: Which GFLOPs.
        timings: Measured modes (``coarse``, ``refine_all``, ``dynamic``), one panel per batch size.
        timed_top1: Top-1 (0 to 1) of each of them.
        published: Rows of the literature (``one_direction`` GFLOPs); drawn grey, marked as not reproduced here.
        title: Of the whole figure.
    """
    sizes = sorted({t.batch_size for t in timings}, reverse=True)
    with style.styled():
        figure = style.new_figure(4.6 * (1 + len(sizes)), 3.9)
        axes = figure.subplots(1, 1 + len(sizes), squeeze=False, sharey=not published)[0]
        _gflops_panel(axes[0], curve, chosen, convention, published)
        for ax, size in zip(axes[1:], sizes, strict=True):
            own = [(t, y) for t, y in zip(timings, timed_top1, strict=True) if t.batch_size == size]
            _time_panel(ax, own, size, curve, None if chosen is None else float(chosen.threshold[0]))
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


def _gflops_panel(
    ax: Axes, curve: SweepCurve, chosen: SweepCurve | None, convention: str, published: Sequence[PublishedRow]
) -> None:
    x, y = curve.gflops[convention], 100 * curve.top1
    ax.plot(x, y, color=style.DYNAMIC, label="dynamic, every η", zorder=3)
    _ends(ax, (x[0], x[-1]), (y[0], y[-1]))
    if chosen is not None:
        cost, top1 = float(chosen.gflops[convention][0]), 100 * float(chosen.top1[0])
        ax.plot(cost, top1, "*", color=style.DYNAMIC, ms=16, mec="white", mew=0.8, zorder=6)
        _callout(ax, cost, top1, f"η = {chosen.threshold[0]:.3f}: {top1:.1f} %\n{_saving(cost, float(x[-1]))}")
    for row in published:
        ax.plot([row.gflops], [row.top1], "x", color=style.MUTED, ms=6, zorder=2)
        ax.annotate(row.label, (row.gflops, row.top1), xytext=(4, 3), textcoords="offset points", fontsize=7)
    if published:
        ax.plot([], [], "x", color=style.MUTED, label="published, not reproduced here")
    ax.set_title("computation")
    ax.set_xlabel(f"GFLOPs per image ({convention.replace('_', ' ')})")
    ax.set_xlim(left=0)
    _headroom(ax, y.min(), max(y.max(), *(row.top1 for row in published)) if published else y.max())
    ax.legend(loc="lower right")


def _time_panel(
    ax: Axes, points: Sequence[tuple[Timing, float]], batch_size: int, curve: SweepCurve, chosen: float | None
) -> None:
    by_mode = {t.mode: (t, 100 * top1) for t, top1 in points}
    dynamic = sorted(((t, 100 * top1) for t, top1 in points if t.mode == "dynamic"), key=lambda p: p[0].ms)
    coarse, full = by_mode["coarse"], by_mode["refine_all"]
    _ends(ax, (coarse[0].ms, full[0].ms), (coarse[1], full[1]))
    between = coarse[0].ms + curve.share_refined * (full[0].ms - coarse[0].ms)
    ax.plot(
        between, 100 * curve.top1, color=style.DYNAMIC, lw=1.2, alpha=0.45, label="if splitting were free", zorder=3
    )
    ms = np.array([t.ms for t, _ in dynamic])
    errors = np.array([[t.ms - t.ms_low for t, _ in dynamic], [t.ms_high - t.ms for t, _ in dynamic]])
    ax.errorbar(
        ms,
        [y for _, y in dynamic],
        xerr=errors,
        fmt="o",
        color=style.DYNAMIC,
        ms=6,
        elinewidth=1.2,
        capsize=2,
        label="dynamic (quartiles)",
        zorder=5,
    )
    for t, y in dynamic:
        if t.threshold == chosen:
            ax.plot(t.ms, y, "*", color=style.DYNAMIC, ms=16, mec="white", mew=0.8, zorder=6)
            _callout(ax, t.ms, y, f"{t.ms:.2f} ms\n{_saving(t.ms, full[0].ms)}")
    _headroom(ax, 100 * curve.top1.min(), 100 * curve.top1.max())
    ax.set_title(f"measured time, batch {batch_size}")
    ax.set_xlabel("ms per image")
    ax.set_xlim(left=0)
    ax.legend(loc="lower right")
