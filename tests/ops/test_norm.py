"""Residual addition + RMSNorm: values, dtypes and gradients of every backend."""

import pytest
import torch
import torch.nn.functional as F

from mambascope.ops import add_rms_norm

from .common import FAST, relative_error

EPS = 1e-5


def expected(hidden, residual, weight, eps=EPS):
    total = hidden.double() if residual is None else residual.double() + hidden.double()
    return F.rms_norm(total, total.shape[-1:], weight.double(), eps), total


def tensors(*shape, dtype=torch.float32, residual=True):
    hidden = torch.randn(shape).to(dtype).requires_grad_()
    stream = torch.randn(shape).requires_grad_() if residual else None
    return hidden, stream, torch.randn(shape[-1]).requires_grad_()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 1, 1), (3, 13), (5, 50, 192)], ids=str)
@pytest.mark.parametrize("residual", [True, False], ids=["stream", "first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(backend, shape, residual, dtype):
    hidden, stream, weight = tensors(*shape, dtype=dtype, residual=residual)
    leaves = [t for t in (hidden, stream, weight) if t is not None]
    want, want_total = expected(hidden, stream, weight)
    g, g_total = torch.randn(shape), torch.randn(shape)
    want_grads = torch.autograd.grad([want, want_total], leaves, [g.double(), g_total.double()])

    normed, total = add_rms_norm(hidden, stream, weight, EPS, backend=backend)
    assert normed.dtype == total.dtype == torch.float32
    assert relative_error(normed, want) < 1e-6
    assert relative_error(total, want_total) < 1e-6
    grads = torch.autograd.grad([normed, total], leaves, [g, g_total])
    for leaf, a, b in zip(leaves, grads, want_grads, strict=True):
        assert a.dtype == leaf.dtype
        assert relative_error(a, b) < (2e-6 if leaf.dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("used", ["normed", "total"])
def test_only_one_output_used(backend, used):
    """The stream of the last block has no gradient of its own; nor has the norm of a branch that is cut off."""
    hidden, stream, weight = tensors(2, 5, 24)
    pick = 0 if used == "normed" else 1
    have = torch.autograd.grad(
        add_rms_norm(hidden, stream, weight, EPS, backend=backend)[pick].square().sum(),
        [hidden, stream, weight],
        allow_unused=True,
    )
    want = torch.autograd.grad(
        expected(hidden, stream, weight)[pick].square().sum(), [hidden, stream, weight], allow_unused=True
    )
    for a, b in zip(have, want, strict=True):
        if b is None:
            assert a is None or a.abs().max() == 0
        else:
            assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize("backend", FAST)
def test_output_dtypes(backend):
    hidden, weight = torch.randn(2, 5, 24), torch.randn(24)
    stream = torch.randn(2, 5, 24)
    normed, total = add_rms_norm(hidden.bfloat16(), stream, weight.bfloat16(), backend=backend)
    assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        normed, total = add_rms_norm(hidden.bfloat16(), stream, weight, backend=backend)
    assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(normed, expected(hidden.bfloat16(), stream, weight)[0]) < 2**-8
    normed, total = add_rms_norm(hidden.double(), stream.double(), weight.double(), backend=backend)
    assert normed.dtype == total.dtype == torch.float64
    assert relative_error(normed, expected(hidden, stream, weight)[0]) < 1e-14


def test_stream_keeps_what_bf16_would_lose():
    stream = torch.full((1, 1, 8), 256.0)
    for _ in range(16):
        _, stream = add_rms_norm(torch.full((1, 1, 8), 0.5).bfloat16(), stream, torch.ones(8))
    assert torch.equal(stream, torch.full((1, 1, 8), 264.0))


def test_first_block_does_not_alias_its_input():
    hidden = torch.randn(1, 3, 8)
    _, total = add_rms_norm(hidden, None, torch.ones(8))
    assert total.data_ptr() != hidden.data_ptr()
