"""The mamba_ssm and causal_conv1d adapter: refusals, and its mapping to their layout.

Their compiled functions need a GPU. What they compute is written out here as autograd functions in their layout, with
the argument order and dtype demands of their interface, and stands in for them; the adapter itself is the real one.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mambascope.layers.mixer import BidirectionalMamba
from mambascope.ops import mamba_ssm
from mambascope.ops.causal_conv1d.common import ConvSide
from mambascope.ops.causal_conv1d.reference import conv_backward as conv_reference_backward
from mambascope.ops.causal_conv1d.reference import conv_forward as conv_reference
from mambascope.ops.selective_scan.common import ScanSide, states_numel
from mambascope.ops.selective_scan.reference import gated_sum_reference
from mambascope.ops.selective_scan.reference import scan_backward as reference_backward

from .common import bidirectional, relative_error, two_directions


def formula(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """selective_scan_fn on [B, E, L]: what its kernel computes, and the dtypes that it insists on."""
    assert A.dtype == torch.float32
    assert all(t is None or t.dtype == torch.float32 for t in (D, delta_bias))
    assert {delta.dtype, B.dtype, C.dtype} | ({z.dtype} if z is not None else set()) == {u.dtype}
    assert all(t.stride(-1) == 1 for t in (u, delta, B, C))
    x, dt = u.float(), delta.float()
    dt = dt if delta_bias is None else dt + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    state, outputs = x.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        decay = torch.exp(dt[:, :, t, None] * A)
        state = decay * state + (dt * x)[:, :, t, None] * B.float()[:, None, :, t]
        outputs.append((state * C.float()[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, 2)
    y = y if D is None else y + D[:, None] * x
    return (y if z is None else y * F.silu(z.float())).to(u.dtype)


class Scan(torch.autograd.Function):
    """Its gradients appear only through Function.apply, as those of their compiled function do."""

    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(*args[:8])
        ctx.softplus = args[8]
        return formula(*args)

    @staticmethod
    def backward(ctx, grad):
        tensors = [None if t is None else t.detach() for t in ctx.saved_tensors]
        primals = [t for t in tensors if t is not None]

        def run(*values):
            values = iter(values)
            return formula(*(None if t is None else next(values) for t in tensors), ctx.softplus)

        gradients = iter(torch.func.vjp(run, *primals)[1](grad))
        return *(None if t is None else next(gradients) for t in tensors), None


def side_of(batch, length, width, states, rank, reverse, dtype=torch.float32, bare=False):
    proj = torch.randn(batch, length, (rank or width) + 2 * states).to(dtype)
    dt, b, c = proj.split([rank or width, states, states], -1)
    return ScanSide(
        torch.randn(batch, length, 2 * width).to(dtype)[..., :width],
        dt,
        -torch.rand(width, states) - 0.1,
        b,
        c,
        None if bare else torch.randn(width),
        torch.randn(width, rank) if rank else None,
        None if bare else torch.randn(width) - 1,
        reverse,
    )


def double(side):
    return ScanSide(*(t.double() if isinstance(t, torch.Tensor) else t for t in side))


CASES = {
    "forward": (False,),
    "reverse": (True,),
    "both": (False, True),
}


@pytest.mark.parametrize("pad", ["0", "1"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("directions", CASES)
def test_scan_is_mapped_to_their_layout_and_back(directions, gated, pad, monkeypatch):
    monkeypatch.setenv(mamba_ssm.PAD_ENV, pad)
    sides = [side_of(2, 9, 6, 3, 2, reverse, bare=not gated) for reverse in CASES[directions]]
    z = torch.randn(2, 9, 6) if gated else None
    want, total = gated_sum_reference(
        [double(s) for s in sides], None if z is None else z.double(), scale=0.5, dt_softplus=True
    )
    for return_score in (False, True):
        out, score, kept = mamba_ssm.scan_forward(
            sides, z, scale=0.5, dt_softplus=True, save=True, return_score=return_score, function=Scan.apply
        )
        assert relative_error(out, want) < 1e-5
        assert (score is not None) == return_score
        if score is not None:
            assert relative_error(score, total.amax(-1)) < 1e-5
        assert kept.states.numel() == states_numel(len(sides), (2, 9, 6), 3)
        assert kept.total.shape == (want.shape if gated else (0,))
    grad = torch.randn(2, 9, 6)
    with torch._C._AutoDispatchBelowAutograd():  # as inside an operator
        grads, dz = mamba_ssm.scan_backward(grad, sides, z, kept, scale=0.5, dt_softplus=True, function=Scan.apply)
    want_grads, want_dz = reference_backward(
        grad.double(), [double(s) for s in sides], None if z is None else z.double(), None, scale=0.5, dt_softplus=True
    )
    for have, reference, side in zip(grads, want_grads, sides, strict=True):
        for name in have._fields[:-1]:
            value, input_ = getattr(have, name), getattr(side, name)
            assert (value is None) == (input_ is None), name
            if value is not None:
                assert value.dtype == input_.dtype
                assert value.is_contiguous()
                assert relative_error(value, getattr(reference, name)) < 1e-5, name
    assert (dz is None) == (z is None)
    if dz is not None:
        assert relative_error(dz, want_dz) < 1e-5


def test_mixed_dtypes_become_what_their_kernel_takes():
    side = side_of(1, 5, 8, 4, None, True, dtype=torch.bfloat16)
    side = side._replace(dt=side.dt.float(), B=side.B.float(), A=side.A.bfloat16(), D=side.D.bfloat16())
    out, _, _ = mamba_ssm.scan_forward(
        [side], None, scale=1.0, dt_softplus=False, save=False, return_score=False, function=Scan.apply
    )
    assert out.dtype == torch.bfloat16
    want, _ = gated_sum_reference([double(side)], None, scale=1.0, dt_softplus=False)
    assert relative_error(out, want) < 3e-2


def test_even_lengths():
    lengths = (1, 50, 128, 129, 197, 256, 257, 1000, 1024, 1025, 4097)
    assert [mamba_ssm.even_length(n) for n in lengths] == [128, 128, 128, 256, 256, 256, 512, 1024, 1024, 2048, 6144]


class Conv(torch.autograd.Function):
    """causal_conv1d_fn on [B, E, L]; demands what its channel-last path demands of strides."""

    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        if x.stride(2) != 1:
            assert x.stride(1) == 1
            assert x.shape[1] % 8 == 0
            assert x.stride(0) % 8 == 0
            assert x.stride(2) % 8 == 0
        ctx.save_for_backward(x, weight, bias)
        ctx.activation = activation
        return Conv.run(x, weight, bias, activation)

    @staticmethod
    def run(x, weight, bias, activation):
        y = F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=x.shape[1])
        return F.silu(y) if activation == "silu" else y

    @staticmethod
    def backward(ctx, grad):
        primals = [t.detach() for t in ctx.saved_tensors if t is not None]

        def run(x, weight, bias=None):
            return Conv.run(x, weight, bias, ctx.activation)

        gradients = torch.func.vjp(run, *primals)[1](grad)
        return *gradients, *(None,) * (4 - len(gradients))


@pytest.mark.parametrize(("width", "silu", "bias"), [(6, True, True), (8, True, True), (16, False, False)])
def test_convolution_is_mapped_to_their_layout_and_back(width, silu, bias):
    x = torch.randn(2, 7, 2 * width)[..., :width]
    sides = [ConvSide(torch.randn(width, 4), torch.randn(width) if bias else None, r) for r in (False, True)]

    def call(x, weight, bias, activation):
        return Conv.apply(x, weight, bias, activation)

    double_sides = [ConvSide(s.weight.double(), None if s.bias is None else s.bias.double(), s.reverse) for s in sides]
    want = conv_reference(x.double(), double_sides, silu=silu)
    have = mamba_ssm.conv_forward(x, sides, silu=silu, function=call)
    grads = [torch.randn_like(y) for y in have]
    with torch._C._AutoDispatchBelowAutograd():
        dx, params = mamba_ssm.conv_backward(grads, x, sides, silu=silu, function=call)
    want_dx, want_params = conv_reference_backward([g.double() for g in grads], x.double(), double_sides, silu=silu)
    for a, b in ((dx, want_dx), *zip(have, want, strict=True)):
        assert relative_error(a, b) < 1e-5
        assert a.is_contiguous()
    for (dw, db), (want_dw, want_db) in zip(params, want_params, strict=True):
        assert relative_error(dw, want_dw) < 1e-5
        assert (db is None) == (want_db is None) == (not bias)
        if db is not None:
            assert relative_error(db, want_db) < 1e-5


@pytest.fixture
def peers(monkeypatch):
    """The benchmark's peers, with the formulas in place of their compiled functions."""
    path = Path(__file__).parents[2] / "benchmarks" / "gpu_peers.py"
    spec = importlib.util.spec_from_file_location("gpu_peers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def conv(x, weight, bias, activation):
        return Conv.run(x, weight, bias, activation)

    monkeypatch.setattr(module, "functions", lambda: (formula, conv))
    return module


def test_the_peer_of_the_model_benchmark_computes_what_our_mixer_computes(peers):
    mixer = BidirectionalMamba(16, d_state=4)
    tokens = torch.randn(2, 6, 16)
    want, _ = mixer(tokens)
    have, _ = peers.use_their_mixer(nn.Sequential(mixer))[0](tokens)
    assert relative_error(have, want) < 1e-5
    have.sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())


