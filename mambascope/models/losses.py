"""Training losses of MambaScope (section 3.5, eq. 21) and of one-stage classifiers. B batch, C classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambascope.models import StageLogits
from mambascope.utils import share


def nonnegative(name: str, value: float) -> float:
    """Returns a number of at least 0; raises ``ValueError``, naming it, for anything else."""
    if not value >= 0:
        raise ValueError(f"{name} must be a number >= 0, got {value!r}")
    return value


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy in at least fp32.

    Args:
        logits: [B, C].
        target: Class indices [B] int64, or probabilities [B, C] as Mixup makes them.
        label_smoothing: Share of the probability spread evenly over all classes, 0 to 1.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if target.is_floating_point():
        target = target.to(logits.dtype)
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing)


def coarse_distillation(coarse: Tensor, fine: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(softmax(fine / T) || softmax(coarse / T))``, mean over the batch; no gradient reaches the fine logits.

    Scaled by T², so that its gradient keeps its size when T changes.

    Args:
        coarse: Coarse logits [B, C].
        fine: Fine logits [B, C].
        temperature: T, above 0.
    """
    dtype = torch.promote_types(coarse.dtype, torch.float32)
    student = F.log_softmax(coarse.to(dtype) / temperature, dim=-1)
    teacher = F.log_softmax(fine.detach().to(dtype) / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class ScopeLoss(nn.Module):
    """``CE(fine, y) + kl_weight * KL(fine || coarse) + coarse_ce_weight * CE(coarse, y)`` (eq. 21).

    The fine stage learns from the labels, the coarse stage from the fine one. Since the fine stage reads the coarse
    features, every parameter gets a gradient from each batch.

    Args:
        kl_weight: Weight of the distillation term.
        temperature: Softening of both distributions in the distillation term.
        coarse_ce_weight: Weight of the coarse stage's own cross entropy; the paper has none.
        label_smoothing: Of both cross entropies.
    """

    def __init__(
        self,
        kl_weight: float = 1.0,
        temperature: float = 1.0,
        coarse_ce_weight: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.kl_weight = nonnegative("kl_weight", kl_weight)
        self.coarse_ce_weight = nonnegative("coarse_ce_weight", coarse_ce_weight)
        self.label_smoothing = share("label_smoothing", label_smoothing, below_one=True)
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature!r}")
        self.temperature = temperature
        if kl_weight == 0 and coarse_ce_weight == 0:
            raise ValueError("kl_weight and coarse_ce_weight must not both be 0: nothing would train the coarse answer")

    def forward(self, output: StageLogits, target: Tensor) -> dict[str, Tensor]:
        """Computes the loss and its parts.

        Args:
            output: Logits [B, C] of both stages.
            target: Class indices [B] int64, or probabilities [B, C].

        Returns:
            ``loss``, and without gradient its parts ``fine_ce``, ``coarse_kl`` and ``coarse_ce``, unweighted.
        """
        fine_ce = cross_entropy(output.fine, target, self.label_smoothing)
        coarse_kl = coarse_distillation(output.coarse, output.fine, self.temperature)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.coarse_ce_weight > 0):
            coarse_ce = cross_entropy(output.coarse, target, self.label_smoothing)
        loss = fine_ce + self.kl_weight * coarse_kl
        if self.coarse_ce_weight > 0:
            loss = loss + self.coarse_ce_weight * coarse_ce
        return {
            "loss": loss,
            "fine_ce": fine_ce.detach(),
            "coarse_kl": coarse_kl.detach(),
            "coarse_ce": coarse_ce.detach(),
        }


class ClassificationLoss(nn.Module):
    """Cross entropy of a one-stage model.

    Args:
        label_smoothing: Share of the probability spread evenly over all classes.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = share("label_smoothing", label_smoothing, below_one=True)

    def forward(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss of logits [B, C] against class indices [B] or probabilities [B, C]; key ``loss``."""
        return {"loss": cross_entropy(output, target, self.label_smoothing)}
