"""Causal depthwise convolution over tokens, as the equation reads.

Shape letters: B batch, L tokens, E width, K taps.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mambascope.ops.selective_scan.reference import state_dtype


def causal_conv1d_reference(
    x_BLE: Tensor, weight_EK: Tensor, bias_E: Tensor | None, *, silu: bool, reverse: bool
) -> Tensor:
    """``y_t = act(bias + sum_k weight_k x_{t-K+1+k})`` with zeros before the first token; reversed: looks ahead."""
    dtype = state_dtype(x_BLE.dtype)
    x, weight = x_BLE.to(dtype), weight_EK.to(dtype)
    length, taps = x.shape[1], weight.shape[1]
    x = F.pad(x, (0, 0, 0, taps - 1) if reverse else (0, 0, taps - 1, 0))
    # the walk from the end meets the same taps in the opposite order
    order = range(taps - 1, -1, -1) if reverse else range(taps)
    y = sum(weight[:, k] * x[:, i : i + length] for i, k in enumerate(order))
    assert isinstance(y, Tensor)
    if bias_E is not None:
        y = y + bias_E.to(dtype)
    return (F.silu(y) if silu else y).to(x_BLE.dtype)
