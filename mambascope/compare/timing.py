"""Measured time of every point in one interleaved run, so that whatever else the machine does meets all alike."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambascope.compare.lists import TimingArgs
from mambascope.compare.results import Result
from mambascope.compare.sources import Point, digest
from mambascope.compare.work import Work
from mambascope.evaluation.machine import machine_info
from mambascope.evaluation.throughput import interleaved, quartiles
from mambascope.utils import atomic_path, evaluating

SMALL_BATCH = 8  # up to here single images cost several times as much: a quarter of them is timed


@dataclass(frozen=True)
class Measured:
    """Time of one point, and of one threshold of a MambaScope.

    Attributes:
        entry, setting, seed: Which point.
        threshold: η; ``None`` for a one-stage model.
        batch_size: Images per call.
        images: Images per round.
        rounds: Timed rounds.
        ms: Median milliseconds per image.
        ms_low, ms_high: Quartiles over the rounds.
        ratio: Median over the rounds of the time as a multiple of the baseline's in the same round and seed.
    """

    entry: str
    setting: str
    seed: int
    threshold: float | None
    batch_size: int
    images: int
    rounds: int
    ms: float
    ms_low: float
    ms_high: float
    ratio: float

    @property
    def where(self) -> tuple[str, str, int, float | None]:
        """Point and threshold."""
        return self.entry, self.setting, self.seed, self.threshold


@dataclass(frozen=True)
class _Subject:
    """A model at one threshold, with the images it reads."""

    point: Point
    threshold: float | None
    model: Any
    images: Tensor
    confidence: np.ndarray | None
    share: float

    def call(self, count: int, batch_size: int) -> Callable[[], None]:
        """Runs the first `count` images through the model."""
        batches = list(self.images[:count].split(batch_size))
        # the images that are timed refine the same share as all images do
        eta = None if self.confidence is None else threshold_for(self.confidence[:count], self.share)

        def run() -> None:
            for batch in batches:
                if eta is None:
                    self.model(batch)
                else:
                    self.model.forward_scope(batch, eta)

        return run


def threshold_for(confidence: np.ndarray, share: float) -> float:
    """The η at which that share of images with these coarse confidences [K] is refined, to the nearest image."""
    count = round(share * len(confidence))
    if count in (0, len(confidence)):
        return float(count > 0)
    ranked = np.sort(confidence)
    return float((ranked[count - 1] + ranked[count]) / 2)


def share_refined(result: Result, threshold: float) -> float:
    """Share of the evaluation images that a threshold refines; at 0 none and at 1 all."""
    if threshold <= 0 or threshold >= 1:
        return float(threshold >= 1)
    return float((result.record.confidence < threshold).mean())


def measure(
    work: Work, results: dict[Point, Result], args: TimingArgs, path: Path
) -> tuple[list[Measured], dict[str, Any]]:
    """Times every point on the same images, or reads what was measured before on the same machine.

    Args:
        work: Gives models and images.
        results: Of all points.
        args: How to measure.
        path: JSON file of the measurements.

    Returns:
        The times, and facts about the machine.
    """
    facts = machine_info(work.device)
    entries = {point.entry: work.plan.entries[point.entry].thresholds for point in results}
    key = digest([(*_named(p), r.key) for p, r in results.items()], asdict(args), entries, work.plan.baseline, facts)
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored.get("key") == key:
            return [Measured(**row) for row in stored["rows"]], facts
    subjects = _subjects(work, results, args)
    rows = [row for size in args.batch_sizes for row in _measure_size(subjects, size, work, args)]
    with atomic_path(path) as temporary:
        content = {"key": key, "machine": facts, "rows": [asdict(row) for row in rows]}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return rows, facts


def _named(point: Point) -> tuple[str, str, int]:
    return point.entry, point.setting.label, point.seed


def _subjects(work: Work, results: dict[Point, Result], args: TimingArgs) -> list[_Subject]:
    """Every model on the device, with the same images at the size that it reads."""
    total = min(len(result.record) for result in results.values())
    index = np.random.default_rng(0).permutation(total)[: args.images]
    images: dict[str, Tensor] = {}
    subjects = []
    for point, result in results.items():
        data = work.data(point)
        model = work.model(point, data)
        name = digest(work.data_section(point))
        if name not in images:
            images[name] = work.images(point, index).to(work.device)
        etas = (0.0, *work.plan.entries[point.entry].thresholds, 1.0) if result.two_stage else (None,)
        confidence = result.record.confidence[index] if result.two_stage else None
        for eta in etas:
            share = 1.0 if eta is None else share_refined(result, eta)
            subjects.append(_Subject(point, eta, model, images[name], confidence, share))
    return subjects


def _measure_size(subjects: Sequence[_Subject], size: int, work: Work, args: TimingArgs) -> list[Measured]:
    count = len(subjects[0].images)
    if size > count:
        raise ValueError(f"timing.batch_sizes must be at most the {count} images that are timed, got {size}")
    count = count // size * size if size > SMALL_BATCH else max(1, count // 4 // size) * size
    runs = {str(i): subject.call(count, size) for i, subject in enumerate(subjects)}
    with evaluating(torch.nn.ModuleList({id(s.model): s.model for s in subjects}.values())):
        seconds = interleaved(
            runs,
            work.device,
            rounds=args.rounds,
            max_seconds=args.max_seconds,
            progress=f"timing, batch {size}" if work.progress else None,
        )
    assert work.plan.baseline is not None
    first = work.plan.entries[work.plan.baseline].settings[0].label
    base = {
        s.point.seed: seconds[str(i)]
        for i, s in enumerate(subjects)
        if (s.point.entry, s.point.setting.label) == (work.plan.baseline, first) and s.threshold in (None, 1.0)
    }
    rows = []
    for i, subject in enumerate(subjects):
        rounds = seconds[str(i)]
        baseline = base.get(subject.point.seed) or next(iter(base.values()))
        low, mid, high = (1e3 * value / count for value in quartiles(rounds))
        ratio = statistics.median(a / b for a, b in zip(rounds, baseline, strict=True))
        where = (*_named(subject.point), subject.threshold)
        rows.append(Measured(*where, size, count, len(rounds), mid, low, high, ratio))
    return rows
