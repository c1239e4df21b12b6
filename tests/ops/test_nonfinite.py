"""NaN and infinity in any input come out where the reference has them: forward, gradients, every instruction level."""

from __future__ import annotations

import functools

import pytest
import torch

from mambascope.ops import add_rms_norm, bidirectional_conv, causal_conv1d, linear, native, selective_scan
from mambascope.ops.gemm import ENV, why_not_onednn
from mambascope.ops.ssd import ssd_scan
from tests.ops.common import bidirectional, scan_inputs, two_directions

# float32 by its bits: the usual NaN, NaNs with every payload bit (what CUDA writes, and memory of all ones), infinities
ODD = {"nan": 0x7FC00000, "cuda's nan": 0x7FFFFFFF, "ones": -1, "inf": 0x7F800000, "-inf": -0x800000}


def scan(softplus=True):
    return lambda backend, **t: selective_scan(**t, dt_softplus=softplus, backend=backend)


def scan_problem(softplus, length, width, states, rank, z=True, D=True, dtype=torch.float32):
    torch.manual_seed(0)
    t = scan_inputs(2, length, width, states, rank, z=z, D=D, dtype=dtype)
    if not softplus:  # steps of the wrong sign grow until they overflow
        t |= {k: t[k].abs() * 0.3 for k in ("dt", "dt_weight", "dt_bias") if t[k] is not None}
    return scan(softplus), {k: v for k, v in t.items() if v is not None}


def both_problem(length, width, states, rank, dtype=torch.float32):
    torch.manual_seed(0)
    function = lambda backend, **t: bidirectional(backend, return_score=True, **t)  # noqa: E731
    return function, two_directions(1, length, width, states, rank, dtype=dtype)


def conv_problem(taps, activation, two):
    torch.manual_seed(0)
    t = {"x": torch.randn(1, 9, 20)}
    if two:
        for side in "fb":
            t |= {f"weight_{side}": torch.randn(20, taps), f"bias_{side}": torch.randn(20)}
        return lambda backend, **t: bidirectional_conv(**t, activation=activation, backend=backend), t
    t["weight"] = torch.randn(20, taps)
    return lambda backend, **t: causal_conv1d(**t, activation=activation, reverse=True, backend=backend), t


def norm_problem():
    torch.manual_seed(0)
    t = {"hidden": torch.randn(3, 4, 20), "residual": torch.randn(3, 4, 20), "weight": torch.randn(20)}
    return lambda backend, **t: add_rms_norm(**t, backend=backend), t


PROBLEMS = {
    # odd widths and numbers of states leave lanes and states that only pad; 40 tokens are two chunks
    "scan": functools.partial(scan_problem, True, 40, 16, 16, None),
    "scan, low rank, no gate, padded": functools.partial(scan_problem, True, 40, 19, 5, 3, z=False, D=False),
    "scan, one channel and state": functools.partial(scan_problem, True, 5, 1, 1, None, z=False),
    "scan, no softplus": functools.partial(scan_problem, False, 40, 3, 4, 2),
    "scan, bfloat16": functools.partial(scan_problem, True, 40, 5, 8, 2, dtype=torch.bfloat16),
    "both directions and score": functools.partial(both_problem, 34, 24, 8, 3),
    "convolution": functools.partial(conv_problem, 4, "silu", two=True),
    "convolution, three taps": functools.partial(conv_problem, 3, None, two=False),
    "norm": norm_problem,
}


