"""The files of a comparison: table, picture, texts, and facts about the machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambascope.compare.curves import Curve, compare, make_curve, text
from mambascope.compare.lists import Comparison
from mambascope.compare.results import Result
from mambascope.compare.sources import Point
from mambascope.compare.table import HONEST, Row, Spread, make_rows, write_csv
from mambascope.compare.timing import Measured
from mambascope.compare.verdicts import markdown
from mambascope.evaluation.published import IMAGENET_ROWS
from mambascope.plotting.methods import Method, plot_methods
from mambascope.plotting.published import PublishedPoint
from mambascope.utils import atomic_path

CSV_NAME, PLOT_NAME, FACTS_NAME = "comparison.csv", "comparison.png", "comparison.json"
TEXT_NAME, TABLES_NAME = "comparison.txt", "tables.md"

INTRODUCTION = """# {title}

Written by `tools/compare.py`. Published figures belong to the paper's data and models, and are *published, not
reproduced here*: only which choice is best can be compared. Top-1 in per cent. "Refined" is with every image refined,
"at η" at the model's threshold. GFLOPs are multiply-adds / 1e9 of both stages, both scan directions counted.
"Sets of images": the rows are one model with another config, not trained anew, and every set has other images.
"Trainings": every row and seed is a training of its own. "At 50 % cost" is top-1 at the threshold where a row's mean
GFLOPs equal those of the first row with half of the images refined; no label takes part in that choice.

"""


def write_report(
    plan: Comparison,
    results: dict[Point, Result],
    measured: Sequence[Measured],
    facts: dict[str, Any],
    out: Path,
    whole: Comparison | None = None,
) -> list[Path]:
    """Writes the files that the list asks for, and prints its texts.

    Args:
        plan: What was evaluated.
        results: Of all its points.
        measured: Times; empty where nothing was timed.
        facts: About the machine and how it was measured.
        out: Folder to write to.
        whole: The list with all its rows; by default `plan`.

    Returns:
        The files.

    Raises:
        ValueError: If the points cannot be compared.
    """
    rows = make_rows(plan, results, measured)
    write_csv(rows, plan.timing.batch_sizes if measured else (), out / CSV_NAME)
    _write(out / FACTS_NAME, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    files = [out / CSV_NAME]
    if any(entry.table is not None for entry in plan.entries.values()):
        tables = markdown(whole or plan, rows)
        _write(out / TABLES_NAME, INTRODUCTION.format(title=plan.title) + tables)
        print(f"\n{tables}")
        files.append(out / TABLES_NAME)
    if not measured:
        return files
    curves = _curves(plan, results, measured)
    _plot(plan, rows, curves, out / PLOT_NAME)
    files.append(out / PLOT_NAME)
    if plan.curve is not None:
        if plan.curve not in curves:
            raise ValueError(f"curve must be an entry with a MambaScope, got {plan.curve!r}, a one-stage model")
        rest = [row for row in rows if row.entry != plan.curve and row.ms]
        lines = text(curves[plan.curve], [compare(curves[plan.curve], row) for row in rest])
        _write(out / TEXT_NAME, lines + "\n")
        print(f"\n{lines}\n")
    return files


def _write(path: Path, content: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def _curves(plan: Comparison, results: dict[Point, Result], measured: Sequence[Measured]) -> dict[str, Curve]:
    """The curve of every MambaScope by its entry, at its first setting."""
    curves = {}
    for name, entry in plan.entries.items():
        parts = [(p, r) for p, r in results.items() if p.entry == name and p.setting == entry.settings[0]]
        if parts and parts[0][1].two_stage:
            curves[name] = make_curve(entry.label, parts, measured)
    return curves


def _plot(plan: Comparison, rows: Sequence[Row], curves: dict[str, Curve], path: Path) -> None:
    convention = "one_direction" if plan.published else HONEST
    sizes = plan.timing.batch_sizes
    panels = {convention: ("computation", f"GFLOPs per image ({convention.replace('_', ' ')})")}
    panels |= {str(s): (f"measured time, batch {s}", "ms per image") for s in sizes}
    methods = []
    for name, entry in plan.entries.items():
        # of a curve, the thresholds that were timed are marked
        points = [r for r in rows if r.entry == name and r.ms]
        if not points:
            continue
        curve = curves.get(name)
        cost = {convention: _ranges([r.gflops[convention] for r in points])}
        cost |= {str(s): _ranges([r.ms[s] for r in points]) for s in sizes}
        curve_cost = {}
        if curve is not None:
            curve_cost = {convention: curve.gflops[convention], **{str(size): ms for size, ms in curve.ms.items()}}
        methods.append(
            Method(
                entry.label,
                _ranges([r.top1 for r in points]),
                cost,
                None if curve is None else np.stack([curve.mean, curve.top1.min(0), curve.top1.max(0)], axis=1),
                curve_cost,
                reference=name == plan.baseline,
            )
        )
    models = [row for row in IMAGENET_ROWS if row.size in plan.published]
    published = [PublishedPoint(row.label, row.top1, row.gflops) for row in models]
    count = len(plan.seeds)
    title = f"{plan.title} ({count} {'seed' if count == 1 else 'seeds'})"
    plot_methods(methods, panels, path, published=published, title=title)


def _ranges(values: Sequence[Spread]) -> np.ndarray:
    """Mean, smallest and largest value of each [P, 3]."""
    return np.array([(value.mean, value.low, value.high) for value in values])
