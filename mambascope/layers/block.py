"""Pre-norm block with the residual stream carried beside the hidden tokens."""

from __future__ import annotations

from timm.layers import DropPath
from torch import Tensor, nn

from mambascope.layers.look import BlockOffsets
from mambascope.layers.mixer import BidirectionalMamba
from mambascope.layers.norm import RMSNorm
from mambascope.layers.trace import BlockTrace


class VimBlock(nn.Module):
    """``residual += hidden; hidden = drop_path(mixer(RMSNorm(residual)))``.

    The block's own output is dropped, which is where it joins the residual stream: in the next block's addition.

    Args:
        mixer: The token mixer.
        dim: Model width d.
        norm_eps: Epsilon of the RMSNorm.
        drop_path: Probability of dropping this block's output for a whole image.
    """

    def __init__(self, mixer: BidirectionalMamba, dim: int, norm_eps: float = 1e-5, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, norm_eps)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        trace: tuple[str, ...] = (),
        offsets: BlockOffsets | None = None,
    ) -> tuple[Tensor, Tensor, BlockTrace | None]:
        """Mixes the tokens of the residual stream.

        Args:
            hidden: Output of the block before [B, L, d].
            residual: Residual stream that it joins [B, L, d].
            trace: Fields of :class:`~mambascope.layers.trace.BlockTrace` that are wanted.
            offsets: What this look adds to the parameters.

        Returns:
            The block's output [B, L, d], the residual stream that it joins [B, L, d] and, if asked for, the trace.
        """
        if offsets is None:
            normed, residual = self.norm(hidden, residual)
            out, left = self.mixer(normed, trace)
        else:
            normed, residual = self.norm(hidden, residual, offsets.norm)
            out, left = self.mixer(normed, trace, offsets)
        if left is not None and "tokens" in trace:
            left = left._replace(tokens=(residual.detach(), (residual + out).detach()))
        return self.drop_path(out), residual, left
