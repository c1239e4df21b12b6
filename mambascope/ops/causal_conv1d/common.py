"""What all convolution backends share. Shape letters: B batch, L tokens, E width, K taps."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ConvSide(NamedTuple):
    """One direction of a convolution as a backend receives it (shapes are checked).

    Attributes:
        weight: [E, K].
        bias: [E] or ``None``.
        reverse: Anti-causal.
    """

    weight: Tensor
    bias: Tensor | None
    reverse: bool
