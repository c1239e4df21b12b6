"""Selective scans of the compiled kernels on torch tensors.

Shape letters: B batch, L tokens, E channels, N states, R rank of the low-rank step size. Streamed tensors (x, dt, B, C,
z, gradients) are float32 or bfloat16, all of one dtype, channel-last, and may be views whose last dimension is
contiguous; parameters are used in float32. These functions know nothing of autograd.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambascope.ops.native import library

if TYPE_CHECKING:
    from collections.abc import Sequence

DTYPES = (torch.float32, torch.bfloat16)
MAX_STATES = 256


def supports(dtype: torch.dtype, E: int | None = None, N: int | None = None) -> str | None:
    """Why the scan kernels refuse a problem, in words; ``None`` if they take it.

    Args:
        dtype: Dtype of the streamed tensors.
        E: Channels; any number.
        N: States; 1 to 256, multiples of 8 without padding.
    """
    if library.why_unavailable() is not None:
        return library.why_unavailable()
    if dtype not in DTYPES:
        return f"takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if E is not None and E < 1:
        return f"needs at least one channel, got E = {E}"
    if N is not None and not 1 <= N <= MAX_STATES:
        return f"takes 1 to {MAX_STATES} states, got N = {N}"
    return None


def new_states(batch: int, length: int, channels: int, states: int, directions: int = 2) -> Tensor:
    """Uninitialised float32 buffer for the states that a training forward pass hands to its backward pass.

    Passing it as ``states`` to a forward and then to the matching backward function saves the second walk over the
    tokens. It holds about ``N / 32`` floats per element of x and direction, in a layout private to the loaded library.
    """
    return torch.empty(directions * batch * library.get().states_size(length, channels, states), dtype=torch.float32)


class _Arguments:
    """Collects the fields of an argument struct and keeps the tensors behind its pointers alive during the call."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.fields: list[int | float] = []
        self.alive: list[Tensor] = []

    def rows(self, tensor: Tensor) -> tuple[int, int, int]:
        """Pointer, batch stride and row stride of a streamed tensor [B, L, *]."""
        if tensor.dtype != self.dtype:
            tensor = tensor.to(self.dtype)
        batch, row, last = tensor.stride()
        if last != 1 and tensor.shape[2] > 1:
            tensor = tensor.contiguous()
            batch, row, _ = tensor.stride()
        self.alive.append(tensor)
        return tensor.data_ptr(), batch, row

    def parameter(self, tensor: Tensor | None) -> int:
        """Pointer to a parameter as contiguous float32; 0 if there is none."""
        if tensor is None:
            return 0
        tensor = tensor.float().contiguous()
        self.alive.append(tensor)
        return tensor.data_ptr()

    def direction(
        self,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        A: Tensor,
        D: Tensor | None,
        dt_weight: Tensor | None,
        dt_bias: Tensor | None,
        reverse: bool,
    ) -> None:
        """Adds a ``Direction`` struct."""
        streams = [self.rows(t) for t in (x, dt, B, C)]
        self.fields += [s[0] for s in streams]
        self.fields += [self.parameter(t) for t in (A, D, dt_weight, dt_bias)]
        self.fields += [stride for s in streams for stride in s[1:]]
        self.fields.append(int(reverse))

    def proj_direction(
        self, x: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, N: int, reverse: bool
    ) -> None:
        """Adds a ``Direction`` struct whose dt, B and C are column ranges of ``proj`` [B, L, R + 2N]."""
        first, batch, row = self.rows(proj)
        size, rank = self.dtype.itemsize, dt_weight.shape[1]
        at_x, x_batch, x_row = self.rows(x)
        self.fields += (at_x, first, first + rank * size, first + (rank + N) * size)
        self.fields += [self.parameter(t) for t in (A, D, dt_weight, dt_bias)]
        self.fields += (x_batch, x_row, batch, row, batch, row, batch, row, int(reverse))

    def gate(self, z: Tensor | None) -> None:
        self.fields += (0, 0, 0) if z is None else self.rows(z)


_NO_DIRECTION = (0,) * 17
_NO_GRADIENT = (0,) * 11


def _shape(x: Tensor, N: int, rank: int, softplus: bool) -> tuple[int, ...]:
    reason = supports(x.dtype, x.shape[2], N)
    if reason is not None:
        raise ValueError(f"the native scan {reason}")
    return (*x.shape, N, rank, int(softplus), int(x.dtype == torch.bfloat16), torch.get_num_threads())


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _parameter_gradients(parameters: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if p is None else torch.empty(p.shape, dtype=torch.float32) for p in parameters]


