"""One pass of both stages over a data set: what the threshold sweep, the report and the plots start from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mambascope.evaluation.sweep import StageRecord
from mambascope.models.gate import confidence
from mambascope.models.two_stage import is_two_stage
from mambascope.utils import evaluating, model_device, unpack


@dataclass
class Collected:
    """Answers on every image, and a random sample of the images themselves.

    Attributes:
        record: Both stages' answers on N images. For a one-stage model both are the same.
        images: Sample [K, C, H, W] as the model takes them, on the CPU.
        labels: Their labels [K] int64.
        index: Their places in the data [K] int64.
    """

    record: StageRecord
    images: Tensor
    labels: Tensor
    index: Tensor


def stage_answers(model: nn.Module, images: Tensor, alpha: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Coarse and fine logits [B, C] of every image and the gate's confidence [B].

    A one-stage model answers twice the same; its confidence is the largest class probability.
    """
    if is_two_stage(model):
        output = model.forward_scope(images, 1.0, alpha)
        return output.coarse_logits, output.logits, output.confidence
    logits = model(images)
    return logits, logits, confidence(logits)


def _stage(logits: Tensor, labels: Tensor, certainty: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, predicted class and top-5 hit of one stage."""
    logits = logits.float()
    label_logits = logits.gather(1, labels.unsqueeze(1))
    top5 = (logits > label_logits).sum(1) < 5
    return certainty.double().cpu().numpy(), logits.argmax(1).cpu().numpy(), top5.cpu().numpy()


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    keep: int = 0,
    seed: int = 0,
    alpha: float | None = None,
    progress: bool = True,
    description: str = "both stages",
) -> Collected:
    """Runs both stages once on every image.

    Memory does not grow with the number of classes: only the answers and `keep` images stay.

    Args:
        model: A MambaScope (or a one-stage classifier), on any device.
        loader: Gives (images [B, C, H, W], labels [B]).
        keep: Images to sample uniformly from the whole loader, in loader order.
        seed: Of that sample.
        alpha: Share of cells to refine; ``None`` for the model's.
        progress: Whether to show a progress bar.
        description: Its label.

    Raises:
        ValueError: The loader is empty or gives something else, a label is no class of the model, or a logit is NaN
            or inf.
    """
    device = model_device(model)
    rng = np.random.default_rng(seed)
    parts: list[StageRecord] = []
    sample: list[tuple[int, Tensor, int]] = []
    offset = 0
    with evaluating(model), tqdm(loader, desc=description, unit="batch", disable=not progress, leave=False) as bar:
        for batch in bar:
            images, labels = unpack(batch)
            coarse, fine, certainty = stage_answers(model, images.to(device), alpha)
            classes = coarse.shape[1]
            unknown = labels[(labels < 0) | (labels >= classes)]
            if len(unknown):
                raise ValueError(
                    f"label {int(unknown[0])} in the data is no class of the model, which has {classes} classes"
                )
            if not (bool(coarse.isfinite().all()) and bool(fine.isfinite().all())):
                raise ValueError(
                    f"the model returned NaN or inf for an image among {offset}..{offset + len(labels) - 1}"
                )
            y = labels.to(device).long()
            c_conf, c_pred, c_top5 = _stage(coarse, y, certainty)
            f_conf, f_pred, f_top5 = _stage(fine, y, confidence(fine))
            parts.append(StageRecord(y.cpu().numpy(), c_conf, c_pred, c_top5, f_conf, f_pred, f_top5))
            _reservoir(sample, images, labels, offset, keep, rng)
            offset += len(labels)
    record = StageRecord.concatenate([p for p in parts if len(p)])
    sample.sort(key=lambda item: item[0])
    return Collected(
        record=record,
        images=torch.stack([image for _, image, _ in sample]) if sample else torch.empty(0),
        labels=torch.tensor([label for _, _, label in sample], dtype=torch.long),
        index=torch.tensor([index for index, _, _ in sample], dtype=torch.long),
    )


def _reservoir(
    sample: list[tuple[int, Tensor, int]],
    images: Tensor,
    labels: Tensor,
    offset: int,
    keep: int,
    rng: np.random.Generator,
) -> None:
    """Algorithm R: after any number of images each of them is in the sample with the same probability."""
    for i in range(len(labels) if keep else 0):
        place = len(sample) if len(sample) < keep else int(rng.integers(0, offset + i + 1))
        if place < keep:
            item = (offset + i, images[i].detach().cpu().clone(), int(labels[i]))
            if place == len(sample):
                sample.append(item)
            else:
                sample[place] = item
