"""Means and spread over the seeds: one row per entry, setting and operating point."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mambascope.compare.lists import Comparison, Entry
from mambascope.compare.results import Result
from mambascope.compare.sources import Point
from mambascope.compare.timing import Measured
from mambascope.evaluation.sweep import StageRecord, sweep
from mambascope.models.cost import CONVENTIONS, StageCost
from mambascope.utils import atomic_path

ETA_STEPS = 20  # thresholds of a curve in the table: 0, 1/20, 2/20, ..., 1, and those that were timed
BUDGETS = (0.25, 0.5, 0.75)
"""Shares of refined images whose cost in the first row of a table all its rows are compared at."""
HONEST = "both_directions"
"""The convention in which costs are equal."""


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

    @property
    def error(self) -> float:
        """Standard error of the mean; 0 for a single seed."""
        return self.std / math.sqrt(len(self.values))


@dataclass(frozen=True)
class Row:
    """An entry at one setting and operating point.

    Attributes:
        entry, label, setting: The method or table, its name in the legend or title, and how it was run.
        point: Operating point: in a table ``coarse``, ``refined`` (every image), ``model`` (at the model's threshold)
            or a share of the cost (:func:`budget_name`); else the threshold; empty for a one-stage model.
        threshold: η; ``None`` for a one-stage model, and where the seeds differ in it.
        seeds: How many.
        images: Evaluation images.
        params: Learned parameters.
        epochs: Epochs of training behind the weights; ``None`` if unknown.
        top1, top5: Accuracy, 0 to 1; NaN where even the coarse stage costs more than the operating point.
        share_refined: Share of images that the fine stage read; 1 for a one-stage model.
        gflops: Per convention, mean GFLOPs (multiply-adds / 1e9) per image.
        ms: Per batch size, measured milliseconds per image (medians over the rounds).
        ratio: Per batch size, time as a multiple of the baseline's.
    """

    entry: str
    label: str
    setting: str
    point: str
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
            "point": self.point,
            "threshold": self.threshold,
            "seeds": self.seeds,
            "images": self.images,
            "params": self.params,
            "epochs": self.epochs,
        }
        cells |= {"top1_mean": self.top1.mean, "top1_std": self.top1.std, **_range("top1", self.top1)}
        cells["top1_seeds"] = " ".join(f"{value:.6g}" for value in self.top1.values)
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


def make_rows(plan: Comparison, results: dict[Point, Result], measured: Sequence[Measured] = ()) -> list[Row]:
    """The rows of all entries, in the order of the list; a MambaScope has one per operating point.

    Raises:
        ValueError: If entries of a comparison of methods were evaluated on different images, or a table has a one-stage
            model.
    """
    _check_same_images({p: r for p, r in results.items() if plan.entries[p.entry].table is None})
    rows = []
    for name, entry in plan.entries.items():
        reference: StageCost | None = None
        for setting in entry.settings:
            parts = [(p, r) for p, r in results.items() if (p.entry, p.setting.label) == (name, setting.label)]
            reference = reference or parts[0][1].costs[HONEST]
            etas = _operating_points(entry, [result for _, result in parts], reference)
            rows += [_row(entry.label, parts, point, values, measured) for point, values in etas.items()]
    return rows


def budget_name(share: float) -> str:
    """The operating point at the cost of a table's first row with that share of images refined."""
    return f"{100 * share:.0f} % cost"


def _operating_points(entry: Entry, results: Sequence[Result], reference: StageCost) -> dict[str, list[float]]:
    """The threshold of every seed at every operating point; NaN where there is none."""
    count = len(results)
    if not results[0].two_stage:
        if entry.table is not None:
            raise ValueError(f"table {entry.label!r} is for two stages; its models have one")
        return {"": [1.0] * count}
    if entry.table is None:
        grid = [i / ETA_STEPS for i in range(ETA_STEPS + 1)]
        return {f"{eta:g}": [eta] * count for eta in sorted({*grid, *entry.thresholds})}
    etas = {"coarse": [0.0] * count, "refined": [1.0] * count, "model": [float(r.threshold or 0.0) for r in results]}
    for share in BUDGETS if entry.table == "gain" else ():
        budget = reference.gflops(share)
        etas[budget_name(share)] = [threshold_at_cost(r.record, r.costs[HONEST], budget) for r in results]
    return etas


def threshold_at_cost(record: StageRecord, cost: StageCost, gflops: float) -> float:
    """The highest η whose mean cost is at most `gflops`; NaN if the coarse stage alone costs more."""
    curve = sweep(record, {cost.convention: cost})
    within = np.flatnonzero(curve.gflops[cost.convention] <= gflops * (1 + 1e-9))
    return float(curve.threshold[within[-1]]) if len(within) else math.nan


def _check_same_images(results: dict[Point, Result]) -> None:
    expected: tuple[Point, Result] | None = None
    for point, result in results.items():
        first, reference = expected = expected or (point, result)
        if not np.array_equal(result.record.labels, reference.record.labels):
            raise ValueError(
                f"entries must be evaluated on the same images: {first.entry} was on {len(reference.record)}, "
                f"{point.entry} with setting {point.setting.label!r} on {len(result.record)}, or in another order"
            )


def _row(
    label: str,
    parts: Sequence[tuple[Point, Result]],
    point: str,
    etas: Sequence[float],
    measured: Sequence[Measured],
) -> Row:
    first, result = parts[0]
    figures = [_figures(r, eta) for (_, r), eta in zip(parts, etas, strict=True)]
    threshold = etas[0] if result.two_stage and len(set(etas)) == 1 else None
    times: dict[int, list[Measured]] = {}
    for row in measured:
        if (row.entry, row.setting, row.threshold) == (first.entry, first.setting.label, threshold):
            times.setdefault(row.batch_size, []).append(row)

    def spread(name: str) -> Spread:
        return Spread(tuple(values[name] for values in figures))

    return Row(
        entry=first.entry,
        label=label,
        setting=first.setting.label,
        point=point,
        threshold=threshold,
        seeds=len(parts),
        images=len(result.record),
        params=next(iter(result.costs.values())).params,
        epochs=result.epochs,
        top1=spread("top1"),
        top5=spread("top5"),
        share_refined=spread("share_refined"),
        gflops={name: spread(f"gflops_{name}") for name in CONVENTIONS},
        ms={size: Spread(tuple(row.ms for row in rows)) for size, rows in times.items()},
        ratio={size: Spread(tuple(row.ratio for row in rows)) for size, rows in times.items()},
    )


def _figures(result: Result, eta: float) -> dict[str, float]:
    if math.isnan(eta):
        return dict.fromkeys(sweep(result.record, result.costs, thresholds=[1.0]).row(0), math.nan)
    return sweep(result.record, result.costs, thresholds=[eta]).row(0)


def write_csv(rows: Sequence[Row], batch_sizes: Sequence[int], path: Path) -> None:
    """Writes the table, under a temporary name first."""
    lines = [row.cells(batch_sizes) for row in rows]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