def _as_parameters(grads: Sequence[Tensor | None], parameters: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if g is None or p is None else g.to(p.dtype) for g, p in zip(grads, parameters, strict=True)]


def scan_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    reverse: bool = False,
    states: Tensor | None = None,
) -> Tensor:
    """One selective scan: y = scan(x) with the D term, times silu(z) if z is given.

    Args:
        x: [B, L, E].
        dt: Step sizes [B, L, E], or [B, L, R] with ``dt_weight``.
        A: [E, N].
        B: [B, L, N].
        C: [B, L, N].
        D: [E] or None.
        z: Gate [B, L, E] or None.
        dt_weight: [E, R] or None.
        dt_bias: [E] or None.
        dt_softplus: Pass the step sizes through softplus.
        reverse: Walk from the last token to the first.
        states: Buffer of :func:`new_states` (one direction) to fill for :func:`scan_backward`.

    Returns:
        y [B, L, E] in the dtype of x, contiguous.
    """
    args = _Arguments(x.dtype)
    N = A.shape[1]
    args.fields += _shape(x, N, 0 if dt_weight is None else dt_weight.shape[1], dt_softplus)
    args.direction(x, dt, B, C, A, D, dt_weight, dt_bias, reverse)
    args.fields += (*_NO_DIRECTION, 1)
    args.gate(z)
    y = _like(x)
    args.fields += (1.0, y.data_ptr(), 0, 0, _pointer(states), 0)
    library.get().run("scan_forward", library.FORWARD.pack(*args.fields))
    return y


