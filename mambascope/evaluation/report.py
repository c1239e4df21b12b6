"""The report folder: what a trained model is worth, in numbers and pictures.

Choice of the threshold η: by default, of all that keep top-1 within half a point of refining every image, the one that
refines the fewest images. It is made on the calibration data if there are any, otherwise on the evaluation data
themselves; the report says which. With the latter the accuracy at η is slightly optimistic. Too few images to decide
leave the model's own η (:mod:`mambascope.evaluation.choice`).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambascope._names import as_json
from mambascope.evaluation import sweep as sw
from mambascope.evaluation.choice import describe_choice, images_needed, interval_text
from mambascope.evaluation.collect import Collected, collect
from mambascope.evaluation.published import rows_for
from mambascope.evaluation.tables import card_rows, curve_csv, curve_rows, results_table, savings, timings_csv
from mambascope.evaluation.throughput import Timing, measure_model, measure_scope, representative
from mambascope.models.cost import CONVENTIONS, StageCost, format_gflops, plain_vim, stage_macs
from mambascope.models.flop_count import costs_of
from mambascope.models.gate import check_threshold
from mambascope.models.scope import MambaScope
from mambascope.models.two_stage import is_two_stage
from mambascope.models.vim import VisionMamba
from mambascope.peers.reduced import scan_share
from mambascope.utils import atomic_path, model_device

CALIBRATION = "calibration data"
PICTURE_IMAGES = 192  # candidates for the figures


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


def machine_info(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on, and with which versions."""
    import timm

    from mambascope._version import __version__
    from mambascope.ops import report as backend_report

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text(errors="replace").splitlines() if line.startswith("model name")]
        cpu = lines[0].partition(":")[2].strip() if lines else cpu
    info = {
        "device": str(device.type),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "scan_backends": backend_report().splitlines(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
            "mambascope": __version__,
        },
    }
    if device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(device)
    return info


def write_report(
    model: VisionMamba,
    data: Any,
    out_dir: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    metrics_csv: str | os.PathLike[str] | None = None,
    calibration_loader: Iterable[Any] | None = None,
    threshold: float | None = None,
    target: sw.Target = sw.Target(),  # noqa: B008 (frozen)
    measure_thresholds: Sequence[float] = (),
    batch_sizes: Sequence[int] = (64, 1),
    timing_images: int = 384,
    rounds: int = 7,
    max_seconds: float = 20.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str | None = None,
    published: bool = False,
    figures: bool = True,
    seed: int = 0,
    progress: bool = True,
    print_table: bool = True,
) -> Report:
    """Evaluates `model` and writes ``report.json``, ``report.txt``, two CSV files and the figures to `out_dir`.

    Args:
        model: A MambaScope, or a one-stage classifier (then there is no threshold and no curve). Left unchanged: set
            ``model.threshold = report.threshold`` to use the choice.
        data: A loader of (images [B, C, H, W], labels [B]), or a data module with ``val_dataloader()``.
        out_dir: Folder; made if missing. Files in it are replaced one by one, never half-written.
        class_names: Names of the classes for the figures; default: the model's, else numbers.
        metrics_csv: Lightning's CSV log, for the training curves.
        calibration_loader: Data on which η is chosen; default: the evaluation data.
        threshold: Use this η instead of choosing one.
        target: What η is chosen for; with too few images to decide it the model's own stays.
        measure_thresholds: More η whose time is measured.
        batch_sizes: Images per call of the timings; the first one is that of the printed table's first column.
        timing_images: Images to time (at least 1), sampled from `data` so that their confidences are spread like those
            of all; small batches are timed on a quarter of them.
        rounds: Timed rounds, at most.
        max_seconds: Rough limit for the timing of each batch size.
        mean, std: Normalisation of the images, to show them; default: the model's.
        name: Of the model.
        published: Whether the frontier carries the published ImageNet rows of this size, marked as such.
        figures: Whether to draw figures.
        seed: Of the sample.
        progress: Whether to show progress bars.
        print_table: Whether to print the table.

    Raises:
        ValueError: Bad data, see :func:`mambascope.evaluation.collect.collect`, or an argument out of range.
        OSError: The folder cannot be written.
    """
    if timing_images < 1:
        raise ValueError(f"timing_images must be at least 1, got {timing_images}")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    loader = data.val_dataloader() if hasattr(data, "val_dataloader") else data
    class_names = class_names or getattr(model, "labels", None)
    name = name or (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
    found = collect(
        model, loader, keep=timing_images + timing_images // 2, seed=seed, progress=progress, description="evaluating"
    )
    base = {
        "model": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": len(found.record),
        "config": asdict(model.config),
        "machine": machine_info(model_device(model)),
    }
    # loaders may be sorted by class: timed batches and pictures are mixed
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(seed))
    found.images, found.labels, found.index = found.images[order], found.labels[order], found.index[order]
    effort: dict[str, Any] = {"rounds": rounds, "max_seconds": max_seconds, "progress": progress}
    if not is_two_stage(model):
        return _write_one_stage(model, found, out, base, batch_sizes, effort, metrics_csv, print_table)
    effort["count"] = timing_images

    size = tuple(found.images.shape[-2:])
    costs = costs_of(model, size)
    curve = sw.sweep(found.record, costs)
    if threshold is None:
        eta, choice = _choose(model, found, calibration_loader, target, effort, batch_sizes)
    else:
        eta = check_threshold(threshold)
        choice = {"rule": "given", "threshold": eta, "data": None}
    etas = list(dict.fromkeys([eta, *map(float, measure_thresholds)]))
    timings = measure_all(model, found, etas, batch_sizes, **effort)
    points = [top1_at(found.record, t) for t in timings]
    results = _results(found.record, costs, eta, timings)
    table = results_table(results, eta) + f"\n{_how_chosen(choice)}"
    data_out = {
        **base,
        "parameters": sum(p.numel() for p in model.parameters()),
        "alpha": model.alpha,
        "threshold": eta,
        "choice": choice,
        "results": results,
        "savings": savings(results),
        "gate": _gate(found.record, results["dynamic"]),
        "cost": _cost_section(model, costs, size),
        "timings": [{**t.to_dict(), "top1": y} for t, y in zip(timings, points, strict=True)],
        "curve": curve_rows(curve),
        "table": card_rows(results, eta),
    }
    _write_text(out / "curve.csv", curve_csv(curve))
    _write_text(out / "timings.csv", timings_csv(timings, points))
    _write_text(out / "report.txt", table + "\n")
    files = ["curve.csv", "report.json", "report.txt", "timings.csv"]
    data_out["files"] = files
    _write_json(out / "report.json", data_out)  # the numbers are safe whatever happens to the figures
    if figures:
        look = {"class_names": class_names, "mean": mean, "std": std}
        timed = list(zip(timings, points, strict=True))
        files += _frontier(curve, sw.sweep(found.record, costs, thresholds=[eta]), timed, out, name, published)
        files += _pictures(model, found, eta, out, look, name) + _curves(metrics_csv, out, name)
        data_out["files"] = sorted(files)
        _write_json(out / "report.json", data_out)
    if print_table:
        print(table)
    return Report(out, eta, table, data_out, found)


