"""A MambaScope's curve against the other methods: at equal cost, at equal time and at equal accuracy.

The curve runs over the share of images that are refined; at each share the seeds are averaged. Between the shares that
were timed, time is interpolated linearly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mambascope.compare.results import Result
from mambascope.compare.sources import Point
from mambascope.compare.table import HONEST, Row, Spread
from mambascope.compare.timing import Measured, share_refined
from mambascope.evaluation.sweep import sweep
from mambascope.models.cost import CONVENTIONS

STEPS = 200


@dataclass(frozen=True)
class Curve:
    """A MambaScope over the share of images that it refines.

    Attributes:
        label: Name in the legend.
        share: Shares [S], ascending from 0 to 1.
        top1: Accuracy of every seed [seeds, S], 0 to 1.
        gflops: Per convention, GFLOPs per image [S], mean of the seeds.
        ms: Per batch size, measured milliseconds per image [S], mean of the seeds.
    """

    label: str
    share: np.ndarray
    top1: np.ndarray
    gflops: dict[str, np.ndarray]
    ms: dict[int, np.ndarray]

    @property
    def mean(self) -> np.ndarray:
        """Mean accuracy of the seeds [S]."""
        return self.top1.mean(0)

    def top1_at(self, cost: np.ndarray, value: float) -> np.ndarray | None:
        """Every seed's accuracy [seeds] where the curve's `cost` [S] is `value`, or at its end if that costs less.

        ``None`` if even the coarse stage alone costs more.
        """
        if value < cost[0]:
            return None
        share = float(np.interp(value, np.maximum.accumulate(cost), self.share))
        return np.array([np.interp(share, self.share, line) for line in self.top1])

    def cost_at(self, cost: np.ndarray, top1: float) -> float | None:
        """Smallest `cost` [S] at which the mean accuracy is `top1`; ``None`` if it is nowhere that high."""
        reached = np.flatnonzero(self.mean >= top1)
        if not reached.size:
            return None
        i = int(reached[0])
        if i == 0:
            return float(cost[0])
        return float(np.interp(top1, self.mean[i - 1 : i + 1], cost[i - 1 : i + 1]))


def make_curve(label: str, parts: Sequence[tuple[Point, Result]], measured: Sequence[Measured]) -> Curve:
    """The curve of one setting of a MambaScope.

    Args:
        label: Name in the legend.
        parts: Its results, one per seed.
        measured: Times, also of other entries.
    """
    share = np.linspace(0, 1, STEPS + 1)
    sweeps = [sweep(result.record, result.costs) for _, result in parts]
    times: dict[int, list[np.ndarray]] = {}
    for point, result in parts:
        rows = [r for r in measured if (r.entry, r.setting, r.seed) == (point.entry, point.setting.label, point.seed)]
        for size in dict.fromkeys(r.batch_size for r in rows):
            timed = sorted((share_refined(result, r.threshold or 0.0), r.ms) for r in rows if r.batch_size == size)
            times.setdefault(size, []).append(np.interp(share, *np.array(timed).T))
    gflops = {
        name: np.mean([np.interp(share, curve.share_refined, curve.gflops[name]) for curve in sweeps], axis=0)
        for name in CONVENTIONS
    }
    top1 = np.stack([np.interp(share, curve.share_refined, curve.top1) for curve in sweeps])
    return Curve(label, share, top1, gflops, {size: np.mean(lines, axis=0) for size, lines in times.items()})


@dataclass(frozen=True)
class Comparison:
    """A method's point against the curve; differences are the curve's minus the point's, ratios curve / point.

    Attributes:
        row: The point.
        top1_at_gflops: Difference of top-1 at equal GFLOPs, per seed; ``None`` if the coarse stage alone costs more.
        top1_at_ms: The same at equal measured time, per batch size.
        gflops_at_top1: Ratio of GFLOPs at equal mean accuracy; ``None`` if the curve does not reach it.
        ms_at_top1: The same of measured time, per batch size.
    """

    row: Row
    top1_at_gflops: Spread | None
    top1_at_ms: dict[int, Spread | None]
    gflops_at_top1: float | None
    ms_at_top1: dict[int, float | None]


def compare(curve: Curve, row: Row, convention: str = HONEST) -> Comparison:
    """One point against the curve."""
    gflops, cost = row.gflops[convention].mean, curve.gflops[convention]
    equal = curve.cost_at(cost, row.top1.mean)
    sizes = [size for size in row.ms if size in curve.ms]
    ms_equal = {size: curve.cost_at(curve.ms[size], row.top1.mean) for size in sizes}
    return Comparison(
        row,
        _difference(curve.top1_at(cost, gflops), row),
        {size: _difference(curve.top1_at(curve.ms[size], row.ms[size].mean), row) for size in sizes},
        None if equal is None else equal / gflops,
        {size: None if ms is None else ms / row.ms[size].mean for size, ms in ms_equal.items()},
    )


def _difference(top1: np.ndarray | None, row: Row) -> Spread | None:
    if top1 is None:
        return None
    points = np.array(row.top1.values)
    # the same seeds stand in the same order; weights that have no seeds are one value for all
    return Spread(tuple(float(v) for v in top1 - (points if len(points) == len(top1) else points.mean())))


def text(curve: Curve, comparisons: Sequence[Comparison], convention: str = HONEST) -> str:
    """The comparisons as a table."""
    sizes = list(curve.ms)
    batches = [f"b{size}" for size in sizes]
    head = ["method", "setting", "top-1", "GFLOPs", *(f"ms {b}" for b in batches)]
    head += ["top-1 at GFLOPs", *(f"top-1 at ms {b}" for b in batches)]
    head += ["GFLOPs at top-1", *(f"ms {b} at top-1" for b in batches)]
    lines = [head]
    for c in comparisons:
        spread = f" ± {100 * c.row.top1.std:.1f}" if c.row.seeds > 1 else ""
        setting = c.row.setting if c.row.threshold is None else f"{c.row.setting}, η {c.row.threshold:g}"
        line = [c.row.label, setting, f"{100 * c.row.top1.mean:.1f}{spread}"]
        line += [f"{c.row.gflops[convention].mean:.3g}", *(_ms(c.row, s) for s in sizes)]
        line += [_points(c.top1_at_gflops), *(_points(c.top1_at_ms.get(s)) for s in sizes)]
        line += [_percent(c.gflops_at_top1), *(_percent(c.ms_at_top1.get(s)) for s in sizes)]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    best = f"(its best mean is {100 * curve.mean.max():.1f})"
    note = [
        f"{curve.label} against the others. First the others' own figures: top-1 in per cent with the standard",
        f"deviation of the seeds, GFLOPs of {convention.replace('_', ' ')}, measured ms per image (b: batch size).",
        f"'top-1 at': points that {curve.label} has more at the same cost, mean and [range] of the seeds; 'cheaper':",
        f"its coarse stage alone costs more. 'at top-1': what {curve.label} costs more (+) or less (-) at the same",
        f"mean top-1; 'not reached': it is nowhere that accurate {best}.",
    ]
    return "\n".join([*note, "", rows[0], "-" * max(map(len, rows)), *rows[1:]])


def _ms(row: Row, size: int) -> str:
    return f"{row.ms[size].mean:.3g}" if size in row.ms else ""


def _points(value: Spread | None) -> str:
    if value is None:
        return "cheaper"
    spread = f" [{100 * value.low:+.1f}, {100 * value.high:+.1f}]" if len(value.values) > 1 else ""
    return f"{100 * value.mean:+.1f}{spread}"


def _percent(ratio: float | None) -> str:
    return "not reached" if ratio is None else f"{100 * (ratio - 1):+.0f} %"
