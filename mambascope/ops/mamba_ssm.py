"""The scan of mamba_ssm and the convolution of causal_conv1d behind the interface that all backends have.

Both packages are optional peers, compiled for CUDA. Whether they can be used depends on how they were built, not on
whether they are installed: mamba_ssm after 2.3.2 leaves its Mamba-1 scan out unless ``MAMBA_KEEP_CUDA_BUILD=TRUE``. So
the compiled extensions ``selective_scan_cuda`` and ``causal_conv1d_cuda`` are looked for, and of causal_conv1d only the
Python function is called, because the signature of its extension changes.

Their layout is [B, E, L] and they walk from the first token only: every call here transposes, and flips for a reverse
walk. Their kernel is much faster where L fills its blocks; ``MAMBASCOPE_MAMBA_SSM_PAD=1`` pads L up to that.

Shape letters: B batch, L tokens, E channels, N states, R rank of the low-rank step size, K taps.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.ops.causal_conv1d.common import ConvSide
from mambascope.ops.selective_scan.common import Kept, ScanGrads, ScanSide, new_kept

PAD_ENV = "MAMBASCOPE_MAMBA_SSM_PAD"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_STATES = 256
TAPS = (2, 3, 4)
# thread counts times items per thread that their forward kernel is compiled for; above, blocks of the last
_BLOCKS = (128, 256, 512, 1024, 2048)

_BUILDS = {
    "mamba_ssm": (
        "selective_scan_cuda",
        "mamba_ssm.ops.selective_scan_interface",
        "selective_scan_fn",
        "MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation mamba-ssm",
    ),
    "causal_conv1d": (
        "causal_conv1d_cuda",
        "causal_conv1d",
        "causal_conv1d_fn",
        "CAUSAL_CONV1D_FORCE_BUILD=TRUE pip install --no-build-isolation causal-conv1d",
    ),
}


@functools.cache
def _load(package: str) -> tuple[Callable[..., Tensor] | None, str | None]:
    """The function of a package, or why there is none."""
    extension, module, name, recipe = _BUILDS[package]
    if importlib.util.find_spec(package) is None:
        return None, f"the package {package} is not installed"
    if importlib.util.find_spec(extension) is None:
        return None, f"{package} is installed without its compiled extension {extension}; build it with {recipe}"
    for part in (extension, module):
        try:
            imported = importlib.import_module(part)
        except Exception as error:  # built for another torch, CUDA or Python: the ways to fail are many
            lines = str(error).splitlines() or [""]
            return None, f"importing {part} failed: {type(error).__name__}: {lines[0]}"
    return getattr(imported, name), None


def why_unavailable(package: str = "mamba_ssm") -> str | None:
    """Why a package cannot be used, in words; ``None`` if it can.

    Args:
        package: ``"mamba_ssm"`` (scan) or ``"causal_conv1d"`` (convolution).

    Raises:
        ValueError: Another package.
    """
    if package not in _BUILDS:
        raise ValueError(f"package must be one of {', '.join(_BUILDS)}, got {package!r}")
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return _load(package)[1]


def why_not(op: str, device: str, dtype: torch.dtype, size: int = 0) -> str | None:
    """Why an op cannot be served, in words; ``None`` if it can.

    Args:
        op: ``"scan"``, ``"conv"`` or ``"norm"``.
        device: Device type.
        dtype: Dtype of the tokens.
        size: States N of a scan, taps K of a convolution.
    """
    if op not in ("scan", "conv"):
        return f"has no {op}"
    if device != "cuda":
        return f"runs on CUDA devices, not on {device}"
    if dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if op == "scan" and size > MAX_STATES:
        return f"takes up to {MAX_STATES} states, got N = {size}"
    if op == "conv" and size and size not in TAPS:
        return f"takes 2 to 4 taps, got {size}"
    return why_unavailable("mamba_ssm" if op == "scan" else "causal_conv1d")


def even_length(length: int) -> int:
    """The next length that fills mamba_ssm's thread blocks: 128, 256, 512, 1024 or a multiple of 2048 tokens."""
    for block in _BLOCKS:
        if length <= block:
            return block
    return -(-length // _BLOCKS[-1]) * _BLOCKS[-1]


def padding_enabled() -> bool:
    """Whether ``MAMBASCOPE_MAMBA_SSM_PAD`` asks for padding L to :func:`even_length`."""
    return os.environ.get(PAD_ENV, "0").lower() in ("1", "true", "yes", "on")


def _walk_order(t: Tensor, reverse: bool, length: int) -> Tensor:
    """[B, L, *] as [B, *, length], contiguous, in the order of the walk, zeros after its end."""
    t = t.transpose(1, 2)
    if reverse:
        t = t.flip(2)
    return F.pad(t, (0, length - t.shape[2])).contiguous() if length > t.shape[2] else t.contiguous()


def _reading_order(t: Tensor, reverse: bool, length: int) -> Tensor:
    """The inverse of :func:`_walk_order`."""
    t = t[..., :length]
    return (t.flip(2) if reverse else t).transpose(1, 2)


class Operands(NamedTuple):
    """Arguments of ``selective_scan_fn``, in its order and layout."""

    u: Tensor  # [B, E, L]
    delta: Tensor  # [B, E, L]
    A: Tensor  # [E, N] float32
    B: Tensor  # [B, N, L]
    C: Tensor  # [B, N, L]
    D: Tensor | None  # [E] float32
    z: Tensor | None  # [B, E, L]
    delta_bias: Tensor | None  # [E] float32


def operands(side: ScanSide, z: Tensor | None, *, pad: bool = False) -> Operands:
    """What mamba_ssm's scan is called with for one direction.

    Args:
        side: The direction; its tensors may have any dtype, the streamed ones are given that of x.
        z: Gate [B, L, E] or ``None``.
        pad: Pad L to :func:`even_length`.
    """
    length, dtype = side.x.shape[1], side.x.dtype
    to = even_length(length) if pad else length
    delta = _walk_order(side.dt.to(dtype), side.reverse, to)
    if side.dt_weight is not None:
        delta = torch.matmul(side.dt_weight.to(dtype), delta)  # channels come out in front, as they are needed
    return Operands(
        _walk_order(side.x, side.reverse, to),
        delta,
        side.A.float().contiguous(),
        _walk_order(side.B.to(dtype), side.reverse, to),
        _walk_order(side.C.to(dtype), side.reverse, to),
        None if side.D is None else side.D.float().contiguous(),
        None if z is None else _walk_order(z.to(dtype), side.reverse, to),
        None if side.dt_bias is None else side.dt_bias.float().contiguous(),
    )


def _function(package: str, function: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    if function is not None:
        return function
    function, reason = _load(package)
    if function is None:
        raise ValueError(f"backend mamba_ssm cannot be used: {reason}")
    return function


def scan_forward(
    sides: Sequence[ScanSide],
    z: Tensor | None,
    *,
    scale: float,
    dt_softplus: bool,
    save: bool,
    return_score: bool,
    function: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Kept | None]:
    """Output [B, L, E], the score [B, L] if asked for and what to keep if asked for.

    Args:
        sides: One direction or two.
        z: Gate [B, L, E] or ``None``.
        scale: Factor on the sum of the directions.
        dt_softplus: Whether softplus is applied to the step sizes.
        save: Keep what the backward pass can use. Their function keeps its own states for autograd only, so nothing
            is of use here and the buffers are zeros: the backward pass runs the forward pass again.
        return_score: Also return the maximum over channels of the ungated sum, which costs an ungated output.
        function: What to call instead of ``mamba_ssm``'s ``selective_scan_fn``.

    Raises:
        ValueError: Mamba_ssm cannot be used.
    """
    call, x, pad = _function("mamba_ssm", function), sides[0].x, padding_enabled()
    inside = None if return_score else z  # their kernel gates, but then the ungated sum is not to be had
    total: Tensor | None = None
    for side in sides:
        y = _reading_order(call(*operands(side, inside, pad=pad), dt_softplus), side.reverse, x.shape[1]).float()
        total = y if total is None else total + y
    assert total is not None
    score = total.amax(-1) if return_score else None
    out = total * scale
    if z is not None and inside is None:
        out = out * F.silu(z.float())
    kept = None
    if save:
        kept = Kept(*(t.zero_() for t in new_kept(len(sides), x, sides[0].A.shape[1], z is not None)))
    return out.to(x.dtype).contiguous(), score, kept


def scan_backward(
    grad: Tensor,
    sides: Sequence[ScanSide],
    z: Tensor | None,
    kept: Kept | None,
    *,
    scale: float,
    dt_softplus: bool,
    function: Callable[..., Tensor] | None = None,
) -> tuple[list[ScanGrads], Tensor | None]:
    """Gradients of every side and of `z`, by their autograd function; arguments as for :func:`scan_forward`.

    Leaves are made in their layout and only their function is recorded: inside an operator the dispatcher has switched
    autograd off for everything else.
    """
    call, pad, x = _function("mamba_ssm", function), padding_enabled(), sides[0].x
    length = x.shape[1]
    grads: list[ScanGrads] = []
    dz: Tensor | None = None
    for side in sides:
        leaves = [None if t is None else t.detach().requires_grad_() for t in operands(side, z, pad=pad)]
        with torch.enable_grad():
            y = call(*leaves, dt_softplus)
        dy = _walk_order((grad * scale).to(y.dtype), side.reverse, y.shape[2])
        inputs = [t for t in leaves if t is not None]
        gradients = iter(torch.autograd.grad(y, inputs, dy))
        du, ddelta, dA, dB, dC, dD, dgate, dbias = (None if t is None else next(gradients) for t in leaves)
        assert du is not None
        assert ddelta is not None
        assert dA is not None
        assert dB is not None
        assert dC is not None
        steps, d_weight = _reading_order(ddelta, side.reverse, length), None
        if side.dt_weight is not None:
            rows = steps.reshape(-1, steps.shape[2])
            d_weight = (rows.float().T @ side.dt.reshape(rows.shape[0], -1).float()).to(side.dt_weight.dtype)
            steps = torch.matmul(steps, side.dt_weight.to(steps.dtype))
        if dgate is not None:
            part = _reading_order(dgate, side.reverse, length).float()
            dz = part if dz is None else dz + part
        grads.append(
            ScanGrads(
                x=_reading_order(du, side.reverse, length).contiguous(),
                dt=steps.to(side.dt.dtype).contiguous(),
                A=dA.to(side.A.dtype),
                B=_reading_order(dB, side.reverse, length).to(side.B.dtype).contiguous(),
                C=_reading_order(dC, side.reverse, length).to(side.C.dtype).contiguous(),
                D=None if dD is None or side.D is None else dD.to(side.D.dtype),
                dt_weight=d_weight,
                dt_bias=None if dbias is None or side.dt_bias is None else dbias.to(side.dt_bias.dtype),
            )
        )
    return grads, None if dz is None or z is None else dz.to(z.dtype).contiguous()


def _image(x: Tensor, reverse: bool) -> Tensor:
    """[B, L, E] as [B, E, L]: without a copy where their channel-last path takes it (E and strides multiples of 8)."""
    x = x.flip(1) if reverse else x
    even = x.shape[2] % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0
    return x.transpose(1, 2) if even and x.stride(2) == 1 else x.transpose(1, 2).contiguous()


def _conv_operands(x: Tensor, side: ConvSide) -> list[Tensor | None]:
    bias = None if side.bias is None else side.bias.to(x.dtype).contiguous()
    return [_image(x, side.reverse), side.weight.to(x.dtype).contiguous(), bias]


def conv_forward(
    x: Tensor, sides: Sequence[ConvSide], *, silu: bool, function: Callable[..., Tensor] | None = None
) -> list[Tensor]:
    """One output [B, L, E] per side; `function` replaces ``causal_conv1d_fn``.

    Raises:
        ValueError: Causal_conv1d cannot be used.
    """
    call = _function("causal_conv1d", function)
    outputs = []
    for side in sides:
        y = call(*_conv_operands(x, side), activation="silu" if silu else None)
        outputs.append(_reading_order(y, side.reverse, x.shape[1]).contiguous())
    return outputs


def conv_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    sides: Sequence[ConvSide],
    *,
    silu: bool,
    function: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
    """Gradients of `x` and of every side's weight and bias, by their autograd function."""
    call = _function("causal_conv1d", function)
    dx: Tensor | None = None
    params: list[tuple[Tensor, Tensor | None]] = []
    for grad, side in zip(grads, sides, strict=True):
        leaves = [None if t is None else t.detach().requires_grad_() for t in _conv_operands(x, side)]
        with torch.enable_grad():
            y = call(*leaves, activation="silu" if silu else None)
        dy = _image(grad.to(y.dtype), side.reverse)
        gradients = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
        du, dw, db = (None if t is None else next(gradients) for t in leaves)
        assert du is not None
        assert dw is not None
        part = _reading_order(du, side.reverse, x.shape[1]).float()
        dx = part if dx is None else dx + part
        d_bias = None if db is None or side.bias is None else db.to(side.bias.dtype)
        params.append((dw.to(side.weight.dtype), d_bias))
    assert dx is not None
    return dx.to(x.dtype).contiguous(), params
