"""The report at the end of a training."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambascope.evaluation.both_looks import fit_coarse_weight
from mambascope.evaluation.options import ReportOptions
from mambascope.evaluation.report import write_report
from mambascope.evaluation.sweep import Target
from mambascope.models.two_stage import is_two_stage
from mambascope.models.weights import LOG_DIR, METRICS_NAME, REPORT_DIR


def report_training(
    model: Any, datamodule: Any, run_dir: Path, name: str, options: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Writes the report of a classifier of images on its validation data; a model with two stages gets its threshold,
    and one whose head reads every token (ours, not the paper's) the weight of its coarse answer.

    Args:
        model: The trained model, in evaluation mode on its device.
        datamodule: The data it was trained with.
        run_dir: Folder of the run.
        name: The model's entry.
        options: What the entry was asked for; a threshold among them stays.

    Returns:
        The printed table, and what weights files keep of the report.
    """
    datamodule.trainer = None  # the loaders shall give this process every image
    two_stage = is_two_stage(model)
    calibration = getattr(datamodule, "calibration_dataloader", lambda: None)()
    if two_stage and calibration is not None and model.config.global_pool == "lse" and "coarse_weight" not in options:
        model.coarse_weight = fit_coarse_weight(model, calibration)
    report = write_report(
        model,
        datamodule,
        run_dir / REPORT_DIR,
        ReportOptions(
            class_names=getattr(datamodule, "class_names", None),
            metrics_csv=run_dir / LOG_DIR / METRICS_NAME,
            # on other images the drop differs by a few tenths: aim at none, to stay within half a point
            target=Target("acc_drop", 0.0),
            object_masks=getattr(datamodule, "object_masks", None),
            calibration_loader=calibration,
            mean=getattr(datamodule, "mean", None),
            std=getattr(datamodule, "std", None),
            name=name,
            threshold=options.get("threshold") if two_stage else None,
            published=model.num_classes == 1000,  # the published rows are ImageNet's
            progress=sys.stdout.isatty(),
            print_table=False,
        ),
    )
    if two_stage and report.threshold is not None:
        model.threshold = report.threshold
    return report.table, {key: report.data.get(key) for key in ("threshold", "table", "choice")}
