"""What cannot be differentiated twice, or by torch.func, says so on every path; what can be is right."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from mambascope.layers import BidirectionalMamba
from mambascope.ops import add_rms_norm, bidirectional_conv, causal_conv1d, linear, selective_scan
from mambascope.ops.gemm import ENV, why_not_onednn
from mambascope.ops.selective_scan.common import ScanSide
from mambascope.ops.selective_scan.reference import scan_reference
from mambascope.ops.ssd import ssd_scan
from mambascope.ops.ssd.mamba_ssm import scan_mamba_ssm
from mambascope.ops.ssd.reference import scan_reference as ssd_reference
from tests.ops.common import FAST, bidirectional, two_directions

BATCH, LENGTH, WIDTH, STATES = 2, 18, 8, 4


@functools.cache  # torch.func.vmap does not allow random numbers inside
def fixed(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scan(x, backend):
    b = fixed(BATCH, LENGTH, STATES)
    return selective_scan(x, fixed(BATCH, LENGTH, WIDTH, seed=1), -torch.ones(WIDTH, STATES), b, b, backend=backend)


@functools.cache
def directions():
    torch.manual_seed(0)
    return two_directions(BATCH, LENGTH, WIDTH, STATES, 2)


def both_scans(x, backend):
    return bidirectional(backend, **{**directions(), "x_f": x, "x_b": x})


def conv(x, backend):
    return causal_conv1d(x, fixed(WIDTH, 4), backend=backend)


def both_convs(x, backend):
    return sum(bidirectional_conv(x, fixed(WIDTH, 4), None, fixed(WIDTH, 4), None, backend=backend))


def norm(x, backend):
    return add_rms_norm(x, None, fixed(WIDTH), backend=backend)[0]


def residual(x, backend):
    return add_rms_norm(x, x, fixed(WIDTH), backend=backend)[0]


def mamba2(x, backend):
    b = fixed(BATCH, LENGTH, 1, STATES)
    dt = fixed(BATCH, LENGTH, 2, seed=1)
    return ssd_scan(x.unflatten(-1, (2, 4)), dt, -torch.ones(2), b, b, chunk_size=8, backend=backend)[0].flatten(-2)


def peer_mamba2(x, backend):
    """mamba_ssm's function is not here; one without a second derivative, as theirs, takes its place."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return ssd_reference(*tensors)

        @staticmethod
        def backward(ctx, *grads):
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            with torch.enable_grad():
                outputs = ssd_reference(*leaves)
            return torch.autograd.grad(outputs, leaves, grads)

    def function(x, dt, A, b, c, chunk, *, initial_states, return_final_states):
        return Once.apply(x, dt, A, b, c, initial_states)

    b, dt = fixed(BATCH, LENGTH, 1, STATES), fixed(BATCH, LENGTH, 2, seed=1).abs()
    state = torch.zeros(BATCH, 2, 4, STATES)
    return scan_mamba_ssm(x.unflatten(-1, (2, 4)), dt, -torch.ones(2), b, b, state, function=function)[0].flatten(-2)


OPERATORS = (scan, both_scans, conv, both_convs, norm, residual)
REFUSING = [(function, backend) for function in OPERATORS for backend in ("reference", *FAST)]
REFUSING += [(mamba2, "torch"), (peer_mamba2, None)]
parametrized = pytest.mark.parametrize(("function", "backend"), REFUSING, ids=lambda p: getattr(p, "__name__", p))


