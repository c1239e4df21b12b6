"""Public scan functions: check the arguments, then call the operator.

Shape letters: B batch, L tokens, E inner width, N states, R dt rank.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch.nn.functional as F
from torch import Tensor

from mambascope.ops._checks import check_sequence, check_tensor
from mambascope.ops._library import call, needs_grad
from mambascope.ops.backends import check_backend, resolve
from mambascope.ops.selective_scan.common import state_dtype
from mambascope.ops.selective_scan.op import BIDIRECTIONAL, SCAN


class ScanDirection(NamedTuple):
    """What one direction of a bidirectional mixer feeds its scan.

    Attributes:
        x: Tokens after convolution and SiLU [B, L, E].
        proj: Output of ``x_proj`` [B, L, R + 2N], read as ``dt_low | B | C``.
        dt_weight: [E, R]; ``None`` if ``proj`` is [B, L, E + 2N] and holds the step sizes themselves.
        dt_bias: [E]; with ``dt_weight=None`` it may be ``None``.
        A: [E, N], negative.
        D: [E].
    """

    x: Tensor
    proj: Tensor
    dt_weight: Tensor | None
    dt_bias: Tensor | None
    A: Tensor
    D: Tensor


_LETTERS = ("[B, L, E]", "[B, L, R + 2N]", "[E, R]", "[E]", "[E, N]", "[E]")
_FORWARD_NAMES, _BACKWARD_NAMES = (
    [f"{side}.{name}" for name in ScanDirection._fields] for side in ("forward", "backward")
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Selective scan over the token axis (Mamba, arXiv 2312.00752, eq. 2 and 4).

    ``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t``, ``y_t = (h_t . C_t + D x_t) * SiLU(z_t)``.

    Every argument may be a strided view whose last dimension is contiguous. State, softplus and gate are computed in
    fp32 (fp64 for fp64 `x`) whatever the input dtypes, also under autocast. Differentiable in every tensor.

    Args:
        x: [B, L, E].
        dt: Step sizes before bias and softplus [B, L, E], or their low-rank form [B, L, R] if `dt_weight` is given.
        A: [E, N], negative.
        B: [B, L, N].
        C: [B, L, N].
        D: Skip weight [E].
        z: Gate [B, L, E].
        dt_weight: [E, R]; ``dt @ dt_weight.T`` is used as `dt`.
        dt_bias: [E], added to `dt`.
        dt_softplus: Whether softplus is applied to `dt`.
        reverse: Walk from the last token to the first. The output keeps the original order.
        backend: Name of a backend, ``None`` for ``MAMBASCOPE_SCAN_BACKEND`` or the automatic choice.

    Returns:
        y [B, L, E] in the dtype of `x`.

    Raises:
        ValueError: A shape, dtype or device that does not fit, or an unknown backend.
    """
    check_backend(backend)
    check_sequence("x", x, "[B, L, E]")
    batch, length, width = x.shape
    if not isinstance(A, Tensor) or A.dim() != 2:
        raise ValueError(f"A must be [E, N], got {list(A.shape) if isinstance(A, Tensor) else type(A).__name__}")
    states = A.shape[1]
    check_tensor("A", A, "[E, N]", (width, states), x)
    if dt_weight is None:
        check_tensor("dt", dt, "[B, L, E]", (batch, length, width), x)
    else:
        check_sequence("dt", dt, "[B, L, R]")
        check_tensor("dt", dt, "[B, L, R]", (batch, length, dt.shape[-1]), x)
        check_tensor("dt_weight", dt_weight, "[E, R]", (width, dt.shape[-1]), x)
    check_tensor("B", B, "[B, L, N]", (batch, length, states), x)
    check_tensor("C", C, "[B, L, N]", (batch, length, states), x)
    if D is not None:
        check_tensor("D", D, "[E]", (width,), x)
    if z is not None:
        check_tensor("z", z, "[B, L, E]", (batch, length, width), x)
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, "[E]", (width,), x)
    tensors = (x, dt, A, B, C, D, z, dt_weight, dt_bias)
    grad = needs_grad(*tensors)
    chosen = resolve("scan", backend, x.device.type, x.dtype, states)
    y, *_ = call(SCAN, grad, *tensors, dt_softplus, reverse, chosen, grad)
    return y


