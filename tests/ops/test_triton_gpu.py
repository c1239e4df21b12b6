"""The Triton kernels on a GPU against the float64 formulas: real shapes, long sequences, compiled graphs."""

import pytest
import torch

from mambascope.ops import bidirectional_conv, selective_scan
from mambascope.ops.backends import Request, choose
from mambascope.ops.selective_scan.common import ScanSide
from mambascope.ops.triton import interpreted, scan

from .common import bidirectional, relative_error, run, scan_inputs, to_double, two_directions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or interpreted(), reason="needs CUDA"),
]


@pytest.fixture(autouse=True)
def _full_precision():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(inputs):
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def strided(inputs):
    """x and z as halves of one tensor, as the mixer makes them (moving to the GPU makes copies)."""
    if inputs.get("z") is None:
        return inputs
    name = "x" if "x" in inputs else "x_f"
    both = torch.cat([inputs[name], inputs["z"]], -1)
    width = inputs["z"].shape[-1]
    return inputs | {name: both[..., :width], "z": both[..., width:]}


def check(function, inputs, tolerance, grad_tolerance=None, backend="triton"):
    inputs = strided(on_gpu(inputs))
    first = next(v for v in inputs.values() if isinstance(v, torch.Tensor))
    grad = torch.randn(first.shape, device="cuda", dtype=torch.float64)
    want, want_grads = run(function, to_double(inputs), "reference", grad)
    have, have_grads = run(function, inputs, backend, grad)
    errors = {"output": relative_error(have, want)}
    assert errors["output"] <= tolerance
    for name, value in have_grads.items():
        assert value.isfinite().all(), name
        errors[name] = relative_error(value, want_grads[name])
    bad = {k: v for k, v in errors.items() if not v <= (grad_tolerance or 10 * tolerance)}
    assert not bad, errors


def test_triton_is_the_automatic_choice():
    for op, size in (("scan", 16), ("conv", 4), ("norm", 0)):
        assert choose(Request(op, "cuda", torch.bfloat16, size)) == "triton"


@pytest.mark.parametrize("length", [1, 2, 7, 50, 63, 155, 196, 197])
@pytest.mark.parametrize(("width", "states"), [(20, 8), (130, 16), (40, 64)])
def test_both_directions_match(length, width, states):
    check(bidirectional, two_directions(3, length, width, states, rank=4), 2e-5)


@pytest.mark.parametrize("batch", [1, 64])
def test_vim_tiny_in_bfloat16(batch):
    inputs = two_directions(batch, 50, 384, 16, rank=12, dtype=torch.bfloat16)
    check(bidirectional, inputs, 3e-2, grad_tolerance=4e-2)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1000, 4097])
def test_long_sequences(length, reverse):
    def function(backend, **tensors):
        return selective_scan(**tensors, reverse=reverse, backend=backend)

    check(function, scan_inputs(1, length, 40, 8, 3), 5e-5, grad_tolerance=1e-3)


def test_segments_give_what_one_walk_gives():
    inputs = on_gpu(scan_inputs(2, 4097, 96, 16, 6))
    tensors = [inputs[k] for k in ("x", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias")]
    for reverse in (False, True):
        side = ScanSide(*tensors, reverse)
        whole, _, _ = scan.run_forward([side], inputs["z"], segment=1 << 20)
        parts, _, _ = scan.run_forward([side], inputs["z"], segment=256)
        assert relative_error(parts, whole) < 2e-5


def test_decays_that_underflow():
    check(bidirectional, two_directions(2, 65, 40, 16, rank=4, dt_scale=1e3), 2e-5)


@pytest.mark.parametrize("length", [1, 50, 197, 300])
def test_convolution_matches(length):
    inputs = {
        "x": torch.randn(3, length, 390),
        "weight_f": torch.randn(390, 4),
        "bias_f": torch.randn(390),
        "weight_b": torch.randn(390, 4),
        "bias_b": torch.randn(390),
    }

    def function(backend, **tensors):
        return sum(bidirectional_conv(**tensors, backend=backend))

    check(function, inputs, 2e-5)


def test_score_and_output_are_repeatable():
    inputs = on_gpu(two_directions(8, 197, 384, 16, rank=12, dtype=torch.bfloat16))
    with torch.no_grad():
        first = bidirectional(**inputs, backend="triton", return_score=True)
        for _ in range(5):
            again = bidirectional(**inputs, backend="triton", return_score=True)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "a race"
        _, score = bidirectional(**to_double(inputs), backend="reference", return_score=True)
    assert relative_error(first[1], score) < 3e-2


def test_compiled_model_agrees_with_eager():
    inputs = on_gpu(two_directions(2, 50, 64, 16, rank=4))

    def step(**tensors):
        return bidirectional(**tensors, backend="triton").square().sum()

    grads = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
        grads.append(torch.autograd.grad(function(**leaves), list(leaves.values())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
