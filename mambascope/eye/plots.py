"""MambaEye: accuracy against the number of glimpses, and pictures of the glimpses themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter
from numpy.typing import NDArray

from mambascope.eye.curves import GlimpseCurve
from mambascope.plotting import style

_SIZES = ("#7aa6d6", style.COARSE, "#2b5a8c", "#142f4d", "#8a6bbf", style.MUTED)
_MARKERS = ("*", "D", "s", "^")
_KINDS = (style.INK, style.DYNAMIC, style.FINE, style.COARSE, "#8a6bbf", "#b58900", style.MUTED, "#c4304b")


def plot_glimpse_curves(
    sizes: Mapping[str, GlimpseCurve],
    path: str | os.PathLike[str],
    *,
    peers: Mapping[str, Mapping[str, float]] | None = None,
    stopping: GlimpseCurve | None = None,
    orders: Mapping[str, GlimpseCurve] | None = None,
    title: str = "",
) -> Path:
    """Draws accuracy against glimpses.

    Args:
        sizes: One curve per image size, by its label.
        path: PNG to write.
        peers: Accuracy (0 to 1) of other models by name and size label, drawn beside the curves.
        stopping: A curve with early stopping; gets a panel of its own.
        orders: Curves of scan patterns and choices at one size; get a panel of their own.
        title: Of the whole figure.
    """
    count = 1 + (stopping is not None) + bool(orders)
    with style.styled():
        figure = style.new_figure(4.9 * count, 4.6)
        axes = list(figure.subplots(1, count, squeeze=False)[0])
        _size_panel(axes.pop(0), sizes, peers or {})
        if stopping is not None:
            _stop_panel(axes.pop(0), stopping)
        if orders:
            _order_panel(axes.pop(0), orders)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return style.save(figure, path)


def _steps(length: int) -> NDArray[np.int64]:
    """Places where a curve on a logarithmic axis is drawn."""
    return np.unique(np.geomspace(1, length, 80).round().astype(np.int64))


def _glimpse_axis(ax: Axes, length: int) -> None:
    ticks = [2**i for i in range(0, 16, 2 if length > 40 else 1) if 2**i <= length]
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel("glimpses")
    ax.set_ylabel("top-1 accuracy (%)")


def _size_panel(ax: Axes, sizes: Mapping[str, GlimpseCurve], peers: Mapping[str, Mapping[str, float]]) -> None:
    length = max(curve.options.length for curve in sizes.values())
    for (label, curve), colour in zip(sizes.items(), _SIZES, strict=False):
        steps = _steps(curve.options.length)
        ax.plot(steps, 100 * curve.top1[steps - 1], color=colour, label=f"MambaEye {label}")
        # other models have no glimpses: they stand beside the curves, in the colour of the size
        for i, (name, marker) in enumerate(zip(peers, _MARKERS, strict=False)):
            if label in peers[name]:
                ax.plot(length * 1.5 ** (i + 1), 100 * peers[name][label], marker, color=colour, ms=9, clip_on=False)
    for name, marker in zip(peers, _MARKERS, strict=False):
        ax.plot([], [], marker, color=style.MUTED, ms=9, label=name)
    _glimpse_axis(ax, length)
    ax.set_title("image sizes")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8)


def _stop_panel(ax: Axes, curve: GlimpseCurve) -> None:
    steps = _steps(curve.options.length)
    ax.plot(steps, 100 * curve.top1[steps - 1], color=style.MUTED, ls=(0, (4, 3)), label="as many for every image")
    names = {
        "confidence": "sure for what it has seen",
        "raw": "softmax threshold (not corrected)",
        "margin": "margin, corrected",
        "entropy": "entropy, corrected",
    }
    colours = {"confidence": style.DYNAMIC, "raw": style.FINE, "margin": style.COARSE, "entropy": "#8a6bbf"}
    for stop in curve.stops:
        order = np.argsort(stop.mean_glimpses)
        x, y = stop.mean_glimpses[order], 100 * stop.top1[order]
        ax.plot(x, y, color=colours[stop.criterion], label=names[stop.criterion])
    _glimpse_axis(ax, curve.options.length)
    ax.set_xlabel("glimpses used, mean")
    ax.set_title("stopping when sure")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8)


def _order_panel(ax: Axes, orders: Mapping[str, GlimpseCurve]) -> None:
    length = max(curve.options.length for curve in orders.values())
    for i, (label, curve) in enumerate(orders.items()):
        steps = _steps(curve.options.length)
        turn, kind = divmod(i, len(_KINDS))
        dashes = ("-", (0, (4, 1.5)), (0, (1, 1.2)))[min(turn, 2)]  # when the colours come round again
        ax.plot(steps, 100 * curve.top1[steps - 1], color=_KINDS[kind], ls=dashes, lw=1.6, label=label)
    _glimpse_axis(ax, length)
    ax.set_title("where to look")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=8)


def _cycle(count: int) -> Sequence[str]:
    return [_KINDS[i % len(_KINDS)] for i in range(count)]


def plot_scaling(
    series: Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
) -> Path:
    """Draws time and memory against the number of glimpses.

    Args:
        series: By name: glimpses, milliseconds per image, and megabytes held.
        path: PNG to write.
        title: Of the whole figure.
    """
    with style.styled():
        figure = style.new_figure(9.2, 3.9)
        time_ax, memory_ax = figure.subplots(1, 2)
        for (name, (steps, ms, mb)), colour in zip(series.items(), _cycle(len(series)), strict=True):
            time_ax.plot(steps, ms, "o-", color=colour, ms=4, label=name)
            memory_ax.plot(steps, mb, "o-", color=colour, ms=4, label=name)
        for ax, label, heading in (
            (time_ax, "ms per image", "time"),
            (memory_ax, "MB", "memory that grows with the sequence"),
        ):
            ax.set_xscale("log", base=2)
            ax.set_yscale("log" if ax is time_ax else "linear")  # the memory may be nothing
            for axis in (ax.xaxis, ax.yaxis):  # powers would be written in TeX
                axis.set_major_formatter("{x:g}")
            ax.set_xlabel("glimpses")
            ax.set_ylabel(label)
            ax.set_title(heading)
            ax.legend(fontsize=8)
        time_ax.yaxis.set_minor_formatter(LogFormatter())
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return style.save(figure, path)
