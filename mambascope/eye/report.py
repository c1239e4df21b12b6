"""The report on a MambaEye: accuracy against glimpses, image size, scan pattern and choice, beside other models.

Choice of the stopping threshold: of all that keep top-1 within half a point of reading every glimpse, the one that
reads the fewest. It is made on calibration images if there are any, otherwise on the evaluated ones; the report says
which. Too few images to decide leave the usual threshold (:mod:`mambascope.evaluation.choice`).
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mambascope.evaluation.choice import CONFIDENCE, binomial_interval, images_for_drop
from mambascope.eye.choice import make_chooser
from mambascope.eye.curves import (
    GlimpseCurve,
    Pictures,
    StopOptions,
    batches,
    evaluate_glimpses,
    evaluate_stopping,
    glimpse_macs,
)
from mambascope.eye.dataset import GlimpseOptions
from mambascope.eye.model import MambaEye
from mambascope.models.cost import stage_macs
from mambascope.models.scope import MambaScope
from mambascope.models.vim import VisionMamba
from mambascope.models.weights import REPORT_DIR
from mambascope.utils import atomic_path, evaluating, model_device

DROP = 0.005  # accuracy that early stopping may cost
USUAL_THRESHOLD = 0.8  # where nothing decides


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


def report_steps(length: int) -> list[int]:
    """Numbers of glimpses that the table shows: powers of four and the last."""
    return sorted({4**i for i in range(1, 12) if 4**i <= length} | {length})


def size_label(size: int | tuple[int, int] | None) -> str:
    """How a canvas is called."""
    if size is None:
        return "native"
    return f"{size}²" if isinstance(size, int) else f"{size[0]}x{size[1]}"


def vim_accuracy(
    model: VisionMamba,
    pictures: Pictures,
    size: int,
    *,
    batch_size: int = 64,
    limit: int | None = None,
) -> tuple[float, float]:
    """Accuracy (0 to 1) and GFLOPs per image of a Vim or MambaScope at an image size; its position tables follow."""
    from mambascope.models.preprocessing import make_transform

    model.set_input_size((size, size))
    transform, device = make_transform(model), model_device(model)
    hits = count = refined = 0
    with evaluating(model):
        for _, images, labels in batches(pictures, batch_size, limit):
            x = torch.stack([transform(image) for image in images]).to(device)
            if isinstance(model, MambaScope):
                output = model.forward_scope(x)
                logits = output.logits
                refined += int((~output.exited).sum())
            else:
                logits = model(x)
                refined += len(images)
            hits += int((logits.argmax(1).cpu() == labels).sum())
            count += len(images)
    cost = stage_macs(model.config, (size, size), convention="both_directions")
    return hits / count, cost.gflops(refined / count)


def write_eye_report(
    model: MambaEye,
    pictures: Pictures,
    directory: str | os.PathLike[str],
    *,
    options: GlimpseOptions,
    sizes: Sequence[int | tuple[int, int] | None] | None = None,
    patterns: Sequence[str] = (),
    choices: Sequence[str] = (),
    sharpness: float = 2.0,
    stop: StopOptions | None = StopOptions(),  # noqa: B008 (frozen)
    calibration: Pictures | None = None,
    vims: Mapping[str, VisionMamba] | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    chunk: int = 128,
    seed: int = 0,
    name: str | None = None,
    figures: bool = True,
    progress: bool = False,
) -> EyeReport:
    """Measures, and writes ``report.json``, ``accuracy.csv``, ``early_stop.csv``, ``table.txt`` and ``accuracy.png``.

    Args:
        model: The model.
        pictures: Labelled images.
        directory: Where to write.
        options: Glimpses, scan pattern and canvas; the patch size is the model's.
        sizes: Canvas sides to evaluate; ``None`` for the options' alone. The first equal to the options' canvas (else
            the first) also gets early stopping, patterns and choices.
        patterns: Further scan patterns.
        choices: Ways to choose glimpses; see :func:`mambascope.eye.choice.make_chooser`.
        sharpness: Of the choices.
        stop: Early stopping; ``None`` for none.
        calibration: Images to choose the stopping threshold on.
        vims: Other models, by name, evaluated on the same images at the same sizes.
        limit: Most images.
        batch_size: Images per pass.
        chunk: Glimpses whose logits exist at once.
        seed: Of the positions.
        name: What to call the model.
        figures: Whether to draw.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If an option does not have an accepted value, or there is no image.
    """
    directory = Path(directory)
    name = name or model.description.get("model") or "MambaEye"
    wanted = list(dict.fromkeys(sizes if sizes is not None else [options.canvas_size]))
    main = options.canvas_size if options.canvas_size in wanted else wanted[0]

    def bar(text: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        count = -(-min(len(pictures), limit or len(pictures)) // max(1, batch_size))
        return lambda parts: tqdm(parts, desc=text, total=count, leave=False, disable=not progress)

    def run(text: str, given: GlimpseOptions, **more: Any) -> tuple[GlimpseCurve, float]:
        start = time.perf_counter()
        curve = evaluate_glimpses(
            model,
            pictures,
            given,
            seed=seed,
            batch_size=batch_size,
            chunk=chunk,
            limit=limit,
            progress=bar(text),
            **more,
        )
        return curve, time.perf_counter() - start

    curves: dict[str, GlimpseCurve] = {}
    entries: list[dict[str, Any]] = []
    for size in wanted:
        given = replace(options, canvas_size=size)
        curve, seconds = run(size_label(size), given, stop=stop if size == main else None)
        curves[size_label(size)] = curve
        entries.append({"size": size_label(size), "order": given.pattern, "cost": 1.0, "seconds": seconds})
    given = replace(options, canvas_size=main)
    base = curves[size_label(main)]
    orders: dict[str, GlimpseCurve] = {given.pattern: base}
    costs: dict[str, float] = {given.pattern: 1.0}
    for pattern in patterns:
        if pattern not in orders:
            orders[pattern], _ = run(pattern, replace(given, pattern=pattern))
            costs[pattern] = 1.0
    for choice in choices:
        chooser = make_chooser(choice, model, given.length, sharpness)
        orders[choice], _ = run(choice, given, chooser=chooser)
        costs[choice] = chooser.cost

    others: dict[str, dict[str, tuple[float, float]]] = {}
    for other, vim in (vims or {}).items():
        trained = vim.config.image_hw
        others[other] = {
            size_label(s): vim_accuracy(vim, pictures, s, batch_size=batch_size, limit=limit)
            for s in wanted
            if isinstance(s, int)
        }
        vim.set_input_size(trained)

    data: dict[str, Any] = {
        "model": name,
        "images": base.images,
        "options": asdict(given),
        "seed": seed,
        "glimpse_macs": glimpse_macs(model.config),
        "sizes": {label: _curve_data(curve) for label, curve in curves.items()},
        "orders": {label: {**_curve_data(c), "cost": costs[label]} for label, c in orders.items()},
        "others": {
            n: {s: {"top1": t, "gflops_both_directions": g} for s, (t, g) in tops.items()} for n, tops in others.items()
        },
    }
    if stop is not None:
        data["stopping"] = _stopping(
            model, pictures, given, base, stop, calibration, batch_size=batch_size, limit=limit, seed=seed
        )
    rows = _rows(name, model, curves, others, data.get("stopping"), size_label(main))
    table = _text(rows)
    if stop is not None:
        table += "\n" + _how_chosen(data["stopping"])
    if len(orders) > 1:
        table += "\n\n" + _text(_order_rows(orders, costs, size_label(main)))
    _write(directory, data, table, curves, orders, costs, model, base)
    if figures:
        from mambascope.eye.plots import plot_glimpse_curves

        plot_glimpse_curves(
            curves,
            directory / "accuracy.png",
            others={n: {s: t for s, (t, _) in tops.items()} for n, tops in others.items()},
            stopping=base if stop is not None else None,
            orders=orders if len(orders) > 1 else None,
            title=f"{name}, {base.images:,} images",
        )
    return EyeReport(directory, table, rows, data, curves)


def _curve_data(curve: GlimpseCurve) -> dict[str, Any]:
    steps = report_steps(curve.options.length)
    return {
        "top1": {str(step): round(float(curve.top1[step - 1]), 6) for step in steps},
        "coverage": {str(step): round(float(curve.mean_coverage[step - 1]), 6) for step in steps},
        "best": {"glimpses": int(curve.top1.argmax()) + 1, "top1": round(float(curve.top1.max()), 6)},
    }


def _drop_interval(whole: int, stopped: int, images: int) -> tuple[float, float]:
    """Interval of the drop from `whole` to `stopped` right answers, whichever images they are of."""
    each = (1 + CONFIDENCE) / 2
    (low, high), (least, most) = (binomial_interval(hits, images, each) for hits in (whole, stopped))
    return low - most, high - least


def _how_chosen(stopping: Mapping[str, Any]) -> str:
    used = stopping["criteria"][stopping["measured"]["criterion"]]
    low, high = (100 * v for v in used["drop_interval"])
    where = f"{stopping['images']:,} {stopping['chosen_on']}"
    rule = f"fewest glimpses with top-1 at most {100 * DROP:g} points below all of them; chosen on {where}"
    if not stopping["decided"]:
        rule = f"the usual one stays: {where} are too few to choose, {stopping['images_needed']:,} can"
    text = f"stopping threshold {used['threshold']:g}: {rule}"
    return f"{text}; drop there {low:.2f} to {high:.2f} points ({100 * CONFIDENCE:g} % interval)"


def _stopping(
    model: MambaEye,
    pictures: Pictures,
    options: GlimpseOptions,
    base: GlimpseCurve,
    stop: StopOptions,
    calibration: Pictures | None,
    **how: Any,
) -> dict[str, Any]:
    """Chooses a threshold per criterion, and really runs the first one with it."""
    chosen_on = base
    if calibration is not None:
        chosen_on = evaluate_glimpses(model, calibration, options, stop=stop, **{**how, "seed": how["seed"] + 1})
    needed = images_for_drop(DROP)
    result: dict[str, Any] = {
        "chosen_on": "evaluated images" if calibration is None else "calibration images",
        "images": chosen_on.images,
        "images_needed": needed,
        "decided": chosen_on.images >= needed,
        "all_glimpses": {"top1": float(base.top1[-1]), "glimpses": options.length},
        "criteria": {},
    }
    for here, there in zip(base.stops, chosen_on.stops, strict=True):
        k = there.choose(float(chosen_on.top1[-1]) - DROP)
        if chosen_on.images < needed:
            k = int(np.abs(there.thresholds - USUAL_THRESHOLD).argmin())
        result["criteria"][here.criterion] = {
            "threshold": float(here.thresholds[k]),
            "drop_interval": list(_drop_interval(int(chosen_on.hits[-1]), int(there.hits[k]), chosen_on.images)),
            "top1": float(here.top1[k]),
            "mean_glimpses": float(here.mean_glimpses[k]),
        }
    criterion = base.stops[0].criterion
    top1, used, _ = evaluate_stopping(
        model,
        pictures,
        options,
        threshold=result["criteria"][criterion]["threshold"],
        criterion=criterion,
        stop=stop,
        **how,
    )
    result["measured"] = {"criterion": criterion, "top1": top1, "mean_glimpses": used}
    fixed = base.needed(top1)
    result["as_many_for_every_image"] = fixed
    return result


# ---- text and files --------------------------------------------------------------------------------------------------


def _rows(
    name: str,
    model: MambaEye,
    curves: Mapping[str, GlimpseCurve],
    others: Mapping[str, Mapping[str, tuple[float, float]]],
    stopping: Mapping[str, Any] | None,
    main: str,
) -> list[dict[str, str]]:
    macs = glimpse_macs(model.config)
    rows = []
    for step in report_steps(next(iter(curves.values())).options.length):
        row = {"model": f"{name}, {step:,} glimpses", "GFLOPs": f"{step * macs / 1e9:.3g}"}
        for label, curve in curves.items():
            row[label] = f"{100 * curve.top1[step - 1]:.1f} ({100 * curve.mean_coverage[step - 1]:.0f} % seen)"
        rows.append(row)
    if stopping is not None:
        used = stopping["measured"]
        row = {
            "model": f"{name}, stops when sure: {used['mean_glimpses']:.1f} glimpses",
            "GFLOPs": f"{used['mean_glimpses'] * macs / 1e9:.3g}",
        }
        rows.append({**row, **{s: f"{100 * used['top1']:.1f}" if s == main else "" for s in curves}})
    for other, tops in others.items():
        costs = [g for _, g in tops.values()]
        cells = {label: f"{100 * tops[label][0]:.1f}" if label in tops else "" for label in curves}
        span = f"{min(costs):.3g}-{max(costs):.3g}" if costs else ""
        rows.append({"model": other, "GFLOPs": span, **cells})
    return rows


def _order_rows(orders: Mapping[str, GlimpseCurve], costs: Mapping[str, float], size: str) -> list[dict[str, str]]:
    """Accuracy of each order, and the glimpses after which it is as accurate as the first order at some numbers."""
    name, first = next(iter(orders.items()))
    steps = report_steps(first.options.length)
    rows = []
    for label, curve in orders.items():
        row = {f"order at {size}": label}
        row |= {f"{s} gl.": f"{100 * curve.top1[s - 1]:.1f}" for s in steps}
        for step in steps[1:]:
            need = curve.needed(float(first.top1[step - 1]))
            text = "never" if need is None else str(need)
            if need is not None and costs[label] > 1:
                text += f" ({need * costs[label]:.0f} steps)"
            row[f"as {name} at {step}"] = text
        rows.append(row)
    return rows


def _text(rows: Sequence[Mapping[str, str]]) -> str:
    columns = list(rows[0])
    widths = [max(len(c), *(len(r[c]) for r in rows)) for c in columns]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)])

    return "\n".join([line(columns), "-" * len(line(columns)), *(line([r[c] for c in columns]) for r in rows)])


def _write(
    directory: Path,
    data: Mapping[str, Any],
    table: str,
    curves: Mapping[str, GlimpseCurve],
    orders: Mapping[str, GlimpseCurve],
    costs: Mapping[str, float],
    model: MambaEye,
    base: GlimpseCurve,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _file(directory / "report.json", json.dumps(data, indent=2) + "\n")
    _file(directory / "table.txt", table + "\n")
    macs = glimpse_macs(model.config)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["size", "order", "glimpses", "model_steps", "gflops", "coverage", "top1", "images"])
    lines = [(size, next(iter(orders)), curve, 1.0) for size, curve in curves.items()]
    main = next(size for size, curve in curves.items() if curve is base)
    lines += [(main, label, curve, costs[label]) for label, curve in orders.items() if curve is not base]
    for size, label, curve, cost in lines:
        for step in range(1, curve.options.length + 1):
            steps = step * cost
            writer.writerow(
                [
                    size,
                    label,
                    step,
                    f"{steps:g}",
                    f"{steps * macs / 1e9:.6g}",
                    f"{curve.mean_coverage[step - 1]:.6f}",
                    f"{curve.top1[step - 1]:.6f}",
                    curve.images,
                ]
            )
    _file(directory / "accuracy.csv", text.getvalue())
    if base.stops:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["size", "criterion", "threshold", "mean_glimpses", "top1", "images"])
        for stop in base.stops:
            for k, threshold in enumerate(stop.thresholds):
                numbers = (f"{threshold:g}", f"{stop.mean_glimpses[k]:.4f}", f"{stop.top1[k]:.6f}")
                writer.writerow([main, stop.criterion, *numbers, stop.images])
        _file(directory / "early_stop.csv", text.getvalue())


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
        options=datamodule.glimpses,
        name=name,
        progress=sys.stdout.isatty(),
    )
    return report.table, {"table": report.rows}
