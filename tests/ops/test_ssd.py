"""The Mamba-2 scan: every path against the plain recurrence in float64, forward and backward."""

import subprocess
import sys

import pytest
import torch

from mambascope.ops.ssd import api, ssd_backend, ssd_scan, ssd_step
from mambascope.ops.ssd.chunked import _segments
from tests.conftest import relative_error

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


def inputs(length, *, batch=2, heads=4, width=5, groups=1, states=3, dtype=torch.float64, grad=False):
    """A problem whose decays span almost nothing to almost everything."""
    t = {
        "x": torch.randn(batch, length, heads, width),
        "dt": torch.randn(batch, length, heads),
        "A": -torch.logspace(-1, 1, heads),
        "B": torch.randn(batch, length, groups, states),
        "C": torch.randn(batch, length, groups, states),
        "D": torch.randn(heads),
        "dt_bias": torch.randn(heads) - 1,
        "initial_state": torch.randn(batch, heads, width, states),
    }
    return {k: v.to(dtype).requires_grad_(grad) for k, v in t.items()}


def gradients(problem, **options):
    """Outputs and the gradient of a random projection of both for every input."""
    y, last = ssd_scan(**problem, **options)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (y, last)]
    loss = sum((t.double() * w).sum() for t, w in zip((y, last), weights, strict=True))
    grads = torch.autograd.grad(loss, list(problem.values()))
    return y, last, dict(zip(problem, grads, strict=True))


