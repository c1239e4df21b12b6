"""Depthwise convolution and RMSNorm of the compiled kernels on torch tensors; nothing here knows of autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from mambascope.ops.native import library
from mambascope.ops.native.scan import DTYPES

MAX_TAPS = 4


def supports_conv(dtype: torch.dtype, taps: int | None = None) -> str | None:
    """Why the convolution kernels refuse a problem, in words; ``None`` if they take it (1 to 4 taps)."""
    if library.why_unavailable() is not None:
        return library.why_unavailable()
    if dtype not in DTYPES:
        return f"takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if taps is not None and not 1 <= taps <= MAX_TAPS:
        return f"takes 1 to {MAX_TAPS} taps, got {taps}"
    return None


def supports_norm(dtype: torch.dtype) -> str | None:
    """Why the RMSNorm kernels refuse a dtype of ``hidden``, in words; ``None`` if they take it."""
    return supports_conv(dtype)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(2) == 1 or tensor.shape[2] == 1 else tensor.contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _conv_shape(x: Tensor, taps: int, activation: str | None, directions: int) -> tuple[int, ...]:
    reason = supports_conv(x.dtype, taps)
    if reason is not None:
        raise ValueError(f"the native convolution {reason}")
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    flags = (int(activation == "silu"), int(x.dtype == torch.bfloat16), torch.get_num_threads(), directions)
    return (*x.shape, taps, *flags)


def conv_forward(
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None,
    weight_b: Tensor | None = None,
    bias_b: Tensor | None = None,
    activation: str | None = "silu",
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal and anti-causal depthwise convolution from one read of x.

    Args:
        x: [B, L, E], last dimension contiguous.
        weight_f: [E, 1, K] or [E, K], K up to 4.
        bias_f: [E] or None.
        weight_b: Weight of the anti-causal direction; None for a single direction.
        bias_b: Its bias.
        activation: ``"silu"`` or None.
        reverse: With a single direction: anti-causal instead of causal.

    Returns:
        Both outputs [B, L, E], contiguous; the second is None with a single direction.
    """
    x, taps = _rows(x), weight_f.shape[-1]
    pair = [(_float(weight_f), _float(bias_f)), (_float(weight_b), _float(bias_b))]
    two = weight_b is not None
    y_f = torch.empty(x.shape, dtype=x.dtype)
    y_b = torch.empty(x.shape, dtype=x.dtype) if two else None
    fields = [*_conv_shape(x, taps, activation, 1 + two), x.data_ptr(), x.stride(0), x.stride(1)]
    fields += [_pointer(w) for w, _ in pair] + [_pointer(b) for _, b in pair]
    fields += [int(reverse and not two), 1, _pointer(y_f), _pointer(y_b), *[0] * 11]
    library.get().run("conv_forward", library.CONV.pack(*fields))
    return y_f, y_b


def conv_backward(
    grad_f: Tensor,
    grad_b: Tensor | None,
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None,
    weight_b: Tensor | None = None,
    bias_b: Tensor | None = None,
    activation: str | None = "silu",
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`conv_forward` from those of its outputs.

    Returns:
        Gradients of x, weight_f, bias_f, weight_b, bias_b in the dtypes of those; None where the input is None.
    """
    x, taps = _rows(x), weight_f.shape[-1]
    two = weight_b is not None
    arguments = (weight_f, bias_f, weight_b, bias_b)
    params = [_float(p) for p in arguments]
    dparams = [None if p is None else torch.empty_like(p) for p in params]
    grads = [_rows(g.to(x.dtype)) for g in (grad_f, grad_b) if g is not None]
    if len(grads) != 1 + two:
        raise ValueError("grad_b must be given exactly when weight_b is")
    dx = torch.empty(x.shape, dtype=x.dtype)
    fields = [*_conv_shape(x, taps, activation, 1 + two), x.data_ptr(), x.stride(0), x.stride(1)]
    fields += [_pointer(params[i]) for i in (0, 2, 1, 3)]
    fields += [int(reverse and not two), 1, 0, 0]
    for column in ([g.data_ptr() for g in grads], [g.stride(0) for g in grads], [g.stride(1) for g in grads]):
        fields += column + [0] * (2 - len(column))
    fields += [dx.data_ptr()] + [_pointer(dparams[i]) for i in (0, 2, 1, 3)]
    library.get().run("conv_backward", library.CONV.pack(*fields))
    dw_f, db_f, dw_b, db_b = (
        None if d is None or p is None else d.to(p.dtype) for d, p in zip(dparams, arguments, strict=True)
    )
    assert dw_f is not None
    return dx, dw_f, db_f, dw_b, db_b


def add_rms_norm_forward(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum = residual + hidden in float32; normed = sum / rms(sum) * weight.

    Args:
        hidden: [..., d], float32 or bfloat16.
        residual: [..., d] float32 or None.
        weight: [d].
        eps: Added to the mean square.
        out_dtype: Type (float32 or bfloat16) of ``normed``; default: the dtype of hidden.

    Returns:
        normed [..., d]; sum [..., d] float32; 1 / rms [...] float32.
    """
    out_dtype = hidden.dtype if out_dtype is None else out_dtype
    for what, dtype in (("hidden", hidden.dtype), ("out_dtype", out_dtype)):
        if dtype not in DTYPES:
            raise ValueError(f"{what} must be float32 or bfloat16, got {dtype}")
    hidden, residual, gain = hidden.contiguous(), _float(residual), weight.float().contiguous()
    normed = torch.empty(hidden.shape, dtype=out_dtype)
    total = torch.empty(hidden.shape, dtype=torch.float32)
    rstd = torch.empty(hidden.shape[:-1], dtype=torch.float32)
    fields = (rstd.numel(), hidden.shape[-1], torch.get_num_threads(), hidden.dtype == torch.bfloat16)
    pointers = [_pointer(t) for t in (hidden, residual, gain, normed, total, rstd)]
    arguments = library.NORM.pack(*fields, out_dtype == torch.bfloat16, float(eps), *pointers, 0, 0, 0, 0)
    library.get().run("norm_forward", arguments)
    return normed, total, rstd


def add_rms_norm_backward(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`add_rms_norm_forward`.

    Args:
        grad_normed: Gradient of normed [..., d], float32 or bfloat16.
        grad_sum: Gradient of sum [..., d] float32, or None for zero.
        total: The sum of the forward pass.
        weight: [d].
        rstd: 1 / rms of the forward pass.

    Returns:
        Gradient of both addends [..., d] in float32 (cast it for a bfloat16 hidden); gradient of weight [d].
    """
    grad, extra, gain = grad_normed.contiguous(), _float(grad_sum), weight.float().contiguous()
    total, rstd = total.contiguous(), rstd.contiguous()
    dtotal, dweight = torch.empty_like(total), torch.empty_like(gain)
    fields = (rstd.numel(), total.shape[-1], torch.get_num_threads(), 0, grad.dtype == torch.bfloat16)
    pointers = [_pointer(t) for t in (gain, None, total, rstd, grad, extra, dtotal, dweight)]
    library.get().run("norm_backward", library.NORM.pack(*fields, 0.0, 0, 0, *pointers))
    return dtotal, dweight.to(weight.dtype)
