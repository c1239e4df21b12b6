"""Selective scan written the way the equations read: a loop over tokens that autograd differentiates.

This is what every other backend is compared with. It keeps several [B, E, N] tensors per token for the backward pass,
so it is for checks and short sequences only.

Shape letters: B batch, L tokens, E inner width, N states, R dt rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state and softplus: fp64 for fp64 inputs, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scan_reference(
    x_BLE: Tensor,
    dt_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor | None = None,
    *,
    dt_weight_ER: Tensor | None = None,
    dt_bias_E: Tensor | None = None,
    dt_softplus: bool = True,
    reverse: bool = False,
) -> Tensor:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t``, ``y_t = h_t . C_t + D x_t`` (Mamba, eq. 2 and 4).

    Args are those of :func:`mambascope.ops.selective_scan`. The result [B, L, E] is not gated and stays in the state's
    dtype, so that callers can sum directions before they round.
    """
    dtype = state_dtype(x_BLE.dtype)
    x_BLE, dt_BLE, A_EN, B_BLN, C_BLN = (t.to(dtype) for t in (x_BLE, dt_BLE, A_EN, B_BLN, C_BLN))
    if dt_weight_ER is not None:
        dt_BLE = dt_BLE @ dt_weight_ER.to(dtype).T
    if dt_bias_E is not None:
        dt_BLE = dt_BLE + dt_bias_E.to(dtype)
    if dt_softplus:
        dt_BLE = F.softplus(dt_BLE)
    length = x_BLE.shape[1]
    # unbind, not indexing: the backward of x[:, t] would make a full-size zero tensor for every token
    tokens = list(zip(*(t.unbind(1) for t in (x_BLE, dt_BLE, B_BLN, C_BLN)), strict=True))
    h_BEN = x_BLE.new_zeros(x_BLE.shape[0], *A_EN.shape)
    outputs = []
    for t in reversed(range(length)) if reverse else range(length):
        x_BE, dt_BE, b_BN, c_BN = tokens[t]
        h_BEN = torch.exp(dt_BE[..., None] * A_EN) * h_BEN + (dt_BE * x_BE)[..., None] * b_BN[:, None]
        outputs.append((h_BEN * c_BN[:, None]).sum(-1))
    y_BLE = torch.stack(outputs[::-1] if reverse else outputs, dim=1)
    return y_BLE if D_E is None else y_BLE + D_E.to(dtype) * x_BLE


def gate_reference(y_BLE: Tensor, z_BLE: Tensor | None) -> Tensor:
    """``y * SiLU(z)`` in the dtype of `y`; `y` itself without a gate."""
    return y_BLE if z_BLE is None else y_BLE * F.silu(z_BLE.to(y_BLE.dtype))
