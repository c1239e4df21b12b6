"""Compiled CPU kernels against float64 formulas, for every instruction-set level that this CPU runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambascope.ops import native
from mambascope.ops.native import library
from tests.ops import native_formula

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))


def _levels() -> list[str]:
    if native.why_unavailable() is not None:
        return ["none"]
    limit = library.get().cpu_level()
    built = [isa for isa in library.LEVELS if (library._HERE / f"_kernels_{isa}.so").exists()]
    return [isa for isa in built if isa == "base" or int(isa[1:]) <= limit]


@pytest.fixture(params=_levels())
def isa(request, monkeypatch):
    """Runs the test with one instruction-set level, on fresh output buffers full of NaN."""
    level = request.param
    monkeypatch.setattr(library, "_library", library.Library(level, library._HERE / f"_kernels_{level}.so"))
    deterministic = torch.are_deterministic_algorithms_enabled()
    filled, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield level
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def _direction(B: int, L: int, E: int, N: int, R: int, seed: int, dt_scale: float = 1.0) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=make)  # noqa: E731
    wide = randn(B, L, 2 * E)
    return {
        "x": wide[..., :E],  # row stride 2E, as half of an in_proj output
        "proj": randn(B, L, R + 2 * N),
        "dt_weight": randn(E, R) * R**-0.5 * dt_scale,
        "dt_bias": randn(E) - 2 if dt_scale == 1 else randn(E) * dt_scale,
        "A": -torch.exp(randn(E, N) * 0.5) * torch.arange(1, N + 1),
        "D": randn(E),
    }


def _leaves(tensors, dtype=torch.float64) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def _close(got: Tensor | None, want: Tensor, tolerance: float, what: str) -> None:
    assert got is not None, what
    assert got.shape == want.shape, what
    assert torch.isfinite(got).all(), f"{what} is not finite"
    scale = max(want.abs().max().item(), 1e-30)
    error = (got.double() - want).abs().max().item() / scale
    assert error < tolerance, f"{what}: relative error {error:.2e} above {tolerance:.0e}"


def _check_bidirectional(
    B, L, E, N, R, dtype=torch.float32, gate=True, saved=True, dt_scale=1.0, tolerance=4e-6, threads=1
):
    sides = [_direction(B, L, E, N, R, seed, dt_scale) for seed in (0, 1)]
    z = torch.randn(B, L, 2 * E, generator=torch.Generator().manual_seed(2))[..., E:] if gate else None
    grad = torch.randn(B, L, E, generator=torch.Generator().manual_seed(3))
    if dtype != torch.float32:
        for side in sides:
            side["x"], side["proj"] = side["x"].to(dtype), side["proj"].to(dtype)
        z, grad = None if z is None else z.to(dtype), grad.to(dtype)
    names = list(sides[0])
    inputs = [side[n] for side in sides for n in ("x", "proj", "dt_weight", "dt_bias", "A", "D")]

    states = native.new_states(B, L, E, N) if saved else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    out, y_sum, score = native.bidirectional_forward(*inputs, z, 0.5, want_score=True, want_sum=True, states=states)
    grads = native.bidirectional_backward(grad, *inputs, z, 0.5, y_sum, states=states)
    plain, no_sum, no_score = native.bidirectional_forward(*inputs, z, 0.5)
    torch.set_num_threads(before)
    assert torch.equal(plain, out)
    assert no_sum is None
    assert no_score is None

    leaves = _leaves([*inputs, z])
    half = len(names)
    want, want_sum = native_formula.bidirectional(
        dict(zip(("x", "proj", "dt_weight", "dt_bias", "A", "D"), leaves[:half], strict=True)),
        dict(zip(("x", "proj", "dt_weight", "dt_bias", "A", "D"), leaves[half:-1], strict=True)),
        leaves[-1],
        0.5,
    )
    _close(out, want.detach(), tolerance, "out")
    _close(y_sum, want_sum.detach(), tolerance, "y_sum")
    _close(score, want_sum.detach().amax(-1), tolerance, "score")
    assert out.dtype == dtype
    want_grads = torch.autograd.grad(want, [t for t in leaves if t is not None], grad.double())
    labels = [f"d{n}_{side}" for side in "fb" for n in ("x", "proj", "dt_weight", "dt_bias", "A", "D")] + ["dz"]
    if not gate:
        assert grads[-1] is None
    for label, got, expected in zip(labels, grads, want_grads, strict=False):
        _close(got, expected, tolerance, label)


@pytest.mark.parametrize("L", [1, 2, 7, 50, 63, 197])
@pytest.mark.parametrize(("E", "N"), [(48, 16), (20, 8)])
def test_bidirectional_lengths(isa, L, E, N):
    _check_bidirectional(2, L, E, N, 3)


@pytest.mark.parametrize(
    ("E", "N", "R"), [(5, 8, 1), (16, 32, 4), (33, 64, 12), (24, 5, 6), (17, 20, 2), (100, 16, 24), (192, 16, 6)]
)
@pytest.mark.parametrize("saved", [True, False])
def test_bidirectional_widths(isa, E, N, R, saved):
    _check_bidirectional(3, 35, E, N, R, saved=saved)


def test_bidirectional_long(isa):
    _check_bidirectional(1, 1000, 20, 16, 2, tolerance=1e-5)


def test_bidirectional_without_gate(isa):
    _check_bidirectional(2, 40, 24, 8, 3, gate=False)


def test_bidirectional_large_steps(isa):
    """dt * |A| beyond the range of the unclamped exponential in some channels and tokens."""
    _check_bidirectional(2, 70, 36, 16, 3, dt_scale=30.0)


def test_bidirectional_bf16(isa):
    """Streams are rounded on the way out only: the state is float32, so the error is that of one rounding."""
    _check_bidirectional(2, 67, 36, 16, 3, dtype=torch.bfloat16, tolerance=9e-3)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("variant", ["all", "plain", "no_softplus", "full_dt", "bf16"])
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize(("L", "E", "N"), [(1, 16, 16), (33, 21, 8), (100, 40, 24)])
def test_scan(isa, reverse, variant, saved, L, E, N):
    batch, R = 2, 5
    side = _direction(batch, L, E, N, R, 4)
    dt, B, C = side["proj"].split([R, N, N], -1)  # column ranges: rows are not contiguous
    z = torch.randn(batch, L, E)
    D, weight, bias, softplus = side["D"], side["dt_weight"], side["dt_bias"], True
    if variant in ("plain", "full_dt", "no_softplus"):
        dt, weight = torch.randn(batch, L, E) - 1, None
    if variant == "plain":
        D, z, bias = None, None, None
    if variant == "no_softplus":
        dt, softplus, bias = torch.rand(batch, L, E) * 0.1, False, bias.exp() * 0.01
    x, grad, tolerance = side["x"], torch.randn(batch, L, E), 4e-6
    if variant == "bf16":
        x, dt, B, C, z, grad = (t.bfloat16() for t in (x, dt, B, C, z, grad))
        tolerance = 9e-3
    inputs = (x, dt, side["A"], B, C, D, z, weight, bias)
    states = native.new_states(batch, L, E, N, directions=1) if saved else None
    y = native.scan_forward(*inputs, softplus, reverse, states=states)
    grads = native.scan_backward(grad, *inputs, softplus, reverse, states=states)
    leaves = _leaves(inputs)
    want = native_formula.scan(*leaves, softplus, reverse)
    _close(y, want.detach(), tolerance, "y")
    want_grads = iter(torch.autograd.grad(want, [t for t in leaves if t is not None], grad.double()))
    for name, primal, got in zip(("x", "dt", "A", "B", "C", "D", "z", "weight", "bias"), inputs, grads, strict=True):
        if primal is None:
            assert got is None
        else:
            _close(got, next(want_grads), tolerance, f"d{name}")
            assert got.dtype == primal.dtype


def test_scan_negative_steps_and_growth(isa):
    """Without softplus a step may be negative: exp(dt A) > 1 must stay exact beyond the unclamped range as well."""
    x = torch.randn(1, 3, 16)
    dt = torch.full((1, 3, 16), -20.0)
    A = torch.full((16, 8), -2.0)
    B = C = torch.ones(1, 3, 8)
    want = native_formula.scan(*(t.double() for t in (x, dt, A, B, C)), dt_softplus=False)
    _close(native.scan_forward(x, dt, A, B, C, dt_softplus=False), want, 1e-5, "y")
    huge = native.scan_forward(x, dt * 10, A, B, C, dt_softplus=False)
    assert (~torch.isfinite(huge[:, 1:]) | (huge[:, 1:].abs() > 1e30)).all()


def test_nan_input_stays_visible(isa):
    side = _direction(1, 20, 16, 16, 2, 0)
    x = side["x"].clone()
    x[0, 5, 3] = float("nan")
    dt, B, C = side["proj"].split([2, 16, 16], -1)
    y = native.scan_forward(x, dt, side["A"], B, C, side["D"], None, side["dt_weight"], side["dt_bias"])
    assert y[0, 5:, 3].isnan().all()
    assert torch.isfinite(y[0, :5]).all()
    assert torch.isfinite(y[0, :, :3]).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_agree(isa, threads):
    """Any thread count, also one that splits the channels of a single image, gives the same numbers."""
    _check_bidirectional(1, 50, 100, 16, 6, threads=threads)
    _check_bidirectional(6, 60, 40, 8, 2, threads=threads)


def test_backward_is_reproducible(isa):
    sides = [_direction(4, 40, 64, 16, 4, seed) for seed in (0, 1)]
    inputs = [side[n] for side in sides for n in ("x", "proj", "dt_weight", "dt_bias", "A", "D")]
    z = torch.randn(4, 40, 64)
    _, y_sum, _ = native.bidirectional_forward(*inputs, z, 0.5, want_sum=True)
    first = native.bidirectional_backward(torch.ones(4, 40, 64), *inputs, z, 0.5, y_sum)
    second = native.bidirectional_backward(torch.ones(4, 40, 64), *inputs, z, 0.5, y_sum)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("L", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(("E", "taps"), [(16, 4), (37, 4), (8, 3), (5, 1)])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv(isa, L, E, taps, activation, dtype):
    tolerance = 3e-6 if dtype == torch.float32 else 9e-3
    x = torch.randn(3, L, 2 * E).to(dtype)[..., :E]
    weights, biases = [torch.randn(E, 1, taps), torch.randn(E, taps)], [torch.randn(E), None]
    grads = [torch.randn(3, L, E).to(dtype), torch.randn(3, L, 3 * E).to(dtype)[..., E : 2 * E]]
    leaves = _leaves([x, weights[0], biases[0], weights[1], biases[1]])
    want = [
        native_formula.conv(leaves[0], leaves[1], leaves[2], activation, False),
        native_formula.conv(leaves[0], leaves[3], leaves[4], activation, True),
    ]
    params = (weights[0], biases[0], weights[1], biases[1])
    got = native.conv_forward(x, *params, activation)
    for y, expected in zip(got, want, strict=True):
        _close(y, expected.detach(), tolerance, "conv")
    expected_grads = iter(torch.autograd.grad(want, [t for t in leaves if t is not None], [g.double() for g in grads]))
    for name, primal, grad in zip(
        ("x", "w_f", "b_f", "w_b", "b_b"),
        (x, *params),
        native.conv_backward(*grads, x, *params, activation),
        strict=True,
    ):
        if primal is None:
            assert grad is None
        else:
            _close(grad, next(expected_grads), tolerance, name)

    for reverse, parameters, full in ((False, params[:2], want[0]), (True, params[2:], want[1])):
        y, second = native.conv_forward(x, *parameters, activation=activation, reverse=reverse)
        assert second is None
        _close(y, full.detach(), tolerance, "single conv")
        dx, dw, _, none, _ = native.conv_backward(
            grads[0], None, x, *parameters, activation=activation, reverse=reverse
        )
        assert none is None
        one = _leaves([x, *parameters])
        single = native_formula.conv(*one, activation, reverse)
        expected = torch.autograd.grad(single, one[:2], grads[0].double())
        _close(dx, expected[0], tolerance, "single dx")
        _close(dw, expected[1], tolerance, "single dw")


@pytest.mark.parametrize("width", [5, 96, 192, 200])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("with_residual", [True, False])
def test_norm(isa, width, dtypes, with_residual):
    hidden = torch.randn(3, 7, width).to(dtypes[0])
    residual = torch.randn(3, 7, width) * 10 if with_residual else None
    weight, grad, grad_sum = torch.randn(width), torch.randn(3, 7, width).to(dtypes[1]), torch.randn(3, 7, width)
    leaves = _leaves([hidden, residual, weight])
    want, want_sum = native_formula.norm(*leaves, 1e-5)
    normed, total, rstd = native.add_rms_norm_forward(hidden, residual, weight, 1e-5, out_dtype=dtypes[1])
    assert normed.dtype == dtypes[1]
    assert total.dtype == torch.float32
    tolerance = 2e-6 if dtypes[1] == torch.float32 else 5e-3
    _close(normed, want.detach(), tolerance, "normed")
    _close(total, want_sum.detach(), 2e-7, "sum")
    for extra in (grad_sum, None):
        outputs, cotangents = (
            ([want, want_sum], [grad.double(), grad_sum.double()]) if extra is not None else ([want], [grad.double()])
        )
        expected = torch.autograd.grad(outputs, [leaves[0], leaves[2]], cotangents, retain_graph=True)
        dtotal, dweight = native.add_rms_norm_backward(grad, extra, total, weight, rstd)
        _close(dtotal, expected[0], 3e-6, "dsum")
        _close(dweight, expected[1], 3e-6, "dweight")


def test_refusals():
    assert native.supports(torch.float32, 33, 16) is None
    assert native.supports(torch.bfloat16, 1, 64) is None
    assert "float64" in str(native.supports(torch.float64, 16, 16))
    assert "states" in str(native.supports(torch.float32, 16, 0))
    assert "taps" in str(native.supports_conv(torch.float32, 5))
    assert "float16" in str(native.supports_norm(torch.float16))
    with pytest.raises(ValueError, match="float64"):
        native.scan_forward(
            *(torch.ones(1, 2, 4, dtype=torch.float64),) * 2, torch.ones(4, 8), *(torch.ones(1, 2, 8),) * 2
        )
    with pytest.raises(ValueError, match="y_sum"):
        native.bidirectional_backward(*(torch.ones(1, 1, 1),) * 14, 0.5, None)
