"""What a block leaves for token scores.

Shape letters: B batch, L tokens, D model width, E inner width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockTrace(NamedTuple):
    """Inner results of a block, those that were asked for by name; the others are ``None``. Without gradient.

    Attributes:
        top: Largest SSM output of each token, both directions summed [B, L]. The fused scan returns it.
        outputs: SSM outputs of both directions with the D term, before the gate, in the tokens' order: two [B, L, E].
        steps: Step sizes of both directions: two [B, L, E].
        gate: The gate z before its SiLU [B, L, E].
        tokens: Residual stream before and after the block: two [B, L, D].
    """

    top: Tensor | None = None
    outputs: tuple[Tensor, Tensor] | None = None
    steps: tuple[Tensor, Tensor] | None = None
    gate: Tensor | None = None
    tokens: tuple[Tensor, Tensor] | None = None
