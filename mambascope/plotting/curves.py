"""Training curves from the CSV file that Lightning's CSVLogger writes."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from mambascope.plotting import style

_COLOURS = {"coarse": style.COARSE, "fine": style.FINE, "dynamic": style.DYNAMIC}
# panel title -> (words a column's last part may contain, words it must not contain, factor, axis label)
_PANELS: dict[str, tuple[tuple[str, ...], tuple[str, ...], float, str]] = {
    "loss": (("loss", "_ce", "_kl"), (), 1.0, "loss"),
    "top-1": (("top1", "acc"), ("top5",), 100.0, "top-1 accuracy (%)"),
    "images refined": (("share_refined",), (), 100.0, "share refined (%)"),
    "learning rate": (("lr",), (), 1.0, "learning rate"),
}


def read_metrics(path: str | os.PathLike[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads ``metrics.csv``: for every column its steps and values, without the gaps.

    Raises:
        ValueError: The file is missing or has no ``step`` column.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"metrics file {path} does not exist")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and "step" not in rows[0]:
        raise ValueError(f"metrics file {path} has no column 'step'; it has {', '.join(rows[0])}")
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, text in row.items():
            if name in (None, "", "step") or not isinstance(text, str) or not text or not row["step"]:
                continue
            try:
                value = float(text)
            except ValueError:
                continue
            if math.isfinite(value):
                steps, values = series.setdefault(name, ([], []))
                steps.append(float(row["step"]))
                values.append(value)
    return {name: (np.array(s), np.array(v)) for name, (s, v) in series.items()}


def plot_training_curves(
    metrics: str | os.PathLike[str] | Mapping[str, tuple[np.ndarray, np.ndarray]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
) -> Path | None:
    """Draws losses, accuracies, share refined and learning rate over the steps; ``None`` if the log holds none of them.

    Args:
        metrics: Lightning's ``metrics.csv``, or what :func:`read_metrics` gave.
        path: PNG to write.
        title: Of the whole figure.
    """
    series = metrics if isinstance(metrics, Mapping) else read_metrics(metrics)
    panels = {}
    for panel, (words, without, factor, label) in _PANELS.items():
        names = [n for n in series if _belongs(n, words, without)]
        if names:
            panels[panel] = (_unique(names), factor, label)
    if not panels:
        return None
    with style.styled():
        figure = style.new_figure(3.6 * len(panels) + 0.4, 3.4)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (panel, (names, factor, label)) in zip(axes, panels.items(), strict=True):
            for name in names:
                _line(ax, name, *series[name], factor, only=len(names) == 1)
            ax.set_title(panel)
            ax.set_xlabel("step")
            ax.set_ylabel(label)
            if len(names) > 1:
                ax.legend(fontsize=7.5)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return style.save(figure, path)


def _belongs(name: str, words: Sequence[str], without: Sequence[str]) -> bool:
    last = name.lower().rsplit("/", 1)[-1]
    if words == ("lr",):
        return last.startswith("lr") or name.lower().startswith("lr")
    return any(w in last for w in words) and not any(w in last for w in without)


def _unique(names: Sequence[str]) -> list[str]:
    """Lightning writes a metric that is logged per step and per epoch three times: keep the finest."""
    kept = [n for n in names if not (n.endswith("_epoch") and f"{n.removesuffix('_epoch')}_step" in names)]
    return [n for n in kept if f"{n}_step" not in kept]


def _line(ax: Axes, name: str, steps: np.ndarray, values: np.ndarray, factor: float, *, only: bool) -> None:
    stage = next((s for s in _COLOURS if s in name.lower()), None)
    training = name.lower().startswith("train")
    colour = _COLOURS[stage] if stage else style.INK
    shown = values * factor
    # every step of a training loss is noise; its running mean is the curve
    if training and len(values) > 50:
        window = max(5, len(values) // 40)
        ax.plot(steps, shown, color=colour, lw=0.5, alpha=0.18)
        kernel = np.ones(window) / window
        steps, shown = steps[window - 1 :], np.convolve(shown, kernel, mode="valid")
    label = name.removesuffix("_step").replace("_", " ")
    ax.plot(
        steps,
        shown,
        color=style.DYNAMIC if only else colour,
        lw=1.4 if training else 2.0,
        ls="--" if name.endswith(("_kl", "_kl_step")) else "-",  # beside the coarse stage's cross entropy
        marker="" if len(values) > 30 or training else "o",
        ms=4,
        label=label,
    )
