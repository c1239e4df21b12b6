"""Importance heat maps with the refined cells drawn on the images. H, W image size; rows x cols coarse grid."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from mambascope.plotting import style


@dataclass(frozen=True)
class Example:
    """One image and what the model did with it.

    Attributes:
        image: RGB [H, W, 3], 0 to 1, as the model saw it (padding left out).
        importance: Importance of each coarse cell [rows, cols].
        selected: Refined cells, raster indices; empty for an image that exited.
        exited: Whether the coarse answer was accepted.
        predicted, coarse_predicted: Final and coarse answer, as text.
        confidence: Of the coarse stage, 0 to 1. `fine_confidence` of the fine stage, if it ran.
        true: The right answer, as text, if known.
        tokens: Tokens used over both stages.
        cell: Side of a coarse cell in pixels.
        name: File name or other caption.
    """

    image: np.ndarray
    importance: np.ndarray
    selected: np.ndarray
    exited: bool
    predicted: str
    coarse_predicted: str
    confidence: float
    cell: int
    fine_confidence: float | None = None
    true: str | None = None
    tokens: int | None = None
    name: str | None = None

    @property
    def correct(self) -> bool | None:
        """Whether the answer is right; ``None`` if that is not known."""
        return None if self.true is None else self.predicted == self.true

    def caption(self) -> str:
        """Two lines: what is true and predicted, and how the model came to it."""
        first = f"predicted {self.predicted}" + (f", true {self.true}" if self.true is not None else "")
        if self.exited:
            return f"{first}\nleft after the coarse look ({self.confidence:.2f})"
        fine = "" if self.fine_confidence is None else f" ({self.fine_confidence:.2f})"
        return f"{first}\ncoarse {self.coarse_predicted} ({self.confidence:.2f}) → fine {self.predicted}{fine}"


def selected_mask(selected: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Raster indices of cells as a mask [rows, cols]."""
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    mask[selected[selected >= 0]] = True
    return mask.reshape(grid)


def outline(mask: np.ndarray, cell: float) -> np.ndarray:
    """Segments [n, 2, (x, y)] in pixels along every border between selected and other cells of a mask [rows, cols]."""
    padded = np.pad(mask, 1).astype(np.int8)
    segments = []
    rows, cols = np.nonzero(np.diff(padded, axis=0)[:, 1:-1])  # horizontal borders
    segments += [((c * cell, r * cell), ((c + 1) * cell, r * cell)) for r, c in zip(rows, cols, strict=True)]
    rows, cols = np.nonzero(np.diff(padded, axis=1)[1:-1])  # vertical borders
    segments += [((c * cell, r * cell), (c * cell, (r + 1) * cell)) for r, c in zip(rows, cols, strict=True)]
    return np.array(segments, dtype=float).reshape(-1, 2, 2) - 0.5  # imshow puts pixel centres on integers


def as_seen(example: Example) -> np.ndarray:
    """What the last stage read [H, W, 3]: refined cells at full resolution, all others at half, paler."""
    image, cell = example.image, example.cell
    h, w = image.shape[:2]
    even = np.pad(image, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    half = even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2, 3).mean(axis=(1, 3))
    blurred = half.repeat(2, axis=0).repeat(2, axis=1)[:h, :w]
    if example.exited:
        return blurred
    mask = selected_mask(example.selected, example.importance.shape)
    sharp = mask.repeat(cell, axis=0).repeat(cell, axis=1)[:h, :w, None]
    return np.where(sharp, image, 0.45 * blurred + 0.55 * 0.93)


