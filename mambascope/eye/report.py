"""The report on a MambaEye: accuracy against glimpses, image size, scan pattern and choice, beside other models."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mambascope.eye.curves import GlimpseCurve, Pictures, glimpse_macs
from mambascope.eye.dataset import GlimpseOptions
from mambascope.eye.measurements import Measurements, ReportOptions, measure
from mambascope.eye.model import MambaEye
from mambascope.eye.tables import accuracy_csv, report_steps, report_text, stopping_csv
from mambascope.models.vim import VisionMamba
from mambascope.models.weights import REPORT_DATA, REPORT_DIR
from mambascope.utils import atomic_path


@dataclass
class EyeReport:
    """A written report.

    Attributes:
        directory: Where its files are.
        table: The printed table.
        rows: The same as rows of text, for a model card.
        data: Everything in ``report.json``.
        curves: By size label.
    """

    directory: Path
    table: str
    rows: list[dict[str, str]]
    data: dict[str, Any]
    curves: dict[str, GlimpseCurve] = field(default_factory=dict)


def write_eye_report(
    model: MambaEye,
    pictures: Pictures,
    directory: str | os.PathLike[str],
    options: GlimpseOptions,
    report: ReportOptions | None = None,
    *,
    calibration: Pictures | None = None,
    vims: Mapping[str, VisionMamba] | None = None,
    name: str | None = None,
) -> EyeReport:
    """Measures, and writes ``report.json``, ``accuracy.csv``, ``early_stop.csv``, ``table.txt`` and ``accuracy.png``.

    Args:
        model: The model.
        pictures: Labelled images.
        directory: Where to write.
        options: Glimpses, scan pattern and canvas; the patch size is the model's.
        report: What is measured; ``None`` for the canvas of `options`, with early stopping.
        calibration: Images to choose the stopping threshold on.
        vims: Other models, by name, evaluated on the same images at the same sizes.
        name: What to call the model.

    Raises:
        ValueError: If an option does not have an accepted value, or there is no image.
    """
    report = report or ReportOptions()
    directory = Path(directory)
    name = name or model.description.get("model") or "MambaEye"
    measured = measure(model, pictures, options, report, calibration=calibration, vims=vims)
    rows, table = report_text(name, model.config, measured)
    data = _data(name, model, measured, report.seed)
    directory.mkdir(parents=True, exist_ok=True)
    _file(directory / REPORT_DATA, json.dumps(data, indent=2) + "\n")
    _file(directory / "table.txt", table + "\n")
    _file(directory / "accuracy.csv", accuracy_csv(model.config, measured))
    if measured.base.stops:
        _file(directory / "early_stop.csv", stopping_csv(measured))
    if report.figures:
        from mambascope.eye.plots import plot_glimpse_curves

        plot_glimpse_curves(
            measured.curves,
            directory / "accuracy.png",
            peers={peer: {size: top1 for size, (top1, _) in tops.items()} for peer, tops in measured.peers.items()},
            stopping=measured.base if measured.stopping is not None else None,
            orders=measured.orders if len(measured.orders) > 1 else None,
            title=f"{name}, {measured.base.images:,} images",
        )
    return EyeReport(directory, table, rows, data, measured.curves)


def _data(name: str, model: MambaEye, measured: Measurements, seed: int) -> dict[str, Any]:
    data: dict[str, Any] = {
        "model": name,
        "images": measured.base.images,
        "options": asdict(measured.options),
        "seed": seed,
        "glimpse_macs": glimpse_macs(model.config),
        "sizes": {label: _curve_data(curve) for label, curve in measured.curves.items()},
        "orders": {
            label: {**_curve_data(curve), "cost": measured.costs[label]} for label, curve in measured.orders.items()
        },
        "others": {
            peer: {size: {"top1": top1, "gflops_both_directions": gflops} for size, (top1, gflops) in tops.items()}
            for peer, tops in measured.peers.items()
        },
    }
    return data if measured.stopping is None else {**data, "stopping": measured.stopping}


def _curve_data(curve: GlimpseCurve) -> dict[str, Any]:
    steps = report_steps(curve.options.length)
    return {
        "top1": {str(step): round(float(curve.top1[step - 1]), 6) for step in steps},
        "coverage": {str(step): round(float(curve.mean_coverage[step - 1]), 6) for step in steps},
        "best": {"glimpses": int(curve.top1.argmax()) + 1, "top1": round(float(curve.top1.max()), 6)},
    }


def _file(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def report_training(
    model: MambaEye, datamodule: Any, run_dir: Path, name: str, options: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The report at the end of a training: accuracy against the number of glimpses, on the validation images.

    Args:
        model: The trained model, in evaluation mode on its device.
        datamodule: The data it was trained with.
        run_dir: Folder of the run.
        name: The model's entry.
        options: What the entry was asked for; not used.

    Returns:
        The printed table, and what weights files keep of the report.
    """
    del options
    report = write_eye_report(
        model,
        datamodule.val_images(),
        run_dir / REPORT_DIR,
        datamodule.glimpses,
        ReportOptions(progress=sys.stdout.isatty()),
        name=name,
    )
    return report.table, {"table": report.rows}
