"""The tables of a report on a MambaEye as text, and its curves as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mambascope.evaluation.choice import CONFIDENCE
from mambascope.eye.config import MambaEyeConfig
from mambascope.eye.curves import GlimpseCurve, glimpse_macs
from mambascope.eye.measurements import DROP, Measurements


def report_steps(length: int) -> list[int]:
    """Numbers of glimpses that the table shows: powers of four and the last."""
    return sorted({4**i for i in range(1, 12) if 4**i <= length} | {length})


def model_rows(name: str, config: MambaEyeConfig, measured: Measurements) -> list[dict[str, str]]:
    """Accuracy on every canvas after some numbers of glimpses, with early stopping, and of other models."""
    macs = glimpse_macs(config)
    rows = []
    for step in report_steps(measured.options.length):
        row = {"model": f"{name}, {step:,} glimpses", "GFLOPs": f"{step * macs / 1e9:.3g}"}
        for label, curve in measured.curves.items():
            row[label] = f"{100 * curve.top1[step - 1]:.1f} ({100 * curve.mean_coverage[step - 1]:.0f} % seen)"
        rows.append(row)
    if measured.stopping is not None:
        used = measured.stopping["measured"]
        row = {
            "model": f"{name}, stops when sure: {used['mean_glimpses']:.1f} glimpses",
            "GFLOPs": f"{used['mean_glimpses'] * macs / 1e9:.3g}",
        }
        cells = {label: f"{100 * used['top1']:.1f}" if label == measured.size else "" for label in measured.curves}
        rows.append({**row, **cells})
    for peer, tops in measured.peers.items():
        costs = [gflops for _, gflops in tops.values()]
        cells = {label: f"{100 * tops[label][0]:.1f}" if label in tops else "" for label in measured.curves}
        span = f"{min(costs):.3g}-{max(costs):.3g}" if costs else ""
        rows.append({"model": peer, "GFLOPs": span, **cells})
    return rows


def order_rows(measured: Measurements) -> list[dict[str, str]]:
    """Accuracy of each order, and the glimpses after which it is as accurate as the first order at some numbers."""
    name, first = next(iter(measured.orders.items()))
    steps = report_steps(first.options.length)
    rows = []
    for label, curve in measured.orders.items():
        row = {f"order at {measured.size}": label}
        row |= {f"{s} gl.": f"{100 * curve.top1[s - 1]:.1f}" for s in steps}
        for step in steps[1:]:
            need = curve.needed(float(first.top1[step - 1]))
            text = "never" if need is None else str(need)
            if need is not None and measured.costs[label] > 1:
                text += f" ({need * measured.costs[label]:.0f} steps)"
            row[f"as {name} at {step}"] = text
        rows.append(row)
    return rows


def choice_text(stopping: Mapping[str, Any]) -> str:
    """How the stopping threshold was chosen, in one line."""
    used = stopping["criteria"][stopping["measured"]["criterion"]]
    low, high = (100 * v for v in used["drop_interval"])
    where = f"{stopping['images']:,} {stopping['chosen_on']}"
    rule = f"fewest glimpses with top-1 at most {100 * DROP:g} points below all of them; chosen on {where}"
    if not stopping["decided"]:
        rule = f"the usual one stays: {where} are too few to choose, {stopping['images_needed']:,} can"
    text = f"stopping threshold {used['threshold']:g}: {rule}"
    return f"{text}; drop there {low:.2f} to {high:.2f} points ({100 * CONFIDENCE:g} % interval)"


def table_text(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as aligned columns."""
    columns = list(rows[0])
    widths = [max(len(c), *(len(r[c]) for r in rows)) for c in columns]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)])

    return "\n".join([line(columns), "-" * len(line(columns)), *(line([r[c] for c in columns]) for r in rows)])


def report_text(name: str, config: MambaEyeConfig, measured: Measurements) -> tuple[list[dict[str, str]], str]:
    """Rows of the main table, and all that is printed."""
    rows = model_rows(name, config, measured)
    text = table_text(rows)
    if measured.stopping is not None:
        text += "\n" + choice_text(measured.stopping)
    if len(measured.orders) > 1:
        text += "\n\n" + table_text(order_rows(measured))
    return rows, text


def accuracy_csv(config: MambaEyeConfig, measured: Measurements) -> str:
    """Accuracy after every glimpse, of every canvas and order."""
    macs = glimpse_macs(config)
    lines: list[tuple[str, str, GlimpseCurve, float]]
    lines = [(size, measured.options.pattern, curve, 1.0) for size, curve in measured.curves.items()]
    lines += [
        (measured.size, label, curve, measured.costs[label])
        for label, curve in measured.orders.items()
        if curve is not measured.base
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["size", "order", "glimpses", "model_steps", "gflops", "coverage", "top1", "images"])
    for size, label, curve, cost in lines:
        for step in range(1, curve.options.length + 1):
            steps = step * cost
            seen, top1 = curve.mean_coverage[step - 1], curve.top1[step - 1]
            cells = (f"{steps:g}", f"{steps * macs / 1e9:.6g}", f"{seen:.6f}", f"{top1:.6f}")
            writer.writerow([size, label, step, *cells, curve.images])
    return text.getvalue()


def stopping_csv(measured: Measurements) -> str:
    """Early stopping at every threshold of every criterion."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["size", "criterion", "threshold", "mean_glimpses", "top1", "images"])
    for stop in measured.base.stops:
        for k, threshold in enumerate(stop.thresholds):
            numbers = (f"{threshold:g}", f"{stop.mean_glimpses[k]:.4f}", f"{stop.top1[k]:.6f}")
            writer.writerow([measured.size, stop.criterion, *numbers, stop.images])
    return text.getvalue()
