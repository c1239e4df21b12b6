"""The scan as dispatcher operators with backward passes that are operators themselves.

``save`` asks for what the backward pass can use: the states that its chunks start from and the sum before the gate.
Without it (inference, or a caller of the raw operator who did not ask) the results hold empty tensors instead, and a
backward pass walks forward again.

Shape letters: B batch, L tokens, E inner width, N states, R dt rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambascope.ops._library import absent, define, dense, differentiable, present, where_present
from mambascope.ops.backends import implementation
from mambascope.ops.selective_scan.common import STATE_INTERVAL, Kept, ScanGrads, ScanSide, new_kept, state_dtype

_ONE = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_weight, Tensor? dt_bias, "
    "bool dt_softplus, bool reverse, str backend"
)
_TWO = (
    "Tensor x_f, Tensor proj_f, Tensor dt_weight_f, Tensor dt_bias_f, Tensor A_f, Tensor D_f, "
    "Tensor x_b, Tensor proj_b, Tensor dt_weight_b, Tensor dt_bias_b, Tensor A_b, Tensor D_b, "
    "Tensor? z, float scale, str backend"
)


def _optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else dense(tensor)


def _split(proj: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the columns ``dt_low | B | C``."""
    n = (proj.shape[-1] - rank) // 2
    dt, b, c = proj.split([rank, n, n], dim=-1)
    return dt, b, c


def _side(tensors: Sequence[Tensor], reverse: bool) -> ScanSide:
    x, proj, w, bias, A, D = tensors
    proj = dense(proj)
    dt, b, c = _split(proj, w.shape[1])
    return ScanSide(dense(x), dt, A, b, c, D, w, bias, reverse, proj)


def _nothing(x: Tensor) -> Kept:
    return Kept(x.new_empty(0, dtype=state_dtype(x.dtype)), x.new_empty(0))


def _fake_kept(save: bool, sides: int, x: Tensor, n: int, gated: bool) -> Kept:
    return new_kept(sides, x, n, gated) if save else _nothing(x)


def _reuse(states: Tensor, total: Tensor, x: Tensor, gated: bool) -> Kept | None:
    """What the forward pass kept, or None if it was not asked to keep anything that is needed."""
    needed = x.shape[1] > STATE_INTERVAL
    return None if (needed and not states.numel()) or (gated and not total.numel()) else Kept(states, total)


def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n = A.shape[1]
    side = ScanSide(dense(x), dense(dt), A, dense(B), dense(C), D, dt_weight, dt_bias, reverse)
    y, _, kept = implementation("scan", backend, x, n).scan_forward(
        (side,), _optional(z), scale=1.0, dt_softplus=dt_softplus, save=save, return_score=False
    )
    return y, *(kept or _nothing(x))