def run(function, inputs, backend, odd_grad=None):
    """Outputs and gradients by name; `odd_grad` is put into the gradient of the first output."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items() if v is not None}
    outputs = function(backend, **leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    made = [o for o in outputs if o.requires_grad]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in made]
    if odd_grad is not None:
        grads[0].view(-1)[grads[0].numel() // 3] = odd_grad
    result = torch.autograd.grad(made, list(leaves.values()), grads)
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return results | {f"gradient of {k}": g for k, g in zip(leaves, result, strict=True)}


def placed(inputs, name, bits):
    """`inputs` with one odd number in the middle of one of them."""
    odd = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    tensor = inputs[name].clone(memory_format=torch.contiguous_format)
    tensor.view(-1)[tensor.numel() // 2 : tensor.numel() // 2 + 1] = odd.to(tensor.dtype)
    return {**inputs, name: tensor}


def cases(inputs):
    """What is changed, by description: inputs, and the odd upstream gradient if it is that."""
    for what, bits in ODD.items():
        odd = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        yield f"{what} in the gradient", inputs, odd
        for name in [k for k, v in inputs.items() if v is not None]:
            yield f"{what} in {name}", placed(inputs, name, bits), None


@functools.cache
def reference_values(problem):
    function, inputs = PROBLEMS[problem]()
    return {what: run(function, t, "reference", odd) for what, t, odd in cases(inputs)}


def kinds(t):
    """0 for finite numbers, 1 for NaN, 2 and 3 for the infinities."""
    t = t.float()
    return t.isnan() + 2 * (t == torch.inf) + 3 * (t == -torch.inf)


def differing(result, expected):
    """Names of the results that are not of the same kind, or not close where finite."""
    bad = {}
    for name, want in expected.items():
        have, finite = result[name], kinds(want) == 0
        off = (kinds(have) != kinds(want)).sum().item()
        tolerance = 0.1 if have.dtype == torch.bfloat16 else 1e-3
        close = torch.allclose(have[finite].float(), want[finite].float(), rtol=tolerance, atol=tolerance)
        if off or not close:
            bad[name] = off or "other numbers"
    return bad


@pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))
@pytest.mark.parametrize("problem", PROBLEMS)
def test_kernels_as_the_reference(problem, level):
    function, inputs = PROBLEMS[problem]()
    bad = {
        what: differing(run(function, t, "cpu", odd), reference_values(problem)[what]) for what, t, odd in cases(inputs)
    }
    assert not {what: names for what, names in bad.items() if names}


def test_huge_gates_vanish(level):
    """SiLU of a very negative number is zero however large it is; with a limited exponential it was not."""
    x = torch.ones(1, 4, 16)
    gate = torch.full((1, 4, 16), -1e38)
    y = causal_conv1d(gate, torch.ones(16, 1), backend="cpu")
    assert torch.equal(y, torch.zeros_like(y))
    b = torch.ones(1, 4, 2)
    assert not selective_scan(x, x, -torch.ones(16, 2), b, b, z=gate, backend="cpu").any()


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_scan_as_the_recurrence(groups):
    """The products of the chunks would carry it to the other tokens, also backwards in time."""
    torch.manual_seed(0)
    rows = (1, 18, groups, 3)
    inputs = {
        "x": torch.randn(1, 18, 4, 3),
        "dt": torch.randn(1, 18, 4),
        "A": -torch.rand(4),
        "B": torch.randn(rows),
        "C": torch.randn(rows),
        "D": torch.randn(4),
        "dt_bias": torch.randn(4),
        "initial_state": torch.randn(1, 4, 3, 3),
    }
    function = lambda backend, **t: ssd_scan(**t, chunk_size=8, backend=backend)  # noqa: E731
    for what, t, odd in cases(inputs):
        assert not differing(run(function, t, "torch", odd), run(function, t, "reference", odd)), what


@pytest.mark.parametrize("library_name", ["torch", "onednn"])
def test_products_as_float64(monkeypatch, library_name):
    monkeypatch.setenv(ENV, library_name)
    why_not_onednn.cache_clear()
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 20, 8), "weight": torch.randn(5, 8), "bias": torch.randn(5)}

    def plain(backend, x, weight, bias):
        return (x.double()[:, :, None] * weight.double()).sum(-1) + bias.double()

    for what, t, odd in cases(inputs):
        have = run(lambda backend, **t: linear(**t), t, None, odd)
        want = run(plain, t, None, None if odd is None else odd.double())
        assert not differing(have, want), what
    why_not_onednn.cache_clear()
