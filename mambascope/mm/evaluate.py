"""A dense model at every exit threshold: quality, share refined, cost and measured time.

Both stages are run once on every image and their predictions kept; what a threshold gives follows by taking each
image's from the stage it would end in, because an image's result does not depend on its batch. N images.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import nn

from mambascope.evaluation.sweep import candidate_thresholds
from mambascope.evaluation.throughput import interleaved, quartiles
from mambascope.mm.dense import crop_sample
from mambascope.mm.loading import scope_backbone
from mambascope.mm.scope_backbone import ScopeBackbone
from mambascope.utils import model_device

# what is reported, and what it is called in mmseg's and mmdet's own tables
HEADLINES = {"mIoU": "mIoU", "bbox_mAP": "box AP", "segm_mAP": "mask AP"}
CONVENTIONS = ("both_directions", "one_direction")


@dataclass
class DenseRecord:
    """What both stages gave on N images.

    Attributes:
        confidence: Of the gate [N].
        presence: Gate probabilities [N, C].
        coarse, fine: Per metric, each image's entry as the metric keeps it.
        gflops: Per convention, backbone GFLOPs of an image that exits and of a refined one [N, 2].
    """

    confidence: np.ndarray
    presence: np.ndarray
    coarse: list[list[Any]]
    fine: list[list[Any]]
    gflops: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.confidence)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the tables that metrics print and log."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def build_metrics(cfg: Any, dataset_meta: dict) -> list[BaseMetric]:
    """The config's metrics of quality (not the gate's).

    Raises:
        ValueError: If there is none.
    """
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, (list, tuple)) else [cfg.test_evaluator]
    metrics = [METRICS.build(copy.deepcopy(e)) for e in evaluators if e["type"] != "GateMetric"]
    if not metrics:
        raise ValueError("test_evaluator of the config must have a metric besides GateMetric")
    for metric in metrics:
        metric.dataset_meta = dataset_meta
    return metrics


@torch.inference_mode()
def predictions(model: Any, loader: Iterable, metrics: Sequence[BaseMetric], progress: Any = None) -> list[list[Any]]:
    """Every metric's entries for all images of a loader, as the model is set; also works for a plain Vim."""
    for metric in metrics:
        metric.results = []
    for batch in loader if progress is None else progress(loader):
        samples = [sample.to_dict() for sample in model.test_step(batch)]
        for metric in metrics:
            metric.process(data_batch=batch, data_samples=samples)
    return [list(metric.results) for metric in metrics]


def collect(model: Any, loader: Iterable, metrics: Sequence[BaseMetric], progress: Any = None) -> DenseRecord:
    """Runs both stages on all images of a loader.

    Raises:
        ValueError: If the model has no gate, cuts images into windows, or there are no images.
    """
    backbone = scope_backbone(model)
    mode = (getattr(model, "test_cfg", None) or {}).get("mode", "whole")
    if mode != "whole":
        raise ValueError(f"test_cfg.mode must be 'whole' (windows decide one by one), got {mode!r}")
    parts: dict[str, list[list[Any]]] = {"coarse": [], "fine": []}
    seen: dict[str, list[dict[str, Any]]] = {"coarse": [], "fine": []}
    before = backbone.threshold
    try:
        for stage, threshold in (("coarse", 0.0), ("fine", 1.0)):
            backbone.threshold = threshold
            watcher = _Facts(seen[stage])
            parts[stage] = predictions(model, loader, [*metrics, watcher], progress and progress(stage))[:-1]
    finally:
        backbone.threshold = before
    if not seen["coarse"]:
        raise ValueError("there are no images to evaluate")
    gflops = {
        c: np.array([[a[f"gflops_{c}"], b[f"gflops_{c}"]] for a, b in zip(seen["coarse"], seen["fine"], strict=True)])
        for c in CONVENTIONS
    }
    return DenseRecord(
        confidence=np.array([fact["confidence"] for fact in seen["coarse"]]),
        presence=np.stack([fact["presence"] for fact in seen["coarse"]]),
        coarse=parts["coarse"],
        fine=parts["fine"],
        gflops=gflops,
    )


class _Facts(BaseMetric):
    """Keeps what the gate decided, in the order of the images."""

    def __init__(self, store: list[dict[str, Any]]) -> None:
        super().__init__()
        self.store = store

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        self.store += [sample["scope"] for sample in data_samples]

    def compute_metrics(self, results: list) -> dict:
        return {}


def scores(metrics: Sequence[BaseMetric], entries: Sequence[list[Any]]) -> dict[str, float]:
    """The headline figures (0 to 100) of entries per metric."""
    figures: dict[str, float] = {}
    with quiet():
        for metric, rows in zip(metrics, entries, strict=True):
            for name, value in metric.compute_metrics(rows).items():
                if name in HEADLINES:
                    # COCO's figures lie in [0, 1]; mmseg's are per cent already
                    figures[HEADLINES[name]] = float(value) * (1 if name == "mIoU" else 100)
    if not figures:
        raise ValueError(f"the config's metrics give none of {', '.join(HEADLINES)}")
    return figures


def thresholds_for(confidence: np.ndarray, points: int) -> np.ndarray:
    """At most ``points`` thresholds from 0 to 1 whose shares refined are spread evenly."""
    every = candidate_thresholds(confidence)
    share = np.array([_refined(confidence, t).mean() for t in every])
    targets = np.linspace(0, 1, max(2, points))
    return every[np.unique([int(np.abs(share - target).argmin()) for target in targets])]


def _refined(confidence: np.ndarray, threshold: float) -> np.ndarray:
    if threshold <= 0 or threshold >= 1:
        return np.full(len(confidence), threshold >= 1)
    return confidence < threshold


