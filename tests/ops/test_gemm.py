"""Both GEMM libraries give the same product and the same gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mambascope.ops import linear
from mambascope.ops.gemm import ENV, why_not_onednn
from tests.conftest import relative_error


@pytest.fixture
def onednn(monkeypatch):
    monkeypatch.setenv(ENV, "onednn")
    why_not_onednn.cache_clear()
    yield
    why_not_onednn.cache_clear()


@pytest.mark.parametrize("shape", [(3, 7, 24), (40, 24), (1, 24), (0, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_float64(onednn, shape, bias):
    if why_not_onednn():
        pytest.skip(why_not_onednn())
    x = torch.randn(*shape[:-1], 2 * shape[-1])[..., : shape[-1]].requires_grad_()  # a strided view, as in the mixer
    w, b = torch.randn(10, 24, requires_grad=True), torch.randn(10, requires_grad=True) if bias else None
    out, probe = linear(x, w, b), torch.randn(*shape[:-1], 10)
    args = [t for t in (x, w, b) if t is not None]
    grads = torch.autograd.grad(out, args, probe)
    wide = [t.detach().double().requires_grad_() for t in args]
    expected = F.linear(*wide)
    expected_grads = torch.autograd.grad(expected, wide, probe.double())
    for value, reference in zip([out, *grads], [expected, *expected_grads], strict=True):
        assert value.shape == reference.shape
        if value.numel():
            assert relative_error(value, reference) < 1e-6


def test_compiled_and_counted(onednn):
    x, w = torch.randn(32, 24), torch.randn(10, 24)
    with FlopCounterMode(display=False) as counter:
        linear(x, w)
    assert counter.get_total_flops() == 2 * 32 * 24 * 10
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x, w), x @ w.T) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16


def test_wrong_choice_is_named(monkeypatch):
    monkeypatch.setenv(ENV, "blas")
    why_not_onednn.cache_clear()
    with pytest.raises(ValueError, match="MAMBASCOPE_GEMM must be one of auto, torch, onednn, got 'blas'"):
        linear(torch.randn(32, 24), torch.randn(10, 24))
    why_not_onednn.cache_clear()