def _how_chosen(choice: dict[str, Any]) -> str:
    if choice["data"] is None:
        return "η was given"
    own = "" if choice["data"] == CALIBRATION else ", the same as above: its accuracy is slightly optimistic"
    found = "chosen on" if choice["decided"] else "looked at"
    where = f"{found} {choice['images']:,} images of the {choice['data']}{own}"
    return f"η: {choice['rule']}; {where}\n{interval_text(choice)}"


def _choose(
    model: MambaScope,
    found: Collected,
    calibration: Iterable[Any] | None,
    target: sw.Target,
    effort: dict[str, Any],
    batch_sizes: Sequence[int],
) -> tuple[float, dict[str, Any]]:
    """η, and what the report says about its choice."""
    record, source = found.record, "evaluation data"
    if calibration is not None:
        record = collect(model, calibration, progress=effort["progress"], description="calibrating").record
        source = CALIBRATION
    if target.kind == "ms":
        coarse, full = measure_all(model, found, [], batch_sizes[:1], **effort)
        chosen_on = sw.sweep(record, ms_coarse=coarse.ms, ms_refined=full.ms)
    else:
        chosen_on = sw.sweep(record, costs_of(model, tuple(found.images.shape[-2:])))
    eta = float(chosen_on.threshold[target.pick(chosen_on)])  # also where it is not used: it may refuse the target
    if len(record) < images_needed(target):
        eta = model.threshold
    choice = describe_choice(target, record, eta, model.threshold)
    return eta, {**asdict(target), "data": source, **choice}


def measure_all(
    model: MambaScope,
    found: Collected,
    thresholds: Sequence[float],
    batch_sizes: Sequence[int],
    count: int = 384,
    *,
    rounds: int = 7,
    max_seconds: float | None = None,
    progress: bool = False,
) -> list[Timing]:
    """Times all modes at every batch size on about `count` sampled images; larger batches shrink to the sample."""
    timings: list[Timing] = []
    sampled = found.record.confidence[found.index.numpy()]
    count = min(count, len(sampled))
    for size in dict.fromkeys(min(int(s), count) for s in batch_sizes):
        # single images take several times longer each: a quarter of the sample is enough
        wanted = count // size * size if size > 8 else max(size, count // 4)
        picked = representative(sampled, found.record.confidence, wanted)
        timings += measure_scope(
            model,
            found.images[torch.from_numpy(picked)],
            thresholds,
            batch_size=size,
            rounds=rounds,
            max_seconds=max_seconds,
            progress=progress,
        )
    return timings


