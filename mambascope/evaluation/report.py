"""The report folder: what a trained model is worth, in numbers and pictures.

Choice of the threshold η: by default, of all that keep top-1 within half a point of refining every image, the one that
refines the fewest images. It is made on the calibration data if there are any, otherwise on the evaluation data
themselves; the report says which. With the latter the accuracy at η is slightly optimistic. Too few images to decide
leave the model's own η (:mod:`mambascope.evaluation.choice`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mambascope._names import as_json
from mambascope.evaluation import sweep as sw
from mambascope.evaluation.choice import describe_choice, images_needed, interval_text
from mambascope.evaluation.collect import Collected, collect
from mambascope.evaluation.machine import machine_info
from mambascope.evaluation.options import ReportOptions
from mambascope.evaluation.promise import promised_threshold
from mambascope.evaluation.selection import selection_quality, selection_text
from mambascope.evaluation.tables import card_rows, curve_csv, curve_rows, results_table, savings, timings_csv
from mambascope.evaluation.throughput import Timing, measure_all, measure_model
from mambascope.models.cost import CONVENTIONS, StageCost, format_gflops, plain_vim, stage_macs
from mambascope.models.flop_count import costs_of
from mambascope.models.frozen import freeze_where_possible, is_frozen
from mambascope.models.gate import check_threshold
from mambascope.models.scope import MambaScope
from mambascope.models.two_stage import is_two_stage
from mambascope.models.vim import VisionMamba
from mambascope.models.weights import REPORT_DATA, REPORT_TEXT
from mambascope.utils import atomic_path, model_device

CALIBRATION = "calibration data"


@dataclass(frozen=True)
class Report:
    """A written report.

    Attributes:
        directory: Where its files are.
        threshold: The chosen η; ``None`` for a one-stage model.
        table: The printed table.
        data: Everything in ``report.json``.
        collected: Both stages' answers and the sampled images that it was made from.
    """

    directory: Path
    threshold: float | None
    table: str
    data: dict[str, Any]
    collected: Collected


def write_report(
    model: VisionMamba,
    data: Any,
    out_dir: str | os.PathLike[str],
    options: ReportOptions = ReportOptions(),  # noqa: B008 (frozen)
) -> Report:
    """Evaluates `model` and writes ``report.json``, ``report.txt``, two CSV files and the figures to `out_dir`.

    Args:
        model: A model of two stages, or a one-stage classifier (then there is no threshold and no curve). Left
            unchanged: set ``model.threshold = report.threshold`` to use the choice.
        data: A loader of (images [B, C, H, W], labels [B]), or a data module with ``val_dataloader()``.
        out_dir: Folder; made if missing. Files in it are replaced one by one, never half-written.
        options: How thresholds are chosen, times are measured, and figures are drawn.

    Raises:
        ValueError: Bad data, see :func:`mambascope.evaluation.collect.collect`, or an option out of range.
        OSError: The folder cannot be written.
    """
    out = Path(out_dir)
    begun = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    freeze_where_possible(model)  # what is timed is what predictions run
    try:
        return _write(model, data, out, options)
    except BaseException:
        if not begun:
            with suppress(OSError):  # a report that was refused leaves nothing; what was written stays
                out.rmdir()
        raise


def _write(model: VisionMamba, data: Any, out: Path, options: ReportOptions) -> Report:
    sample = _collect(model, data.val_dataloader() if hasattr(data, "val_dataloader") else data, options)
    registered = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    facts = {
        "model": options.name or registered or type(model).__name__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": len(sample.record),
        "config": asdict(model.config),
        "machine": machine_info(model_device(model)),
        "frozen": is_frozen(model),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if is_two_stage(model):
        report = _write_two_stages(model, sample, out, facts, options)
    else:
        report = _write_one_stage(model, sample, out, facts, options)
    if options.print_table:
        print(report.table)
    return report


def _collect(model: VisionMamba, loader: Any, options: ReportOptions) -> Collected:
    """Both stages' answers, and images to time and to draw in mixed order: loaders may be sorted by class."""
    count, seed = options.timing_images + options.timing_images // 2, options.seed
    sample = collect(model, loader, keep=count, seed=seed, progress=options.progress, description="evaluating")
    order = torch.randperm(len(sample.images), generator=torch.Generator().manual_seed(seed))
    return Collected(sample.record, sample.images[order], sample.labels[order], sample.index[order])


# ---- two stages ------------------------------------------------------------------------------------------------------


