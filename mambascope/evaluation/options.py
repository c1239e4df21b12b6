"""What is asked of a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mambascope.evaluation.sweep import Target
from mambascope.utils import check_positive


@dataclass(frozen=True)
class ReportOptions:
    """What :func:`mambascope.evaluation.report.write_report` does beside evaluating a model on its data.

    Attributes:
        name: Of the model; default: its registered name, else that of its class.
        class_names: Names of the classes for the figures; default: the model's, else numbers.
        mean, std: Normalisation of the images, to show them; default: the model's.
        metrics_csv: Lightning's CSV log, for the training curves.
        object_masks: From places among the evaluated images to the pixels [K, H, W] of their objects, bool, for the
            quality of the selection; ``None`` where nobody knows them.
        calibration_loader: Data on which η is chosen; default: the evaluation data.
        threshold: Use this η instead of choosing one.
        target: What η is chosen for; with too few images to decide it the model's own stays.
        measure_thresholds: More η whose time is measured.
        batch_sizes: Images per call of the timings; the first one is that of the printed table's first column.
        timing_images: Images to time (at least 1), sampled so that their confidences are spread like those of all;
            small batches are timed on a quarter of them.
        rounds: Timed rounds, at most.
        max_seconds: Rough limit for the timing of each batch size.
        published: Whether the figure of the trade-off carries the published ImageNet rows of this size, marked as such.
        figures: Whether to draw figures.
        seed: Of the sample of images.
        progress: Whether to show progress bars.
        print_table: Whether to print the table.

    Raises:
        ValueError: An option out of range.
    """

    name: str | None = None
    class_names: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    metrics_csv: str | os.PathLike[str] | None = None
    object_masks: Callable[[Sequence[int]], Any] | None = None
    calibration_loader: Iterable[Any] | None = None
    threshold: float | None = None
    target: Target = Target()  # noqa: RUF009 (frozen)
    measure_thresholds: Sequence[float] = ()
    batch_sizes: Sequence[int] = (64, 1)
    timing_images: int = 384
    rounds: int = 7
    max_seconds: float = 20.0
    published: bool = False
    figures: bool = True
    seed: int = 0
    progress: bool = True
    print_table: bool = True

    def __post_init__(self) -> None:
        check_positive("timing_images", self.timing_images)
