"""MambaEye's loss (arXiv 2511.19963). Shape letters: B batch, C classes, L glimpses."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