@pytest.mark.parametrize(
    ("length", "chunk", "groups"), [(1, 64, 1), (7, 3, 1), (64, 16, 2), (67, 16, 1), (67, 16, 4), (131, 64, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chunked_matches_the_recurrence(length, chunk, groups, dtype):
    problem = inputs(length, groups=groups, grad=True)
    expected_y, expected_last, expected = gradients(problem, backend="reference")
    cast = {k: v.detach().to(dtype).requires_grad_() for k, v in problem.items()}
    y, last, grads = gradients(cast, backend="torch", chunk_size=chunk)
    limit = 1e-12 if dtype == torch.float64 else 3e-5
    assert y.dtype == dtype
    assert relative_error(y, expected_y) < limit
    assert relative_error(last, expected_last) < limit
    errors = {k: relative_error(grads[k], expected[k]) for k in NAMES}
    assert max(errors.values()) < limit, errors


def test_segments_cover_long_sequences_once(monkeypatch):
    """A long sequence is cut into several segments; the result does not depend on where."""
    problem = inputs(101, grad=True)
    whole = gradients(problem, backend="torch", chunk_size=8)
    monkeypatch.setitem(sys.modules["mambascope.ops.ssd.chunked"]._SEGMENT_ELEMENTS, "cpu", 3 * 2 * 4 * 64)
    segments = list(_segments(101, 8, 2 * 4 * 64, torch.device("cpu")))
    assert [(s.start, s.chunks, s.size) for s in segments] == [
        (0, 3, 8), (24, 3, 8), (48, 3, 8), (72, 3, 8), (96, 1, 5),
    ]  # fmt: skip
    cut = gradients(problem, backend="torch", chunk_size=8)
    assert relative_error(cut[0], whole[0]) < 1e-13
    assert max(relative_error(cut[2][k], whole[2][k]) for k in NAMES) < 1e-12


def test_gradcheck():
    """The written-out backward against finite differences, including the gradient that comes through the last state."""
    problem = inputs(5, batch=1, heads=2, width=2, states=2, grad=True)

    def run(*tensors):
        return ssd_scan(**dict(zip(NAMES, tensors, strict=True)), backend="torch", chunk_size=2)

    assert torch.autograd.gradcheck(run, tuple(problem[k] for k in NAMES))


def test_gradients_without_state_or_options():
    problem = inputs(9, grad=True)
    plain = {k: problem[k] for k in ("x", "dt", "A", "B", "C")}
    results = []
    for backend in ("reference", "torch"):
        y, _ = ssd_scan(**plain, backend=backend, chunk_size=4)
        results.append(torch.autograd.grad(y.square().sum(), list(plain.values())))
    assert max(relative_error(a, b) for a, b in zip(*results, strict=True)) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_whole_pieces_and_steps_agree(backend):
    problem = inputs(23, groups=2)
    y, last = ssd_scan(**problem, backend=backend, chunk_size=8)
    common = {k: problem[k] for k in ("A", "D", "dt_bias")}
    per_token = ("x", "dt", "B", "C")

    pieces, state = [], problem["initial_state"]
    for start, stop in ((0, 1), (1, 10), (10, 10 + 8), (18, 23)):
        part = {k: problem[k][:, start:stop] for k in per_token}
        out, state = ssd_scan(**part, **common, initial_state=state, backend=backend, chunk_size=8)
        pieces.append(out)
    assert relative_error(torch.cat(pieces, 1), y) < 1e-13
    assert relative_error(state, last) < 1e-13

    state, before = problem["initial_state"], problem["initial_state"].clone()
    steps = []
    for t in range(23):
        out, state = ssd_step(state, **{k: problem[k][:, t] for k in per_token}, **common)
        steps.append(out)
    assert relative_error(torch.stack(steps, 1), y) < 1e-13
    assert relative_error(state, last) < 1e-13
    assert torch.equal(problem["initial_state"], before)  # the caller's state is not written to


def test_strong_and_weak_decay_stay_finite():
    """Step sizes up to 1e4 forget everything, down to 0 nothing; neither may overflow."""
    problem = inputs(40, dtype=torch.float32, grad=True)
    with torch.no_grad():
        problem["dt"][:, ::3] = 1e4
        problem["dt"][:, 1::3] = -1e4
    y, last, grads = gradients(problem, backend="torch", chunk_size=16)
    assert all(t.isfinite().all() for t in (y, last, *grads.values()))
    double = {k: v.detach().double().requires_grad_() for k, v in problem.items()}
    expected = gradients(double, backend="reference")
    assert relative_error(y, expected[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_keep_an_fp32_state(dtype):
    problem = inputs(50, dtype=torch.float32)
    low = {k: v.to(dtype) if k in ("x", "dt", "B", "C") else v for k, v in problem.items()}
    expected, expected_last = ssd_scan(**{k: v.double() for k, v in low.items()}, backend="reference")
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y, last = ssd_scan(**low, backend="torch", chunk_size=16)
        assert (y.dtype, last.dtype) == (dtype, torch.float32)
        # only the inputs and the output are rounded, so the state is exact to fp32
        assert relative_error(last, expected_last) < 1e-5
        assert relative_error(y, expected) < (4e-3 if dtype == torch.bfloat16 else 5e-4)


def test_autocast_backward_is_fp32():
    """The matrix products of the backward pass must not be autocast either."""
    problem = inputs(30, dtype=torch.float32, grad=True)
    plain = gradients(problem, backend="torch", chunk_size=8)[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradients(problem, backend="torch", chunk_size=8)[2]
    assert max(relative_error(cast[k], plain[k]) for k in NAMES) < 1e-6


def test_strided_views_are_accepted():
    """The layer passes slices of one convolution output."""
    base = torch.randn(2, 21, 4 * 5 + 2 * 3, dtype=torch.float64, requires_grad=True)
    x, b, c = base.split([20, 3, 3], dim=-1)
    other = inputs(21)
    rest = {k: other[k] for k in ("dt", "A", "D", "dt_bias")}
    results = []
    for backend in ("reference", "torch"):
        y, _ = ssd_scan(x.unflatten(-1, (4, 5)), B=b[:, :, None], C=c[:, :, None], **rest, backend=backend)
        results.append(torch.autograd.grad(y.sum(), base)[0])
    assert relative_error(results[1], results[0]) < 1e-12


def test_saves_no_quadratic_tensors():
    """What the backward pass keeps grows linearly: the inputs and one state per chunk."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ssd_scan(**inputs(256, grad=True), backend="torch", chunk_size=64)
    assert max(t.numel() for t in saved) == 2 * 256 * 4 * 5  # x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 6, 4)}, r"x must be floating point \[B, L, H, P\]"),
        ({"x": torch.randn(2, 0, 4, 5)}, "at least one token"),
        ({"dt": torch.randn(2, 6, 3)}, r"dt must be \[B, L, H\] = \[2, 6, 4\]"),
        ({"B": torch.randn(2, 6, 3, 3)}, "divides the 4 heads"),
        ({"C": torch.randn(2, 6, 1, 2)}, r"C must be \[B, L, G, N\]"),
        ({"A": torch.randn(4, 1)}, r"A must be \[H\]"),
        ({"initial_state": torch.zeros(2, 4, 3, 5)}, r"initial_state must be \[B, H, P, N\] = \[2, 4, 5, 3\]"),
        ({"chunk_size": 0}, "chunk_size must be a positive integer"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_bad_arguments_name_themselves(change, message):
    problem = {**inputs(6, dtype=torch.float32), **change}
    with pytest.raises(ValueError, match=message):
        ssd_scan(**problem)


def test_backend_choice(monkeypatch):
    cpu, dtype = torch.device("cpu"), torch.float32
    monkeypatch.delenv("MAMBASCOPE_SCAN_BACKEND", raising=False)
    assert ssd_backend(None, cpu, dtype) == "torch"
    monkeypatch.setenv("MAMBASCOPE_SCAN_BACKEND", "reference")
    assert ssd_backend(None, cpu, dtype) == "reference"
    assert ssd_backend("torch", cpu, dtype) == "torch"
    monkeypatch.setenv("MAMBASCOPE_SCAN_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"MAMBASCOPE_SCAN_BACKEND must be one of .*'fastest'"):
        ssd_backend(None, cpu, dtype)


def test_refused_backends_say_why_once(caplog):
    api._log_fallback.cache_clear()
    cpu, dtype = torch.device("cpu"), torch.float32
    for _ in range(2):
        assert ssd_backend("mamba_ssm", cpu, dtype) == "torch"
        assert ssd_backend("cpu", cpu, dtype) == "torch"
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "CUDA only" in messages[0]
    assert "has reference, torch, mamba_ssm only" in messages[1]


def test_import_needs_no_mamba_ssm():
    code = "import sys, mambascope.ops.ssd; assert 'mamba_ssm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "mamba_ssm"])
def test_gpu_backends_match_the_recurrence(backend):
    if backend == "mamba_ssm":
        pytest.importorskip("mamba_ssm.ops.triton.ssd_combined")
    problem = inputs(300, heads=8, width=64, states=64, grad=True)
    expected_y, expected_last, expected = gradients(problem, backend="reference")
    on_gpu = {k: v.detach().float().cuda().requires_grad_() for k, v in problem.items()}
    y, last = ssd_scan(**on_gpu, backend=backend)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).cuda() for t in (y, last)]
    loss = (y.double() * weights[0]).sum() + (last.double() * weights[1]).sum()
    grads = dict(zip(NAMES, torch.autograd.grad(loss, list(on_gpu.values())), strict=True))
    # Triton's matrix products use TF32
    limit = 1e-4 if backend == "torch" else 1e-2
    assert relative_error(y.cpu(), expected_y) < limit
    assert relative_error(last.cpu(), expected_last) < limit
    errors = {k: relative_error(grads[k].cpu(), expected[k]) for k in NAMES}
    assert max(errors.values()) < limit, errors
