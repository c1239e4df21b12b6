"""Feature reuse: coarse outputs as a hint for the fine stage (MambaScope eq. 17-19)."""

from __future__ import annotations

from timm.layers import Mlp
from torch import Tensor, nn

REUSE_KINDS = ("mlp", "linear", "off")


class FeatureReuse(nn.Module):
    """LayerNorm followed by an MLP (or one linear layer) on the coarse tokens.

    Args:
        dim: Model width d.
        kind: ``mlp`` (the paper's choice, GELU) or ``linear``.
        ratio: Hidden width of the MLP as a multiple of d.
    """

    def __init__(self, dim: int, kind: str = "mlp", ratio: float = 4.0) -> None:
        super().__init__()
        if kind not in ("mlp", "linear"):
            raise ValueError(f"reuse must be one of {', '.join(REUSE_KINDS)}, got {kind!r}")
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * ratio)) if kind == "mlp" else nn.Linear(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Maps coarse outputs [..., d] to additions for fine embeddings [..., d]."""
        return self.mlp(self.norm(features))
