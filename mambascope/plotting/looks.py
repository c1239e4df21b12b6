"""The method in one picture: coarse look, confidence, importance, selected cells, fine sequence.

H, W image size in pixels; rows x cols coarse grid; k selected cells.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mambascope.plotting import style
from mambascope.plotting.heatmaps import outline, selected_mask

_GAP = 0.25  # between cells of the sequence, in tokens


@dataclass(frozen=True)
class Looks:
    """Both looks at one image.

    Attributes:
        image: RGB [H, W, 3], 0 to 1; H and W are multiples of ``2 * patch``.
        importance: Importance of each coarse cell [rows, cols].
        selected: Cells that are read again [k], raster indices.
        patch: Side of a patch in pixels: of the half-size image in the coarse look, of the image in the fine one.
        probabilities: Of the classes after the coarse look [C].
        threshold: Confidence at which the coarse answer would have been accepted.
        classes: Names of the C classes.
        fine_probabilities: Of the classes after the fine look [C].
    """

    image: np.ndarray
    importance: np.ndarray
    selected: np.ndarray
    patch: int
    probabilities: np.ndarray
    threshold: float
    classes: Sequence[str]
    fine_probabilities: np.ndarray

    @property
    def half(self) -> np.ndarray:
        """The half-size image [H/2, W/2, 3]: means of four pixels."""
        height, width = self.image.shape[:2]
        return self.image.reshape(height // 2, 2, width // 2, 2, -1).mean(axis=(1, 3))


def _token(picture: np.ndarray, row: int, col: int, side: int) -> np.ndarray:
    """One token's pixels [side, side, 3]."""
    return picture[row * side : (row + 1) * side, col * side : (col + 1) * side]


def _probabilities(ax: Axes, values: np.ndarray, classes: Sequence[str], color: str, title: str) -> None:
    ax.bar(range(len(values)), values, color=color)
    ax.set_xticks(range(len(values)), list(classes), fontsize=7)
    ax.set_ylim(0, 1)
    ax.grid(axis="x", visible=False)
    ax.set_title(title, fontsize=9)


def _grid(ax: Axes, rows: int, cols: int, side: float) -> None:
    lines = [((c * side, 0.0), (c * side, rows * side)) for c in range(cols + 1)]
    lines += [((0.0, r * side), (cols * side, r * side)) for r in range(rows + 1)]
    ax.add_collection(LineCollection(list(np.array(lines) - 0.5), colors="white", linewidths=1.2))


def _sequence(ax: Axes, looks: Looks) -> int:
    """Draws the fine sequence: CLS, four patches per selected cell, one coarse token per other cell."""
    cols, patch = looks.importance.shape[1], looks.patch
    half, place = looks.half, 1.0 + _GAP
    ax.add_patch(Rectangle((0, 0), 1, 1, facecolor=style.INK))
    ax.text(0.5, 0.5, "CLS", color="white", ha="center", va="center", fontsize=7)

    def put(pixels: np.ndarray, x: float, color: str) -> None:
        ax.imshow(pixels, extent=(x, x + 1, 0, 1), vmin=0, vmax=1, interpolation="nearest")
        ax.add_patch(Rectangle((x, 0), 1, 1, fill=False, edgecolor=color, linewidth=1.0))

    for cell in looks.selected:
        row, col = divmod(int(cell), cols)
        for child in range(4):
            put(_token(looks.image, 2 * row + child // 2, 2 * col + child % 2, patch), place, style.CELLS)
            place += 1
        place += _GAP
    remaining = np.flatnonzero(~selected_mask(looks.selected, looks.importance.shape).ravel())
    for cell in remaining:
        row, col = divmod(int(cell), cols)
        put(_token(half, row, col, patch), place, style.MUTED)
        place += 1
    ax.set_xlim(-0.1, place + 0.1)
    ax.set_ylim(-0.15, 1.15)
    ax.set_aspect("equal")
    return 1 + 4 * len(looks.selected) + len(remaining)


def _pictures(figure: Figure, looks: Looks) -> None:
    rows, cols = looks.importance.shape
    patch = looks.patch
    axes = figure.subplots(1, 4)
    axes[0].imshow(looks.image, vmin=0, vmax=1)
    axes[0].set_title("the image", fontsize=10)
    axes[1].imshow(looks.half, vmin=0, vmax=1, interpolation="nearest")
    _grid(axes[1], rows, cols, patch)
    axes[1].set_title(f"1  coarse look: {rows * cols} tokens", fontsize=10)
    axes[2].imshow(looks.importance, cmap=style.HEAT, interpolation="nearest")
    axes[2].set_title("2  importance of each cell", fontsize=10)
    axes[3].imshow(looks.image, vmin=0, vmax=1)
    mask = selected_mask(looks.selected, looks.importance.shape)
    axes[3].add_collection(
        LineCollection(list(outline(mask, 2 * patch)), colors=style.CELLS, linewidths=2.2, capstyle="projecting")
    )
    axes[3].set_title(f"3  the {len(looks.selected)} cells to re-read", fontsize=10)
    for ax in axes:
        style.image_axes(ax)


def draw_looks(looks: Looks, path: str | os.PathLike[str]) -> Path:
    """Writes the picture as a PNG.

    Raises:
        ValueError: The image is not whole cells of the grid.
    """
    rows, cols = looks.importance.shape
    size = (2 * looks.patch * rows, 2 * looks.patch * cols)
    if looks.image.shape[:2] != size:
        raise ValueError(f"image must be {size[0]}x{size[1]} pixels for this grid, got {looks.image.shape[:2]}")
    best, last = int(looks.probabilities.argmax()), int(looks.fine_probabilities.argmax())
    confidence = float(looks.probabilities[best])
    with style.styled():
        figure = style.new_figure(10.0, 6.0)
        top, middle, bottom = np.asarray(figure.subfigures(3, 1, height_ratios=(2.6, 0.9, 1.9)))
        _pictures(top, looks)
        sequence = style.image_axes(middle.subplots())
        length = _sequence(sequence, looks)
        sequence.set_title(
            "4  fine sequence: CLS, four patches of each selected cell, one coarse token of each other: "
            f"{length} tokens",
            fontsize=10,
        )
        first, second = bottom.subplots(1, 2)
        sure = "sure enough: stop here" if confidence >= looks.threshold else "not sure enough: look again"
        _probabilities(
            first,
            looks.probabilities,
            looks.classes,
            style.COARSE,
            f"after the coarse look: {looks.classes[best]} with {confidence:.2f}; {sure}",
        )
        first.axhline(looks.threshold, color=style.INK, linewidth=1, linestyle="--")
        place = len(looks.probabilities) - 0.5, looks.threshold
        first.text(*place, f"η = {looks.threshold:g} ", ha="right", va="bottom")
        title = f"after the fine look: {looks.classes[last]} with {looks.fine_probabilities[last]:.2f}"
        _probabilities(second, looks.fine_probabilities, looks.classes, style.FINE, title)
        return style.save(figure, path)
