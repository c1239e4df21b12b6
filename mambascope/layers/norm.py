"""RMSNorm that also carries the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambascope.ops import add_rms_norm


class RMSNorm(nn.Module):
    """Adds the branch output to the residual stream, then normalises it (Vim's fused add + norm).

    Args:
        dim: Model width ``d``.
        eps: Added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(
        self, hidden: Tensor, residual: Tensor | None = None, offset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns ``(RMSNorm(residual + hidden), residual + hidden)``, both [B, L, d]; the sum is at least fp32.

        ``offset`` [d] is added to the gain.
        """
        weight = self.weight if offset is None else self.weight + offset
        return add_rms_norm(hidden, residual, weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
