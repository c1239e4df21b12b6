"""Every fast backend against the float64 reference: outputs and all gradients."""

from functools import partial

import pytest
import torch

from mambascope.ops import selective_scan
from mambascope.ops.backends import Request, why_not

from .common import (
    FAST,
    assert_matches_reference,
    bidirectional,
    composed,
    relative_error,
    run,
    scan_inputs,
    to_double,
    two_directions,
)

pytestmark = pytest.mark.parametrize("backend", FAST)

LENGTHS = [1, 2, 7, 50, 63, 196, 197]


def need(backend, dtype=torch.float32, states=16, op="scan"):
    reason = why_not(backend, Request(op, "cpu", dtype, states))
    if reason:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_lengths(backend, length, reverse):
    errors = assert_matches_reference(
        partial(selective_scan, reverse=reverse), scan_inputs(2, length, 24, 16, 3), backend, 2e-6
    )
    assert set(errors) == {"output", "x", "dt", "A", "B", "C", "D", "z", "dt_weight", "dt_bias"}


@pytest.mark.parametrize(("length", "width"), [(1000, 8), (4097, 3)])
def test_long_sequences(backend, length, width):
    assert_matches_reference(selective_scan, scan_inputs(1, length, width, 8, 2), backend, 5e-6)


@pytest.mark.parametrize("states", [8, 16, 64])
@pytest.mark.parametrize("width", [1, 13, 40])
def test_widths_and_states(backend, width, states):
    need(backend, states=states)
    assert_matches_reference(selective_scan, scan_inputs(3, 37, width, states, 5), backend, 2e-6)


