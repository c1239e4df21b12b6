"""The operators in PyTorch's machinery: opcheck, compile, export, autocast, inference."""

import pytest
import torch
from torch import nn
from torch.library import opcheck

from mambascope.ops import add_rms_norm, bidirectional_conv, causal_conv1d, selective_scan
from mambascope.ops.backends import resolve

from .common import FAST, bidirectional, relative_error, scan_inputs, two_directions

OPS = torch.ops.mambascope
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def leaves(values):
    return [v.detach().clone().requires_grad_() if isinstance(v, torch.Tensor) else v for v in values]


def passes(op, args):
    assert set(opcheck(op, args, test_utils=CHECKS).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("full", [True, False], ids=["all arguments", "only the needed"])
def test_opcheck_scan(backend, full):
    inputs = scan_inputs(2, 37, 12, 16, 3 if full else None, z=full, D=full, bias=full)
    args = leaves(inputs[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_weight", "dt_bias"))
    passes(OPS.selective_scan.default, (*args, True, full, backend, True))


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize(("gate", "save"), [(True, True), (False, True), (True, False)])
def test_opcheck_bidirectional(backend, gate, save):
    args = leaves(two_directions(2, 37, 12, 16, 3, z=gate).values())
    passes(OPS.bidirectional_scan.default, (*args, 0.5, backend, save, save))


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_opcheck_conv_and_norm(backend):
    x, w, b = torch.randn(2, 9, 12), torch.randn(12, 4), torch.randn(12)
    passes(OPS.causal_conv1d.default, (*leaves((x, w, b)), True, True, backend))
    passes(OPS.causal_conv1d.default, (*leaves((x, w, None)), False, False, backend))
    passes(OPS.bidirectional_conv.default, (*leaves((x, w, b, w, b)), True, backend))
    passes(OPS.add_rms_norm.default, (*leaves((x, x, b)), 1e-5, torch.float32, backend))
    passes(OPS.add_rms_norm.default, (*leaves((x, None, b)), 1e-5, torch.bfloat16, backend))


class Mixer(nn.Module):
    """Everything a Vim block uses, small. Not the package's own layer: layers are above ops."""

    def __init__(self, backend, dim=12, states=16, rank=2):
        super().__init__()
        self.backend, self.rank, self.states = backend, rank, states
        self.norm = nn.Parameter(torch.rand(dim) + 0.5)
        self.in_proj = nn.Linear(dim, 4 * dim, bias=False)
        self.x_proj = nn.ModuleList(nn.Linear(2 * dim, rank + 2 * states, bias=False) for _ in range(2))
        shapes = {"conv": (2 * dim, 1, 4), "bias": (2 * dim,), "dt": (2 * dim, rank), "dt_bias": (2 * dim,)}
        shapes |= {"A": (2 * dim, states), "D": (2 * dim,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.ParameterList(torch.randn(shape) * 0.3 for _ in range(2)))
        self.out_proj = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, hidden, residual):
        u, residual = add_rms_norm(hidden, residual, self.norm, backend=self.backend)
        x, z = self.in_proj(u).chunk(2, -1)
        xs = bidirectional_conv(x, self.conv[0], self.bias[0], self.conv[1], self.bias[1], backend=self.backend)
        t = {"z": z}
        for i, side in enumerate("fb"):
            t |= {f"x_{side}": xs[i], f"proj_{side}": self.x_proj[i](xs[i]), f"dt_weight_{side}": self.dt[i]}
            t |= {f"dt_bias_{side}": self.dt_bias[i], f"A_{side}": -torch.exp(self.A[i]), f"D_{side}": self.D[i]}
        y, score = bidirectional(**t, return_score=True, backend=self.backend)
        one = causal_conv1d(x, self.conv[0], self.bias[0], reverse=True, backend=self.backend)
        dt, b, c = self.x_proj[0](one).split([self.rank, self.states, self.states], -1)
        y = y + selective_scan(
            one, dt, -torch.exp(self.A[0]), b, c, dt_weight=self.dt[0], reverse=True, backend=self.backend
        )
        return self.out_proj(y), residual, score


@pytest.mark.parametrize("backend", ["torch", None])
def test_captured_is_eager(backend):
    """Forward and backward as one graph each, batch and length left open."""
    torch._dynamo.reset()
    module = Mixer(backend)
    captured = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 37):
        args = [torch.randn(2, length, 12, requires_grad=True) for _ in range(2)]
        want, have = module(*args), captured(*args)
        for a, b in zip(have, want, strict=True):
            assert relative_error(a, b) < 1e-6
        variables = [*args, *module.parameters()]
        grads = [
            torch.autograd.grad([r[0].square().sum() + r[1].square().sum()], variables, allow_unused=True)
            for r in (want, have)
        ]
        for a, b in zip(*grads, strict=True):
            assert relative_error(b, a) < 2e-5
    with torch.no_grad():
        assert relative_error(captured(*args)[0], want[0]) < 1e-6


def test_inductor_is_eager():
    """The walk must stay inside the operator: Inductor has miscompiled it. Few kernels, to spare the C++ compiler."""
    torch._dynamo.reset()
    inputs = two_directions(2, 37, 12, 16, 3)

    def function(x, **rest):
        return bidirectional(x_f=x * 2, x_b=x + 1, **rest, backend="torch").square()

    def run(function):
        x = inputs["x_f"].detach().clone().requires_grad_()
        out = function(x, **{k: v for k, v in inputs.items() if not k.startswith("x_")})
        return out, torch.autograd.grad(out, x, torch.ones_like(out))[0]

    for have, want in zip(run(torch.compile(function, fullgraph=True)), run(function), strict=True):
        assert relative_error(have, want) < 1e-6


@pytest.mark.parametrize("backend", FAST)
def test_export_with_dynamic_batch_and_length(backend):
    module = Mixer(backend).eval()
    dims = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", min=2, max=4096)}
    args = (torch.randn(2, 20, 12), torch.randn(2, 20, 12))
    with torch.no_grad():
        program = torch.export.export(module, args, dynamic_shapes=(dims, dims))
        names = {str(node.target).split(".")[1] for node in program.graph.nodes if "mambascope" in str(node.target)}
        assert names == {"add_rms_norm", "bidirectional_conv", "bidirectional_scan", "causal_conv1d", "selective_scan"}
        for shape in ((1, 2, 12), (3, 77, 12)):
            args = (torch.randn(shape), torch.randn(shape))
            for a, b in zip(program.module()(*args), module(*args), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", FAST)
def test_autocast_keeps_dtypes_and_computes_in_fp32(backend):
    inputs = two_directions(2, 50, 24, 16, 3, dtype=torch.bfloat16)
    plain = bidirectional(**inputs, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        under = bidirectional(**inputs, backend=backend)
        full = bidirectional(**{k: v.float() for k, v in inputs.items()}, backend=backend)
        conv = causal_conv1d(inputs["x_f"], torch.ones(24, 4), backend=backend)
    assert under.dtype == conv.dtype == torch.bfloat16
    assert torch.equal(under, plain)
    assert full.dtype == torch.float32
    assert torch.equal(full, bidirectional(**{k: v.float() for k, v in inputs.items()}, backend=backend))


@pytest.mark.parametrize("backend", FAST)
def test_training_under_autocast(backend):
    module = Mixer(backend)
    args = [torch.randn(2, 37, 12) for _ in range(2)]
    want = torch.autograd.grad(module(*args)[0].square().sum(), list(module.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        out = module(*args)[0]
    assert out.dtype == torch.bfloat16
    have = torch.autograd.grad(out.float().square().sum(), list(module.parameters()))
    for a, b in zip(have, want, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 0.1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_gives_the_same_and_records_nothing(mode):
    module = Mixer(None)
    args = [torch.randn(2, 37, 12) for _ in range(2)]
    want = module(*args)
    with mode():
        have = module(*args)
    for a, b in zip(have, want, strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


def test_inference_keeps_no_states():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is OPS.bidirectional_scan.default:
                seen.append([t.numel() for t in out])
            return out

    inputs = two_directions(2, 100, 16, 16, 3)
    with Watch():
        bidirectional(**inputs)
        bidirectional(**{k: v.requires_grad_() for k, v in inputs.items()}, return_score=True)
    assert seen[0][1:] == [0, 0, 0]
    assert all(seen[1][1:])


def test_meta_device():
    inputs = {k: v.to("meta") for k, v in two_directions(2, 37, 12, 16, 3).items()}
    out, score = bidirectional(**inputs, return_score=True)
    assert out.shape == (2, 37, 12)
    assert score.shape == (2, 37)


@pytest.mark.parametrize("saved", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("backend", FAST)
def test_backward_with_and_without_what_forward_kept(backend, saved):
    args = leaves(two_directions(2, 70, 12, 16, 3).values())
    out = OPS.bidirectional_scan(*args, 0.5, backend, saved, False)[0]
    grads = torch.autograd.grad(out.square().sum(), args)
    want = torch.autograd.grad(OPS.bidirectional_scan(*args, 0.5, "torch", True, False)[0].square().sum(), args)
    for a, b in zip(grads, want, strict=True):
        assert relative_error(a, b) < 5e-6


def test_empty_backend_name_is_the_automatic_choice():
    args = list(two_directions(1, 9, 8, 16, 3).values())
    auto = resolve("scan", None, "cpu", torch.float32, 16)
    want = OPS.bidirectional_scan(*args, 0.5, auto, False, False)[0]
    assert torch.equal(OPS.bidirectional_scan(*args, 0.5, "", False, False)[0], want)
