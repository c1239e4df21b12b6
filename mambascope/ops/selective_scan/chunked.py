"""The fastest selective scan that plain PyTorch allows, with its own backward pass.

The walk over tokens is serial, so what counts is the number of PyTorch calls per token and that the data in flight
stays in cache. Hence: tokens lead (time-major buffers), both directions walk at once (stacked, the reversed one flipped
while it is copied), a chunk of tokens gets its decays and inputs in a few large calls, and the recurrence itself is one
in-place ``addcmul_`` per token. Decays are ``exp(dt A)`` of single steps, never ratios of cumulative products, so a
large ``dt |A|`` underflows to an exact zero instead of overflowing.

Only one state per ``STATE_INTERVAL`` tokens is kept for the backward pass; it recomputes the others chunk by chunk.

Shape letters: B batch, L tokens, E inner width, N states, R dt rank, S directions, k tokens of a chunk. In this module
B is the number of images in a block; [L, S, B, ...] is called time-major, index 0 being the first token of the walk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.ops.selective_scan.common import (
    STATE_INTERVAL,
    Kept,
    ScanGrads,
    ScanSide,
    new_kept,
    state_dtype,
    step_sizes,
)

# Elements of one [k, S, B, N, E] work buffer: two to four of them should stay in the outer caches. Measured on Zen 4:
# 4 MB of fp32 is best for 1 to 8 images, twice or half as much costs 5 to 20 %.
_BUFFER = 1 << 20


def _chunk_length(per_token: int) -> int:
    """Tokens per forward chunk (divides STATE_INTERVAL): long enough to hide call overhead, short enough for cache."""
    length = STATE_INTERVAL // 2
    while length > 4 and length * per_token > _BUFFER:
        length //= 2
    return length


def _blocks(batch: int, per_image: int) -> list[slice]:
    """Splits the batch so that a block of images times `per_image` elements fits the work buffer."""
    size = max(1, _BUFFER // max(1, per_image))
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def _time_major(parts: Sequence[Tensor], sides: Sequence[ScanSide]) -> Tensor:
    """Stacks one [B, L, ...] tensor per side into [L, S, B, ...], each in the order of its walk."""
    batch, length, width = parts[0].shape
    out = parts[0].new_empty(length, len(parts), batch, width)
    for i, (part, side) in enumerate(zip(parts, sides, strict=True)):
        part = part.transpose(0, 1)
        out[:, i] = part.flip(0) if side.reverse else part
    return out


def _image_major(part_LSBE: Tensor, index: int, side: ScanSide) -> Tensor:
    """Undoes :func:`_time_major` for one side: [B, L, E]."""
    part = part_LSBE[:, index]
    return (part.flip(0) if side.reverse else part).transpose(0, 1)


def _stack_A(sides: Sequence[ScanSide], dtype: torch.dtype) -> Tensor:
    """[S, 1, N, E]: E innermost, so that every large call runs along contiguous channels."""
    return torch.stack([side.A.to(dtype).T for side in sides])[:, None].contiguous()


def _walk_forward(dt: Tensor, du: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, states: Tensor | None) -> Tensor:
    """Runs the recurrence over time-major inputs.

    Args:
        dt: Step sizes [L, S, B, E].
        du: ``dt * x`` [L, S, B, E].
        A: [S, 1, N, E].
        Bm: [L, S, B, N].
        Cm: [L, S, B, N].
        states: Where to put the state before every STATE_INTERVAL-th token but the first [S, (L - 1) // STATE_INTERVAL,
            B, N, E].

    Returns:
        ``h_t . C_t`` [L, S, B, E].
    """
    length, sides, batch, width = dt.shape
    n = A.shape[2]
    chunk = min(length, _chunk_length(sides * batch * n * width))
    decay = dt.new_empty(chunk, sides, batch, n, width)
    state = dt.new_empty(chunk + 1, sides, batch, n, width)  # entry 0 is the state before the chunk
    decay_t, state_t = decay.unbind(0), state.unbind(0)
    state_t[0].zero_()
    y = torch.empty_like(dt)
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        k = stop - start
        rows = k * sides * batch
        if states is not None and start and start % STATE_INTERVAL == 0:
            states[:, start // STATE_INTERVAL - 1] = state_t[0]
        torch.mul(dt[start:stop, :, :, None], A, out=decay[:k]).exp_()
        torch.mul(du[start:stop, :, :, None], Bm[start:stop, ..., None], out=state[1 : k + 1])
        for t in range(k):
            state_t[t + 1].addcmul_(decay_t[t], state_t[t])
        torch.bmm(
            Cm[start:stop].view(rows, 1, n),
            state[1 : k + 1].view(rows, n, width),
            out=y[start:stop].view(rows, 1, width),
        )
        if stop < length:
            state_t[0].copy_(state_t[k])
    return y


def _walk_backward(
    dy: Tensor, dt: Tensor, du: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the recurrence of the gradients ``g_t = dL/dh_t`` from the last token of the walk to the first.

    Args:
        dy: Gradient of ``h_t . C_t`` [L, S, B, E].
        dt, du, A, Bm, Cm: As for :func:`_walk_forward`.
        states: What :func:`_walk_forward` put there.

    Returns:
        Gradients of dt through the decay only and of du [L, S, B, E], of A [S, N, E], of B and C [L, S, B, N].
    """
    length, sides, batch, width = dt.shape
    n = A.shape[2]
    chunk = min(length, STATE_INTERVAL)
    decay = dt.new_empty(chunk, sides, batch, n, width)
    state = dt.new_empty(chunk + 1, sides, batch, n, width)
    grad = torch.empty_like(decay)
    decay_t, state_t, grad_t = decay.unbind(0), state.unbind(0), grad.unbind(0)
    ddt, ddu, dB, dC = torch.empty_like(dt), torch.empty_like(dt), torch.empty_like(Bm), torch.empty_like(Cm)
    # sums over states and tokens as products with ones: several times faster than sum() over outer dimensions
    ones = dt.new_ones(1, max(n, chunk))
    ones_n = ones[:, :n].expand(chunk * sides * batch, 1, n)
    dA = dt.new_zeros(1, sides * batch * n * width)
    carry = torch.zeros_like(grad_t[0])
    for start in reversed(range(0, length, chunk)):
        stop = min(start + chunk, length)
        k = stop - start
        rows = k * sides * batch
        dt_k = dt[start:stop, :, :, None]
        torch.mul(dt_k, A, out=decay[:k]).exp_()
        if start:
            state_t[0].copy_(states[:, start // STATE_INTERVAL - 1])
        else:
            state_t[0].zero_()
        torch.mul(du[start:stop, :, :, None], Bm[start:stop, ..., None], out=state[1 : k + 1])
        for t in range(k):
            state_t[t + 1].addcmul_(decay_t[t], state_t[t])
        torch.mul(dy[start:stop, :, :, None], Cm[start:stop, ..., None], out=grad[:k])
        grad_t[k - 1].add_(carry)
        for t in range(k - 2, -1, -1):
            grad_t[t].addcmul_(decay_t[t + 1], grad_t[t + 1])
        torch.mul(decay_t[0], grad_t[0], out=carry)

        state_k, grad_k = state[1 : k + 1].view(rows, n, width), grad[:k].view(rows, n, width)
        torch.bmm(state_k, dy[start:stop].view(rows, width, 1), out=dC[start:stop].view(rows, n, 1))
        torch.bmm(grad_k, du[start:stop].view(rows, width, 1), out=dB[start:stop].view(rows, n, 1))
        torch.bmm(Bm[start:stop].view(rows, 1, n), grad_k, out=ddu[start:stop].view(rows, 1, width))
        # d(dt A) = g * decay * previous state; decay becomes that, grad becomes its product with A
        decay[:k].mul_(state[:k]).mul_(grad[:k])
        torch.mul(decay[:k], A, out=grad[:k])
        torch.bmm(ones_n[:rows], grad_k, out=ddt[start:stop].view(rows, 1, width))
        decay[:k].mul_(dt_k)
        dA.addmm_(ones[:, :k], decay[:k].view(k, -1))
    return ddt, ddu, dA.view(sides, batch, n, width).sum(1), dB, dC


def _sum_rows(t_BLE: Tensor) -> Tensor:
    """Sum over images and tokens, [E]."""
    rows = t_BLE.reshape(-1, t_BLE.shape[-1])
    return (rows.new_ones(1, rows.shape[0]) @ rows)[0]


def _states(kept: Kept, sides: Sequence[ScanSide]) -> Tensor:
    """The kept states as [S, (L - 1) // STATE_INTERVAL, B, N, E]."""
    (batch, length, width), n = sides[0].x.shape, sides[0].A.shape[1]
    shape = (len(sides), (length - 1) // STATE_INTERVAL, batch, n, width)
    return kept.states[: math.prod(shape)].view(shape)


def _empty(like: Tensor) -> Tensor:
    """Uninitialised, contiguous even where `like` is a strided view."""
    return like.new_empty(like.shape)


def scan_forward(
    sides: Sequence[ScanSide],
    z: Tensor | None,
    *,
    scale: float,
    dt_softplus: bool,
    save: bool,
    return_score: bool,
) -> tuple[Tensor, Tensor | None, Kept | None]:
    """``scale * sum_i(y_i) * SiLU(z)`` [B, L, E], and if asked for the score [B, L] and what the backward pass uses."""
    x = sides[0].x
    batch, length, width = x.shape
    n, dtype = sides[0].A.shape[1], state_dtype(x.dtype)
    out = torch.empty(batch, length, width, dtype=x.dtype, device=x.device)
    score = out.new_empty(batch, length, dtype=dtype) if return_score else None
    kept = new_kept(len(sides), x, n, z is not None) if save else None
    states = None if kept is None else _states(kept, sides)
    A = _stack_A(sides, dtype)
    for block in _blocks(batch, 8 * len(sides) * n * width):
        x_i = [side.x[block].to(dtype) for side in sides]
        dt_i = [step_sizes(s.dt[block], s.dt_weight, s.dt_bias, dt_softplus, dtype) for s in sides]
        dt = _time_major(dt_i, sides)
        du = _time_major([d * xi for d, xi in zip(dt_i, x_i, strict=True)], sides)
        del dt_i
        Bm, Cm = (_time_major([getattr(s, m)[block].to(dtype) for s in sides], sides) for m in ("B", "C"))
        y = _walk_forward(dt, du, A, Bm, Cm, None if states is None else states[:, :, block])
        total = _total(y, x_i, sides)
        if kept is not None and kept.total.numel():
            kept.total[block] = total
        if score is not None:
            torch.amax(total, -1, out=score[block])
        if scale != 1.0:
            total = total * scale
        out[block] = total if z is None else total * F.silu(z[block].to(dtype))
    return out, score, kept


def _total(y: Tensor, x_i: Sequence[Tensor], sides: Sequence[ScanSide]) -> Tensor:
    """Sum of the directions with their skip terms, [B, L, E]."""
    total = _image_major(y, 0, sides[0])
    for i in range(1, len(sides)):
        total = total + _image_major(y, i, sides[i])
    for xi, side in zip(x_i, sides, strict=True):
        if side.D is not None:
            total = torch.addcmul(total, xi, side.D.to(xi.dtype))
    return total


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
    x = sides[0].x
    if kept is None:
        _, _, kept = scan_forward(sides, z, scale=1.0, dt_softplus=dt_softplus, save=True, return_score=False)
        assert kept is not None
    states = _states(kept, sides)
    batch, _, width = x.shape
    n, dtype = sides[0].A.shape[1], state_dtype(x.dtype)
    A = _stack_A(sides, dtype)
    dx, ddt, dB, dC = ([_empty(getattr(s, name)) for s in sides] for name in ("x", "dt", "B", "C"))
    dz = None if z is None else _empty(z)
    dA = A.new_zeros(len(sides), n, width)
    dD, dbias = A.new_zeros(2, len(sides), width)
    dW = [None if s.dt_weight is None else A.new_zeros(s.dt_weight.shape) for s in sides]
    for block in _blocks(batch, STATE_INTERVAL * len(sides) * n * width):
        x_i = [s.x[block].to(dtype) for s in sides]
        dt_i = [step_sizes(s.dt[block], s.dt_weight, s.dt_bias, dt_softplus, dtype) for s in sides]
        g = grad[block].to(dtype) * scale
        dy_block = g if z is None else g * F.silu(z[block].to(dtype))
        dt = _time_major(dt_i, sides)
        du = _time_major([d * xi for d, xi in zip(dt_i, x_i, strict=True)], sides)
        dy = _time_major([dy_block] * len(sides), sides)
        Bm, Cm = (_time_major([getattr(s, m)[block].to(dtype) for s in sides], sides) for m in ("B", "C"))
        ddt_t, ddu_t, dA_block, dB_t, dC_t = _walk_backward(dy, dt, du, A, Bm, Cm, states[:, :, block])
        dA += dA_block
        for i, side in enumerate(sides):
            ddu_i, ddt_b = _image_major(ddu_t, i, side), _image_major(ddt_t, i, side)
            dx_b = ddu_i * dt_i[i]
            ddt_b = torch.addcmul(ddt_b, ddu_i, x_i[i])
            if dt_softplus:
                ddt_b *= -torch.expm1(-dt_i[i])  # the slope of softplus, from its value
            if side.D is not None:
                dx_b.addcmul_(dy_block, side.D.to(dtype))
                dD[i] += _sum_rows(dy_block * x_i[i])
            if side.dt_bias is not None:
                dbias[i] += _sum_rows(ddt_b)
            weight = dW[i]
            if side.dt_weight is not None and weight is not None:
                flat = ddt_b.reshape(-1, width)
                weight.addmm_(flat.T, side.dt[block].to(dtype).reshape(flat.shape[0], -1))
                ddt_b = ddt_b @ side.dt_weight.to(dtype)
            dx[i][block], ddt[i][block] = dx_b, ddt_b
            dB[i][block], dC[i][block] = _image_major(dB_t, i, side), _image_major(dC_t, i, side)
        if z is not None and dz is not None:
            z_b = z[block].to(dtype)
            sig = torch.sigmoid(z_b)
            dz[block] = g * kept.total[block].to(dtype) * sig * (1 + z_b * (1 - sig))
    grads = [
        ScanGrads(
            x=dx[i],
            dt=ddt[i],
            A=dA[i].T.to(s.A.dtype).contiguous(),
            B=dB[i],
            C=dC[i],
            D=None if s.D is None else dD[i].to(s.D.dtype, copy=True),
            dt_weight=None if s.dt_weight is None else dW[i].to(s.dt_weight.dtype),  # type: ignore[union-attr]
            dt_bias=None if s.dt_bias is None else dbias[i].to(s.dt_bias.dtype, copy=True),
        )
        for i, s in enumerate(sides)
    ]
    return grads, dz
