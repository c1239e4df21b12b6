"""Every threshold from one pass over the data, and the choice of one.

Both stages are run once per image (:mod:`mambascope.evaluation.collect`); what any threshold η would give follows by
sorting the images by coarse confidence: those with ``confidence >= η`` keep the coarse answer (MambaScope section 3.2).
Pure NumPy functions. N images, C classes, T thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mambascope.models.cost import StageCost


@dataclass(frozen=True)
class StageRecord:
    """What both stages said about N images; a few bytes per image whatever the number of classes.

    Attributes:
        labels: [N] int64.
        confidence: Of the coarse stage, as the exit threshold is compared with it [N], float64.
        fine_confidence: Largest probability of the fine stage [N], float64.
        coarse_pred, fine_pred: Predicted classes [N] int64.
        coarse_top5, fine_top5: Whether the label is among the five most likely classes [N] bool.
    """

    labels: np.ndarray
    confidence: np.ndarray
    coarse_pred: np.ndarray
    coarse_top5: np.ndarray
    fine_confidence: np.ndarray
    fine_pred: np.ndarray
    fine_top5: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def coarse_correct(self) -> np.ndarray:
        """Whether the coarse answer is right [N] bool."""
        return self.coarse_pred == self.labels

    @property
    def fine_correct(self) -> np.ndarray:
        """Whether the fine answer is right [N] bool."""
        return self.fine_pred == self.labels

    @classmethod
    def from_logits(cls, coarse_logits: Any, fine_logits: Any, labels: Any) -> StageRecord:
        """From logits [N, C] of both stages and labels [N] (arrays or CPU tensors).

        Raises:
            ValueError: Shapes that do not belong together, labels outside the classes, or logits that are not finite.
        """
        coarse, fine = (np.asarray(a, dtype=np.float64) for a in (coarse_logits, fine_logits))
        y = np.asarray(labels)
        if coarse.ndim != 2 or coarse.shape != fine.shape:
            raise ValueError(f"coarse and fine logits must both be [N, C], got {coarse.shape} and {fine.shape}")
        if y.shape != coarse.shape[:1] or not np.issubdtype(y.dtype, np.integer):
            raise ValueError(f"labels must be {len(coarse)} integers, got {y.dtype} of shape {y.shape}")
        if y.size and (y.min() < 0 or y.max() >= coarse.shape[1]):
            raise ValueError(f"labels must be in 0..{coarse.shape[1] - 1}, got {y.min()}..{y.max()}")
        if not (np.isfinite(coarse).all() and np.isfinite(fine).all()):
            raise ValueError("logits must be finite: the model returned NaN or inf")
        (c_conf, c_pred, c_top5), (f_conf, f_pred, f_top5) = _stage(coarse, y), _stage(fine, y)
        return cls(y.astype(np.int64), c_conf, c_pred, c_top5, f_conf, f_pred, f_top5)

    def part(self, rows: slice | np.ndarray) -> StageRecord:
        """The record of some of the images."""
        return StageRecord(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @classmethod
    def concatenate(cls, parts: Sequence[StageRecord]) -> StageRecord:
        """Joins records of several batches, in order."""
        if not parts:
            raise ValueError("there are no images to evaluate")
        return cls(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)})


def _stage(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, predicted class and top-5 hit of one stage."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    pred = logits.argmax(axis=1)
    label_scores = np.take_along_axis(logits, labels[:, None], axis=1)
    # fewer than five classes score strictly higher: ties count as hits, as in topk with a lucky order
    top5 = (logits > label_scores).sum(axis=1) < 5
    return 1.0 / shifted.sum(axis=1), pred.astype(np.int64), top5


@dataclass(frozen=True)
class SweepCurve:
    """Results at T thresholds, ascending: from all images exiting (η = 0) to all refined (η = 1).

    Attributes:
        threshold: η [T].
        share_refined: Share of images that go on to the fine stage [T].
        top1, top5: Accuracy of the dynamic result [T], 0 to 1.
        coarse_top1_exited: Accuracy of the coarse answer on the images that exit [T]; NaN where none exits.
        fine_top1_refined: Accuracy of the fine answer on the images that are refined [T]; NaN where none is.
        gflops: Per convention, mean GFLOPs per image [T].
        ms: Milliseconds per image [T], if measured times were given.
    """

    threshold: np.ndarray
    share_refined: np.ndarray
    top1: np.ndarray
    top5: np.ndarray
    coarse_top1_exited: np.ndarray
    fine_top1_refined: np.ndarray
    gflops: dict[str, np.ndarray]
    ms: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.threshold)

    def row(self, index: int) -> dict[str, float]:
        """One threshold's results by name, GFLOPs as ``gflops_<convention>``."""
        names = [f.name for f in fields(self) if f.name not in ("gflops", "ms")]
        row = {name: float(getattr(self, name)[index]) for name in names}
        row.update({f"gflops_{name}": float(values[index]) for name, values in self.gflops.items()})
        if self.ms is not None:
            row["ms"] = float(self.ms[index])
        return row

    def thinned(self, points: int = 101) -> SweepCurve:
        """At most `points` thresholds, evenly spread over the share refined; both ends are kept."""
        if len(self) <= points:
            return self
        shares = np.linspace(self.share_refined[0], self.share_refined[-1], points)
        return self._take(np.unique(np.searchsorted(self.share_refined, shares).clip(0, len(self) - 1)))

    def _take(self, index: np.ndarray) -> SweepCurve:
        arrays = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name not in ("gflops", "ms")}
        return SweepCurve(
            **arrays,
            gflops={name: values[index] for name, values in self.gflops.items()},
            ms=None if self.ms is None else self.ms[index],
        )


