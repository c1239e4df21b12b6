"""Parameters that one of two looks through the same encoder has to itself.

Networks that read one image at several resolutions do better with norms of their own for each (resolution-switchable
networks, arXiv 2007.09558, with batch norms). Here they are offsets to the shared parameters, zero at the start: a
model without them is the same model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


class BlockOffsets(nn.Module):
    """What a look adds to a block's norm gain, its step-size biases and its skip weights D, both directions.

    Args:
        dim: Model width d.
        inner: Inner width E.
    """

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.norm = _zeros(dim)
        self.dt_bias, self.dt_bias_b = _zeros(inner), _zeros(inner)
        self.D, self.D_b = _zeros(inner), _zeros(inner)

    def direction(self, reverse: bool) -> tuple[Tensor, Tensor]:
        """Offsets [E] of a direction's step-size bias and D."""
        return (self.dt_bias_b, self.D_b) if reverse else (self.dt_bias, self.D)


class LookOffsets(nn.Module):
    """What a look adds to an encoder's CLS token, its final norm's gain and its blocks.

    Args:
        dim: Model width d.
        inner: Inner width E.
        depth: Number of blocks.
    """

    def __init__(self, dim: int, inner: int, depth: int) -> None:
        super().__init__()
        self.cls_token = _zeros(1, 1, dim)
        self.norm_f = _zeros(dim)
        self.layers = nn.ModuleList(BlockOffsets(dim, inner) for _ in range(depth))
