"""Training losses of MambaScope (section 3.5, eq. 21), of Vim with and without token reduction, and of MambaEye.

Shape letters: B batch, C classes, L glimpses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambascope.models import StageLogits
from mambascope.reduction import ReducedOutput


def _check_share(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
    return value


def _check_weight(name: str, value: float) -> float:
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
        self.kl_weight = _check_weight("kl_weight", kl_weight)
        self.coarse_ce_weight = _check_weight("coarse_ce_weight", coarse_ce_weight)
        self.label_smoothing = _check_share("label_smoothing", label_smoothing)
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
        self.label_smoothing = _check_share("label_smoothing", label_smoothing)

    def forward(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss of logits [B, C] against class indices [B] or probabilities [B, C]; key ``loss``."""
        return {"loss": cross_entropy(output, target, self.label_smoothing)}


def token_distillation(patches: Tensor, teacher: Tensor, kept: Tensor | None = None) -> Tensor:
    """``KL(softmax(teacher) || softmax(student))`` over the channels of each patch, mean over the patches (DyVM).

    Args:
        patches: The student's outputs [B, M, d].
        teacher: The teacher's outputs of the same patches [B, M, d].
        kept: 1 for the patches that count [B, M]; ``None`` for all.

    Returns:
        The mean; 0 if no patch counts.
    """
    student, target = (F.log_softmax(t.to(torch.promote_types(t.dtype, torch.float32)), -1) for t in (patches, teacher))
    each = F.kl_div(student, target.detach(), reduction="none", log_target=True).sum(-1)
    if kept is None:
        return each.mean()
    counts = (kept.detach() > 0.5).to(each.dtype)
    return (each * counts).sum() / counts.sum().clamp_min(1.0)


class ReductionLoss(nn.Module):
    """Loss of a Vim with token reduction: cross entropy, what the method adds, and what a teacher says.

    ``CE + sum of the method's terms + kl_weight * KL(teacher || student) + token_weight * token distillation``, the
    last two with the outputs of the unreduced Vim (R-MeeTo: 0.5 and 0; DyVM: 0.5 and 0.5).

    Args:
        label_smoothing: Of the cross entropy.
        kl_weight: Weight of the divergence between the logits.
        token_weight: Weight of the divergence between the patches that both have.
    """

    def __init__(self, label_smoothing: float = 0.0, kl_weight: float = 0.0, token_weight: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = _check_share("label_smoothing", label_smoothing)
        self.kl_weight = _check_weight("kl_weight", kl_weight)
        self.token_weight = _check_weight("token_weight", token_weight)

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with a teacher."""
        return self.kl_weight > 0 or self.token_weight > 0

    def forward(
        self,
        output: ReducedOutput,
        target: Tensor,
        penalties: dict[str, tuple[float, Tensor]],
        teacher: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Computes the loss and its parts.

        Args:
            output: Of the reduced Vim.
            target: Class indices [B] int64, or probabilities [B, C].
            penalties: Weight and value of the method's own terms.
            teacher: Logits [B, C] and patch outputs [B, M, d], in raster order, of the unreduced Vim.

        Returns:
            ``loss``, and without gradient its parts, unweighted.

        Raises:
            ValueError: If the teacher is missing, or its patches cannot be compared because tokens were merged.
        """
        parts = {"ce": cross_entropy(output.logits, target, self.label_smoothing)}
        loss = parts["ce"]
        weighted = dict(penalties)
        if self.needs_teacher:
            if teacher is None:
                raise ValueError("the teacher's outputs must be given: kl_weight or token_weight is above 0")
            weighted |= self._distilled(output, *teacher)
        for name, (weight, value) in weighted.items():
            loss, parts[name] = loss + weight * value, value
        return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}

    def _distilled(self, output: ReducedOutput, logits: Tensor, patches: Tensor) -> dict[str, tuple[float, Tensor]]:
        terms = {}
        if self.kl_weight > 0:
            terms["teacher_kl"] = (self.kl_weight, coarse_distillation(output.logits, logits))
        if self.token_weight > 0:
            if output.places is None:
                raise ValueError("token_weight must be 0 where tokens are merged: they are no patches of the teacher's")
            same = patches.gather(1, output.places.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
            terms["token_kl"] = (self.token_weight, token_distillation(output.patches, same, output.kept))
        return terms


class GlimpseLoss(nn.Module):
    """MambaEye's loss (arXiv 2511.19963): after each glimpse, be as sure of the class as the image has been seen.

    Cross entropy against ``q_t(k) = r_t 1[k = y] + (1 - r_t) / C`` with the information ratio ``r_t``, averaged over
    all glimpses. Its smallest value is the entropy of ``q``, not zero.

    Args:
        plain_ce: The paper's ablation: ``r_t = 1``, plain cross entropy after every glimpse.
    """

    def __init__(self, plain_ce: bool = False) -> None:
        super().__init__()
        self.plain_ce = plain_ce

    def forward(self, output: Tensor, target: Tensor, information_ratio: Tensor | None = None) -> dict[str, Tensor]:
        """Computes the loss.

        Args:
            output: Logits [B, L, C].
            target: Class indices [B] int64.
            information_ratio: [B, L]; not used by ``plain_ce``.

        Returns:
            ``loss``, and without gradient its ``floor``, the entropy of the target distribution.

        Raises:
            ValueError: If the information ratio is missing or does not fit.
        """
        logits = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.plain_ce:
            ratio = logits.new_ones(logits.shape[:2])
        elif information_ratio is None:
            raise ValueError("information_ratio must be given, or plain_ce set: without it the target is unknown")
        elif information_ratio.shape != logits.shape[:2]:
            raise ValueError(
                f"information_ratio must be {list(logits.shape[:2])} as the logits are, "
                f"got {list(information_ratio.shape)}"
            )
        else:
            ratio = information_ratio.to(logits.dtype)
        # -r l(y) - (1 - r) mean(l) with l = z - logsumexp(z), without a tensor of log-probabilities
        named = logits.gather(-1, target[:, None, None].expand(-1, logits.shape[1], 1)).squeeze(-1)
        loss = (logits.logsumexp(-1) - ratio * named - (1 - ratio) * logits.mean(-1)).mean()
        with torch.no_grad():
            classes = logits.shape[-1]
            spread = (1 - ratio) / classes
            peak = ratio + spread
            floor = -(torch.xlogy(peak, peak) + (classes - 1) * torch.xlogy(spread, spread)).mean()
        return {"loss": loss, "floor": floor}
