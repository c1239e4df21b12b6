"""Cross entropy with class weights that also takes ignored pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class ClassWeightedCrossEntropy(nn.Module):
    """Weighted mean of the pixels' cross entropy; ignored pixels have no weight.

    What mmseg's ``CrossEntropyLoss(class_weight=...)`` computes, which fails at the first ignored pixel.

    Args:
        class_weight: One weight >= 0 per class.
        loss_weight: Of the whole.
        loss_name: Name in the log; must begin with ``loss`` to be trained on.

    Raises:
        ValueError: If there is no weight or one is negative.
    """

    def __init__(self, class_weight: Sequence[float], loss_weight: float = 1.0, loss_name: str = "loss_ce") -> None:
        super().__init__()
        if not class_weight or min(class_weight) < 0:
            raise ValueError(f"class_weight must be numbers >= 0, one per class, got {class_weight!r}")
        self.register_buffer("class_weight", torch.tensor(list(class_weight), dtype=torch.float32), persistent=False)
        self.loss_weight = loss_weight
        self.loss_name = loss_name

    def forward(
        self, logits: Tensor, labels: Tensor, weight: Tensor | None = None, ignore_index: int = 255, **_: Any
    ) -> Tensor:
        """Loss of logits [B, C, H, W] and labels [B, H, W]; 0 if every pixel is ignored.

        Args:
            logits: [B, C, H, W].
            labels: Classes [B, H, W].
            weight: Further weight of each pixel [B, H, W].
            ignore_index: Label of pixels that say nothing.

        Raises:
            ValueError: If there are other classes than weights.
        """
        if logits.shape[1] != len(self.class_weight):  # type: ignore[arg-type]
            raise ValueError(
                f"class_weight must have one weight for each of the {logits.shape[1]} classes, got "
                f"{len(self.class_weight)}"  # type: ignore[arg-type]
            )
        class_weight: Tensor = self.class_weight  # type: ignore[assignment]
        loss = F.cross_entropy(logits.float(), labels, class_weight, ignore_index=ignore_index, reduction="none")
        labelled = labels != ignore_index
        total = (class_weight[labels.where(labelled, torch.zeros_like(labels))] * labelled).sum()
        if weight is not None:
            loss = loss * weight
        return self.loss_weight * loss.sum() / total.clamp_min(torch.finfo(total.dtype).tiny)
