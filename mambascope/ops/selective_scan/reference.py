"""Selective scan written the way the equations read: a loop over tokens that autograd differentiates.

This is what every other backend is compared with. Its backward pass keeps several [B, E, N] tensors per token, so it is
for checks and short sequences only.

Shape letters: B batch, L tokens, E inner width, N states, R dt rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.ops.selective_scan.common import Kept, ScanGrads, ScanSide, new_kept, state_dtype, step_sizes

_TENSORS = tuple(name for name in ScanGrads._fields if name != "proj")


def scan_reference(side: ScanSide, *, dt_softplus: bool = True) -> Tensor:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t``, ``y_t = h_t . C_t + D x_t`` (Mamba, eq. 2 and 4).

    The result [B, L, E] is not gated and stays in the state's dtype, so that callers can sum directions before they
    round.
    """
    dtype = state_dtype(side.x.dtype)
    x_BLE, A_EN, B_BLN, C_BLN = (t.to(dtype) for t in (side.x, side.A, side.B, side.C))
    dt_BLE = step_sizes(side.dt, side.dt_weight, side.dt_bias, dt_softplus, dtype)
    length = x_BLE.shape[1]
    # unbind, not indexing: the backward of x[:, t] would make a full-size zero tensor for every token
    tokens = list(zip(*(t.unbind(1) for t in (x_BLE, dt_BLE, B_BLN, C_BLN)), strict=True))
    h_BEN = x_BLE.new_zeros(x_BLE.shape[0], *A_EN.shape)
    outputs = []
    for t in reversed(range(length)) if side.reverse else range(length):
        x_BE, dt_BE, b_BN, c_BN = tokens[t]
        h_BEN = torch.exp(dt_BE[..., None] * A_EN) * h_BEN + (dt_BE * x_BE)[..., None] * b_BN[:, None]
        outputs.append((h_BEN * c_BN[:, None]).sum(-1))
    y_BLE = torch.stack(outputs[::-1] if side.reverse else outputs, dim=1)
    return y_BLE if side.D is None else y_BLE + side.D.to(dtype) * x_BLE


def gated_sum_reference(
    sides: Sequence[ScanSide], z_BLE: Tensor | None, *, scale: float = 1.0, dt_softplus: bool = True
) -> tuple[Tensor, Tensor]:
    """``scale * sum_i(y_i) * SiLU(z)`` in the dtype of x, and the plain sum in the state's dtype, both [B, L, E]."""
    total = scan_reference(sides[0], dt_softplus=dt_softplus)
    for side in sides[1:]:
        total = total + scan_reference(side, dt_softplus=dt_softplus)
    out = total * scale
    if z_BLE is not None:
        out = out * F.silu(z_BLE.to(total.dtype))
    return out.to(sides[0].x.dtype), total


def scan_forward(
    sides: Sequence[ScanSide],
    z: Tensor | None,
    *,
    scale: float,
    dt_softplus: bool,
    save: bool,
    return_score: bool,
) -> tuple[Tensor, Tensor | None, Kept | None]:
    """Output [B, L, E] and score [B, L] if asked for. What is kept is unused: the backward pass starts from scratch."""
    out, total = gated_sum_reference(sides, z, scale=scale, dt_softplus=dt_softplus)
    kept = new_kept(len(sides), sides[0].x, sides[0].A.shape[1], z is not None) if save else None
    for buffer in kept or ():
        buffer.zero_()
    return out, total.amax(-1) if return_score else None, kept


def scan_backward(
    grad: Tensor,
    sides: Sequence[ScanSide],
    z: Tensor | None,
    kept: Kept | None,
    *,
    scale: float,
    dt_softplus: bool,
) -> tuple[list[ScanGrads], Tensor | None]:
    """Gradients of every side and of `z` by differentiating the loop."""
    slots = [(i, name) for i, side in enumerate(sides) for name in _TENSORS if getattr(side, name) is not None]
    primals = [getattr(sides[i], name) for i, name in slots] + ([] if z is None else [z])

    def run(*tensors: Tensor) -> Tensor:
        parts = list(sides)
        for (i, name), tensor in zip(slots, tensors, strict=False):
            parts[i] = parts[i]._replace(**{name: tensor})  # type: ignore[arg-type]
        gate = None if z is None else tensors[-1]
        return gated_sum_reference(parts, gate, scale=scale, dt_softplus=dt_softplus)[0]

    # vjp, not autograd.grad: inside an operator the dispatcher has switched autograd off
    pullback = torch.func.vjp(run, *primals)[1]
    cotangents = [g.contiguous() for g in pullback(grad)]
    grads: list[dict[str, Tensor | None]] = [dict.fromkeys(_TENSORS) for _ in sides]
    for (i, name), value in zip(slots, cotangents, strict=False):
        grads[i][name] = value
    return [ScanGrads(**g) for g in grads], None if z is None else cotangents[-1]  # type: ignore[arg-type]
