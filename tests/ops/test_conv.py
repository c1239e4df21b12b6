"""Convolution backends against the float64 reference: outputs and all gradients."""

from functools import partial

import pytest
import torch

from mambascope.ops import bidirectional_conv, causal_conv1d
from mambascope.ops.backends import Request, why_not

from .common import FAST, assert_matches_reference, relative_error, run, to_double

pytestmark = pytest.mark.parametrize("backend", FAST)


def need(backend, dtype=torch.float32, taps=4):
    reason = why_not(backend, Request("conv", "cpu", dtype, taps))
    if reason:
        pytest.skip(f"{backend}: {reason}")


def inputs(batch, length, width, taps=4, *, bias=True, dtype=torch.float32, both=False):
    """x is the first half of a wider tensor, as in the mixer."""
    made = {"x": torch.randn(batch, length, 2 * width).to(dtype)[..., :width]}
    for side in ("_f", "_b") if both else ("",):
        made[f"weight{side}"] = torch.randn(width, 1, taps)
        made[f"bias{side}"] = torch.randn(width) if bias else None
    return made


def pair(**kwargs):
    """Both outputs stacked, so that one gradient covers both."""
    return torch.stack(bidirectional_conv(**kwargs))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 50, 197])
@pytest.mark.parametrize("reverse", [False, True], ids=["causal", "anti-causal"])
def test_one_direction(backend, length, reverse):
    need(backend)
    assert_matches_reference(partial(causal_conv1d, reverse=reverse), inputs(2, length, 24), backend, 1e-6)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 50, 197])
def test_both_directions(backend, length):
    need(backend)
    errors = assert_matches_reference(pair, inputs(2, length, 24, both=True), backend, 1e-6)
    assert set(errors) == {"output", "x", "weight_f", "bias_f", "weight_b", "bias_b"}


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("width", [1, 13, 40])
def test_taps_and_widths(backend, taps, width):
    need(backend, taps=taps)
    assert_matches_reference(pair, inputs(1, 9, width, taps, both=True), backend, 1e-6)


@pytest.mark.parametrize("reverse", [False, True], ids=["causal", "anti-causal"])
def test_without_bias_or_activation(backend, reverse):
    need(backend)
    function = partial(causal_conv1d, reverse=reverse, activation=None)
    assert_matches_reference(function, inputs(2, 20, 20, bias=False), backend, 1e-6)
    assert_matches_reference(partial(pair, activation=None), inputs(2, 20, 20, bias=False, both=True), backend, 1e-6)


def test_weight_as_matrix(backend):
    need(backend)
    kwargs = inputs(2, 20, 20)
    flat = {**kwargs, "weight": kwargs["weight"].squeeze(1)}
    have, grads = run(causal_conv1d, flat, backend)
    want, want_grads = run(causal_conv1d, kwargs, backend)
    assert torch.equal(have, want)
    assert torch.equal(grads["weight"], want_grads["weight"].squeeze(1))


def test_bf16_tokens(backend):
    need(backend, torch.bfloat16)
    assert_matches_reference(pair, inputs(2, 50, 24, both=True, dtype=torch.bfloat16), backend, 2**-8, 2**-7)


def test_fp64(backend):
    need(backend, torch.float64)
    assert_matches_reference(pair, to_double(inputs(2, 50, 24, both=True)), backend, 1e-14)


def test_transposed_input(backend):
    need(backend)
    kwargs = inputs(2, 20, 24, both=True)
    want = pair(**kwargs, backend=backend)
    kwargs["x"] = kwargs["x"].transpose(1, 2).contiguous().transpose(1, 2)
    assert relative_error(pair(**kwargs, backend=backend), want) < 1e-6


def test_one_of_two_outputs_used(backend):
    """The other output's gradient does not exist."""
    need(backend)
    kwargs = {k: v.detach().requires_grad_() for k, v in inputs(2, 20, 24, both=True).items()}
    causal, _ = bidirectional_conv(**kwargs, backend=backend)
    single = causal_conv1d(kwargs["x"], kwargs["weight_f"], kwargs["bias_f"], backend=backend)
    grad = torch.randn_like(causal)
    have = torch.autograd.grad(causal, list(kwargs.values()), grad)
    want = torch.autograd.grad(single, [kwargs["x"], kwargs["weight_f"], kwargs["bias_f"]], grad)
    for a, b in zip(have, want, strict=False):
        torch.testing.assert_close(a, b)
    assert have[3].abs().max() == have[4].abs().max() == 0


def test_batch_zero(backend):
    need(backend)
    out, grads = run(pair, inputs(0, 9, 16, both=True), backend)
    assert out.shape == (2, 0, 9, 16)
    assert grads["weight_f"].abs().max() == 0