@pytest.mark.parametrize("pad", [False, True])
def test_the_peer_of_the_op_benchmark_computes_what_our_op_computes(peers, pad):
    tensors = two_directions(2, 9, 8, 4, 2)
    peer = peers.OwnLayout(tensors, pad=pad)
    first, second = (y[..., :9].transpose(1, 2) for y in peer.outputs())
    want = bidirectional(**tensors, backend="reference")
    assert relative_error((first + second.flip(1)) * 0.5, want) < 1e-5
    leaves = peer.leaves()
    assert len(torch.autograd.grad(peer().sum(), leaves)) == 2 * 9


def test_reasons_are_precise(monkeypatch, tmp_path):
    assert "norm" in mamba_ssm.why_not("norm", "cuda", torch.float32)
    assert "cpu" in mamba_ssm.why_not("scan", "cpu", torch.float32, 16)
    assert "float64" in mamba_ssm.why_not("scan", "cuda", torch.float64, 16)
    assert "257" in mamba_ssm.why_not("scan", "cuda", torch.float32, 257)
    assert "5" in mamba_ssm.why_not("conv", "cuda", torch.float32, 5)
    if not torch.cuda.is_available():
        assert "CUDA" in mamba_ssm.why_not("scan", "cuda", torch.float32, 16)
    with pytest.raises(ValueError, match="package"):
        mamba_ssm.why_unavailable("mamba")


