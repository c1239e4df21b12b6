"""Means and spread over the seeds: one row per method, setting and threshold."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mambascope.compare.lists import FrontierList
from mambascope.compare.timing import Measured
from mambascope.compare.work import Point, Result
from mambascope.evaluation.sweep import sweep
from mambascope.models.cost import CONVENTIONS
from mambascope.utils import atomic_path

ETA_STEPS = 20  # thresholds of a curve in the table: 0, 1/20, 2/20, ..., 1, and those that were timed


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds.

    Attributes:
        values: One per seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean."""
        return statistics.fmean(self.values)

    @property
    def low(self) -> float:
        """Smallest value."""
        return min(self.values)

    @property
    def high(self) -> float:
        """Largest value."""
        return max(self.values)

    @property
    def std(self) -> float:
        """Standard deviation of the seeds (n - 1); 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Row:
    """A method at one setting and threshold.

    Attributes:
        entry, label, setting: The method, its name in the legend, and how it was run.
        threshold: η; ``None`` for a one-stage model.
        seeds: How many.
        images: Evaluation images.
        params: Learned parameters.
        epochs: Epochs of training behind the weights; ``None`` if unknown.
        top1, top5: Accuracy, 0 to 1.
        share_refined: Share of images that the fine stage read; 1 for a one-stage model.
        gflops: Per convention, mean GFLOPs (multiply-adds / 1e9) per image.
        ms: Per batch size, measured milliseconds per image (medians over the rounds).
        ratio: Per batch size, time as a multiple of the baseline's.
    """

    entry: str
    label: str
    setting: str
    threshold: float | None
    seeds: int
    images: int
    params: int
    epochs: int | None
    top1: Spread
    top5: Spread
    share_refined: Spread
    gflops: dict[str, Spread]
    ms: dict[int, Spread] = field(default_factory=dict)
    ratio: dict[int, Spread] = field(default_factory=dict)

    def cells(self, batch_sizes: Sequence[int]) -> dict[str, Any]:
        """The row of the CSV file; empty cells for what does not apply or was not measured."""
        cells: dict[str, Any] = {
            "entry": self.entry,
            "label": self.label,
            "setting": self.setting,
            "threshold": self.threshold,
            "seeds": self.seeds,
            "images": self.images,
            "params": self.params,
            "epochs": self.epochs,
        }
        cells |= {"top1_mean": self.top1.mean, "top1_std": self.top1.std, **_range("top1", self.top1)}
        cells |= {"top5_mean": self.top5.mean, "share_refined_mean": self.share_refined.mean}
        for convention, value in self.gflops.items():
            cells |= {f"gflops_{convention}_mean": value.mean, **_range(f"gflops_{convention}", value)}
        for size in batch_sizes:
            ms, ratio = self.ms.get(size), self.ratio.get(size)
            cells |= {f"ms_batch_{size}_mean": ms.mean if ms else None, **_range(f"ms_batch_{size}", ms)}
            cells[f"ratio_batch_{size}_mean"] = ratio.mean if ratio else None
        return cells


def _range(name: str, value: Spread | None) -> dict[str, float | None]:
    return {f"{name}_min": value.low if value else None, f"{name}_max": value.high if value else None}


def make_rows(plan: FrontierList, results: dict[Point, Result], measured: Sequence[Measured]) -> list[Row]:
    """The rows of all entries, in the order of the list; a MambaScope has one per threshold.

    Raises:
        ValueError: If entries were evaluated on different images.
    """
    _check_same_images(results)
    rows = []
    for name, entry in plan.entries.items():
        for setting in entry.settings:
            own = [(p, r) for p, r in results.items() if (p.entry, p.setting) == (name, setting)]
            grid = [i / ETA_STEPS for i in range(ETA_STEPS + 1)]
            etas = sorted({*grid, *entry.thresholds}) if own[0][1].two_stage else [None]
            rows += [_row(entry.label, own, eta, measured) for eta in etas]
    return rows


def _check_same_images(results: dict[Point, Result]) -> None:
    first, expected = next(iter(results.items()))
    for point, result in results.items():
        if not np.array_equal(result.record.labels, expected.record.labels):
            raise ValueError(
                f"entries must be evaluated on the same images: {first.entry} was on {len(expected.record)}, "
                f"{point.entry} with setting {point.setting.label!r} on {len(result.record)}, or in another order"
            )


def _row(label: str, own: Sequence[tuple[Point, Result]], eta: float | None, measured: Sequence[Measured]) -> Row:
    curves = [sweep(r.record, r.costs, thresholds=[1.0 if eta is None else eta]) for _, r in own]
    point, result = own[0]
    times: dict[int, list[Measured]] = {}
    for row in measured:
        if (row.entry, row.setting, row.threshold) == (point.entry, point.setting.label, eta):
            times.setdefault(row.batch_size, []).append(row)
    return Row(
        entry=point.entry,
        label=label,
        setting=point.setting.label,
        threshold=eta,
        seeds=len(own),
        images=len(result.record),
        params=next(iter(result.costs.values())).params,
        epochs=result.epochs,
        top1=Spread(tuple(float(c.top1[0]) for c in curves)),
        top5=Spread(tuple(float(c.top5[0]) for c in curves)),
        share_refined=Spread(tuple(float(c.share_refined[0]) for c in curves)),
        gflops={name: Spread(tuple(float(c.gflops[name][0]) for c in curves)) for name in CONVENTIONS},
        ms={size: Spread(tuple(row.ms for row in rows)) for size, rows in times.items()},
        ratio={size: Spread(tuple(row.ratio for row in rows)) for size, rows in times.items()},
    )


def write_csv(rows: Sequence[Row], batch_sizes: Sequence[int], path: Path) -> None:
    """Writes the table, under a temporary name first."""
    lines = [row.cells(batch_sizes) for row in rows]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
