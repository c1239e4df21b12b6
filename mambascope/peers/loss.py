"""What a Vim with token reduction is trained with: labels, the method's own terms, and a teacher."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambascope.models.losses import ClassificationLoss, coarse_distillation, nonnegative
from mambascope.peers.base import ReducedOutput


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
        labels: What the labels ask for: from logits [B, C] and targets to the loss, or to a mapping with ``loss``;
            ``None`` for the cross entropy.
        kl_weight: Weight of the divergence between the logits.
        token_weight: Weight of the divergence between the patches that both have.
    """

    def __init__(self, labels: nn.Module | None = None, kl_weight: float = 0.0, token_weight: float = 0.0) -> None:
        super().__init__()
        self.labels = ClassificationLoss() if labels is None else labels
        self.kl_weight = nonnegative("kl_weight", kl_weight)
        self.token_weight = nonnegative("token_weight", token_weight)

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
        loss = self.labels(output.logits, target)
        loss = loss["loss"] if isinstance(loss, Mapping) else loss
        parts = {"ce": loss}
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
