"""Selective scans of the Triton kernels on torch tensors, forward and backward; nothing here knows of autograd.

Shape letters: B batch, L tokens, E channels, N states, R rank of the low-rank step size. Streamed tensors are float32,
bfloat16 or float16, channel-last, and may be views whose last dimension is contiguous. State, softplus and sums are
float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.ops.selective_scan.common import STATE_INTERVAL, Kept, ScanGrads, ScanSide, new_kept
from mambascope.ops.triton.launch import (
    alignment,
    matmul_float32,
    multiprocessors,
    on_device_of,
    power_of_two,
    same_strides,
    why_not_dtype,
    why_unavailable,
)

MAX_STATES = 64
_FORWARD_TOKENS = 4  # unrolled per chunk: L = 50 then wastes 12 % of the steps, 8 tokens would waste 28 %
_BACKWARD_TOKENS = 8
# With two channels per thread the compiler takes up to 255 registers; 168 let 12 warps share a multiprocessor and cost
# a few spilled words (read from the compiler's report for sm_90).
_REGISTERS = 168
_LONG = 512  # from here on a sequence may be cut into segments
_SHORTEST_SEGMENT = 128
_ROWS_TO_CONVERT = 8192  # rows from which converting B and C to float32 once beats doing it in every program
_PARTIAL_BYTES = 256 << 20


def supports(dtype: torch.dtype, E: int | None = None, N: int | None = None, device: str = "cuda") -> str | None:
    """Why the scan kernels refuse a problem, in words; ``None`` if they take it.

    Args:
        dtype: Dtype of the streamed tensors.
        E: Channels; any number.
        N: States, 1 to 64; powers of two without padding.
        device: Device type of the tensors.
    """
    reason = why_unavailable(device) or why_not_dtype(dtype)
    if reason is not None:
        return reason
    if E is not None and E < 1:
        return f"needs at least one channel, got E = {E}"
    if N is not None and not 1 <= N <= MAX_STATES:
        return f"takes 1 to {MAX_STATES} states, got N = {N}"
    return None


class _Inputs(NamedTuple):
    """Operands of one or two sides, paired for the kernels (a single side is given twice)."""

    x: tuple[Tensor, ...]
    dt: tuple[Tensor, ...]
    A: tuple[Tensor, ...]  # transposed [N, E], float32
    B: tuple[Tensor, ...]
    C: tuple[Tensor, ...]
    D: tuple[Tensor, ...]
    bias: tuple[Tensor, ...]
    z: Tensor
    directions: int
    reverse: bool
    softplus: bool
    has_d: bool
    has_bias: bool
    has_z: bool

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        batch, length, width = self.x[0].shape
        return batch, length, width, self.A[0].shape[0]


def _float32_pair(side: ScanSide) -> tuple[Tensor, Tensor]:
    """B and C as float32, in one launch where they are neighbouring columns of one tensor."""
    b, c = side.B, side.C
    n = b.shape[2]
    if b.stride() == c.stride() and c.data_ptr() == b.data_ptr() + n * b.element_size():
        columns = torch.as_strided(b, (*b.shape[:2], 2 * n), b.stride()).float()
        return columns[..., :n], columns[..., n:]
    return b.float(), c.float()


def _inputs(sides: Sequence[ScanSide], z: Tensor | None, dt_softplus: bool, convert: bool) -> _Inputs:
    if len(sides) not in (1, 2):
        raise ValueError(f"sides must hold one or two directions, got {len(sides)}")
    if len(sides) == 2 and [s.reverse for s in sides] != [False, True]:
        raise ValueError("two sides must be a forward and a reverse walk, in this order")
    x = sides[0].x
    reason = supports(x.dtype, x.shape[2], sides[0].A.shape[1], x.device.type)
    if reason is not None:
        raise ValueError(f"the triton scan {reason}")
    dts = [s.dt if s.dt_weight is None else F.linear(s.dt, s.dt_weight.to(s.dt.dtype)) for s in sides]
    pairs = [_float32_pair(s) if convert and s.B.dtype != torch.float32 else (s.B, s.C) for s in sides]
    has_d, has_bias = sides[0].D is not None, sides[0].dt_bias is not None
    if any((s.D is not None) != has_d or (s.dt_bias is not None) != has_bias for s in sides):
        raise ValueError("columns sides must have D and dt_bias, or neither")
    twice = 3 - len(sides)
    bc = same_strides(*(t for pair in pairs for t in pair))
    absent = sides[0].A  # never read: any pointer will do
    return _Inputs(
        x=same_strides(*(s.x for s in sides)) * twice,
        dt=same_strides(*dts) * twice,
        A=tuple(s.A.float().T.contiguous() for s in sides) * twice,
        B=bc[::2] * twice,
        C=bc[1::2] * twice,
        D=tuple(absent if s.D is None else s.D.contiguous() for s in sides) * twice,
        bias=tuple(absent if s.dt_bias is None else s.dt_bias.contiguous() for s in sides) * twice,
        z=absent if z is None else same_strides(z)[0],
        directions=len(sides),
        reverse=sides[0].reverse,
        softplus=dt_softplus,
        has_d=has_d,
        has_bias=has_bias,
        has_z=z is not None,
    )


def _strides(t: Tensor) -> tuple[int, int]:
    return (t.stride(0), t.stride(1)) if t.dim() == 3 else (0, 0)


class _Plan(NamedTuple):
    """How a problem is spread over programs."""

    channels: int  # per program and direction
    per_thread: int
    warps: int
    segment: int  # tokens
    segments: int
    blocks: int


def _plan(inputs: _Inputs, segment: int | None) -> _Plan:
    batch, length, width, n = inputs.sizes
    target = 2 * multiprocessors(inputs.x[0].device)
    # one channel per thread where states or idle multiprocessors ask for it; else two share the loads of B and C
    per_thread = 1 if n > 16 or batch * -(-width // 64) * inputs.directions < target else 2
    channels = 32 * per_thread
    blocks = -(-width // channels)
    if segment is None:
        count = 1
        if length >= _LONG:
            count = min(-(-target // (batch * blocks)), length // _SHORTEST_SEGMENT)
        segment = -(-length // max(1, count))
    segment = -(-segment // STATE_INTERVAL) * STATE_INTERVAL
    return _Plan(channels, per_thread, inputs.directions, segment, -(-length // segment), blocks)


def _state_tiles(n: int) -> dict[str, int]:
    block = min(16, power_of_two(n))
    return {"N": n, "NB": block, "NG": power_of_two(n) // block}


def _enter_segments(inputs: _Inputs, plan: _Plan, grad: Tensor | None, scale: float) -> Tensor:
    """State in which the walk enters each segment [directions, S, B, N, E]; with `grad`, the gradient at its end."""
    from mambascope.ops.triton.forward_kernels import segment_carry_kernel, segment_state_kernel

    batch, length, width, n = inputs.sizes
    device = inputs.x[0].device
    ends = torch.empty(inputs.directions, plan.segments, batch, n, width, dtype=torch.float32, device=device)
    dt_sums = torch.empty(inputs.directions, plan.segments, batch, width, dtype=torch.float32, device=device)
    towards = {"DIRS": inputs.directions, "REVERSE": inputs.reverse, "GRAD": grad is not None}
    v = inputs.B if grad is None else inputs.C
    g = inputs.z if grad is None else grad
    segment_state_kernel[(plan.blocks, plan.segments, batch)](
        *inputs.x, *inputs.dt, *v, *inputs.A, *inputs.bias, inputs.z, g, ends, dt_sums,
        batch, length, width, plan.segment, *_strides(inputs.x[0]), *_strides(inputs.dt[0]), *_strides(v[0]),
        *_strides(inputs.z), *_strides(g), scale,
        **_state_tiles(n), **towards, BE=plan.channels, CPT=plan.per_thread, T=_FORWARD_TOKENS, ALIGN=alignment(*v),
        SOFTPLUS=inputs.softplus, HAS_BIAS=inputs.has_bias, HAS_Z=inputs.has_z, num_warps=plan.warps,
    )  # fmt: skip
    segment_carry_kernel[(-(-width // 128), n, inputs.directions * batch)](
        ends, dt_sums, *inputs.A, batch, width, plan.segments, N=n, **towards, BE=128, num_warps=4
    )
    return ends


def run_forward(
    sides: Sequence[ScanSide],
    z: Tensor | None,
    *,
    scale: float = 1.0,
    dt_softplus: bool = True,
    save: bool = False,
    return_score: bool = False,
    segment: int | None = None,
) -> tuple[Tensor, Tensor | None, Kept | None]:
    """One scan, or a forward and a reverse scan in one launch: ``scale * (y_f + y_b) * SiLU(z)``.

    Args:
        sides: One direction, or a forward and a reverse one.
        z: Gate [B, L, E] or ``None``.
        scale: Factor on the sum.
        dt_softplus: Whether softplus is applied to the step sizes.
        save: Keep what the backward pass can use.
        return_score: Also return the token score [B, L] float32, the maximum over channels of the ungated sum.
        segment: Tokens per segment of a long sequence; ``None`` cuts it only if the GPU would idle otherwise.

    Returns:
        The output [B, L, E] in the dtype of x, the score and what was kept; the latter two ``None`` if not asked for.

    Raises:
        ValueError: Inputs that :func:`supports` refuses.
    """
    x = sides[0].x
    inputs = _inputs(sides, z, dt_softplus, convert=x.shape[0] * x.shape[1] >= _ROWS_TO_CONVERT)
    from mambascope.ops.triton.forward_kernels import scan_forward_kernel

    batch, length, width, n = inputs.sizes
    plan = _plan(inputs, segment)
    out = torch.empty(batch, length, width, dtype=x.dtype, device=x.device)
    kept = new_kept(inputs.directions, x, n, inputs.has_z) if save else None
    score = torch.empty(batch, length, plan.blocks, dtype=torch.float32, device=x.device) if return_score else None
    save_sum = kept is not None and inputs.has_z
    with on_device_of(x):
        starts = _enter_segments(inputs, plan, None, scale) if plan.segments > 1 else None
        spare = inputs.A[0]
        options = {} if plan.per_thread == 1 else {"maxnreg": _REGISTERS}
        scan_forward_kernel[(plan.blocks, plan.segments, batch)](
            *inputs.x, *inputs.dt, *inputs.B, *inputs.C, *inputs.A, *inputs.D, *inputs.bias, inputs.z,
            kept.total if kept is not None and save_sum else out, out, spare if kept is None else kept.states,
            spare if starts is None else starts, spare if score is None else score,
            batch, length, width, plan.segment, *_strides(inputs.x[0]), *_strides(inputs.dt[0]),
            *_strides(inputs.B[0]), *_strides(inputs.z), scale,
            **_state_tiles(n), DIRS=inputs.directions, REVERSE=inputs.reverse, BE=plan.channels, CPT=plan.per_thread,
            T=_FORWARD_TOKENS, KEEP=STATE_INTERVAL, ALIGN=alignment(*inputs.B, *inputs.C), SOFTPLUS=inputs.softplus,
            HAS_D=inputs.has_d, HAS_BIAS=inputs.has_bias, HAS_Z=inputs.has_z, SAVE_SUM=save_sum,
            SAVE_STATES=save and length > STATE_INTERVAL, HAS_STARTS=starts is not None, HAS_SCORE=return_score,
            num_warps=plan.warps, **options,
        )  # fmt: skip
    return out, None if score is None else score.amax(-1), kept


def run_backward(
    grad: Tensor,
    sides: Sequence[ScanSide],
    z: Tensor | None,
    kept: Kept | None = None,
    *,
    scale: float = 1.0,
    dt_softplus: bool = True,
    segment: int | None = None,
    atomic: bool | None = None,
) -> tuple[list[ScanGrads], Tensor | None]:
    """Gradients of :func:`run_forward`.

    Args:
        grad: Gradient of the output [B, L, E].
        sides: As in the forward pass; likewise `z`, `scale`, `dt_softplus` and `segment`.
        kept: What the forward pass kept, or ``None`` to walk forward again.
        atomic: Add the channel blocks' sums for B and C atomically: less memory, order of additions not fixed.
            ``None`` decides by the size of the buffer, and never takes it under deterministic algorithms.

    Returns:
        Gradients of every side and of `z`, in the dtypes of those; that of ``proj`` where a side has it.
    """
    if kept is None:
        _, _, kept = run_forward(sides, z, dt_softplus=dt_softplus, save=True, segment=segment)
        assert kept is not None
    inputs = _inputs(sides, z, dt_softplus, convert=False)
    from mambascope.ops.triton.backward_kernels import scan_backward_kernel, scan_pack_kernel, scan_unpack_kernel

    batch, length, width, n = inputs.sizes
    plan = _plan(inputs, segment)
    directions, t, x = inputs.directions, _BACKWARD_TOKENS, inputs.x[0]
    packed_shape = (directions, 2, batch, n, -(-length // t) * t)
    per_state = (directions, plan.segments, batch, n, width)
    grad, twice = same_strides(grad)[0], 3 - directions

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    packed = new(*packed_shape)
    if atomic is None:
        large = 4 * plan.blocks * packed.numel() > _PARTIAL_BYTES
        atomic = large and not torch.are_deterministic_algorithms_enabled()
    partial = torch.zeros_like(packed)[None] if atomic else new(plan.blocks, *packed_shape)
    dx = [new(batch, length, width, dtype=s.x.dtype) for s in sides]
    ddt = [new(batch, length, width, dtype=s.dt.dtype) for s in sides]
    joint = [None if s.proj is None else new(*s.proj.shape, dtype=s.proj.dtype) for s in sides]
    dB, dC = _columns(sides, joint, n)
    dz = None if z is None else new(batch, length, width, dtype=z.dtype)
    dA = new(*per_state).zero_()
    dD, dbias = (new(directions, plan.segments, batch, width) for _ in range(2))
    inner = new(directions, plan.segments, batch, STATE_INTERVAL // t - 1, n, width)
    tile = {"N": n, "NP": power_of_two(n), "DIRS": directions, "REVERSE": inputs.reverse, "T": t, "BL": 64}
    rows = (-(-packed_shape[-1] // 64), 2 * directions, batch)
    with on_device_of(x):
        carry = _enter_segments(inputs, plan, grad, scale) if plan.segments > 1 else new(*per_state).zero_()
        scan_pack_kernel[rows](*inputs.B, *inputs.C, packed, batch, length, *_strides(inputs.B[0]), **tile, num_warps=4)
        options = {} if plan.per_thread == 1 else {"maxnreg": _REGISTERS}
        scan_backward_kernel[(plan.blocks, directions * plan.segments, batch)](
            *inputs.x, *inputs.dt, *inputs.A, *inputs.D, *inputs.bias, inputs.z,
            kept.total if inputs.has_z else packed, grad, packed, kept.states if kept.states.numel() else packed,
            inner, carry, *dx * twice, *ddt * twice, packed if dz is None else dz, partial, dA, dD, dbias,
            batch, length, width, plan.segment, plan.segments, *_strides(x), *_strides(inputs.dt[0]),
            *_strides(inputs.z), *_strides(grad), scale,
            N=n, DIRS=directions, REVERSE=inputs.reverse, BE=plan.channels, CPT=plan.per_thread, T=t,
            M=STATE_INTERVAL // t, SOFTPLUS=inputs.softplus, HAS_D=inputs.has_d, HAS_BIAS=inputs.has_bias,
            HAS_Z=inputs.has_z, ATOMIC=atomic, num_warps=1, **options,
        )  # fmt: skip
        scan_unpack_kernel[rows](
            partial, *dB * twice, *dC * twice, partial.shape[0], batch, length, *_strides(dB[0]), **tile, num_warps=4
        )
    dA, dD, dbias = dA.sum((1, 2)), dD.sum((1, 2)), dbias.sum((1, 2))
    grads = []
    for i, side in enumerate(sides):
        d_steps, d_weight, d_proj = ddt[i], None, joint[i]
        if side.dt_weight is not None:
            flat = ddt[i].view(-1, width)
            d_weight = matmul_float32(flat.T, side.dt.reshape(flat.shape[0], -1)).to(side.dt_weight.dtype)
            d_steps = F.linear(ddt[i], side.dt_weight.T.to(ddt[i].dtype))
        if d_proj is not None:
            d_proj[..., : d_steps.shape[2]] = d_steps
        grads.append(
            ScanGrads(
                x=dx[i],
                dt=d_steps if d_proj is None else None,
                A=dA[i].T.to(side.A.dtype, copy=True, memory_format=torch.contiguous_format),
                B=dB[i] if d_proj is None else None,
                C=dC[i] if d_proj is None else None,
                D=None if side.D is None else dD[i].to(side.D.dtype, copy=True),
                dt_weight=d_weight,
                dt_bias=None if side.dt_bias is None else dbias[i].to(side.dt_bias.dtype, copy=True),
                proj=d_proj,
            )
        )
    return grads, dz


def _columns(
    sides: Sequence[ScanSide], joint: Sequence[Tensor | None], n: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Where the gradients of B and C go: columns of ``proj``'s gradient, or tensors of their own."""
    pairs = []
    for side, proj in zip(sides, joint, strict=True):
        if proj is None:
            pairs.append((torch.empty_like(side.B.contiguous()), torch.empty_like(side.C.contiguous())))
        else:
            pairs.append((proj[..., -2 * n : -n], proj[..., -n:]))
    return tuple(b for b, _ in pairs), tuple(c for _, c in pairs)


def scan_forward(
    sides: Sequence[ScanSide],
    z: Tensor | None,
    *,
    scale: float,
    dt_softplus: bool,
    save: bool,
    return_score: bool,
) -> tuple[Tensor, Tensor | None, Kept | None]:
    """What the operators call: :func:`run_forward` with automatic segments."""
    return run_forward(sides, z, scale=scale, dt_softplus=dt_softplus, save=save, return_score=return_score)


def scan_backward(
    grad: Tensor,
    sides: Sequence[ScanSide],
    z: Tensor | None,
    kept: Kept | None,
    *,
    scale: float,
    dt_softplus: bool,
) -> tuple[list[ScanGrads], Tensor | None]:
    """What the operators call: :func:`run_backward` with automatic segments."""
    return run_backward(grad, sides, z, kept, scale=scale, dt_softplus=dt_softplus)