def _scan_fake(x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_fake_kept(rest[-1], 1, x, A.shape[1], rest[3] is not None)


def _scan_backward(
    grad: Tensor,
    states: Tensor,
    total: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    side = ScanSide(dense(x), dense(dt), A, dense(B), dense(C), D, dt_weight, dt_bias, reverse)
    (g,), dz = implementation("scan", backend, x, A.shape[1]).scan_backward(
        grad.contiguous(),
        (side,),
        _optional(z),
        _reuse(states, total, x, z is not None),
        scale=1.0,
        dt_softplus=dt_softplus,
    )
    return tuple(present(t, x) for t in (g.x, g.dt, g.A, g.B, g.C, g.D, dz, g.dt_weight, g.dt_bias))


def _like(tensor: Tensor | None, x: Tensor) -> Tensor:
    return absent(x) if tensor is None else tensor.new_empty(tensor.shape)


def _scan_backward_fake(grad: Tensor, states: Tensor, total: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(_like(t, x) for t in (x, *rest[:8]))


SCAN = define(f"selective_scan({_ONE}, bool save) -> (Tensor, Tensor, Tensor)", _scan, _scan_fake)
SCAN_BACKWARD = define(
    f"selective_scan_backward(Tensor grad, Tensor states, Tensor total, {_ONE}) -> ({', '.join(['Tensor'] * 9)})",
    _scan_backward,
    _scan_backward_fake,
)


def _scan_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.dt_softplus, ctx.reverse, ctx.backend, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], *tensors)


def _scan_autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    if grad is None:
        return (None,) * 13
    states, total, *tensors = ctx.saved_tensors
    grads = SCAN_BACKWARD(grad, states, total, *tensors, ctx.dt_softplus, ctx.reverse, ctx.backend)
    return (*where_present(tensors, grads), None, None, None, None)


differentiable("selective_scan", _scan_context, _scan_autograd)


def _two_sides(tensors: Sequence[Tensor]) -> tuple[ScanSide, ScanSide]:
    return _side(tensors[:6], reverse=False), _side(tensors[6:], reverse=True)


def _bidirectional(*args: Any) -> tuple[Tensor, ...]:
    *tensors, z, scale, backend, save, return_score = args
    x, n = tensors[0], tensors[4].shape[1]
    module = implementation("scan", backend, x, n)
    joint = getattr(module, "joint_forward", None)
    if joint is not None:
        out, score, kept = joint(tensors, z, scale=scale, save=save, return_score=return_score)
    else:
        out, score, kept = module.scan_forward(
            _two_sides(tensors),
            _optional(z),
            scale=scale,
            dt_softplus=True,
            save=save,
            return_score=return_score,
        )
    return out, x.new_empty(0, dtype=state_dtype(x.dtype)) if score is None else score, *(kept or _nothing(x))


def _bidirectional_fake(*args: Any) -> tuple[Tensor, ...]:
    x, n, gated, (save, return_score) = args[0], args[4].shape[1], args[12] is not None, args[-2:]
    score = x.new_empty(x.shape[:2] if return_score else (0,), dtype=state_dtype(x.dtype))
    return x.new_empty(x.shape), score, *_fake_kept(save, 2, x, n, gated)


def _bidirectional_backward(grad: Tensor, states: Tensor, total: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, z, scale, backend = args
    x = tensors[0]
    grads, dz = implementation("scan", backend, x, tensors[4].shape[1]).scan_backward(
        grad.contiguous(),
        _two_sides(tensors),
        _optional(z),
        _reuse(states, total, x, z is not None),
        scale=scale,
        dt_softplus=True,
    )
    return (*_flat(grads[0], x), *_flat(grads[1], x), present(dz, x))


def _flat(g: ScanGrads, x: Tensor) -> tuple[Tensor, ...]:
    """Gradients in the order of the operator's arguments; the columns of ``proj`` are put together again."""
    if g.proj is None:
        assert g.dt is not None
        assert g.B is not None
        assert g.C is not None
        proj = torch.cat([g.dt, g.B, g.C], -1)
    else:
        proj = g.proj
    return g.x, proj, *(present(t, x) for t in (g.dt_weight, g.dt_bias, g.A, g.D))


def _bidirectional_backward_fake(grad: Tensor, states: Tensor, total: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(_like(t, args[0]) for t in args[:13])


BIDIRECTIONAL = define(
    f"bidirectional_scan({_TWO}, bool save, bool return_score) -> (Tensor, Tensor, Tensor, Tensor)",
    _bidirectional,
    _bidirectional_fake,
)
BIDIRECTIONAL_BACKWARD = define(
    f"bidirectional_scan_backward(Tensor grad, Tensor states, Tensor total, {_TWO}) -> ({', '.join(['Tensor'] * 13)})",
    _bidirectional_backward,
    _bidirectional_backward_fake,
)


def _bidirectional_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.backend, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:], *tensors)


def _bidirectional_autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    if grad is None:
        return (None,) * 17
    states, total, *tensors = ctx.saved_tensors
    grads = BIDIRECTIONAL_BACKWARD(grad, states, total, *tensors, ctx.scale, ctx.backend)
    return (*where_present(tensors, grads), None, None, None, None)


differentiable("bidirectional_scan", _bidirectional_context, _bidirectional_autograd)
