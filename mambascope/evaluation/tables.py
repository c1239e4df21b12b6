"""The numbers of a report as text: the printed table, rows for a model card, CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from mambascope.evaluation.sweep import SweepCurve
from mambascope.evaluation.throughput import Timing
from mambascope.models.cost import CONVENTIONS, format_gflops

CURVE_POINTS = 201  # thresholds in the files; the choice is made on all


def savings(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What the dynamic result saves against refining every image, as a share of the latter (0 to 1)."""
    full, dynamic = results["refine_all"], results["dynamic"]
    keys = [k for k in full if k.startswith(("gflops_", "ms_"))]
    return {**{k: 1 - dynamic[k] / full[k] for k in keys}, "top1_drop": full["top1"] - dynamic["top1"]}


def curve_rows(curve: SweepCurve) -> list[dict[str, Any]]:
    """The sweep at up to :data:`CURVE_POINTS` thresholds, for JSON."""
    thin = curve.thinned(CURVE_POINTS)
    rows = (thin.row(i) for i in range(len(thin)))
    return [{key: None if value != value else round(value, 6) for key, value in row.items()} for row in rows]


def curve_csv(curve: SweepCurve) -> str:
    """The sweep at up to :data:`CURVE_POINTS` thresholds, as CSV."""
    thin = curve.thinned(CURVE_POINTS)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(thin.row(0)), lineterminator="\n")
    writer.writeheader()
    for i in range(len(thin)):
        writer.writerow({k: "" if v != v else f"{v:.6g}" for k, v in thin.row(i).items()})
    return text.getvalue()


def timings_csv(timings: Sequence[Timing], top1: Sequence[float]) -> str:
    """Measured times with the accuracy of each mode, as CSV."""
    text = io.StringIO()
    rows = [{**t.to_dict(), "top1": y} for t, y in zip(timings, top1, strict=True)]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


def mode_labels(eta: float) -> dict[str, str]:
    """How the three ways to run the model are called."""
    return {"coarse": "coarse only", "refine_all": "refine everything", "dynamic": f"dynamic, η = {eta:.3f}"}


def card_rows(results: dict[str, dict[str, Any]], eta: float) -> list[dict[str, str]]:
    """The table as rows of text, for a model card."""
    rows = []
    for mode, label in mode_labels(eta).items():
        r = results[mode]
        row = {"mode": label, "top-1": f"{100 * r['top1']:.2f} %", "refined": f"{100 * r['share_refined']:.0f} %"}
        row |= {f"GFLOPs ({c.replace('_', ' ')})": format_gflops(1e9 * r[f"gflops_{c}"]) for c in CONVENTIONS}
        row |= {f"ms/image (batch {k.rsplit('_', 1)[1]})": f"{v:.3f}" for k, v in r.items() if k.startswith("ms_")}
        rows.append(row)
    return rows


def results_table(results: dict[str, dict[str, Any]], eta: float) -> str:
    """The printed table: the three ways to run the model, and what the dynamic one saves."""
    rows = card_rows(results, eta)
    saved = savings(results)
    last = {"mode": "saved by dynamic", "top-1": f"{-100 * saved['top1_drop']:+.2f} pts", "refined": ""}
    last |= {f"GFLOPs ({c.replace('_', ' ')})": f"{100 * saved[f'gflops_{c}']:.1f} %" for c in CONVENTIONS}
    last |= {f"ms/image (batch {k.rsplit('_', 1)[1]})": f"{100 * v:.1f} %" for k, v in saved.items() if k[:3] == "ms_"}
    columns = list(rows[0])
    widths = {c: max(len(c), *(len(r[c]) for r in [*rows, last])) for c in columns}

    def line(cells: dict[str, str]) -> str:
        first, *others = columns
        return "  ".join([cells[first].ljust(widths[first]), *(cells[c].rjust(widths[c]) for c in others)])

    rule = "-" * len(line(last))
    return "\n".join([line({c: c for c in columns}), rule, *map(line, rows), rule, line(last)])
