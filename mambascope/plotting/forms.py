"""Time per image of models in several forms."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mambascope.plotting import style


def _label(ms: float) -> str:
    if ms != ms:  # not timed
        return ""
    return f" {ms:.0f}" if ms >= 100 else f" {ms:.3g}"


def plot_forms(
    times: Mapping[int, Mapping[str, Mapping[str, float]]], path: str | os.PathLike[str], title: str
) -> Path:
    """Bars of milliseconds per image, one panel per batch size.

    Args:
        times: By batch size, by form, by model with the share refined: milliseconds per image.
        path: Picture file.
        title: Above all panels.
    """
    forms = list(dict.fromkeys(form for by_form in times.values() for form in by_form))
    models = list(dict.fromkeys(m for by_form in times.values() for by_model in by_form.values() for m in by_model))
    colours: Sequence[str] = [style.COARSE, style.FINE, style.DYNAMIC, "#8a6bbf", "#b58900", "#7f5a3c", style.MUTED]
    height = 0.32 * len(models) * max(1, len(forms)) / 2 + 1.6
    with style.styled():
        figure = style.new_figure(4.2 * len(times) + 1.5, max(3.2, height))
        axes = figure.subplots(1, len(times), sharey=True, squeeze=False)[0]
        places = np.arange(len(models))
        for axis, (batch, by_form) in zip(axes, times.items(), strict=True):
            for i, form in enumerate(forms):
                values = [by_form.get(form, {}).get(model, np.nan) for model in models]
                step = 0.8 / len(forms)
                bars = axis.barh(places + (i + 0.5) * step - 0.4, values, step, label=form, color=colours[i % 7])
                axis.bar_label(bars, [_label(v) for v in values], fontsize=7)
            axis.set(title=f"batch {batch}", xlabel="ms per image", yticks=places)
            axis.set_yticklabels(models)
            axis.grid(visible=False, axis="y")
            axis.margins(x=0.15)
        axes[0].invert_yaxis()
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(forms))
        return style.save(figure, path)