@pytest.mark.parametrize("missing", ["z", "D", "dt_bias", "dt_weight", "all"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_optional_arguments(backend, missing, reverse):
    rank = None if missing in ("dt_weight", "all") else 4
    inputs = scan_inputs(2, 35, 20, 16, rank)
    for name in ("z", "D", "dt_bias") if missing == "all" else (missing,):
        inputs[name] = None
    assert_matches_reference(partial(selective_scan, reverse=reverse), inputs, backend, 2e-6)


@pytest.mark.parametrize("rank", [None, 3])
def test_without_softplus(backend, rank):
    inputs = scan_inputs(2, 40, 20, 16, rank)
    inputs["dt"], inputs["dt_bias"] = inputs["dt"].abs(), inputs["dt_bias"].abs()
    if rank:
        inputs["dt_weight"] = inputs["dt_weight"].abs()
    assert_matches_reference(partial(selective_scan, dt_softplus=False), inputs, backend, 2e-6)


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_strong_decay(backend, scale):
    """Where a log-cumulative-sum scan overflows: dt |A| far beyond what exp can represent."""
    inputs = scan_inputs(2, 70, 20, 16, 3, dt_scale=scale)
    inputs["dt_bias"] = inputs["dt_bias"] + 4
    assert_matches_reference(selective_scan, inputs, backend, 2e-6)


def test_weak_decay(backend):
    """Decays next to 1 add rounding errors over the whole sequence."""
    inputs = scan_inputs(1, 600, 8, 16, 3, dt_scale=1e-4)
    assert_matches_reference(selective_scan, inputs, backend, 5e-6)


def test_zero_step_sizes(backend):
    inputs = scan_inputs(1, 40, 16, 16, 3)
    inputs["dt_bias"] = torch.full_like(inputs["dt_bias"], -200.0)
    have, grads = run(selective_scan, inputs, backend)
    want = inputs["D"] * inputs["x"] * torch.nn.functional.silu(inputs["z"])
    torch.testing.assert_close(have, want)
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_strides(backend, layout):
    inputs = scan_inputs(2, 33, 24, 16, 3)
    want, want_grads = run(selective_scan, inputs, backend)

    def lay(t):
        if t is None or t.dim() != 3:
            return t
        if layout == "contiguous":
            return t.contiguous()
        if layout == "transposed":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.stack([t, t + 1], dim=1)[:, 0]  # other batch stride

    have, have_grads = run(selective_scan, {k: lay(v) for k, v in inputs.items()}, backend)
    assert relative_error(have, want) < 1e-6
    for name in want_grads:
        assert relative_error(have_grads[name], want_grads[name]) < 2e-6, name


@pytest.mark.parametrize("length", [1, 50, 197])
def test_bf16_tokens_fp32_parameters(backend, length):
    need(backend, torch.bfloat16)
    inputs = scan_inputs(2, length, 24, 16, 3, dtype=torch.bfloat16)
    assert_matches_reference(selective_scan, inputs, backend, 2**-8, 2**-7)


def test_bf16_parameters_too(backend):
    need(backend, torch.bfloat16)
    inputs = scan_inputs(2, 50, 24, 16, 3, dtype=torch.bfloat16)
    inputs = {k: v.bfloat16() for k, v in inputs.items()}
    assert_matches_reference(selective_scan, inputs, backend, 2**-8, 2**-7)


def test_bf16_state_is_fp32(backend):
    """A bf16 state would lose the small inputs of a long memory."""
    need(backend, torch.bfloat16)
    inputs = scan_inputs(1, 2000, 8, 16, None, dtype=torch.bfloat16, z=False, D=False, bias=False)
    inputs["x"], inputs["B"], inputs["C"] = (torch.ones_like(inputs[k]) for k in ("x", "B", "C"))
    inputs["dt"], inputs["A"] = torch.full_like(inputs["dt"], 2**-7), torch.full_like(inputs["A"], -1e-6)
    y = selective_scan(**inputs, dt_softplus=False, backend=backend)
    assert relative_error(y[:, -1], torch.full((1, 8), 2000 * 16 * 2**-7)) < 0.01


def test_fp64_is_computed_in_fp64(backend):
    need(backend, torch.float64)
    inputs = scan_inputs(2, 50, 20, 16, 3, dtype=torch.float64)
    assert_matches_reference(selective_scan, inputs, backend, 1e-13)


def test_batch_zero(backend):
    inputs = scan_inputs(0, 9, 16, 16, 3)
    out, grads = run(selective_scan, inputs, backend)
    assert out.shape == (0, 9, 16)
    assert grads["A"].abs().max() == 0
    assert bidirectional(**two_directions(0, 9, 16, 16, 3), backend=backend, return_score=True)[1].shape == (0, 9)


@pytest.mark.parametrize("length", LENGTHS)
def test_bidirectional(backend, length):
    errors = assert_matches_reference(bidirectional, two_directions(2, length, 24, 16, 3), backend, 2e-6)
    assert len(errors) == 14


@pytest.mark.parametrize(
    "case", ["no gate", "scale", "N=8", "N=64", "width 13", "batch 1", "batch 5", "strong", "long"]
)
def test_bidirectional_variants(backend, case):
    sizes = {
        "N=8": (2, 37, 24, 8, 3),
        "N=64": (2, 37, 24, 64, 3),
        "width 13": (2, 37, 13, 16, 1),
        "batch 1": (1, 65, 32, 16, 3),
        "batch 5": (5, 40, 32, 16, 3),
        "long": (1, 1000, 8, 16, 3),
    }.get(case, (2, 37, 24, 16, 3))
    need(backend, states=sizes[3])
    inputs = two_directions(*sizes, z=case != "no gate", dt_scale=1e3 if case == "strong" else 1.0)
    function = partial(bidirectional, scale=1.7) if case == "scale" else bidirectional
    assert_matches_reference(function, inputs, backend, 5e-6 if case == "long" else 2e-6)


def test_bidirectional_bf16(backend):
    need(backend, torch.bfloat16)
    inputs = two_directions(2, 65, 24, 16, 3, dtype=torch.bfloat16)
    assert_matches_reference(bidirectional, inputs, backend, 2**-8, 2**-7)


def test_bidirectional_fp64(backend):
    need(backend, torch.float64)
    assert_matches_reference(bidirectional, two_directions(2, 65, 24, 16, 3, dtype=torch.float64), backend, 1e-13)


def test_many_images_are_split_into_blocks(backend):
    """More images than fit one work buffer: the sums over blocks must be complete."""
    inputs = two_directions(7, 12, 1100, 16, 3)
    assert_matches_reference(bidirectional, inputs, backend, 5e-6)


def test_bidirectional_is_two_scans(backend):
    inputs = two_directions(2, 50, 24, 16, 3)
    want, want_grads = run(composed, inputs, backend)
    have, have_grads = run(bidirectional, inputs, backend)
    assert relative_error(have, want) < 1e-6
    for name in want_grads:
        assert relative_error(have_grads[name], want_grads[name]) < 3e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [True, False])
def test_score(backend, dtype, gate):
    need(backend, dtype)
    inputs = two_directions(3, 50, 24, 16, 3, z=gate, dtype=dtype)
    want = bidirectional(**to_double(inputs), backend="reference", return_score=True, scale=0.5)[1]
    out, score = bidirectional(**inputs, backend=backend, return_score=True, scale=0.5)
    assert score.shape == (3, 50)
    assert score.dtype == torch.float32
    assert relative_error(score, want) < 2e-6  # also for bf16 tokens: the score is read from the fp32 sum
    assert torch.equal(out, bidirectional(**inputs, backend=backend))


def test_score_has_no_gradient_and_leaves_the_others_alone(backend):
    inputs = two_directions(2, 20, 16, 16, 3)
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    out, score = bidirectional(**leaves, backend=backend, return_score=True)
    assert out.requires_grad
    assert not score.requires_grad
    grads = torch.autograd.grad(out.sum(), list(leaves.values()))
    plain = torch.autograd.grad(bidirectional(**leaves, backend=backend).sum(), list(leaves.values()))
    for a, b in zip(grads, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_uninitialised_memory_is_never_read(backend):
    """Fresh buffers hold NaN here; all results must still be finite."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for length in (1, 33, 70):
            assert_matches_reference(bidirectional, two_directions(2, length, 13, 16, 3), backend, 2e-6)
            assert_matches_reference(selective_scan, scan_inputs(2, length, 13, 16, None), backend, 2e-6)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def test_nothing_of_the_size_of_all_states_is_kept(backend):
    batch, length, width, states = 2, 256, 64, 16
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        inputs = two_directions(batch, length, width, states, 4)
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        bidirectional(**leaves, backend=backend)
    assert saved
    assert max(saved) <= 2 * batch * length * width  # the states of both directions: one per 32 tokens, 16 of them
    assert sum(saved) < batch * length * width * states


def test_backward_twice_gives_the_same(backend):
    inputs = two_directions(2, 40, 24, 16, 3)
    _, first = run(bidirectional, inputs, backend)
    _, second = run(bidirectional, inputs, backend)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_what_has_no_derivative_says_so(backend):
    """A wrong zero would be silent: second derivatives, tangents."""
    need(backend, states=4)
    inputs = scan_inputs(2, 5, 8, 4, None)
    x = inputs["x"].clone().requires_grad_()
    rest = {name: t for name, t in inputs.items() if name != "x"}
    (grad,) = torch.autograd.grad(selective_scan(x, **rest, backend=backend).square().sum(), x, create_graph=True)
    plain = torch.autograd.grad(selective_scan(x, **rest, backend=backend).square().sum(), x)[0]
    assert torch.equal(grad, plain)
    with pytest.raises(RuntimeError, match="selective_scan has no second derivative"):
        grad.square().sum().backward()
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda a: selective_scan(a, **rest, backend=backend), (inputs["x"],), (torch.ones(2, 5, 8),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        selective_scan(torch.autograd.forward_ad.make_dual(inputs["x"], torch.ones(2, 5, 8)), **rest, backend=backend)
