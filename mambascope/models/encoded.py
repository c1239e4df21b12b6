"""What goes into an encoder and comes out of it. Shape letters: B batch, M patches, L tokens, d model width."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mambascope.layers import BlockTrace


class Embedded(NamedTuple):
    """What the encoder reads.

    Attributes:
        tokens: Patches and CLS with positions [B, M + 1, d].
        grid: Rows and columns of the patches.
        stem_maps: What a stem made of the images, for dense models; none without a stem.
    """

    tokens: Tensor
    grid: tuple[int, int]
    stem_maps: list[Tensor]


class Encoded(NamedTuple):
    """What the encoder gives.

    Attributes:
        tokens: Normalised output [B, L, d]; not normalised if the encoder was stopped early.
        taken: Outputs [B, L, d] of the requested blocks, in ascending order: the residual stream after each.
        traces: What the requested blocks left for a token score, in ascending order.
    """

    tokens: Tensor
    taken: list[Tensor]
    traces: list[BlockTrace]


class Intermediates(NamedTuple):
    """Outputs of several blocks as maps.

    Attributes:
        final: Normalised tokens [B, L, d] of the last block that ran.
        maps: [B, d, h, w] each.
        cls: CLS rows [B, 1, d] each.
        stem_maps: What a stem made of the images; none without a stem.
    """

    final: Tensor
    maps: list[Tensor]
    cls: list[Tensor]
    stem_maps: list[Tensor]
