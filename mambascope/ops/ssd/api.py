"""Public Mamba-2 scan functions: check the arguments, choose the implementation, call it.

Shape letters: B batch, L tokens, H heads, P head width, G groups, N states.
"""

from __future__ import annotations

import logging
import os
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.ops._checks import check_tensor
from mambascope.ops._library import transformed
from mambascope.ops.backends import BACKENDS, ENV
from mambascope.ops.selective_scan.common import state_dtype
from mambascope.ops.ssd import mamba_ssm
from mambascope.ops.ssd.chunked import CHUNK_SIZE, scan_chunked
from mambascope.ops.ssd.reference import scan_reference, step_reference

_log = logging.getLogger(__name__)
SSD_BACKENDS = ("reference", "torch", "mamba_ssm")


@cache
def _log_fallback(choice: str, reason: str) -> None:
    _log.warning("ssd: backend %r refused (%s); using 'torch'", choice, reason)


def ssd_backend(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Which implementation a scan on this device and dtype uses.

    Args:
        backend: The caller's wish; ``None`` for ``MAMBASCOPE_SCAN_BACKEND`` or the automatic choice (mamba_ssm's
            kernels where they run, else ``torch``).
        device: Of the inputs.
        dtype: Of the inputs.

    Raises:
        ValueError: If the name is unknown.
    """
    choice = backend or os.environ.get(ENV) or None
    if choice is not None and choice not in BACKENDS:
        raise ValueError(f"{'backend' if backend else ENV} must be one of {', '.join(BACKENDS)}, got {choice!r}")
    if choice is None:
        return "torch" if mamba_ssm.refusal(device, dtype) else "mamba_ssm"
    if choice not in SSD_BACKENDS:
        _log_fallback(choice, f"the Mamba-2 scan has {', '.join(SSD_BACKENDS)} only")
        return "torch"
    if choice == "mamba_ssm" and (reason := mamba_ssm.refusal(device, dtype)):
        _log_fallback(choice, reason)
        return "torch"
    return choice


def _step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    return F.softplus(dt) if dt_softplus else dt


def _check(
    tokens: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> tuple[int, ...]:
    """Checks one set of arguments; ``tokens`` is ``"B, L"`` or ``"B"``. Returns the state's shape [B, H, P, N]."""
    lead = tokens.count(",") + 1
    if not isinstance(x, Tensor) or x.dim() != lead + 2 or not x.is_floating_point():
        got = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be floating point [{tokens}, H, P], got {got}")
    if 0 in x.shape[1:lead]:
        raise ValueError(f"x must hold at least one token, got shape {list(x.shape)}")
    if not isinstance(B, Tensor) or B.dim() != lead + 2:
        raise ValueError(f"B must be [{tokens}, G, N], got {list(B.shape) if isinstance(B, Tensor) else type(B)}")
    sizes, heads, (groups, states) = tuple(x.shape[:lead]), x.shape[lead], B.shape[-2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"B must have a number of groups G that divides the {heads} heads, got {groups}")
    check_tensor("dt", dt, f"[{tokens}, H]", (*sizes, heads), x)
    check_tensor("A", A, "[H]", (heads,), x)
    check_tensor("B", B, f"[{tokens}, G, N]", (*sizes, groups, states), x)
    check_tensor("C", C, f"[{tokens}, G, N]", (*sizes, groups, states), x)
    for name, t in (("D", D), ("dt_bias", dt_bias)):
        if t is not None:
            check_tensor(name, t, "[H]", (heads,), x)
    return (sizes[0], heads, x.shape[-1], states)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    initial_state: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The Mamba-2 scan over the token axis (arXiv 2405.21060), continuing from a state and returning the last one.

    ``S_t = exp(dt_t A) S_{t-1} + dt_t x_t (x) B_t``, ``y_t = S_t C_t + D x_t`` for every head; the heads of a group
    share B and C. Scanning a sequence in pieces, each from the state of the one before, gives the same outputs as
    scanning it whole. State and softplus are fp32 (fp64 for fp64 ``x``), also under autocast. Differentiable in every
    tensor.

    Args:
        x: [B, L, H, P].
        dt: Step sizes before bias and softplus [B, L, H].
        A: [H], negative.
        B: [B, L, G, N]; G divides H.
        C: [B, L, G, N].
        D: Skip weight [H].
        dt_bias: [H], added to ``dt``.
        dt_softplus: Whether softplus is applied to ``dt``.
        initial_state: [B, H, P, N]; ``None`` for zeros.
        chunk_size: Tokens per chunk of the ``torch`` backend.
        backend: ``reference``, ``torch`` or ``mamba_ssm``; see :func:`ssd_backend`.

    Returns:
        y [B, L, H, P] in the dtype of ``x``, and the state after the last token [B, H, P, N].

    Raises:
        ValueError: A shape, dtype or device that does not fit, or an unknown backend.
    """
    name = ssd_backend(backend, x.device, x.dtype) if isinstance(x, Tensor) else "torch"
    shape = _check("B, L", x, dt, A, B, C, D, dt_bias)
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive integer, got {chunk_size!r}")
    dtype = state_dtype(x.dtype)
    if initial_state is None:
        initial_state = torch.zeros(shape, dtype=dtype, device=x.device)
    else:
        check_tensor("initial_state", initial_state, "[B, H, P, N]", shape, x)
    with torch.autocast(x.device.type, enabled=False):
        steps, state, decay = _step_sizes(dt, dt_bias, dt_softplus, dtype), initial_state.to(dtype), A.to(dtype)
        if name == "reference":
            y, last = scan_reference(x.to(dtype), steps, decay, B.to(dtype), C.to(dtype), state)
        elif name == "torch" or transformed():  # mamba_ssm's kernels know nothing of torch.func
            y, last = scan_chunked(x, steps, decay, B, C, state, chunk_size)
        else:
            y, last = mamba_ssm.scan_mamba_ssm(x, steps, decay, B, C, state)
        if D is not None:
            y = torch.addcmul(y.to(dtype), x.to(dtype), D.to(dtype)[:, None])
        return y.to(x.dtype), last.to(dtype)


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
) -> tuple[Tensor, Tensor]:
    """One token of :func:`ssd_scan`; ``state`` is not changed.

    Args:
        state: [B, H, P, N].
        x: [B, H, P].
        dt: [B, H].
        A: [H], negative.
        B: [B, G, N].
        C: [B, G, N].
        D: [H].
        dt_bias: [H].
        dt_softplus: Whether softplus is applied to ``dt``.

    Returns:
        y [B, H, P] in the dtype of ``x``, and the new state [B, H, P, N] in fp32 (fp64 for fp64 ``x``).

    Raises:
        ValueError: A shape, dtype or device that does not fit.
    """
    shape = _check("B", x, dt, A, B, C, D, dt_bias)
    check_tensor("state", state, "[B, H, P, N]", shape, x)
    dtype = state_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        x_, steps = x.to(dtype), _step_sizes(dt, dt_bias, dt_softplus, dtype)
        y, state = step_reference(state.to(dtype), x_, steps, A.to(dtype), B.to(dtype), C.to(dtype))
        if D is not None:
            y = torch.addcmul(y, x_, D.to(dtype)[:, None])
        return y.to(x.dtype), state
