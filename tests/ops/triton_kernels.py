"""The Triton kernels against the float64 formulas, through the operators and their autograd.

Not collected by itself: ``test_triton.py`` runs it in a process of its own with ``TRITON_INTERPRET=1``, because Triton
reads that variable when it is imported. The interpreter takes milliseconds per operation of a program, whatever the
tensor sizes, so shapes are tiny; ``test_triton_gpu.py`` has the large ones.

Inputs are views into memory that is NaN everywhere else, and uninitialised memory is filled with NaN: a kernel that
uses a token too far or leaves an output unwritten cannot pass.
"""

import pytest
import torch

from mambascope.ops import add_rms_norm, bidirectional_conv, causal_conv1d, selective_scan
from mambascope.ops.selective_scan.common import ScanSide
from mambascope.ops.selective_scan.reference import gated_sum_reference
from mambascope.ops.selective_scan.reference import scan_backward as reference_backward
from mambascope.ops.triton import interpreted, scan

from .common import assert_matches_reference, bidirectional, relative_error, scan_inputs, two_directions

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 from the start of the process")

FP32, BF16 = 1e-5, 3e-2


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory():
    """torch.empty returns NaN under deterministic algorithms."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def among_nan(tensor):
    """The same numbers in rows with NaN before, after and between them."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2:
        return tensor
    *outer, rows, columns = tensor.shape
    memory = torch.full((*outer, rows + 16, columns + 24), float("nan"), dtype=tensor.dtype)
    view = memory[..., 8 : 8 + rows, 16 : 16 + columns]
    view.copy_(tensor)
    return view


def poisoned(inputs):
    return {k: among_nan(v) for k, v in inputs.items()}


@pytest.mark.parametrize(
    ("length", "width", "states"),
    [(1, 20, 8), (2, 33, 8), (7, 20, 12), (9, 12, 16), (5, 8, 64), (50, 20, 4), (63, 12, 2), (197, 12, 1)],
)
def test_both_directions_match(length, width, states):
    inputs = two_directions(2 if length < 8 else 1, length, width, states, rank=3)
    assert_matches_reference(bidirectional, poisoned(inputs), "triton", FP32)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_one_direction_matches(reverse, bare):
    inputs = scan_inputs(1, 37, 12, 4, None if bare else 2, z=not bare, D=not bare, bias=not bare)
    if bare:
        inputs["dt"] = torch.rand_like(inputs["dt"])

    def run(backend, **tensors):
        return selective_scan(**tensors, reverse=reverse, dt_softplus=not bare, backend=backend)

    assert_matches_reference(run, poisoned(inputs), "triton", FP32)


def test_decays_that_underflow():
    inputs = two_directions(1, 11, 12, 4, rank=3, dt_scale=1e3)
    assert_matches_reference(bidirectional, poisoned(inputs), "triton", FP32)


def test_step_sizes_that_vanish_and_explode():
    inputs = scan_inputs(1, 9, 12, 4, None)
    inputs["dt"] = torch.linspace(-30, 30, 9 * 12).view(1, 9, 12)
    assert_matches_reference(selective_scan, poisoned(inputs), "triton", FP32)


@pytest.mark.parametrize("convert", [False, True])
def test_bfloat16(convert, monkeypatch):
    monkeypatch.setattr(scan, "_ROWS_TO_CONVERT", 0 if convert else 1 << 30)
    inputs = two_directions(1, 19, 20, 8, rank=4, dtype=torch.bfloat16)
    assert_matches_reference(bidirectional, poisoned(inputs), "triton", BF16, grad_tolerance=BF16)


def test_float16_forward():
    inputs = two_directions(1, 6, 12, 4, rank=2, dtype=torch.float16)
    want = bidirectional(**{k: v.double() for k, v in inputs.items()}, backend="reference")
    assert relative_error(bidirectional(**inputs, backend="triton"), want) < 5e-3


@pytest.mark.parametrize("channels", [12, 70])
def test_score_is_the_largest_channel(channels):
    inputs = two_directions(2, 6, channels, 4, rank=2)
    with torch.no_grad():
        out, score = bidirectional(**inputs, backend="triton", return_score=True)
        want_out, want = bidirectional(
            **{k: v.double() for k, v in inputs.items()}, backend="reference", return_score=True
        )
    assert relative_error(out, want_out) < FP32
    assert score.shape == (2, 6)
    assert relative_error(score, want) < FP32


def test_two_channels_per_thread(monkeypatch):
    """What a large batch is given; small ones leave multiprocessors idle and get one channel per thread."""
    monkeypatch.setattr(scan, "multiprocessors", lambda device: 0)
    inputs = two_directions(1, 13, 70, 4, rank=2)
    assert_matches_reference(bidirectional, poisoned(inputs), "triton", FP32)


