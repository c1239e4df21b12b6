"""The compiled CPU scan behind the interface that all scan backends have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mambascope.ops import native
from mambascope.ops.selective_scan.common import Kept, ScanGrads, ScanSide, new_kept


def _joint(sides: Sequence[ScanSide]) -> list[Any]:
    """Arguments of the bidirectional kernels."""
    return [t for s in sides for t in (s.x, s.proj, s.dt_weight, s.dt_bias, s.A, s.D)]


def scan_forward(
    sides: Sequence[ScanSide],
    z: Tensor | None,
    *,
    scale: float,
    dt_softplus: bool,
    save: bool,
    return_score: bool,
) -> tuple[Tensor, Tensor | None, Kept | None]:
    """Output [B, L, E], the score [B, L] if asked for and what to keep if asked for."""
    if len(sides) == 2:
        return joint_forward(_joint(sides), z, scale=scale, save=save, return_score=return_score)
    (s,) = sides
    x = s.x
    kept = new_kept(1, x, s.A.shape[1], False) if save else None
    states = kept.states if kept is not None and kept.states.numel() else None
    y = native.scan_forward(s.x, s.dt, s.A, s.B, s.C, s.D, z, s.dt_weight, s.dt_bias, dt_softplus, s.reverse, states)
    if kept is not None and z is not None:
        # this kernel computes y again for the gate, but the operator promises the buffer whatever the backend
        kept = kept._replace(total=x.new_zeros(x.shape))
    return y, None, kept


def joint_forward(
    tensors: Sequence[Tensor], z: Tensor | None, *, scale: float, save: bool, return_score: bool
) -> tuple[Tensor, Tensor | None, Kept | None]:
    """:func:`scan_forward` of both directions from the operands of the operator, in its order."""
    kept = new_kept(2, tensors[0], tensors[4].shape[1], False) if save else None
    states = kept.states if kept is not None and kept.states.numel() else None
    want_sum = save and z is not None
    arguments: list[Any] = [*tensors, z, scale, return_score, want_sum, states]
    out, total, score = native.bidirectional_forward(*arguments)
    return out, score, kept if kept is None or total is None else Kept(kept.states, total)


def scan_backward(
    grad: Tensor,
    sides: Sequence[ScanSide],
    z: Tensor | None,
    kept: Kept | None,
    *,
    scale: float,
    dt_softplus: bool,
) -> tuple[list[ScanGrads], Tensor | None]:
    """Gradients of every side and of `z`; without `kept` the forward walk runs again first."""
    if len(sides) == 2:
        if kept is None:
            _, _, kept = scan_forward(sides, z, scale=scale, dt_softplus=dt_softplus, save=True, return_score=False)
            assert kept is not None
        total, states = (t if t.numel() else None for t in (kept.total, kept.states))
        *gradients, dz = native.bidirectional_backward(grad, *[*_joint(sides), z, scale, total, states])
        grads = []
        for x, proj, weight, bias, A, D in (gradients[:6], gradients[6:]):
            assert x is not None
            assert A is not None
            grads.append(ScanGrads(x, None, A, None, None, D, weight, bias, proj))
        return grads, dz
    (s,) = sides
    states = kept.states if kept is not None and kept.states.numel() else None
    dx, ddt, dA, dB, dC, dD, dz, dweight, dbias = native.scan_backward(
        grad, s.x, s.dt, s.A, s.B, s.C, s.D, z, s.dt_weight, s.dt_bias, dt_softplus, s.reverse, states
    )
    assert dx is not None
    assert dA is not None
    return [ScanGrads(dx, ddt, dA, dB, dC, dD, dweight, dbias)], dz