def _heat(ax: Axes, example: Example) -> None:
    """Image in grey with the importance of the cells over it."""
    h, w = example.image.shape[:2]
    rows, cols = example.importance.shape
    extent = (-0.5, cols * example.cell - 0.5, rows * example.cell - 0.5, -0.5)
    grey = example.image.mean(axis=2)
    ax.imshow(0.2 + 0.8 * grey, cmap="gray", vmin=0, vmax=1)
    # each image has its own scale: importance is a ranking within one image. The least important cell stays grey, so
    # that dark and bright pictures both remain visible under the colours.
    span = float(np.ptp(example.importance))
    heat = (example.importance - example.importance.min()) / (span or 1.0)
    ax.imshow(heat, cmap=style.HEAT, vmin=0, vmax=1, extent=extent, alpha=0.65 * heat, interpolation="nearest")
    ax.set_xlim(-0.5, w - 0.5)
    ax.set_ylim(h - 0.5, -0.5)


def _cells(ax: Axes, example: Example, color: str) -> None:
    if not example.exited:
        lines = outline(selected_mask(example.selected, example.importance.shape), example.cell)
        ax.add_collection(LineCollection(list(lines), colors="white", linewidths=3.2, capstyle="projecting"))
        ax.add_collection(LineCollection(list(lines), colors=color, linewidths=1.7, capstyle="projecting"))


def _draw(axes: Sequence[Axes], example: Example) -> None:
    axes[0].imshow(example.image, vmin=0, vmax=1)
    _heat(axes[1], example)
    axes[2].imshow(as_seen(example), vmin=0, vmax=1)
    _cells(axes[1], example, style.CELLS)
    _cells(axes[2], example, style.CELLS)
    for ax in axes:
        style.image_axes(ax)


def draw_example(example: Example, path: str | os.PathLike[str]) -> Path:
    """Writes one image, its importance and what the model read as a PNG."""
    h, w = example.image.shape[:2]
    width = 9.0
    with style.styled():
        figure = style.new_figure(width, width / 3 * h / w + 0.5)
        axes = figure.subplots(1, 3)
        _draw(axes, example)
        for ax, title in zip(axes, _titles(example), strict=True):
            ax.set_title(title, fontsize=10)
        mark = {True: "✓  ", False: "✗  ", None: ""}[example.correct]
        line = example.caption().replace("\n", "; ") + (f"; {example.tokens} tokens" if example.tokens else "")
        figure.suptitle(mark + line, x=0.01, ha="left", fontsize=10)
        return style.save(figure, path)


def _titles(example: Example) -> tuple[str, str, str]:
    last = "read once, at half size" if example.exited else "read: refined cells sharp"
    return example.name or "image", "importance of the cells", last


def plot_heatmaps(examples: Sequence[Example], path: str | os.PathLike[str], *, title: str = "") -> Path:
    """Writes a sheet of examples, two side by side: image, importance with the refined cells, what the model read."""
    if not examples:
        raise ValueError("examples must hold at least one image")
    blocks = 2 if len(examples) > 1 else 1
    rows = -(-len(examples) // blocks)
    h, w = examples[0].image.shape[:2]
    with style.styled():
        row, head = 1.7 * h / w + 0.42, 0.24  # inches; the first row also carries the column titles
        figure = style.new_figure(5.4 * blocks, rows * row + head + 0.25)
        ratios = [row + head] + [row] * (rows - 1)
        sheets = figure.subfigures(rows, blocks, squeeze=False, wspace=0.03, height_ratios=ratios)
        for i in range(rows * blocks):
            # column by column, so that a sorted list reads downwards
            sheet = sheets[i % rows][i // rows]
            if i >= len(examples):
                continue
            example = examples[i]
            axes = sheet.subplots(1, 3)
            _draw(axes, example)
            if i % rows == 0:
                for ax, text in zip(axes, ("image", "importance", "what was read"), strict=True):
                    ax.set_title(text, fontsize=9, fontweight="normal", color=style.MUTED)
            color = {True: style.RIGHT, False: style.WRONG, None: style.INK}[example.correct]
            mark = {True: "✓ ", False: "✗ ", None: ""}[example.correct]
            sheet.supxlabel(mark + example.caption(), fontsize=8.5, color=color, x=0.02, ha="left")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return style.save(figure, path)
