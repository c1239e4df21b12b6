"""Choice of backends: argument, environment, automatic, refusals; and the messages for bad arguments."""

import logging

import pytest
import torch

from mambascope import ops
from mambascope.ops import BACKENDS, ScanDirection, add_rms_norm, bidirectional_conv, causal_conv1d, selective_scan
from mambascope.ops import backends as module
from mambascope.ops.backends import ENV, Backend, Request, choose, register, report, resolve, why_not

from .common import bidirectional, scan_inputs, two_directions

SCAN = Request("scan", "cpu", torch.float32, 16)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv(ENV, raising=False)
    monkeypatch.setattr(module, "_REGISTRY", dict(module._REGISTRY))
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.setattr(module, "_modules", {})
    monkeypatch.setattr(module, "_logged", set())


def refusing(name, reason):
    original = module._REGISTRY.get(name, module._REGISTRY["torch"])
    register(Backend(name, lambda request: reason, original.modules, original.auto))


def test_automatic_choice_is_the_compiled_kernel_or_torch():
    compiled = why_not("cpu", SCAN) is None
    assert choose(SCAN) == ("cpu" if compiled else "torch")
    assert choose(SCAN._replace(dtype=torch.float64)) == "torch"
    assert choose(SCAN._replace(device="cuda")) != "cpu"


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_argument_wins_over_environment(monkeypatch, name):
    monkeypatch.setenv(ENV, "reference" if name == "torch" else "torch")
    assert choose(SCAN, name) == name
    assert choose(SCAN) != name


def test_environment_is_read_at_every_call(monkeypatch):
    used = []
    chunked = __import__("mambascope.ops.selective_scan.chunked", fromlist=["x"])
    forward = chunked.scan_forward
    monkeypatch.setattr(chunked, "scan_forward", lambda *a, **k: used.append(1) or forward(*a, **k))
    inputs = scan_inputs(1, 4, 8, 16, 2)
    monkeypatch.setenv(ENV, "reference")
    selective_scan(**inputs)
    assert not used
    monkeypatch.setenv(ENV, "torch")
    selective_scan(**inputs)
    assert used


@pytest.mark.parametrize(
    "call",
    [
        lambda name: selective_scan(**scan_inputs(1, 4, 8, 16, 2), backend=name),
        lambda name: bidirectional(**two_directions(1, 4, 8, 16, 2), backend=name),
        lambda name: causal_conv1d(torch.randn(1, 4, 8), torch.randn(8, 4), backend=name),
        lambda name: add_rms_norm(torch.randn(1, 4, 8), None, torch.ones(8), backend=name),
        ops.check_backend,
    ],
)
def test_unknown_backend_lists_the_known(call):
    with pytest.raises(ValueError, match=f"{', '.join(BACKENDS)}, got 'cuda'"):
        call("cuda")


def test_unknown_backend_in_the_environment(monkeypatch):
    monkeypatch.setenv(ENV, "fast")
    with pytest.raises(ValueError, match=f"{ENV} must be one of .*, got 'fast'"):
        selective_scan(**scan_inputs(1, 4, 8, 16, 2))


def test_a_refused_backend_is_replaced_and_logged_once(caplog):
    refusing("cpu", "no compiler was found")
    inputs = scan_inputs(1, 4, 8, 16, 2)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            out = selective_scan(**inputs, backend="cpu")
    torch.testing.assert_close(out, selective_scan(**inputs, backend="reference"))
    messages = [r.message for r in caplog.records if "refused" in r.message]
    assert messages == [
        "scan on cpu, float32: backend 'cpu' refused (no compiler was found); using 'torch'",
    ]


def test_automatic_fallback_is_logged_once(caplog):
    refusing("cpu", "no compiler was found")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            selective_scan(**scan_inputs(1, 4, 8, 16, 2))
    assert [r.message for r in caplog.records] == [
        "scan on cpu, float32: backend 'cpu' not used (no compiler was found)"
    ]


def test_forward_and_backward_use_one_backend_even_if_the_environment_changes(monkeypatch):
    inputs = {k: v.detach().requires_grad_() for k, v in two_directions(1, 70, 16, 16, 2).items()}
    want = torch.autograd.grad(bidirectional(**inputs).square().sum(), list(inputs.values()))
    out = bidirectional(**inputs)
    monkeypatch.setenv(ENV, "torch" if resolve("scan", None, "cpu", torch.float32, 16) != "torch" else "reference")
    have = torch.autograd.grad(out.square().sum(), list(inputs.values()))
    for a, b in zip(have, want, strict=True):
        assert torch.equal(a, b)


