"""Figures of segmentation and detection: quality against cost and time, and pictures of single images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from mambascope.plotting import style
from mambascope.plotting.heatmaps import Example, _cells, _heat, as_seen

_MODES = {
    "plain Vim": (style.MUTED, "x"),
    "all exit": (style.COARSE, "s"),
    "dynamic": (style.DYNAMIC, "*"),
    "refine all": (style.FINE, "D"),
}
_COLOURS = [
    "#e64b35",
    "#3c82dc",
    "#2daa64",
    "#f0aa28",
    "#965ac8",
    "#1eb4be",
    "#eb6eaa",
    "#8c6e46",
    "#aac83c",
    "#c8c8d2",
]


def plot_dense(
    rows: Sequence[Mapping[str, float]],
    chosen: int,
    timings: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    vim: Mapping[str, float] | None = None,
    vim_gflops: float | None = None,
    title: str = "",
) -> Path:
    """Draws quality against share refined and against backbone GFLOPs, and measured time against input size.

    Args:
        rows: The sweep, one row per threshold.
        chosen: Index of the chosen row.
        timings: Measured rows with ``side``, ``mode`` and ``ms_backbone``, ``ms_model``.
        path: PNG to write.
        vim: Quality of a trained plain Vim; ``vim_gflops`` its backbone's cost.
        title: Of the whole figure.
    """
    names = [k for k in rows[0] if k not in ("threshold", "share_refined") and not k.startswith("gflops")]
    with style.styled():
        figure = style.new_figure(15.2, 3.9)
        axes = figure.subplots(1, 4)
        share = [100 * r["share_refined"] for r in rows]
        cost = [r["gflops_both_directions"] for r in rows]
        for ax, x, label in ((axes[0], share, "images refined (%)"), (axes[1], cost, "backbone GFLOPs per image")):
            for name, line in zip(names, ("-", "--"), strict=False):
                y = [r[name] for r in rows]
                ax.plot(x, y, line, color=style.DYNAMIC, label=name, zorder=3)
                ax.plot(x[0], y[0], "s", color=style.COARSE, ms=8, zorder=4)
                ax.plot(x[-1], y[-1], "D", color=style.FINE, ms=7, zorder=4)
                ax.plot(x[chosen], y[chosen], "*", color=style.DYNAMIC, ms=15, mec="white", mew=0.8, zorder=5)
            ax.set_xlabel(label)
            ax.set_xlim(left=0)
        axes[0].set_ylabel(" / ".join(names))
        if vim and vim_gflops:
            for name in names:
                axes[1].plot(vim_gflops, vim[name], "x", color=style.INK, ms=8, mew=2, zorder=5)
            axes[1].plot([], [], "x", color=style.INK, ms=8, mew=2, label="plain Vim")
        row = rows[chosen]
        axes[0].set_title(f"η = {row['threshold']:.3f}: {100 * row['share_refined']:.0f} % refined")
        axes[1].set_title("computation")
        axes[1].legend(loc="lower right")
        for ax, kind in ((axes[2], "backbone"), (axes[3], "model")):
            _times(ax, timings, kind)
        axes[2].legend(loc="upper left")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return style.save(figure, path)


def _times(ax: Axes, timings: Sequence[Mapping[str, Any]], kind: str) -> None:
    for mode, (color, marker) in _MODES.items():
        points = sorted((t for t in timings if t["mode"] == mode), key=lambda t: t["side"])
        if points:
            y = np.array([t[f"ms_{kind}"] for t in points])
            errors = np.array(
                [[t[f"ms_{kind}"] - t[f"ms_{kind}_low"], t[f"ms_{kind}_high"] - t[f"ms_{kind}"]] for t in points]
            )
            ax.errorbar(
                [t["side"] for t in points],
                y,
                yerr=errors.T,
                fmt=f"-{marker}",
                color=color,
                ms=7,
                capsize=2,
                label=mode,
            )
    ax.set_title(f"measured time, {'backbone' if kind == 'backbone' else 'whole model'}")
    ax.set_xlabel("short side of the image (pixels)")
    ax.set_ylabel("ms per image")
    ax.set_ylim(bottom=0)


@dataclass(frozen=True)
class DensePicture:
    """One image, what was predicted, and how the model came to it.

    Attributes:
        image: RGB [H, W, 3], 0 to 1, as the pipeline read the file; predictions are in its pixels.
        seen: RGB [h, w, 3], 0 to 1, at the size the model worked on; cells are in its pixels.
        importance: Importance of each coarse cell [rows, cols].
        selected: Refined cells, raster indices; -1 or empty for an image that exited.
        exited: Whether the coarse features were kept.
        confidence: Of the gate, 0 to 1.
        cell: Side of a coarse cell in pixels.
        name: File name.
        classes: Names.
        present: Classes that the gate takes for present.
        palette: Colour (0 to 255) of each class, if known.
        segmentation: Class of each pixel [H, W], of a segmentor.
        boxes, labels, scores, masks: [n, 4], [n], [n] and [n, H, W], of a detector.
    """

    image: np.ndarray
    seen: np.ndarray
    importance: np.ndarray
    selected: np.ndarray
    exited: bool
    confidence: float
    cell: int
    name: str
    classes: Sequence[str]
    present: Sequence[int]
    palette: Sequence[tuple[int, ...]] | None = None
    segmentation: np.ndarray | None = None
    boxes: np.ndarray | None = None
    labels: np.ndarray | None = None
    scores: np.ndarray | None = None
    masks: np.ndarray | None = None

    def color(self, label: int) -> np.ndarray:
        """RGB of a class, 0 to 1."""
        if self.palette is not None and label < len(self.palette):
            return np.array(self.palette[label][:3]) / 255
        text = _COLOURS[label % len(_COLOURS)]
        return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255

    def class_name(self, label: int) -> str:
        """Name of a class, or its number."""
        return str(self.classes[label]) if label < len(self.classes) else str(label)

    def caption(self) -> str:
        """What the gate saw and decided."""
        names = ", ".join(self.class_name(i) for i in self.present) or "nothing for sure"
        how = "exited after the coarse look" if self.exited else "refined"
        return f"{how} (confidence {self.confidence:.2f}); the coarse look sees {names}"

    def class_numbers(self) -> list[int]:
        """Classes in the prediction."""
        labels = self.segmentation if self.segmentation is not None else self.labels
        return [] if labels is None else [int(v) for v in np.unique(labels)]


def _prediction(ax: Axes, item: DensePicture) -> None:
    grey = item.image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    if item.segmentation is not None:
        colors = np.stack([item.color(i) for i in range(int(item.segmentation.max()) + 1)])
        ax.imshow(0.45 * grey + 0.55 * colors[item.segmentation], vmin=0, vmax=1)
        return
    shown = grey
    assert item.boxes is not None
    assert item.labels is not None
    assert item.scores is not None
    for i, label in enumerate(item.labels):
        if item.masks is not None:
            shown = np.where(item.masks[i][..., None], 0.45 * grey + 0.55 * item.color(int(label)), shown)
    ax.imshow(shown, vmin=0, vmax=1)
    for (x0, y0, x1, y1), label, score in zip(item.boxes, item.labels, item.scores, strict=True):
        color = item.color(int(label))
        ax.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, ec=color, lw=1.6))
        text = f"{item.class_name(int(label))} {score:.2f}"
        ax.text(
            x0,
            max(y0 - 1, 0),
            text,
            fontsize=6.5,
            color="white",
            va="bottom",
            clip_on=True,
            bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8},
        )


def _example(item: DensePicture) -> Example:
    selected = np.array([], dtype=int) if item.exited else item.selected[item.selected >= 0]
    return Example(item.seen, item.importance, selected, item.exited, "", "", item.confidence, item.cell)


def _panels(axes: Sequence[Axes], item: DensePicture) -> None:
    example = _example(item)
    axes[0].imshow(item.image, vmin=0, vmax=1)
    _prediction(axes[1], item)
    _heat(axes[2], example)
    axes[3].imshow(as_seen(example), vmin=0, vmax=1)
    _cells(axes[2], example, style.CELLS)
    _cells(axes[3], example, style.CELLS)
    for ax in axes:
        style.image_axes(ax)


def _legend(ax: Axes, item: DensePicture) -> None:
    names = [i for i in item.class_numbers() if item.segmentation is None or i > 0][:8]
    handles = [Rectangle((0, 0), 1, 1, color=item.color(i), label=item.class_name(i)) for i in names]
    if handles:
        ax.legend(
            handles=handles,
            fontsize=7,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.02),
            ncols=min(len(handles), 6),
            handlelength=0.8,
            columnspacing=0.8,
        )


def draw_dense(item: DensePicture, path: str | os.PathLike[str]) -> Path:
    """Writes one image: the image, the prediction, the importance with the refined cells, and what was read."""
    h, w = item.image.shape[:2]
    with style.styled():
        figure = style.new_figure(11.0, 11.0 / 4 * h / w + 0.75)
        axes = figure.subplots(1, 4)
        _panels(axes, item)
        last = "read once, at half size" if item.exited else "read: refined cells sharp"
        for ax, text in zip(axes, (item.name, "prediction", "importance of the cells", last), strict=True):
            ax.set_title(text, fontsize=10)
        _legend(axes[1], item)
        figure.suptitle(item.caption(), x=0.01, ha="left", fontsize=10)
        return style.save(figure, path)


def dense_sheet(items: Sequence[DensePicture], path: str | os.PathLike[str]) -> Path:
    """Writes a sheet with a row for each image."""
    if not items:
        raise ValueError("items must hold at least one image")
    h, w = items[0].image.shape[:2]
    with style.styled():
        figure = style.new_figure(7.6, len(items) * (7.6 / 4 * h / w + 0.28) + 0.3)
        rows = figure.subfigures(len(items), 1, squeeze=False)[:, 0]
        for i, (sheet, item) in enumerate(zip(rows, items, strict=True)):
            axes = sheet.subplots(1, 4)
            _panels(axes, item)
            if i == 0:
                for ax, text in zip(axes, ("image", "prediction", "importance", "what was read"), strict=True):
                    ax.set_title(text, fontsize=9, fontweight="normal", color=style.MUTED)
            sheet.supxlabel(item.caption(), fontsize=8, x=0.02, ha="left")
        return style.save(figure, path)