def candidate_thresholds(confidence: np.ndarray) -> np.ndarray:
    """Every threshold that splits the images differently: 0, the middles between neighbouring confidences, and 1.

    Middles, because a confidence moves by rounding with the batch size: a threshold on top of one would be a coin toss.
    """
    values = np.unique(confidence)
    middles = (values[1:] + values[:-1]) / 2
    # below the smallest confidence everything exits (that is 0), above the largest everything is refined (that is 1)
    inside = middles[(middles > values[:-1]) & (middles > 0) & (middles < 1)] if len(values) > 1 else middles
    return np.concatenate([[0.0], inside, [1.0]])


def sweep(
    record: StageRecord,
    costs: dict[str, StageCost] | None = None,
    *,
    thresholds: Sequence[float] | None = None,
    ms_coarse: float | None = None,
    ms_refined: float | None = None,
) -> SweepCurve:
    """Dynamic results at every threshold (or at `thresholds`).

    Args:
        record: Both stages' answers on N images.
        costs: Per convention, the cost of the stages; gives ``gflops``.
        thresholds: η to evaluate; default: all that make a difference.
        ms_coarse, ms_refined: Measured milliseconds per image with all images exiting and with all refined. If both are
            given, ``ms`` interpolates linearly in the share refined: exact for a batch that is split without overhead.

    Raises:
        ValueError: No images.
    """
    n = len(record)
    if n == 0:
        raise ValueError("there are no images to evaluate")
    order = np.argsort(record.confidence, kind="stable")
    ascending = record.confidence[order]
    if thresholds is None:
        eta = candidate_thresholds(record.confidence)
    else:
        eta = np.unique(np.asarray(thresholds, dtype=np.float64))
        if not np.isfinite(eta).all():
            raise ValueError("thresholds must be finite numbers")
    refined = np.searchsorted(ascending, eta, side="left")  # images with confidence < eta
    refined[eta <= 0], refined[eta >= 1] = 0, n

    def below(hits: np.ndarray) -> np.ndarray:
        """Hits among the `refined` least confident images [T]."""
        return np.concatenate([[0], np.cumsum(hits[order])])[refined]

    coarse, fine = record.coarse_correct, record.fine_correct
    exited_hits, refined_hits = coarse.sum() - below(coarse), below(fine)
    share = refined / n
    with np.errstate(invalid="ignore"):
        exited_acc = np.where(refined < n, exited_hits / np.maximum(n - refined, 1), np.nan)
        refined_acc = np.where(refined > 0, refined_hits / np.maximum(refined, 1), np.nan)
    ms = None
    if ms_coarse is not None and ms_refined is not None:
        ms = ms_coarse + share * (ms_refined - ms_coarse)
    return SweepCurve(
        threshold=eta,
        share_refined=share,
        top1=(exited_hits + refined_hits) / n,
        top5=(record.coarse_top5.sum() - below(record.coarse_top5) + below(record.fine_top5)) / n,
        coarse_top1_exited=exited_acc,
        fine_top1_refined=refined_acc,
        gflops={name: np.array([cost.gflops(s) for s in share.tolist()]) for name, cost in (costs or {}).items()},
        ms=ms,
    )


def pick_acc_drop(curve: SweepCurve, max_drop: float) -> int:
    """Index of the cheapest threshold whose top-1 is at most `max_drop` (0 to 1) below refining every image."""
    if not 0 <= max_drop <= 1:
        raise ValueError(f"the accepted accuracy drop must be in [0, 1] (0.005 is half a point), got {max_drop!r}")
    if curve.share_refined[-1] < 1:
        raise ValueError("the curve must contain the threshold 1 (refine every image) to measure a drop against it")
    eligible = np.flatnonzero(curve.top1 >= curve.top1[-1] - max_drop - 1e-12)
    return int(eligible[np.argmin(curve.share_refined[eligible])])