@parametrized
def test_second_derivatives_are_refused(function, backend):
    """By torch.autograd.grad too: the way to what is differentiated must lead through the refusal."""
    x = fixed(BATCH, LENGTH, WIDTH, seed=2).clone().requires_grad_()
    y = function(x, backend)
    (plain,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert torch.equal(grad, plain)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(grad.square().sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.square().sum().backward()
    # with respect to the incoming gradient: how a product with the Jacobian is made of two backward passes
    upstream = torch.ones_like(y).requires_grad_()
    (grad,) = torch.autograd.grad(function(x, backend), x, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(grad.sum(), upstream)


@pytest.mark.parametrize(("function", "backend"), REFUSING[:-2], ids=lambda p: getattr(p, "__name__", p))
def test_torch_func_is_refused_or_right(function, backend):
    x, tangent = fixed(BATCH, LENGTH, WIDTH, seed=2), fixed(BATCH, LENGTH, WIDTH, seed=3)
    call = lambda a: function(a, backend)  # noqa: E731
    forward, backward = "has no forward-mode derivative", "not with grad, vjp and jacrev of torch.func"
    for message, attempt in (
        (forward, lambda: torch.func.jvp(call, (x,), (tangent,))),
        (forward, lambda: torch.func.jacfwd(call)(x)),
        (forward, lambda: torch.func.vmap(lambda t: torch.func.jvp(call, (x,), (t,))[1])(torch.stack([tangent] * 2))),
        (backward, lambda: torch.func.grad(lambda a: call(a).sum())(x)),
        (backward, lambda: torch.func.vjp(call, x)),
        (backward, lambda: torch.func.jacrev(call)(x)),
        (backward, lambda: torch.func.vmap(torch.func.grad(lambda a: call(a).sum()))(torch.stack([x] * 2))),
        (forward, lambda: torch.func.hessian(lambda a: call(a).sum())(x)),
    ):
        with pytest.raises(RuntimeError, match=message):
            attempt()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=forward):
        call(forward_ad.make_dual(x, tangent))
    several = torch.stack([x, x + 1, 2 * x])
    torch.testing.assert_close(torch.func.vmap(call)(several), torch.stack([call(a) for a in several]))


def plain_scan(x):
    b, dt = fixed(1, 3, 2, dtype=x.dtype), fixed(1, 3, 2, seed=1, dtype=x.dtype)
    return scan_reference(ScanSide(x, dt, -torch.ones(2, 2, dtype=x.dtype), b, b, None, None, None, False))


def test_plain_formulas_have_all_derivatives():
    x = fixed(1, 3, 2, dtype=torch.float64).clone().requires_grad_()
    assert torch.autograd.gradgradcheck(plain_scan, (x,))
    b, dt = fixed(1, 3, 1, 2, dtype=torch.float64), fixed(1, 3, 1, seed=1, dtype=torch.float64)
    slow = lambda a: ssd_scan(a, dt, -torch.ones(1, dtype=a.dtype), b, b, backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(slow, (fixed(1, 3, 1, 2, dtype=torch.float64).clone().requires_grad_(),))


@pytest.mark.parametrize("function", OPERATORS)
def test_gradcheck(function):
    """First derivatives stay right whether or not a graph of them is asked for."""
    x = fixed(BATCH, LENGTH, WIDTH, seed=2, dtype=torch.float64).clone().requires_grad_()
    double = lambda a: function(a, "torch")  # noqa: E731
    assert torch.autograd.gradcheck(double, (x,), fast_mode=True, atol=1e-4)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.gradgradcheck(double, (x,), fast_mode=True)


def test_mamba2_by_torch_func():
    """Under a transform the recurrence is walked, which has all derivatives."""
    x, tangent = fixed(BATCH, LENGTH, WIDTH, seed=2), fixed(BATCH, LENGTH, WIDTH, seed=3)
    call, slow = (lambda a, backend=backend: mamba2(a, backend) for backend in ("torch", "reference"))
    torch.testing.assert_close(
        torch.func.jvp(call, (x,), (tangent,)), torch.func.jvp(slow, (x,), (tangent,)), rtol=1e-4, atol=1e-5
    )
    for transform in (torch.func.grad, lambda f: torch.func.grad(lambda a: torch.func.grad(f)(a).square().sum())):
        result, expected = (transform(lambda a, f=f: f(a).square().sum())(x) for f in (call, slow))
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


def test_products_have_all_derivatives(monkeypatch):
    """Also where oneDNN computes them."""
    monkeypatch.setenv(ENV, "onednn")
    why_not_onednn.cache_clear()
    if why_not_onednn():
        pytest.skip(why_not_onednn())
    x, w, b = fixed(2, 20, 6), fixed(5, 6, seed=1), fixed(5, seed=2)

    def derivatives(product):
        def loss(*args):
            return product(*args).square().mul(fixed(5, seed=3)).sum()

        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(product(forward_ad.make_dual(x, x.flip(0)), w, b)).tangent
        assert dual is not None
        tangent = torch.func.jvp(lambda a: product(a, w, b), (x,), (x.flip(0),))[1]
        jacobian = torch.func.jacrev(lambda a: product(x, w, a))(b)
        return [
            *first,
            *second,
            dual,
            tangent,
            jacobian,
            torch.func.vmap(torch.func.grad(loss), (0, None, None))(x, w, b),
        ]

    for result, expected in zip(derivatives(linear), derivatives(F.linear), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    why_not_onednn.cache_clear()


def test_a_layer_refuses_a_gradient_penalty():
    """As a user meets it: a penalty on the input's gradient that would leave the mixer out."""
    mixer = BidirectionalMamba(16, d_state=4)
    x = fixed(1, LENGTH, 16).clone().requires_grad_()
    (grad,) = torch.autograd.grad(mixer(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(grad.norm(), list(mixer.parameters()), allow_unused=True)