def top1_at(record: sw.StageRecord, timing: Timing) -> float:
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


def _frontier(
    curve: sw.SweepCurve,
    chosen: sw.SweepCurve,
    timings: Sequence[tuple[Timing, float]],
    out: Path,
    name: str,
    published: bool,
) -> list[str]:
    from mambascope.plotting import plot_frontier

    rows = rows_for(name) if published else ()
    plot_frontier(
        curve,
        out / "frontier.png",
        chosen=chosen,
        convention="one_direction" if rows else "both_directions",
        timings=[t for t, _ in timings],
        timed_top1=[y for _, y in timings],
        published=rows,
        title=f"{name}: accuracy against cost",
    )
    return ["frontier.png"]


def _pictures(model: MambaScope, found: Collected, eta: float, out: Path, look: dict[str, Any], name: str) -> list[str]:
    """Exits per stage and heat maps, from the sampled images."""
    from mambascope.evaluation.examples import make_examples, run_scope
    from mambascope.plotting import plot_exits, plot_heatmaps

    images, labels = found.images[:PICTURE_IMAGES], found.labels[:PICTURE_IMAGES]
    if not len(images):
        return []
    examples = make_examples(model, images, run_scope(model, images, eta), labels=labels, **look)
    plot_exits(found.record, examples, eta, out / "exits.png", title=f"{name}: where images leave")
    plot_heatmaps(pick_examples(examples), out / "heatmaps.png", title=f"{name}: importance and refined cells")
    return ["exits.png", "heatmaps.png"]


def pick_examples(examples: Sequence[Any], count: int = 6) -> list[Any]:
    """The first images of each kind: corrected by the fine stage, left early, still wrong; then other refined ones."""
    corrected = [e for e in examples if not e.exited and e.correct and e.coarse_predicted != e.true]
    left = [e for e in examples if e.exited and e.correct]
    wrong = [e for e in examples if not e.exited and e.correct is False]
    picked = corrected[: count - 2] + left[:1] + wrong[:1]
    rest = [e for e in examples if not e.exited and all(e is not p for p in picked)]
    rest += [e for e in examples if e.exited and all(e is not p for p in picked)]
    return picked + rest[: count - len(picked)]


def _curves(metrics_csv: str | os.PathLike[str] | None, out: Path, name: str) -> list[str]:
    if metrics_csv is None or not Path(metrics_csv).is_file():
        return []
    from mambascope.plotting import plot_training_curves

    written = plot_training_curves(metrics_csv, out / "training.png", title=f"{name}: training")
    return ["training.png"] if written else []


def _write_one_stage(
    model: VisionMamba,
    found: Collected,
    out: Path,
    base: dict[str, Any],
    batch_sizes: Sequence[int],
    effort: dict[str, Any],
    metrics_csv: str | os.PathLike[str] | None,
    print_table: bool,
) -> Report:
    """A model without stages: accuracy, cost and time."""
    record, ran = found.record, scan_share(model, zip(found.images.split(64), found.labels.split(64), strict=True))
    costs = costs_of(model, tuple(found.images.shape[-2:]), scan_share=ran)
    row: dict[str, Any] = {"top1": float(record.fine_correct.mean()), "top5": float(record.fine_top5.mean())}
    row |= {f"gflops_{c}": cost.gflops() for c, cost in costs.items()}
    timings = []
    for size in dict.fromkeys(min(s, len(found.images)) for s in batch_sizes):
        sample = found.images if size > 8 else found.images[: max(size, len(found.images) // 4)]
        timings.append(measure_model(model, sample, batch_size=size, **effort))
        row[f"ms_batch_{size}"] = timings[-1].ms
    parts = [f"top-1 {100 * row['top1']:.2f} %", f"top-5 {100 * row['top5']:.2f} %"]
    parts += [f"{format_gflops(1e9 * row[f'gflops_{c}'])} GFLOPs ({c.replace('_', ' ')})" for c in CONVENTIONS]
    parts += [f"{t.ms:.3f} ms/image (batch {t.batch_size})" for t in timings]
    table = "\n".join([base["model"], *parts])
    data = {
        **base,
        "parameters": sum(p.numel() for p in model.parameters()),
        "results": {"all": row},
        "gate": {"calibration_error_fine": sw.calibration_error(record.fine_confidence, record.fine_correct)},
        "cost": {c: asdict(cost) for c, cost in costs.items()},
        "timings": [t.to_dict() for t in timings],
        "table": [{"mode": "all", "top-1": parts[0].removeprefix("top-1 "), "cost": ", ".join(parts[2:])}],
    }
    data["files"] = sorted([*_curves(metrics_csv, out, base["model"]), "report.txt", "report.json"])
    _write_text(out / "report.txt", table + "\n")
    _write_json(out / "report.json", data)
    if print_table:
        print(table)
    return Report(out, None, table, data, found)


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    _write_text(path, as_json(data, indent=2, allow_nan=False) + "\n")