def test_report_names_the_choice_and_every_refusal():
    refusing("cpu", "no compiler was found")
    text = report()
    assert "cpu, float32: torch" in text
    assert "cpu: no compiler was found" in text
    for name in BACKENDS:
        assert name in text


def test_report_as_installed():
    text = report()
    assert f"cpu, float32: {choose(SCAN)}" in text
    assert f"cpu, bfloat16: {choose(SCAN._replace(dtype=torch.bfloat16))}" in text


def swap(inputs, **changes):
    return {**inputs, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(4, 8)}, r"x must be \[B, L, E\], got \[4, 8\]"),
        ({"x": torch.randint(3, (1, 4, 8))}, "x must be floating point"),
        ({"x": torch.randn(1, 0, 8)}, "x must hold at least one token"),
        ({"x": torch.randn(1, 5, 8)}, r"dt must be \[B, L, R\] = \[1, 5, 2\], got \[1, 4, 2\]"),
        ({"A": torch.randn(8)}, r"A must be \[E, N\], got \[8\]"),
        ({"A": torch.randn(7, 16)}, r"A must be \[E, N\] = \[8, 16\], got \[7, 16\]"),
        ({"B": torch.randn(1, 4, 15)}, r"B must be \[B, L, N\] = \[1, 4, 16\]"),
        ({"C": torch.randn(2, 4, 16)}, r"C must be \[B, L, N\]"),
        ({"D": torch.randn(9)}, r"D must be \[E\] = \[8\], got \[9\]"),
        ({"z": torch.randn(1, 4, 9)}, r"z must be \[B, L, E\]"),
        ({"dt_weight": torch.randn(8, 3)}, r"dt_weight must be \[E, R\] = \[8, 2\], got \[8, 3\]"),
        ({"dt_weight": None}, r"dt must be \[B, L, E\] = \[1, 4, 8\], got \[1, 4, 2\]"),
        ({"dt_bias": torch.randn(8, 1)}, r"dt_bias must be \[E\]"),
        ({"D": torch.ones(8, device="meta")}, "D must be on cpu"),
        ({"B": 3}, "B must be a tensor"),
    ],
)
def test_bad_scan_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**swap(scan_inputs(1, 4, 8, 16, 2), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_b": torch.randn(1, 5, 8)}, r"backward.x must be \[B, L, E\] = \[1, 4, 8\]"),
        ({"x_b": torch.randn(1, 4, 8).double()}, "backward.x must be torch.float32"),
        ({"proj_f": torch.randn(1, 4, 33)}, r"forward.proj must be \[B, L, R \+ 2N\] = \[1, 4, 34\]"),
        ({"A_b": torch.randn(8, 8)}, "backward.A must be"),
        ({"A_f": None}, "forward.A must be"),
        ({"dt_weight_f": torch.randn(7, 2)}, "forward.dt_weight must be"),
        ({"z": torch.randn(1, 4, 4)}, r"z must be \[B, L, E\]"),
    ],
)
def test_bad_bidirectional_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        bidirectional(**swap(two_directions(1, 4, 8, 16, 2), **changes))


def test_bad_conv_and_norm_arguments():
    x, w = torch.randn(1, 4, 8), torch.randn(8, 4)
    for args, kwargs, message in (
        ((x, w[:, :, None]), {}, r"weight must be \[E, 1, K\] or \[E, K\]"),
        ((x, torch.randn(7, 4)), {}, "weight must be"),
        ((x, w, torch.randn(7)), {}, "bias must be"),
        ((x, w), {"activation": "gelu"}, "activation must be 'silu' or None, got 'gelu'"),
        ((x[0], w), {}, "x must be"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_conv1d(*args, **kwargs)
    with pytest.raises(ValueError, match="weight_b must have 4 taps"):
        bidirectional_conv(x, w, None, w[:, :3], None)
    with pytest.raises(ValueError, match="together"):
        bidirectional_conv(x, w, None, w, torch.randn(8))
    with pytest.raises(ValueError, match="residual must be"):
        add_rms_norm(x, x[:, :3], torch.ones(8))
    with pytest.raises(ValueError, match="weight must be"):
        add_rms_norm(x, x, torch.ones(7))
    with pytest.raises(ValueError, match="eps must be positive"):
        add_rms_norm(x, x, torch.ones(8), 0.0)


def test_scan_direction_fields_are_the_documented_ones():
    assert ScanDirection._fields == ("x", "proj", "dt_weight", "dt_bias", "A", "D")
