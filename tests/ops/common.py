"""Random inputs for the ops and the comparison of a backend with the float64 reference."""

from __future__ import annotations

import torch

from mambascope.ops import BACKENDS, ScanDirection, bidirectional_scan, selective_scan
from mambascope.ops.backends import Request, why_not

FAST = [
    name
    for name in BACKENDS
    if name != "reference" and why_not(name, Request("scan", "cpu", torch.float32, 16)) is None
]
"""Backends that run here and are compared with the reference."""

PARAMETERS = ("A", "D", "dt_weight", "dt_bias")
"""Kept in fp32 whatever the dtype of the tokens, as under autocast."""


def scan_inputs(
    batch, length, width, states, rank=None, *, z=True, D=True, dt_scale=1.0, dtype=torch.float32, bias=True
):
    """Arguments of selective_scan as the mixer passes them: strided halves of in_proj and slices of x_proj."""
    xz = torch.randn(batch, length, 2 * width, dtype=torch.float64).to(dtype)
    proj = torch.randn(batch, length, (rank or width) + 2 * states, dtype=torch.float64).to(dtype)
    dt, B, C = proj.split([rank or width, states, states], dim=-1)
    inputs = {
        "x": xz[..., :width],
        "dt": dt,
        "A": -torch.rand(width, states) * states * dt_scale,
        "B": B,
        "C": C,
        "D": torch.randn(width) if D else None,
        "z": xz[..., width:] if z else None,
        "dt_weight": torch.randn(width, rank) * rank**-0.5 if rank else None,
        "dt_bias": torch.randn(width) - 2 if bias else None,
    }
    if dtype == torch.float64:
        inputs = {k: None if v is None else v.double() if k in PARAMETERS else v for k, v in inputs.items()}
    return inputs


def run(function, inputs, backend, grad=None):
    """Calls `function` and differentiates it; returns the output and a gradient per tensor in `inputs`.

    `inputs` keep their strides: the leaves are made before the views would be copied.
    """
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    out = function(**{**inputs, **leaves}, backend=backend)
    if grad is None:
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    grads = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return out.detach(), dict(zip(leaves, grads, strict=True))


def to_double(inputs):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def relative_error(value, reference):
    scale = reference.double().abs().max().clamp_min(1e-30)
    return ((value.double() - reference.double()).abs().max() / scale).item()


def assert_matches_reference(function, inputs, backend, tolerance, grad_tolerance=None):
    """Output and every gradient of `backend` against the float64 reference on the same (rounded) numbers."""
    want, want_grads = run(function, to_double(inputs), "reference")
    have, have_grads = run(function, inputs, backend)
    first = next(v for v in inputs.values() if isinstance(v, torch.Tensor))
    assert have.dtype == first.dtype
    errors = {"output": relative_error(have, want)}
    assert have.isfinite().all()
    assert errors["output"] <= tolerance, errors
    for name, value in have_grads.items():
        assert value.dtype == inputs[name].dtype, name
        assert value.isfinite().all(), name
        errors[name] = relative_error(value, want_grads[name])
    bad = {k: v for k, v in errors.items() if not v <= (grad_tolerance or 10 * tolerance)}
    assert not bad, bad
    return errors


def two_directions(batch, length, width, states, rank, *, z=True, dtype=torch.float32, dt_scale=1.0):
    """Flat arguments for :func:`bidirectional`."""
    f, b = (scan_inputs(batch, length, width, states, rank, dtype=dtype, dt_scale=dt_scale) for _ in range(2))
    inputs = {}
    for side, s in (("f", f), ("b", b)):
        inputs[f"x_{side}"] = s["x"]
        inputs[f"proj_{side}"] = torch.cat([s["dt"], s["B"], s["C"]], -1)
        inputs |= {f"{k}_{side}": s[k] for k in ("dt_weight", "dt_bias", "A", "D")}
    inputs["z"] = f["z"] if z else None
    return inputs


def bidirectional(backend=None, scale=0.5, return_score=False, z=None, **t):
    """bidirectional_scan with flat arguments."""
    directions = [ScanDirection(*(t[f"{k}_{side}"] for k in ScanDirection._fields)) for side in ("f", "b")]
    return bidirectional_scan(*directions, z, scale=scale, return_score=return_score, backend=backend)


def composed(backend=None, scale=0.5, z=None, **t):
    """The same from two selective scans with gates, as the equations of Vim have it."""
    outputs = []
    for side, reverse in (("f", False), ("b", True)):
        n = t[f"A_{side}"].shape[1]
        proj = t[f"proj_{side}"]
        dt, B, C = proj.split([proj.shape[-1] - 2 * n, n, n], -1)
        kwargs = {k: t[f"{k}_{side}"] for k in ("dt_weight", "dt_bias")}
        args = (t[f"x_{side}"], dt, t[f"A_{side}"], B, C, t[f"D_{side}"], z)
        outputs.append(selective_scan(*args, **kwargs, reverse=reverse, backend=backend))
    return (outputs[0] + outputs[1]) * scale