def _write_two_stages(
    model: MambaScope, sample: Collected, out: Path, facts: dict[str, Any], options: ReportOptions
) -> Report:
    record, size = sample.record, tuple(sample.images.shape[-2:])
    costs = costs_of(model, size)
    curve = sw.sweep(record, costs)
    if options.threshold is None:
        eta, choice = _choose(model, sample, options)
    else:
        eta = check_threshold(options.threshold)
        choice = {"rule": "given", "threshold": eta, "data": None}
    etas = list(dict.fromkeys([eta, *map(float, options.measure_thresholds)]))
    timings = _measure(model, sample, etas, options.batch_sizes, options)
    top1 = [_top1_at(record, timing) for timing in timings]
    results = _results(record, costs, eta, timings)
    table = results_table(results, eta) + f"\n{_how_chosen(choice)}"
    selection = None
    if options.object_masks is not None:
        masks = options.object_masks(sample.index.tolist())
        selection = selection_quality(model, sample.images, masks)
        table += f"\n{selection_text(selection)}"
    data = {
        **facts,
        "alpha": model.alpha,
        "threshold": eta,
        "choice": choice,
        "results": results,
        "savings": savings(results),
        "gate": _gate(record, results["dynamic"]),
        "selection": selection,
        "cost": _cost_section(model, costs, size),
        "timings": [{**t.to_dict(), "top1": y} for t, y in zip(timings, top1, strict=True)],
        "curve": curve_rows(curve),
        "table": card_rows(results, eta),
        "files": ["curve.csv", REPORT_DATA, REPORT_TEXT, "timings.csv"],
    }
    _write_text(out / "curve.csv", curve_csv(curve))
    _write_text(out / "timings.csv", timings_csv(timings, top1))
    _write_text(out / REPORT_TEXT, table + "\n")
    _write_json(out / REPORT_DATA, data)  # the numbers are safe whatever happens to the figures
    if options.figures:
        from mambascope.evaluation import figures

        name = facts["model"]
        at_eta, timed = sw.sweep(record, costs, thresholds=[eta]), list(zip(timings, top1, strict=True))
        drawn = figures.draw_tradeoff(curve, at_eta, timed, out, name, options.published)
        drawn += figures.draw_selection(selection, model.alpha, out, name)
        drawn += figures.draw_pictures(model, sample, eta, out, name, options)
        drawn += figures.draw_training(options.metrics_csv, out, name)
        data["files"] = sorted([*data["files"], *drawn])
        _write_json(out / REPORT_DATA, data)
    return Report(out, eta, table, data, sample)


def _how_chosen(choice: dict[str, Any]) -> str:
    if choice["data"] is None:
        return "η was given"
    note = "" if choice["data"] == CALIBRATION else ", the same as above: its accuracy is slightly optimistic"
    verb = "chosen on" if choice["decided"] else "looked at"
    where = f"{verb} {choice['images']:,} images of the {choice['data']}{note}"
    return f"η: {choice['rule']}; {where}\n{interval_text(choice)}"


def _measure(
    model: MambaScope, sample: Collected, etas: Sequence[float], batch_sizes: Sequence[int], options: ReportOptions
) -> list[Timing]:
    return measure_all(
        model,
        sample,
        etas,
        batch_sizes,
        options.timing_images,
        rounds=options.rounds,
        max_seconds=options.max_seconds,
        progress=options.progress,
    )


def _choose(model: MambaScope, sample: Collected, options: ReportOptions) -> tuple[float, dict[str, Any]]:
    """η, and what the report says about its choice."""
    record, source, target = sample.record, "evaluation data", options.target
    if options.calibration_loader is not None:
        loader, source = options.calibration_loader, CALIBRATION
        record = collect(model, loader, progress=options.progress, description="calibrating").record
    if target.kind == "ms":
        coarse, full = _measure(model, sample, [], options.batch_sizes[:1], options)
        curve = sw.sweep(record, ms_coarse=coarse.ms, ms_refined=full.ms)
    else:
        curve = sw.sweep(record, costs_of(model, tuple(sample.images.shape[-2:])))
    if target.confidence is not None:
        # the other half may have been fitted to, see `fit_coarse_weight`
        record = record.part(slice(1, None, 2)) if source == CALIBRATION and model.coarse_weight else record
        eta = promised_threshold(record, target.value, target.confidence)
    else:
        eta = float(curve.threshold[target.pick(curve)])  # also where it is not used: it may refuse the target
        if len(record) < images_needed(target):
            eta = model.threshold
    choice = describe_choice(target, record, eta, model.threshold)
    return eta, {**asdict(target), "data": source, **choice}


