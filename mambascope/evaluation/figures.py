"""The figures of a report: what was evaluated, in the terms of :mod:`mambascope.plotting`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambascope.evaluation.collect import Collected
from mambascope.evaluation.examples import make_examples, run_scope
from mambascope.evaluation.options import ReportOptions
from mambascope.evaluation.published import rows_for
from mambascope.evaluation.sweep import StageRecord, SweepCurve
from mambascope.evaluation.throughput import Timing
from mambascope.models.scope import MambaScope
from mambascope.plotting import (
    Example,
    plot_exits,
    plot_heatmaps,
    plot_tradeoff,
    plot_training_curves,
)
from mambascope.plotting.exits import Answers
from mambascope.plotting.published import PublishedPoint
from mambascope.plotting.selection import plot_selection
from mambascope.plotting.tradeoff import ChosenPoint, TimedPoint, Tradeoff

PICTURE_IMAGES = 192  # candidates for the figures


def tradeoff(curve: SweepCurve, convention: str) -> Tradeoff:
    """A sweep as it is drawn, with the GFLOPs of one convention."""
    return Tradeoff(curve.top1, curve.share_refined, curve.gflops[convention], convention.replace("_", " "))


def chosen_point(point: SweepCurve, convention: str) -> ChosenPoint:
    """The sweep at the threshold in use alone, as it is drawn."""
    return ChosenPoint(float(point.threshold[0]), float(point.top1[0]), float(point.gflops[convention][0]))


def timed_point(timing: Timing, top1: float) -> TimedPoint:
    """A measured mode with its accuracy (0 to 1), as it is drawn."""
    t = timing
    return TimedPoint(t.mode, t.batch_size, t.ms, t.ms_low, t.ms_high, top1, t.threshold)


def published_points(name: str) -> list[PublishedPoint]:
    """The published models of the size that is part of a model's name, as they are drawn."""
    return [PublishedPoint(row.label, row.top1, row.gflops) for row in rows_for(name)]


def answers(record: StageRecord) -> Answers:
    """Both stages' answers, as they are drawn."""
    return Answers(record.confidence, record.coarse_correct, record.fine_correct)


def draw_tradeoff(
    curve: SweepCurve, at_eta: SweepCurve, timed: Sequence[tuple[Timing, float]], out: Path, name: str, published: bool
) -> list[str]:
    """Accuracy against cost.

    Args:
        curve: The sweep.
        at_eta: The sweep at the threshold in use alone.
        timed: Measured modes with their top-1 (0 to 1).
        out: Folder of the report.
        name: Of the model.
        published: Whether to add the published models of its size.

    Returns:
        Names of the files.
    """
    points = published_points(name) if published else []
    convention = "one_direction" if points else "both_directions"
    plot_tradeoff(
        tradeoff(curve, convention),
        out / "tradeoff.png",
        chosen=chosen_point(at_eta, convention),
        timed=[timed_point(timing, top1) for timing, top1 in timed],
        published=points,
        title=f"{name}: accuracy against cost",
    )
    return ["tradeoff.png"]


def draw_pictures(
    model: MambaScope, sample: Collected, eta: float, out: Path, name: str, options: ReportOptions
) -> list[str]:
    """Exits per stage and heat maps, from the sampled images; names of the files."""
    images, labels = sample.images[:PICTURE_IMAGES], sample.labels[:PICTURE_IMAGES]
    if not len(images):
        return []
    examples = make_examples(
        model,
        images,
        run_scope(model, images, eta),
        labels=labels,
        class_names=options.class_names or getattr(model, "labels", None),
        mean=options.mean,
        std=options.std,
    )
    plot_exits(answers(sample.record), examples, eta, out / "exits.png", title=f"{name}: where images leave")
    plot_heatmaps(pick_examples(examples), out / "heatmaps.png", title=f"{name}: importance and refined cells")
    return ["exits.png", "heatmaps.png"]


def draw_selection(quality: dict[str, Any] | None, alpha: float, out: Path, name: str) -> list[str]:
    """Where the selected cells lie, if the data know; names of the files."""
    if quality is None:
        return []
    plot_selection(quality["curve"], out / "selection.png", alpha, title=f"{name}\nwhat the selected cells show")
    return ["selection.png"]


def pick_examples(examples: Sequence[Example], count: int = 6) -> list[Example]:
    """The first images of each kind: corrected by the fine stage, left early, still wrong; then other refined ones."""
    corrected = [e for e in examples if not e.exited and e.correct and e.coarse_predicted != e.true]
    left = [e for e in examples if e.exited and e.correct]
    wrong = [e for e in examples if not e.exited and e.correct is False]
    picked = corrected[: count - 2] + left[:1] + wrong[:1]
    rest = [e for e in examples if not e.exited and all(e is not p for p in picked)]
    rest += [e for e in examples if e.exited and all(e is not p for p in picked)]
    return picked + rest[: count - len(picked)]


def draw_training(metrics_csv: Any, out: Path, name: str) -> list[str]:
    """Training curves from Lightning's log, where there is one; names of the files."""
    if metrics_csv is None or not Path(metrics_csv).is_file():
        return []
    written = plot_training_curves(metrics_csv, out / "training.png", title=f"{name}: training")
    return ["training.png"] if written else []
