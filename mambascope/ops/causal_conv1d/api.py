"""Public convolution functions: check the arguments, then call the operator.

Shape letters: B batch, L tokens, E width, K taps.
"""

from __future__ import annotations

from torch import Tensor

from mambascope.ops._checks import check_sequence, check_tensor
from mambascope.ops._library import call, needs_grad
from mambascope.ops.backends import check_backend, resolve
from mambascope.ops.causal_conv1d.op import BOTH, CONV

ACTIVATIONS = ("silu", None)


def _taps(name: str, weight: Tensor, x: Tensor) -> Tensor:
    """The weight as [E, K], from either accepted shape."""
    width = x.shape[-1]
    if not isinstance(weight, Tensor) or weight.dim() not in (2, 3) or (weight.dim() == 3 and weight.shape[1] != 1):
        got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{name} must be [E, 1, K] or [E, K] with E = {width}, got {got}")
    check_tensor(name, weight, "[E, 1, K] or [E, K]", (width, *weight.shape[1:]), x)
    return weight.squeeze(1) if weight.dim() == 3 else weight


def _silu(activation: str | None) -> bool:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    return activation == "silu"


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Depthwise convolution over tokens that only looks back (ahead, if `reverse`), then the activation.

    ``y_t = act(bias + sum_k weight[:, k] x_{t-K+1+k})`` with zeros before the first token: the first L outputs of
    ``nn.Conv1d(E, E, K, groups=E, padding=K - 1)``. With `reverse` the same on the flipped sequence, flipped back.

    Args:
        x: [B, L, E]; may be a strided view whose last dimension is contiguous.
        weight: [E, 1, K] (as ``nn.Conv1d`` keeps it) or [E, K].
        bias: [E].
        activation: ``"silu"`` or ``None``.
        reverse: Anti-causal instead of causal.
        backend: Name of a backend, ``None`` for ``MAMBASCOPE_SCAN_BACKEND`` or the automatic choice.

    Returns:
        [B, L, E] in the dtype of `x`.

    Raises:
        ValueError: A shape, dtype, device or activation that does not fit, or an unknown backend.
    """
    check_backend(backend)
    check_sequence("x", x, "[B, L, E]")
    taps = _taps("weight", weight, x)
    if bias is not None:
        check_tensor("bias", bias, "[E]", (x.shape[-1],), x)
    silu = _silu(activation)
    grad = needs_grad(x, taps, bias)
    chosen = resolve("conv", backend, x.device.type, x.dtype, taps.shape[1])
    return call(CONV, grad, x, taps, bias, silu, reverse, chosen)


def bidirectional_conv(
    x: Tensor,
    weight_f: Tensor,
    bias_f: Tensor | None,
    weight_b: Tensor,
    bias_b: Tensor | None,
    *,
    activation: str | None = "silu",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The causal and the anti-causal convolution of the same tokens, reading them once.

    Args:
        x: [B, L, E]; may be a strided view whose last dimension is contiguous.
        weight_f: Causal weight, [E, 1, K] or [E, K].
        bias_f: [E].
        weight_b: Anti-causal weight, [E, 1, K] or [E, K], same K.
        bias_b: [E].
        activation: ``"silu"`` or ``None``.
        backend: Name of a backend, ``None`` for ``MAMBASCOPE_SCAN_BACKEND`` or the automatic choice.

    Returns:
        ``(causal, anti_causal)``, both [B, L, E] in the dtype of `x`.

    Raises:
        ValueError: A shape, dtype, device or activation that does not fit, or an unknown backend.
    """
    check_backend(backend)
    check_sequence("x", x, "[B, L, E]")
    taps_f, taps_b = _taps("weight_f", weight_f, x), _taps("weight_b", weight_b, x)
    if taps_f.shape[1] != taps_b.shape[1]:
        raise ValueError(f"weight_b must have {taps_f.shape[1]} taps as weight_f has, got {taps_b.shape[1]}")
    if (bias_f is None) != (bias_b is None):
        raise ValueError("bias_f and bias_b must be given together or not at all")
    for name, bias in (("bias_f", bias_f), ("bias_b", bias_b)):
        if bias is not None:
            check_tensor(name, bias, "[E]", (x.shape[-1],), x)
    silu = _silu(activation)
    grad = needs_grad(x, taps_f, bias_f, taps_b, bias_b)
    chosen = resolve("conv", backend, x.device.type, x.dtype, taps_f.shape[1])
    return call(BOTH, grad, x, taps_f, bias_f, taps_b, bias_b, silu, chosen)