def sides_of(inputs, double=False):
    sides = []
    for name, reverse in (("f", False), ("b", True)):
        t = {k: inputs[f"{k}_{name}"] for k in ("x", "proj", "dt_weight", "dt_bias", "A", "D")}
        t = {k: v.double() for k, v in t.items()} if double else t
        n = t["A"].shape[1]
        dt, b, c = t["proj"].split([t["proj"].shape[-1] - 2 * n, n, n], -1)
        sides.append(ScanSide(t["x"], dt, t["A"], b, c, t["D"], t["dt_weight"], t["dt_bias"], reverse))
    return sides


@pytest.mark.parametrize(("directions", "gated"), [(2, True), (1, False)])
def test_segments_with_a_carry(directions, gated):
    """Three segments, the last one short; state and its gradient cross both boundaries."""
    inputs = two_directions(1, 77, 12, 2, rank=2, z=gated)
    pick = slice(0, 2) if directions == 2 else slice(1, 2)
    sides, double = sides_of(poisoned(inputs))[pick], sides_of(inputs, double=True)[pick]
    z, z_double = (None, None) if not gated else (inputs["z"], inputs["z"].double())
    out, score, kept = scan.run_forward(sides, z, scale=0.5, save=True, return_score=True, segment=32)
    want, total = gated_sum_reference(double, z_double, scale=0.5, dt_softplus=True)
    assert relative_error(out, want) < FP32
    assert relative_error(score, total.amax(-1)) < FP32
    grad = torch.randn(out.shape)
    want_grads, want_dz = reference_backward(grad.double(), double, z_double, None, scale=0.5, dt_softplus=True)
    for kept_or_not, atomic in ((kept, False), (None, True)):
        grads, dz = scan.run_backward(grad, sides, z, kept_or_not, scale=0.5, segment=32, atomic=atomic)
        for have, reference in zip(grads, want_grads, strict=True):
            for name in have._fields[:-1]:
                assert relative_error(getattr(have, name), getattr(reference, name)) < 1e-4, name
        if gated:
            assert relative_error(dz, want_dz) < 1e-4


def test_long_sequences_are_cut_only_where_the_gpu_would_idle():
    def plan(batch, length):
        x = torch.empty(batch, length, 384)
        small = torch.empty(384, 16)
        side = ScanSide(x, x, small, x[..., :16], x[..., :16], None, None, None, False)
        return scan._plan(scan._inputs([side], None, True, convert=False), None)

    assert plan(1, 197).segments == 1
    assert plan(64, 4097).segments == 1
    long = plan(1, 4097)
    assert 8 <= long.segments <= 33
    assert long.segment % 32 == 0
    assert (long.segments - 1) * long.segment < 4097 <= long.segments * long.segment


@pytest.mark.parametrize(
    ("length", "taps", "bias"), [(1, 4, True), (7, 4, False), (69, 4, True), (5, 1, True), (3, 7, True)]
)
def test_both_convolutions_match(length, taps, bias):
    inputs = {
        "x": torch.randn(1, length, 20),
        "weight_f": torch.randn(20, 1, taps),
        "bias_f": torch.randn(20) if bias else None,
        "weight_b": torch.randn(20, taps),
        "bias_b": torch.randn(20) if bias else None,
    }

    def run(backend, **tensors):
        return torch.stack(bidirectional_conv(**tensors, backend=backend))

    inputs["x"] = among_nan(inputs["x"])
    assert_matches_reference(run, inputs, "triton", FP32)


@pytest.mark.parametrize("reverse", [False, True])
def test_one_convolution_matches(reverse):
    inputs = {"x": among_nan(torch.randn(2, 6, 130)), "weight": torch.randn(130, 4), "bias": torch.randn(130)}
    inputs = {k: v.bfloat16() if k == "x" else v for k, v in inputs.items()}

    def run(backend, **tensors):
        return causal_conv1d(**tensors, reverse=reverse, activation=None, backend=backend)

    assert_matches_reference(run, inputs, "triton", BF16, grad_tolerance=BF16)


@pytest.mark.parametrize(
    ("shape", "residual", "dtype"), [((3, 5, 20), True, torch.float32), ((7, 33), False, torch.bfloat16)]
)
def test_norm_matches(shape, residual, dtype):
    inputs = {"hidden": among_nan(torch.randn(shape).to(dtype)), "weight": torch.randn(shape[-1])}
    if residual:
        inputs["residual"] = among_nan(torch.randn(shape))
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    double = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    have = add_rms_norm(**({"residual": None} | leaves), backend="triton")
    want = add_rms_norm(**({"residual": None} | double), backend="reference")
    weights = [torch.randn(shape) for _ in range(2)]
    sums = [sum((w * t).sum() for w, t in zip(weights, pair, strict=True)) for pair in (have, want)]
    grads = [torch.autograd.grad(s, list(t.values())) for s, t in zip(sums, (leaves, double), strict=True)]
    tolerance = FP32 if dtype == torch.float32 else BF16
    for a, b in (*zip(have, want, strict=True), *zip(*grads, strict=True)):
        assert a.isfinite().all()
        assert relative_error(a, b) < tolerance
    assert have[1].dtype == torch.float32