def install(monkeypatch, folder, **files):
    """Makes packages importable from a folder, as an installation would."""
    for name, text in files.items():
        path = folder / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    for name in [m for m in sys.modules if m.split(".")[0] in {n.split(".")[0] for n in files}]:
        monkeypatch.delitem(sys.modules, name)
    mamba_ssm._load.cache_clear()


@pytest.fixture
def _no_memory():
    yield
    mamba_ssm._load.cache_clear()
    for name in [m for m in sys.modules if m.split(".")[0] in ("mamba_ssm", "selective_scan_cuda")]:
        del sys.modules[name]


@pytest.mark.usefixtures("_no_memory")
@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is not None, reason="mamba_ssm is installed")
def test_a_missing_package_and_a_missing_extension_are_told_apart(monkeypatch, tmp_path):
    mamba_ssm._load.cache_clear()
    assert mamba_ssm._load("mamba_ssm") == (None, "the package mamba_ssm is not installed")
    install(monkeypatch, tmp_path, **{"mamba_ssm.__init__": ""})
    function, reason = mamba_ssm._load("mamba_ssm")
    assert function is None
    assert "without its compiled extension selective_scan_cuda" in reason
    assert "MAMBA_KEEP_CUDA_BUILD=TRUE" in reason
    install(monkeypatch, tmp_path, selective_scan_cuda="raise ImportError('undefined symbol: _ZN3c10\\nmore')")
    assert mamba_ssm._load("mamba_ssm")[1] == (
        "importing selective_scan_cuda failed: ImportError: undefined symbol: _ZN3c10"
    )
    install(
        monkeypatch,
        tmp_path,
        selective_scan_cuda="",
        **{
            "mamba_ssm.ops.__init__": "",
            "mamba_ssm.ops.selective_scan_interface": "def selective_scan_fn(): return 'theirs'",
        },
    )
    function, reason = mamba_ssm._load("mamba_ssm")
    assert reason is None
    assert function() == "theirs"
    with pytest.raises(ValueError, match="causal_conv1d"):
        mamba_ssm.conv_forward(torch.zeros(1, 2, 8), [ConvSide(torch.zeros(8, 4), None, False)], silu=True)
