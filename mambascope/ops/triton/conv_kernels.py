# Triton compiles these functions: it knows no starred tuples, and its types are not Python's.
# ruff: noqa: RUF005
# mypy: ignore-errors
"""Triton kernels of the causal and anti-causal depthwise convolution, with SiLU.

A thread keeps the last K tokens of its channels in registers while it walks over them. The window of tokens u-K+1 .. u
serves the causal output at u and the anti-causal one at u-K+1, so both directions read x once.

Letters: B batch, L tokens, E channels, K taps, BE channels and SPAN tokens of a program, T tokens unrolled. CAUSAL and
ANTI say which directions there are; the operands of an absent one are never touched.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambascope.ops.triton.device import loop, silu, silu_slope


@triton.jit
def _taps(weight, e, in_e, K: tl.constexpr):
    taps = ()
    for k in tl.static_range(K):
        taps = taps + (tl.load(weight + e * K + k, mask=in_e, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _before(x, lo, e, in_e, x_l, K: tl.constexpr):
    """The K - 1 tokens before ``lo``."""
    window = ()
    for k in tl.static_range(K - 1):
        l = lo - (K - 1) + k
        window = window + (tl.load(x + l.to(tl.int64) * x_l + e, mask=in_e & (l >= 0), other=0.0).to(tl.float32),)
    return window


@triton.jit(do_not_specialize=["L"])
def conv_forward_kernel(
    x, weight_f, bias_f, weight_b, bias_b, y_f, y_b, L, E, x_b, x_l,
    K: tl.constexpr, CAUSAL: tl.constexpr, ANTI: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    BE: tl.constexpr, SPAN: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(E / BE), ceil(L / SPAN), B)."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    in_e = e < E
    image = tl.program_id(2).to(tl.int64)
    lo = tl.program_id(1) * SPAN
    hi = tl.minimum(lo + SPAN, L)
    at_x = x + image * x_b
    row_y = image * L
    if CAUSAL:
        w_f = _taps(weight_f, e, in_e, K)
    if ANTI:
        w_b = _taps(weight_b, e, in_e, K)
    shift_f = tl.zeros([BE], tl.float32)
    shift_b = tl.zeros([BE], tl.float32)
    if HAS_BIAS:
        if CAUSAL:
            shift_f = tl.load(bias_f + e, mask=in_e, other=0.0).to(tl.float32)
        if ANTI:
            shift_b = tl.load(bias_b + e, mask=in_e, other=0.0).to(tl.float32)
    window = _before(at_x, lo, e, in_e, x_l, K)
    for j in loop(tl.cdiv(hi - lo + (K - 1 if ANTI else 0), T)):
        fresh = ()
        for t in tl.static_range(T):
            u = lo + j * T + t
            fresh = fresh + (tl.load(at_x + u.to(tl.int64) * x_l + e, mask=in_e & (u < L), other=0.0).to(tl.float32),)
        for t in tl.static_range(T):
            now = lo + j * T + t
            window = window + (fresh[t],)
            if CAUSAL:
                acc_f = shift_f
                for k in tl.static_range(K):
                    acc_f += w_f[k] * window[k]
                if SILU:
                    acc_f = silu(acc_f)
                tl.store(y_f + (row_y + now) * E + e, acc_f.to(y_f.dtype.element_ty), mask=in_e & (now < hi))
            if ANTI:
                acc_b = shift_b
                for k in tl.static_range(K):
                    acc_b += w_b[k] * window[K - 1 - k]
                if SILU:
                    acc_b = silu(acc_b)
                past = now - (K - 1)
                ok = in_e & (past >= lo) & (past < hi)
                tl.store(y_b + (row_y + past) * E + e, acc_b.to(y_b.dtype.element_ty), mask=ok)
            window = window[1:]


@triton.jit(do_not_specialize=["L"])
def conv_backward_kernel(
    x, weight_f, bias_f, weight_b, bias_b, grad_f, grad_b, dx, dw, L, E, x_b, x_l, gf_b, gf_l, gb_b, gb_l,
    K: tl.constexpr, CAUSAL: tl.constexpr, ANTI: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    BE: tl.constexpr, SPAN: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Same grid. dw [B, ceil(L / SPAN), 2, K + 1, E]: sums over a span of the gradients of the taps and the bias.

    With u the latest token in the window, d_f(u) and d_b(u-K+1) are the gradients before the activation. The gradient
    of x at u-K+1 needs d_f at u-K+1 .. u and d_b at u-2K+2 .. u-K+1: the last K of each.
    """
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    in_e = e < E
    image = tl.program_id(2).to(tl.int64)
    lo = tl.program_id(1) * SPAN
    hi = tl.minimum(lo + SPAN, L)
    at_x = x + image * x_b
    zero = tl.zeros([BE], tl.float32)
    if CAUSAL:
        w_f = _taps(weight_f, e, in_e, K)
    if ANTI:
        w_b = _taps(weight_b, e, in_e, K)
    shift_f = zero
    shift_b = zero
    if HAS_BIAS:
        if CAUSAL:
            shift_f = tl.load(bias_f + e, mask=in_e, other=0.0).to(tl.float32)
        if ANTI:
            shift_b = tl.load(bias_b + e, mask=in_e, other=0.0).to(tl.float32)
    window = _before(at_x, lo, e, in_e, x_l, K)
    last_f = ()
    last_b = ()
    dw_f = (zero,)
    dw_b = (zero,)
    for _ in tl.static_range(K - 1):
        last_f = last_f + (zero,)
        last_b = last_b + (zero,)
        dw_f = dw_f + (zero,)
        dw_b = dw_b + (zero,)
    db_f = zero
    db_b = zero
    for j in loop(tl.cdiv(hi - lo + K - 1, T)):
        fresh = ()
        in_f = ()
        in_b = ()
        for t in tl.static_range(T):
            u = lo + j * T + t
            v = u - (K - 1)
            fresh = fresh + (tl.load(at_x + u.to(tl.int64) * x_l + e, mask=in_e & (u < L), other=0.0).to(tl.float32),)
            if CAUSAL:
                at = grad_f + image * gf_b + u.to(tl.int64) * gf_l + e
                in_f = in_f + (tl.load(at, mask=in_e & (u < L), other=0.0).to(tl.float32),)
            if ANTI:
                at = grad_b + image * gb_b + v.to(tl.int64) * gb_l + e
                in_b = in_b + (tl.load(at, mask=in_e & (v >= 0) & (v < L), other=0.0).to(tl.float32),)
        for t in tl.static_range(T):
            now = lo + j * T + t
            past = now - (K - 1)
            window = window + (fresh[t],)
            acc = zero
            if CAUSAL:
                d_f = in_f[t]
                if SILU:
                    before_f = shift_f
                    for k in tl.static_range(K):
                        before_f += w_f[k] * window[k]
                    d_f = d_f * silu_slope(before_f)
                last_f = last_f + (d_f,)
                mine_f = tl.where(now < hi, d_f, 0.0)
                db_f += mine_f
                sums = ()
                for k in tl.static_range(K):
                    sums = sums + (dw_f[k] + mine_f * window[k],)
                    acc += w_f[k] * last_f[K - 1 - k]
                dw_f = sums
                last_f = last_f[1:]
            if ANTI:
                d_b = in_b[t]
                if SILU:
                    before_b = shift_b
                    for k in tl.static_range(K):
                        before_b += w_b[k] * window[K - 1 - k]
                    d_b = d_b * silu_slope(before_b)
                last_b = last_b + (d_b,)
                mine_b = tl.where((past >= lo) & (past < hi), d_b, 0.0)
                db_b += mine_b
                sums = ()
                for k in tl.static_range(K):
                    sums = sums + (dw_b[k] + mine_b * window[K - 1 - k],)
                    acc += w_b[k] * last_b[k]
                dw_b = sums
                last_b = last_b[1:]
            window = window[1:]
            ok = in_e & (past >= lo) & (past < hi)
            tl.store(dx + (image * L + past) * E + e, acc.to(dx.dtype.element_ty), mask=ok)
    at_dw = dw + (image * tl.num_programs(1) + tl.program_id(1)) * (2 * (K + 1)) * E + e
    for k in tl.static_range(K):
        tl.store(at_dw + k * E, dw_f[k], mask=in_e)
        tl.store(at_dw + (K + 1 + k) * E, dw_b[k], mask=in_e)
    tl.store(at_dw + K * E, db_f, mask=in_e)
    tl.store(at_dw + (2 * K + 1) * E, db_b, mask=in_e)