def sweep(record: DenseRecord, metrics: Sequence[BaseMetric], thresholds: Sequence[float]) -> list[dict[str, float]]:
    """Rows with ``threshold``, ``share_refined`` (0 to 1), ``gflops_<convention>`` and the headline figures."""
    rows = []
    for threshold in thresholds:
        refined = _refined(record.confidence, threshold)
        mixed = [
            [b if r else a for a, b, r in zip(coarse, fine, refined, strict=True)]
            for coarse, fine in zip(record.coarse, record.fine, strict=True)
        ]
        cost = {
            f"gflops_{c}": float(v[np.arange(len(v)), refined.astype(int)].mean()) for c, v in record.gflops.items()
        }
        rows.append(
            {"threshold": float(threshold), "share_refined": float(refined.mean()), **cost, **scores(metrics, mixed)}
        )
    return rows


def choose(rows: Sequence[dict[str, float]], max_drop: float) -> int:
    """Index of the row that refines least with every headline figure at most ``max_drop`` points below refining all."""
    full = max(rows, key=lambda row: row["share_refined"])
    names = [name for name in HEADLINES.values() if name in full]
    good = [i for i, row in enumerate(rows) if all(row[n] >= full[n] - max_drop - 1e-9 for n in names)]
    return min(good, key=lambda i: rows[i]["share_refined"])


# ---- measured time -------------------------------------------------------------------------------------------------


def resized(batch: dict, side: int) -> tuple[torch.Tensor, list[Any]]:
    """A prepared batch at another size: the short side becomes ``side`` pixels.

    Args:
        batch: ``inputs`` [B, 3, H, W] and ``data_samples``, as the model's data preprocessor returns them.
        side: In pixels.
    """
    inputs = batch["inputs"]
    scale = side / min(inputs.shape[-2:])
    size = [round(s * scale) for s in inputs.shape[-2:]]
    inputs = F.interpolate(inputs, size=size, mode="bilinear", align_corners=False)
    samples = copy.deepcopy(batch["data_samples"])
    for sample in samples:
        crop_sample(sample, tuple(size))
        sample.set_metainfo({"ori_shape": tuple(size), "scale_factor": (1.0, 1.0)})
    return inputs, samples


def measure(
    model: Any,
    plain: Any,
    batches: Sequence[dict],
    sides: Sequence[int],
    settings: dict[str, float],
    *,
    rounds: int = 5,
    max_seconds: float | None = None,
) -> list[dict[str, Any]]:
    """Milliseconds per image of the backbone alone and of the whole model, all modes interleaved at every size.

    Args:
        model: With a gate, on the device to measure.
        plain: The same with a plain Vim.
        batches: As loaders give them.
        sides: Short sides in pixels.
        settings: Threshold per mode; ``plain Vim`` is added.
        rounds: Timed rounds; the median counts.
        max_seconds: Per size and kind of measurement.
    """
    backbone = scope_backbone(model)
    device = model_device(model)
    prepared = [model.data_preprocessor(copy.deepcopy(b), False) for b in batches]
    rows: list[dict[str, Any]] = []
    threshold = backbone.threshold
    try:
        for side in sides:
            inputs = [resized(b, side) for b in prepared]
            count = sum(len(x) for x, _ in inputs)
            shares = {mode: _share_refined(backbone, inputs, value) for mode, value in settings.items()}
            exit_cost, refined_cost = backbone.cost(*inputs[0][0].shape[-2:])
            costs = {mode: exit_cost + share * (refined_cost - exit_cost) for mode, share in shares.items()}
            shares["plain Vim"], costs["plain Vim"] = 1.0, plain.backbone.cost(*inputs[0][0].shape[-2:])[1]
            times: dict[str, dict[str, list[float]]] = {}
            for kind in ("backbone", "model"):
                runs = {mode: _runner(model, kind, inputs, value) for mode, value in settings.items()}
                runs["plain Vim"] = _runner(plain, kind, inputs, None)
                with torch.inference_mode():
                    times[kind] = interleaved(runs, device, rounds=rounds, max_seconds=max_seconds)
            for mode in ("plain Vim", *settings):
                row: dict[str, Any] = {
                    "side": side,
                    "mode": mode,
                    "threshold": settings.get(mode, float("nan")),
                    "share_refined": shares[mode],
                    "gflops_both_directions": costs[mode],
                }
                for kind, seconds in times.items():
                    low, mid, high = (1e3 * s / count for s in quartiles(seconds[mode]))
                    row |= {f"ms_{kind}": mid, f"ms_{kind}_low": low, f"ms_{kind}_high": high}
                rows.append(row)
    finally:
        backbone.threshold = threshold
    return rows


@torch.inference_mode()
def _share_refined(backbone: ScopeBackbone, inputs: Sequence[tuple[torch.Tensor, Any]], threshold: float) -> float:
    """Which share of the images is refined at a threshold, which stays set."""
    backbone.threshold = threshold
    return 1 - float(torch.cat([backbone.forward_scope(x).exited for x, _ in inputs]).double().mean())


def _runner(model: Any, kind: str, inputs: Sequence[tuple[Any, Any]], threshold: float | None) -> Callable[[], None]:
    def run() -> None:
        if threshold is not None:
            model.backbone.threshold = threshold
        for x, samples in inputs:
            if kind == "backbone":
                model.backbone(x)
            else:
                model.predict(x, samples)

    return run


def parameters(model: nn.Module) -> float:
    """Millions of parameters."""
    return sum(p.numel() for p in model.parameters()) / 1e6
