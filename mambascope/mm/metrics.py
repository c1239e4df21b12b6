"""What the gate did over a data set."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmengine.registry import METRICS


def average_precision(scores: np.ndarray, present: np.ndarray) -> float:
    """Area under the precision-recall steps of one class.

    Args:
        scores: Predicted probability [N].
        present: Whether the class is present [N] bool, at least once.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], present[order].astype(np.float64)
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # images of one score have no order among them
    true_positives = hits.cumsum()[last]
    precision, recall = true_positives / (last + 1), true_positives / hits.sum()
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def _num_views(data_batch: Any) -> int:
    """Views of each image; a batch of test-time augmentation is a list of batches."""
    inputs: Any = data_batch["inputs"] if isinstance(data_batch, Mapping) else ()
    return len(inputs) if len(inputs) and isinstance(inputs[0], (list, tuple)) else 1


@METRICS.register_module()
class GateMetric(BaseMetric):
    """Mean average precision of the gate, share refined, and mean backbone GFLOPs of a dense model.

    Reported as ``gate/mAP`` (0 to 100, over the classes that occur), ``gate/share_refined`` (0 to 100),
    ``gate/backbone_gflops`` (both scan directions) and ``gate/backbone_gflops_one_direction`` per image. With test-time
    augmentation that is the cost of all views, and needs ``ScopeSegTTAModel`` or ``ScopeDetTTAModel``: mmseg's and
    mmdet's own hand on what was decided for one view only, which is left out.

    Args:
        ignore_index: Label of pixels that say nothing.
        **kwargs: Of mmengine's ``BaseMetric``.
    """

    default_prefix = "gate"

    def __init__(self, ignore_index: int = 255, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_index = ignore_index

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keeps each image's decision, cost and gate probabilities beside the classes that are really there."""
        views = _num_views(data_batch)
        for sample in data_samples:
            if "scope" not in sample:
                raise ValueError("GateMetric needs a model with a gate (ScopeEncoderDecoder, ScopeCascadeRCNN)")
            fact = sample["scope"]
            if fact.get("views", 1) != views:
                continue
            self.results.append(
                {
                    "presence": fact["presence"],
                    "target": self._target(sample, len(fact["presence"])),
                    "refined": fact["refined"],
                    "both": fact["gflops_both_directions"],
                    "one": fact["gflops_one_direction"],
                }
            )

    def _target(self, sample: Mapping, num_classes: int) -> np.ndarray | None:
        if "gt_sem_seg" in sample:
            mask = sample["gt_sem_seg"]["data"].cpu().numpy()
            labels = np.unique(mask[mask != self.ignore_index])
            if not labels.size:
                return None  # nothing is known of an image without a labelled pixel
        elif "gt_instances" in sample and "labels" in sample["gt_instances"]:
            labels = np.unique(sample["gt_instances"]["labels"].cpu().numpy())
        else:
            return None
        target = np.zeros(num_classes, bool)
        target[labels[labels < num_classes]] = True
        return target

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The figures over all images; mAP is NaN if no image has labels, and nothing is known of single views."""
        if not results:
            print_log(
                "gate: left out, as the merged predictions have one view's decisions only; set tta_model.type to "
                "ScopeSegTTAModel or ScopeDetTTAModel",
                logger="current",
                level=logging.WARNING,
            )
            return {}
        labelled = [r for r in results if r["target"] is not None]
        value = float("nan")
        if labelled:
            scores = np.stack([r["presence"] for r in labelled])
            target = np.stack([r["target"] for r in labelled])
            classes = np.flatnonzero(target.any(0))
            if classes.size:
                value = float(np.mean([average_precision(scores[:, c], target[:, c]) for c in classes]))
        out = {
            "mAP": 100 * value,
            "share_refined": 100 * float(np.mean([r["refined"] for r in results])),
            "backbone_gflops": float(np.mean([r["both"] for r in results])),
            "backbone_gflops_one_direction": float(np.mean([r["one"] for r in results])),
        }
        print_log(
            f"gate: mAP {out['mAP']:.1f}, {out['share_refined']:.1f} % of {len(results)} images refined, "
            f"{out['backbone_gflops']:.4g} backbone GFLOPs per image ({out['backbone_gflops_one_direction']:.4g} with "
            "one scan direction)",
            logger="current",
        )
        return out
