"""Which images left after the coarse look and which were read again (the paper's Figure 8)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from mambascope.plotting import style
from mambascope.plotting.heatmaps import Example


@dataclass(frozen=True)
class Answers:
    """Both stages' answers on N images.

    Attributes:
        confidence: Of the coarse stage [N], 0 to 1.
        coarse_correct, fine_correct: Whether each stage is right [N] bool.
    """

    confidence: np.ndarray
    coarse_correct: np.ndarray
    fine_correct: np.ndarray


def plot_exits(
    answers: Answers,
    examples: Sequence[Example],
    threshold: float,
    path: str | os.PathLike[str],
    *,
    per_stage: int = 12,
    title: str = "",
) -> Path:
    """Draws example images per stage, and the coarse confidences of all images around the threshold.

    Args:
        answers: Of both stages on all images.
        examples: Images with the stage in which they ended.
        threshold: η; ``<= 0`` exits all, ``>= 1`` refines all.
        path: PNG to write.
        per_stage: Most images shown per stage.
        title: Of the whole figure.
    """
    exited = answers.confidence >= threshold if threshold < 1 else np.zeros(len(answers.confidence), dtype=bool)
    exited |= threshold <= 0
    with style.styled():
        figure = style.new_figure(10.8, 5.2)
        pictures, numbers = figure.subfigures(1, 2, squeeze=False, width_ratios=[2.1, 1])[0]
        upper, lower = pictures.subfigures(2, 1, squeeze=False)[:, 0]
        left = _heading("left after the coarse look", exited, answers.coarse_correct)
        again = _heading("read again", ~exited, answers.fine_correct)
        _stage(upper, [e for e in examples if e.exited], per_stage, left, style.COARSE)
        _stage(lower, [e for e in examples if not e.exited], per_stage, again, style.FINE)
        _histogram(numbers.subplots(), answers, threshold)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return style.save(figure, path)


def _heading(label: str, members: np.ndarray, correct: np.ndarray) -> str:
    share = f"{label}: {100 * members.mean():.0f} % of the images"
    return share + (f", {100 * correct[members].mean():.1f} % of them right" if members.any() else "")


def _stage(part: SubFigure, examples: Sequence[Example], most: int, heading: str, color: str) -> None:
    """A block of images with answer and coarse confidence; wrong answers are framed."""
    part.suptitle(heading, x=0.01, ha="left", fontsize=10.5, color=color)
    columns = max(1, most // 2)
    axes = part.subplots(2, columns, squeeze=False).ravel()
    # spread over the confidences: the surest first
    ranked = sorted(examples, key=lambda e: -e.confidence)
    if len(ranked) > len(axes):
        ranked = [ranked[i] for i in np.linspace(0, len(ranked) - 1, len(axes)).round().astype(int)]
    for ax, example in zip(axes, ranked, strict=False):
        ax.imshow(example.image, vmin=0, vmax=1)
        wrong = example.correct is False
        text = f"{example.predicted} ({example.confidence:.2f})" + (f", true {example.true}" if wrong else "")
        ax.set_xlabel(text, fontsize=7.5, color=style.WRONG if wrong else style.INK, labelpad=2)
    for ax in axes:
        style.image_axes(ax)
    for ax, example in zip(axes, ranked, strict=False):
        if example.correct is False:
            for spine in ax.spines.values():
                spine.set(visible=True, color=style.WRONG, linewidth=2)


def _histogram(ax: Axes, answers: Answers, threshold: float) -> None:
    bins = np.linspace(0, 1, 26)
    right = answers.coarse_correct
    ax.hist(
        [answers.confidence[right], answers.confidence[~right]],
        bins=list(bins),
        stacked=True,
        color=[style.RIGHT, style.WRONG],
        label=["coarse right", "coarse wrong"],
        rwidth=0.92,
    )
    ax.axvline(min(max(threshold, 0), 1), color=style.INK, lw=1.5, ls="--", label=f"η = {threshold:.3f}")
    ax.set_xlim(0, 1)
    ax.set_title("coarse confidence of all images", fontsize=10.5)
    ax.set_xlabel("confidence of the coarse stage")
    ax.set_ylabel("images")
    ax.legend(loc="upper center", frameon=True, facecolor="white", edgecolor="none", framealpha=0.9)