@overload
def bidirectional_scan(
    forward: ScanDirection,
    backward: ScanDirection,
    z: Tensor | None,
    *,
    scale: float = 0.5,
    return_score: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def bidirectional_scan(
    forward: ScanDirection,
    backward: ScanDirection,
    z: Tensor | None,
    *,
    scale: float = 0.5,
    return_score: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def bidirectional_scan(
    forward: ScanDirection,
    backward: ScanDirection,
    z: Tensor | None,
    *,
    scale: float = 0.5,
    return_score: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Both directions of a Vim mixer in one call: ``scale * (y_f + y_b) * SiLU(z)`` (Vim, arXiv 2401.09417, alg. 1).

    Args:
        forward: Inputs of the walk from the first token to the last.
        backward: Inputs of the walk from the last token to the first, in the original token order.
        z: Gate [B, L, E], or ``None``.
        scale: Factor of the sum; 0.5 in Vim.
        return_score: Also return the token score.
        backend: Name of a backend, ``None`` for ``MAMBASCOPE_SCAN_BACKEND`` or the automatic choice.

    Returns:
        The mixed tokens [B, L, E] in the dtype of ``forward.x``; with `return_score` also the score [B, L] fp32 (fp64
        for fp64 inputs), ``max over channels of (y_f + y_b)`` before gate and scale, without gradient (MambaScope,
        eq. 11: the caller applies softplus, which is monotone).

    Raises:
        ValueError: A shape, dtype or device that does not fit, or an unknown backend.
    """
    check_backend(backend)
    check_sequence("forward.x", forward.x, "[B, L, E]")
    batch, length, width = forward.x.shape
    if not isinstance(forward.A, Tensor) or forward.A.dim() != 2:
        raise ValueError("forward.A must be [E, N]")
    states = forward.A.shape[1]
    if forward.dt_weight is None or backward.dt_weight is None:
        return _one_by_one(forward, backward, z, scale, return_score, backend)
    if not isinstance(forward.dt_weight, Tensor) or forward.dt_weight.dim() != 2:
        raise ValueError("forward.dt_weight must be [E, R]")
    rank = forward.dt_weight.shape[1]
    shapes = (
        (batch, length, width),
        (batch, length, rank + 2 * states),
        (width, rank),
        (width,),
        (width, states),
        (width,),
    )
    for direction, names in ((forward, _FORWARD_NAMES), (backward, _BACKWARD_NAMES)):
        for name, tensor, letters, shape in zip(names, direction, _LETTERS, shapes, strict=True):
            check_tensor(name, tensor, letters, shape, forward.x)
    if backward.x.dtype != forward.x.dtype:
        raise ValueError(f"backward.x must be {forward.x.dtype} as forward.x is, got {backward.x.dtype}")
    if z is not None:
        check_tensor("z", z, "[B, L, E]", (batch, length, width), forward.x)
    tensors = (*forward, *backward, z)  # the fields of a direction are the operands, in the order of the operator
    grad = needs_grad(*tensors)
    chosen = resolve("scan", backend, forward.x.device.type, forward.x.dtype, states)
    out, score, *_ = call(BIDIRECTIONAL, grad, *tensors, float(scale), chosen, grad, return_score)
    return (out, score) if return_score else out


def _one_by_one(
    forward: ScanDirection,
    backward: ScanDirection,
    z: Tensor | None,
    scale: float,
    return_score: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`bidirectional_scan` as two scans: the operator takes low-rank step sizes only."""
    if z is not None:
        check_tensor("z", z, "[B, L, E]", tuple(forward.x.shape), forward.x)
    sums = []
    for side, reverse in ((forward, False), (backward, True)):
        n = side.A.shape[1]
        dt, b, c = side.proj.split([side.proj.shape[-1] - 2 * n, n, n], dim=-1)
        y = selective_scan(
            side.x,
            dt,
            side.A,
            b,
            c,
            side.D,
            dt_weight=side.dt_weight,
            dt_bias=side.dt_bias,
            reverse=reverse,
            backend=backend,
        )
        sums.append(y.to(state_dtype(y.dtype)))
    total = sums[0] + sums[1]
    out = total * scale if z is None else total * scale * F.silu(z.to(total.dtype))
    out = out.to(forward.x.dtype)
    return (out, total.detach().amax(-1)) if return_score else out
