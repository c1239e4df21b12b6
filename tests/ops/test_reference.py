"""The reference itself: against arithmetic written out by hand, PyTorch's convolution and numerical derivatives."""

import math

import pytest
import torch
import torch.nn.functional as F

from mambascope.ops import add_rms_norm, bidirectional_conv, causal_conv1d, selective_scan
from mambascope.ops.selective_scan.common import ScanSide
from mambascope.ops.selective_scan.reference import gated_sum_reference

from .common import bidirectional, composed, relative_error, scan_inputs, to_double, two_directions


def scan_by_hand(x, dt, A, B, C, D, z, dt_weight, dt_bias):
    """Scalar loops over every index."""
    batch, length, width = x.shape
    states, rank = A.shape[1], dt.shape[-1]
    y = torch.zeros(batch, length, width, dtype=torch.float64)
    for b in range(batch):
        for e in range(width):
            h = [0.0] * states
            for t in range(length):
                step = sum(float(dt[b, t, r] * dt_weight[e, r]) for r in range(rank)) + float(dt_bias[e])
                step = math.log1p(math.exp(step))
                for n in range(states):
                    h[n] = math.exp(step * float(A[e, n])) * h[n] + step * float(x[b, t, e] * B[b, t, n])
                out = sum(h[n] * float(C[b, t, n]) for n in range(states)) + float(D[e] * x[b, t, e])
                gate = float(z[b, t, e])
                y[b, t, e] = out * gate / (1 + math.exp(-gate))
    return y


def test_scan_is_the_written_out_recurrence():
    inputs = to_double(scan_inputs(2, 5, 3, 4, 2))
    torch.testing.assert_close(selective_scan(**inputs, backend="reference"), scan_by_hand(**inputs))


def test_gradients_are_the_numerical_derivatives():
    inputs = to_double(scan_inputs(1, 4, 3, 2, 2))
    names = list(inputs)

    def function(*tensors):
        t = dict(zip(names, tensors, strict=True))
        z = t.pop("z")
        return gated_sum_reference([ScanSide(**t, reverse=True)], z)[0]

    assert torch.autograd.gradcheck(function, [v.clone().requires_grad_() for v in inputs.values()])


@pytest.mark.parametrize("length", [1, 2, 9])
def test_reverse_is_the_flipped_sequence(length):
    inputs = scan_inputs(2, length, 6, 4, 3)
    flipped = {k: v.flip(1) if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
    want = selective_scan(**flipped, backend="reference").flip(1)
    torch.testing.assert_close(selective_scan(**inputs, reverse=True, backend="reference"), want)


def test_bidirectional_is_two_gated_scans():
    inputs = to_double(two_directions(2, 9, 6, 4, 3))
    want = composed(**inputs, backend="reference")
    torch.testing.assert_close(bidirectional(**inputs, backend="reference"), want)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 10])
def test_convolution_is_that_of_torch(length, taps):
    conv = torch.nn.Conv1d(6, 6, taps, groups=6, padding=taps - 1).double()
    x = torch.randn(2, length, 6, dtype=torch.float64)

    def torchs(x):
        return F.silu(conv(x.transpose(1, 2))[..., :length]).transpose(1, 2)

    causal, anti = bidirectional_conv(x, conv.weight, conv.bias, conv.weight, conv.bias, backend="reference")
    torch.testing.assert_close(causal, torchs(x))
    torch.testing.assert_close(anti, torchs(x.flip(1)).flip(1))
    plain = causal_conv1d(x, conv.weight.squeeze(1), None, activation=None, reverse=True, backend="reference")
    bias = conv.bias[:, None]
    want = (conv(x.flip(1).transpose(1, 2)) - bias)[..., :length].transpose(1, 2).flip(1)
    torch.testing.assert_close(plain, want)


def test_norm_is_that_of_torch():
    hidden, residual, weight = torch.randn(2, 7, 12), torch.randn(2, 7, 12), torch.randn(12)
    normed, total = add_rms_norm(hidden, residual, weight, 1e-5)
    assert torch.equal(total, hidden + residual)
    assert relative_error(normed, F.rms_norm(hidden + residual, (12,), weight, 1e-5)) < 1e-6
