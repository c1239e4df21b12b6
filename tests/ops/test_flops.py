"""Counts of the operators under PyTorch's own counter."""

import pytest
import torch
import torch.nn.functional as F

from mambascope.ops import bidirectional_conv, causal_conv1d, selective_scan
from mambascope.ops.flops import count_macs

from .common import FAST, bidirectional, scan_inputs, two_directions

B, L, E, N, R, K = 2, 37, 24, 16, 3, 4
TOKENS = B * L


def backward(function, inputs):
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    return lambda: torch.autograd.grad(function(**leaves).sum(), list(leaves.values()))


@pytest.mark.parametrize("backend", [*FAST, "reference", None])
def test_scan(backend):
    full = scan_inputs(B, L, E, N, R)
    assert count_macs(selective_scan, **full, backend=backend) == TOKENS * (9 * E * N + R * E + 2 * E)
    plain = scan_inputs(B, L, E, N, None, z=False, D=False)
    assert count_macs(selective_scan, **plain, backend=backend) == TOKENS * (9 * E * N + 2 * E)


@pytest.mark.parametrize("backend", [*FAST, None])
def test_bidirectional_and_backward(backend):
    inputs = two_directions(B, L, E, N, R)
    one_way = 2 * TOKENS * (9 * E * N + R * E + 2 * E)
    assert count_macs(bidirectional, **inputs, backend=backend) == one_way
    assert count_macs(bidirectional, **inputs, backend=backend, return_score=True) == one_way
    assert count_macs(backward(bidirectional, inputs)) == 3 * one_way


def test_scan_backward():
    inputs = scan_inputs(B, L, E, N, R)
    assert count_macs(backward(selective_scan, inputs)) == 3 * count_macs(selective_scan, **inputs)


def test_convolution():
    x, w = torch.randn(B, L, E), torch.randn(E, 1, K)
    assert count_macs(causal_conv1d, x, w) == TOKENS * K * E
    assert count_macs(bidirectional_conv, x, w, None, w, None) == 2 * TOKENS * K * E
    assert count_macs(backward(causal_conv1d, {"x": x, "weight": w})) == 3 * TOKENS * K * E
    assert count_macs(backward(lambda x, w: sum(bidirectional_conv(x, w, None, w, None)), {"x": x, "w": w})) == (
        6 * TOKENS * K * E
    )


def test_inference_mode_counts_too():
    inputs = two_directions(B, L, E, N, R)
    with torch.inference_mode():
        assert count_macs(bidirectional, **inputs) == 2 * TOKENS * (9 * E * N + R * E + 2 * E)


def test_products_count_one_per_multiply_add():
    assert count_macs(F.linear, torch.randn(5, 7), torch.randn(11, 7)) == 5 * 7 * 11