def scan_backward(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    reverse: bool = False,
    states: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of :func:`scan_forward`.

    Args:
        grad: Gradient of y [B, L, E].
        states: What :func:`scan_forward` filled for the same inputs, or None to recompute it.

    Returns:
        Gradients of x, dt, A, B, C, D, z, dt_weight, dt_bias in the dtypes of those; None where the input is None.
    """
    args = _Arguments(x.dtype)
    N = A.shape[1]
    args.fields += _shape(x, N, 0 if dt_weight is None else dt_weight.shape[1], dt_softplus)
    args.direction(x, dt, B, C, A, D, dt_weight, dt_bias, reverse)
    args.fields += (*_NO_DIRECTION, 1)
    args.gate(z)
    args.fields += (1.0, *args.rows(grad), 0, _pointer(states))
    streams = [torch.empty(t.shape, dtype=x.dtype) for t in (x, dt, B, C)]
    parameters = (A, D, dt_weight, dt_bias)
    grads = _parameter_gradients(parameters)
    args.fields += [t.data_ptr() for t in streams]
    args.fields += [t.shape[2] for t in streams[1:]]
    args.fields += [_pointer(g) for g in grads]
    dz = None if z is None else torch.empty(z.shape, dtype=x.dtype)
    args.fields += (*_NO_GRADIENT, _pointer(dz))
    library.get().run("scan_backward", library.BACKWARD.pack(*args.fields))
    dx, ddt, dB, dC = (g.to(t.dtype) for g, t in zip(streams, (x, dt, B, C), strict=True))
    dA, dD, dweight, dbias = _as_parameters(grads, parameters)
    return dx, ddt, dA, dB, dC, dD, dz if z is None or dz is None else dz.to(z.dtype), dweight, dbias


def bidirectional_forward(
    x_f: Tensor,
    proj_f: Tensor,
    dt_weight_f: Tensor,
    dt_bias_f: Tensor,
    A_f: Tensor,
    D_f: Tensor,
    x_b: Tensor,
    proj_b: Tensor,
    dt_weight_b: Tensor,
    dt_bias_b: Tensor,
    A_b: Tensor,
    D_b: Tensor,
    z: Tensor | None,
    scale: float = 0.5,
    want_score: bool = False,
    want_sum: bool = False,
    states: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Both directions of a Vision Mamba mixer: out = scale * (y_f + y_b) * silu(z).

    The step-size projection and softplus happen inside; a channel block is walked in both directions by one task, so
    that y_f + y_b stays in cache until it is gated.

    Args:
        x_f: Input of the forward walk [B, L, E] (after convolution and SiLU).
        proj_f: Output of its x_proj [B, L, R + 2N]: low-rank dt, B, C.
        dt_weight_f: [E, R].
        dt_bias_f: [E].
        A_f: [E, N].
        D_f: [E].
        x_b: Input of the walk from the last token to the first, original token order; the other ``*_b`` likewise.
        z: Gate [B, L, E] or None.
        scale: Factor on the sum.
        want_score: Return the token score.
        want_sum: Return y_f + y_b, which :func:`bidirectional_backward` needs.
        states: Buffer of :func:`new_states` to fill for :func:`bidirectional_backward`.

    Returns:
        out [B, L, E]; y_f + y_b [B, L, E] before gate and scale, or None; score [B, L] float32, the maximum of
        y_f + y_b over channels, or None.
    """
    args = _Arguments(x_f.dtype)
    N = A_f.shape[1]
    args.fields += _shape(x_f, N, dt_weight_f.shape[1], True)
    args.proj_direction(x_f, proj_f, dt_weight_f, dt_bias_f, A_f, D_f, N, False)
    args.proj_direction(x_b, proj_b, dt_weight_b, dt_bias_b, A_b, D_b, N, True)
    args.fields.append(2)
    args.gate(z)
    out = _like(x_f)
    y_sum = _like(x_f) if want_sum else None
    score = torch.empty(x_f.shape[:2], dtype=torch.float32) if want_score else None
    args.fields += (float(scale), out.data_ptr(), _pointer(y_sum), _pointer(score), _pointer(states), 0)
    library.get().run("scan_forward", library.FORWARD.pack(*args.fields))
    return out, y_sum, score


def bidirectional_backward(
    grad_out: Tensor,
    x_f: Tensor,
    proj_f: Tensor,
    dt_weight_f: Tensor,
    dt_bias_f: Tensor,
    A_f: Tensor,
    D_f: Tensor,
    x_b: Tensor,
    proj_b: Tensor,
    dt_weight_b: Tensor,
    dt_bias_b: Tensor,
    A_b: Tensor,
    D_b: Tensor,
    z: Tensor | None,
    scale: float,
    y_sum: Tensor | None,
    states: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of :func:`bidirectional_forward`.

    Args:
        grad_out: Gradient of out [B, L, E].
        y_sum: The sum y_f + y_b of the forward pass [B, L, E]; only needed with a gate.
        states: What the forward pass filled, or None to recompute it.

    Returns:
        Gradients of x, proj, dt_weight, dt_bias, A, D of the forward walk, the same six of the backward walk, and of z
        (None without a gate), in the dtypes of those.

    Raises:
        ValueError: A gate without ``y_sum``.
    """
    if z is not None and y_sum is None:
        raise ValueError("y_sum must be the sum that bidirectional_forward returned with want_sum=True, got None")
    args = _Arguments(x_f.dtype)
    N, rank = A_f.shape[1], dt_weight_f.shape[1]
    args.fields += _shape(x_f, N, rank, True)
    args.proj_direction(x_f, proj_f, dt_weight_f, dt_bias_f, A_f, D_f, N, False)
    args.proj_direction(x_b, proj_b, dt_weight_b, dt_bias_b, A_b, D_b, N, True)
    args.fields.append(2)
    args.gate(z)
    if y_sum is not None:
        y_sum = y_sum.to(x_f.dtype).contiguous()
    args.fields += (float(scale), *args.rows(grad_out), _pointer(y_sum), _pointer(states))
    result: list[Tensor | None] = []
    for x, proj, weight, bias, A, D in (
        (x_f, proj_f, dt_weight_f, dt_bias_f, A_f, D_f),
        (x_b, proj_b, dt_weight_b, dt_bias_b, A_b, D_b),
    ):
        dx, dproj = _like(x), torch.empty(proj.shape, dtype=x.dtype)
        dA, dD, dweight, dbias = grads = _parameter_gradients((A, D, weight, bias))
        first, size, row = dproj.data_ptr(), x.dtype.itemsize, rank + 2 * N
        args.fields += (dx.data_ptr(), first, first + rank * size, first + (rank + N) * size, row, row, row)
        args.fields += [_pointer(g) for g in grads]
        result += [dx, dproj, dweight, dbias, dA, dD]
    dz = None if z is None else torch.empty(z.shape, dtype=x_f.dtype)
    args.fields.append(_pointer(dz))
    library.get().run("scan_backward", library.BACKWARD.pack(*args.fields))
    result.append(dz)
    inputs = (x_f, proj_f, dt_weight_f, dt_bias_f, A_f, D_f, x_b, proj_b, dt_weight_b, dt_bias_b, A_b, D_b, z)
    return tuple(_as_parameters(result, inputs))