def _top1_at(record: sw.StageRecord, timing: Timing) -> float:
    """Top-1 on all images of the mode that was timed."""
    eta = {"coarse": 0.0, "refine_all": 1.0}.get(timing.mode, timing.threshold)
    return float(sw.sweep(record, thresholds=[1.0 if eta is None else eta]).top1[0])


def _results(
    record: sw.StageRecord, costs: dict[str, StageCost], eta: float, timings: Sequence[Timing]
) -> dict[str, dict[str, Any]]:
    """Accuracy, share, GFLOPs and measured time of the three ways to run the model."""
    results: dict[str, dict[str, Any]] = {}
    for mode, at in (("coarse", 0.0), ("refine_all", 1.0), ("dynamic", eta)):
        row: dict[str, Any] = sw.sweep(record, costs, thresholds=[at]).row(0)
        row = {key: None if value != value else value for key, value in row.items()}  # NaN is no JSON
        for t in timings:
            if t.mode == mode and (mode != "dynamic" or t.threshold == eta):
                row[f"ms_batch_{t.batch_size}"] = t.ms
                row[f"share_timed_batch_{t.batch_size}"] = t.share_refined
        results[mode] = row
    return results


def _gate(record: sw.StageRecord, dynamic: dict[str, Any]) -> dict[str, float]:
    share = dynamic["share_refined"]
    coarse, fine = record.coarse_correct.mean(), record.fine_correct.mean()
    return {
        "calibration_error_coarse": sw.calibration_error(record.confidence, record.coarse_correct),
        "calibration_error_fine": sw.calibration_error(record.fine_confidence, record.fine_correct),
        "oracle_top1": sw.oracle_top1(record),
        "random_gate_top1_at_same_share": float(coarse + share * (fine - coarse)),
    }


def _cost_section(model: MambaScope, costs: dict[str, StageCost], size: Sequence[int]) -> dict[str, Any]:
    vim = plain_vim(model.config)
    return {
        "unit": "multiply-adds per image; GFLOPs = multiply-adds / 1e9",
        "image_size": list(size),
        **{c: {**asdict(cost), "plain_vim": stage_macs(vim, size, convention=c).fine} for c, cost in costs.items()},
    }


# ---- one stage -------------------------------------------------------------------------------------------------------


def _write_one_stage(
    model: VisionMamba, sample: Collected, out: Path, facts: dict[str, Any], options: ReportOptions
) -> Report:
    """Accuracy, cost and time of a model without a threshold."""
    record, images = sample.record, sample.images
    batches = zip(images.split(64), sample.labels.split(64), strict=True)
    costs = costs_of(model, tuple(images.shape[-2:]), batches=batches)
    row: dict[str, Any] = {"top1": float(record.fine_correct.mean()), "top5": float(record.fine_top5.mean())}
    row |= {f"gflops_{c}": cost.gflops() for c, cost in costs.items()}
    timings = []
    for size in dict.fromkeys(min(s, len(images)) for s in options.batch_sizes):
        part = images if size > 8 else images[: max(size, len(images) // 4)]
        effort: dict[str, Any] = {"rounds": options.rounds, "max_seconds": options.max_seconds}
        timings.append(measure_model(model, part, batch_size=size, progress=options.progress, **effort))
        row[f"ms_batch_{size}"] = timings[-1].ms
    parts = [f"top-1 {100 * row['top1']:.2f} %", f"top-5 {100 * row['top5']:.2f} %"]
    parts += [f"{format_gflops(1e9 * row[f'gflops_{c}'])} GFLOPs ({c.replace('_', ' ')})" for c in CONVENTIONS]
    parts += [f"{t.ms:.3f} ms/image (batch {t.batch_size})" for t in timings]
    table = "\n".join([facts["model"], *parts])
    drawn = []
    if options.metrics_csv is not None:
        from mambascope.evaluation.figures import draw_training

        drawn = draw_training(options.metrics_csv, out, facts["model"])
    data = {
        **facts,
        "results": {"all": row},
        "gate": {"calibration_error_fine": sw.calibration_error(record.fine_confidence, record.fine_correct)},
        "cost": {c: asdict(cost) for c, cost in costs.items()},
        "timings": [t.to_dict() for t in timings],
        "table": [{"mode": "all", "top-1": parts[0].removeprefix("top-1 "), "cost": ", ".join(parts[2:])}],
        "files": sorted([*drawn, REPORT_TEXT, REPORT_DATA]),
    }
    _write_text(out / REPORT_TEXT, table + "\n")
    _write_json(out / REPORT_DATA, data)
    return Report(out, None, table, data, sample)


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    _write_text(path, as_json(data, indent=2, allow_nan=False) + "\n")