def pick_budget(curve: SweepCurve, cost: np.ndarray, target: float, unit: str) -> int:
    """Index of the most accurate threshold whose mean `cost` [T] is at most `target`; ties go to the cheaper one.

    Raises:
        ValueError: The coarse stage alone costs more than `target` (the message gives the possible range).
    """
    eligible = np.flatnonzero(cost <= target * (1 + 1e-9))
    if not eligible.size:
        raise ValueError(
            f"a target of {target:g} {unit} cannot be met: this model needs {cost[0]:.3g} {unit} for the coarse stage "
            f"alone and {cost[-1]:.3g} {unit} for refining every image"
        )
    best = eligible[curve.top1[eligible] >= curve.top1[eligible].max() - 1e-12]
    return int(best[np.argmin(cost[best])])


def pick_gflops(curve: SweepCurve, target: float, convention: str = "one_direction") -> int:
    """Index of the most accurate threshold that costs at most `target` GFLOPs per image on average."""
    if convention not in curve.gflops:
        raise ValueError(f"convention must be one of {', '.join(curve.gflops) or 'none given'}, got {convention!r}")
    return pick_budget(curve, curve.gflops[convention], target, "GFLOPs")


def pick_ms(curve: SweepCurve, target: float) -> int:
    """Index of the most accurate threshold that takes at most `target` milliseconds per image on average."""
    if curve.ms is None:
        raise ValueError("a target in milliseconds needs measured times")
    return pick_budget(curve, curve.ms, target, "ms")


@dataclass(frozen=True)
class Target:
    """What a threshold is chosen for.

    Attributes:
        kind: ``"acc_drop"``: the cheapest threshold whose top-1 is at most `value` (0.005 is half a point) below
            refining every image. ``"gflops"``, ``"ms"``: the most accurate one with at most `value` per image.
        value: The bound.
        convention: Of the GFLOPs.
        confidence: Of ``"acc_drop"``: promise the bound for other images of the same kind with this probability
            (:mod:`mambascope.evaluation.promise`) instead of meeting it on the images at hand.
    """

    kind: str = "acc_drop"
    value: float = 0.005
    convention: str = "one_direction"
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("acc_drop", "gflops", "ms"):
            raise ValueError(f"kind must be acc_drop, gflops or ms, got {self.kind!r}")
        if not np.isfinite(self.value) or self.value < 0 or (self.kind == "acc_drop" and self.value > 1):
            accepted = "in [0, 1] (0.005 is half a point)" if self.kind == "acc_drop" else "a positive number"
            raise ValueError(f"target {self.kind} must be {accepted}, got {self.value!r}")
        if self.confidence is None:
            return
        if self.kind != "acc_drop":
            raise ValueError(f"confidence can be asked for with a target of acc_drop, got {self.kind}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, e.g. 0.95, got {self.confidence!r}")
        if not 0 < self.value < 1:
            raise ValueError(f"with a confidence the accepted drop must lie between 0 and 1, got {self.value!r}")

    def pick(self, curve: SweepCurve) -> int:
        """Index of the chosen threshold; raises ``ValueError`` if the target cannot be met."""
        if self.kind == "gflops":
            return pick_gflops(curve, self.value, self.convention)
        return pick_ms(curve, self.value) if self.kind == "ms" else pick_acc_drop(curve, self.value)

    def describe(self) -> str:
        """The rule in words."""
        if self.kind == "acc_drop":
            rule = f"fewest refined images with top-1 at most {100 * self.value:g} points below refining every image"
            kept = (
                ""
                if self.confidence is None
                else f", promised for other such images with a confidence of {self.confidence:g}"
            )
            return rule + kept
        unit = f"GFLOPs ({self.convention.replace('_', ' ')})" if self.kind == "gflops" else "ms"
        return f"highest top-1 with at most {self.value:g} {unit} per image"


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., arXiv 1706.04599), 0 to 1, over equal-width confidence bins.

    For the exit gate this is the mean gap between what the coarse stage claims and how often it is right.
    """
    conf, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if conf.shape != correct.shape or conf.ndim != 1 or not conf.size:
        raise ValueError(f"confidence and correct must be [N] with N > 0, got {conf.shape} and {correct.shape}")
    index = np.clip(np.ceil(conf * bins).astype(int) - 1, 0, bins - 1)
    gap = np.abs(np.bincount(index, correct, bins) - np.bincount(index, conf, bins))
    return float(gap.sum() / conf.size)


def oracle_top1(record: StageRecord) -> float:
    """Top-1 if the better stage could be known for each image: what a perfect gate would reach."""
    return float((record.coarse_correct | record.fine_correct).mean())
