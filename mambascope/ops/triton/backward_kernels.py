# Triton compiles these functions: it knows no starred tuples, and its types are not Python's.
# ruff: noqa: RUF005
# mypy: ignore-errors
"""Triton kernels of the selective scan's gradients.

One program per channel block, image, direction and segment goes through the walk backwards, a chunk of T tokens at a
time. Here the states are the outer loop and the tokens of a chunk are unrolled: per state, the chunk is walked forwards
from its start state and then backwards, all in registers, so that every decay is computed once. The start states of the
groups of KEEP tokens come from the forward pass; those of the chunks inside a group are recomputed first.

The gradients of B and C need sums over all channels: each program writes its block's sums, ``scan_unpack_kernel`` adds
the blocks (where that buffer would be too large, the programs add atomically).

Letters as in ``forward_kernels``; M = KEEP / T chunks per group. Tiles are [BE, T], tokens in the order of the walk.
B and C and their gradients are packed as [DIRS, 2, B, N, chunks * T] in float32, again with the tokens of each chunk in
the order of the walk: one vector load brings what a state needs for a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambascope.ops.triton.device import LOG2E, loop, sigmoid, silu, silu_slope, softplus, stack, unstack

_RUN_TIME = ["B", "L", "S", "seg", "blocks"]
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=_RUN_TIME)
def scan_pack_kernel(
    b0, b1, c0, c1, packed, B, L, bc_b, bc_l,
    N: tl.constexpr, NP: tl.constexpr, DIRS: tl.constexpr, REVERSE: tl.constexpr, T: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """packed [DIRS, 2, B, N, chunks * T] from B and C [B, L, N]. Grid (ceil(chunks * T / BL), 2 * DIRS, B)."""
    side = tl.program_id(1) // 2
    which = tl.program_id(1) % 2
    image = tl.program_id(2).to(tl.int64)
    padded = tl.cdiv(L, T) * T
    back = (side == 1) if DIRS == 2 else (side < REVERSE)
    p = tl.program_id(0) * BL + tl.arange(0, BL)[:, None]
    n = tl.arange(0, NP)[None, :]
    l = tl.where(back, p // T * T + (T - 1 - p % T), p)
    source = tl.where(which == 0, tl.where(side == 1, b1, b0), tl.where(side == 1, c1, c0))
    v = tl.load(source + image * bc_b + l.to(tl.int64) * bc_l + n, mask=(l < L) & (n < N), other=0.0)
    row = (tl.program_id(1) * B + image) * N + n
    tl.store(packed + row * padded + p, v.to(tl.float32), mask=(p < padded) & (n < N))


@triton.jit(do_not_specialize=_RUN_TIME)
def scan_unpack_kernel(
    packed, b0, b1, c0, c1, blocks, B, L, bc_b, bc_l,
    N: tl.constexpr, NP: tl.constexpr, DIRS: tl.constexpr, REVERSE: tl.constexpr, T: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """The reverse of ``scan_pack_kernel``: sums packed [blocks, ...] over blocks into [B, L, N]. Same grid."""
    side = tl.program_id(1) // 2
    which = tl.program_id(1) % 2
    image = tl.program_id(2).to(tl.int64)
    padded = tl.cdiv(L, T) * T
    back = (side == 1) if DIRS == 2 else (side < REVERSE)
    p = tl.program_id(0) * BL + tl.arange(0, BL)[:, None]
    n = tl.arange(0, NP)[None, :]
    ok = (p < padded) & (n < N)
    v = tl.zeros([BL, NP], tl.float32)
    for block in loop(blocks):
        row = ((tl.cast(block, tl.int64) * (2 * DIRS) + tl.program_id(1)) * B + image) * N + n
        v += tl.load(packed + row * padded + p, mask=ok, other=0.0)
    l = tl.where(back, p // T * T + (T - 1 - p % T), p)
    target = tl.where(which == 0, tl.where(side == 1, b1, b0), tl.where(side == 1, c1, c0))
    tl.store(target + image * bc_b + l.to(tl.int64) * bc_l + n, v.to(b0.dtype.element_ty), mask=ok & (l < L))


@triton.jit
def _step_sizes(at, bias, SOFTPLUS: tl.constexpr, in_e, ok):
    """Raw and effective step sizes of a tile; 0 for tokens beyond the end, which leaves the state as it is."""
    raw = tl.load(at, mask=in_e, other=0.0).to(tl.float32) + bias[:, None]
    dt = raw
    if SOFTPLUS:
        dt = softplus(dt)
    return raw, tl.where(ok, dt, 0.0)


@triton.jit(do_not_specialize=_RUN_TIME)
def scan_backward_kernel(
    x0, x1, dt0, dt1, a0, a1, d0, d1, bias0, bias1, z, y_sum, grad, BC, states, inner, carry,
    dx0, dx1, ddt0, ddt1, dz, dBC, dA, dD, dbias,
    B, L, E, seg, S, x_b, x_l, dt_b, dt_l, z_b, z_l, g_b, g_l, scale,
    N: tl.constexpr, DIRS: tl.constexpr, REVERSE: tl.constexpr, BE: tl.constexpr, CPT: tl.constexpr, T: tl.constexpr,
    M: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(E / BE), DIRS * S, B).

    carry, dA [DIRS, S, B, N, E]: in: gradient of the state that leaves the segment, and zeros; out: scratch, and the
    gradient of A per image and segment. inner [DIRS, S, B, M - 1, N, E] scratch. dBC [blocks (1 if ATOMIC), DIRS, 2, B,
    N, chunks * T]. dD, dbias [DIRS, S, B, E]. dx, ddt, dz, y_sum contiguous.
    """
    block = tl.program_id(0)
    side = tl.program_id(1) // S
    segment = tl.program_id(1) % S
    image = tl.program_id(2).to(tl.int64)
    lo = segment * seg
    hi = tl.minimum(lo + seg, L)
    back = (side == 1) if DIRS == 2 else (side < REVERSE)
    e = tl.max_contiguous(block * BE + tl.arange(0, BE), [CPT])
    e2 = tl.max_contiguous(tl.broadcast_to((block * BE + tl.arange(0, BE))[:, None], [BE, T]), [CPT, 1])
    in_e = e < E
    in_e2 = e2 < E
    at_x = tl.where(side == 1, x1, x0) + image * x_b
    at_dt = tl.where(side == 1, dt1, dt0) + image * dt_b
    at_A = tl.where(side == 1, a1, a0)
    at_dx = tl.where(side == 1, dx1, dx0) + image * L * E
    at_ddt = tl.where(side == 1, ddt1, ddt0) + image * L * E
    entry = (side * S + segment).to(tl.int64) * B + image
    at_carry = carry + entry * N * E
    at_dA = dA + entry * N * E
    at_inner = inner + entry * (M - 1) * N * E
    padded = tl.cdiv(L, T) * T
    per_image = padded.to(tl.int64) * N
    at_B = BC + (side * 2 * B + image) * per_image
    at_C = at_B + B * per_image
    at_dB = dBC + (((0 if ATOMIC else block) * DIRS + side) * 2 * B + image) * per_image
    at_dC = at_dB + B * per_image
    skip = tl.zeros([BE], tl.float32)
    if HAS_D:
        skip = tl.load(tl.max_contiguous(tl.where(side == 1, d1, d0) + e, [CPT]), mask=in_e, other=0.0).to(tl.float32)
    bias = tl.zeros([BE], tl.float32)
    if HAS_BIAS:
        at_bias = tl.max_contiguous(tl.where(side == 1, bias1, bias0) + e, [CPT])
        bias = tl.load(at_bias, mask=in_e, other=0.0).to(tl.float32)
    sum_D = tl.zeros([BE], tl.float32)
    sum_bias = tl.zeros([BE], tl.float32)
    order = tl.where(back, T - 1 - tl.arange(0, T), tl.arange(0, T))[None, :]
    groups = tl.cdiv(hi - lo, M * T)
    for gi in loop(groups):
        group_lo = lo + tl.where(back, gi, groups - 1 - gi) * (M * T)
        live = tl.minimum(tl.cdiv(hi - group_lo, T), M)
        kept = tl.cdiv(L, M * T) - 1
        slot = group_lo // (M * T) - tl.where(back, 0, 1)
        from_zero = (slot < 0) | (slot >= kept)  # where the walk begins
        at_state = states + ((side * kept + slot).to(tl.int64) * B + image) * N * E
        # walk into the group, keeping the state before every further chunk
        for q in loop(live - 1):
            tl.debug_barrier()
            chunk_lo = tl.multiple_of(group_lo + tl.where(back, live - 1 - q, q) * T, T)
            l = chunk_lo + order
            row = tl.minimum(l, hi - 1).to(tl.int64)
            x = tl.load(tl.max_contiguous(at_x + row * x_l + e2, [CPT, 1]), mask=in_e2, other=0.0).to(tl.float32)
            at = tl.max_contiguous(at_dt + row * dt_l + e2, [CPT, 1])
            _, dt = _step_sizes(at, bias, SOFTPLUS, in_e2, l < hi)
            du = dt * x
            source = tl.where(q == 0, at_state, at_inner + (q - 1) * N * E)
            for n in loop(N):
                a = tl.load(tl.max_contiguous(at_A + n * E + e, [CPT]), mask=in_e, other=0.0) * LOG2E
                ok_h = in_e & ((q > 0) | (from_zero == 0))
                h = tl.load(tl.max_contiguous(source + n * E + e, [CPT]), mask=ok_h, other=0.0)
                b = tl.load(at_B + n * padded + chunk_lo + tl.arange(0, T)[None, :])
                decays = unstack(tl.exp2(dt * a[:, None]), T)
                inputs = unstack(du * b, T)
                for i in tl.static_range(T):
                    h = decays[i] * h + inputs[i]
                tl.store(tl.max_contiguous(at_inner + (q * N + n) * E + e, [CPT]), h, mask=in_e)

        for p in loop(live):
            tl.debug_barrier()
            q_m = live - 1 - p
            chunk_m = tl.multiple_of(group_lo + tl.where(back, live - 1 - q_m, q_m) * T, T)
            l_m = chunk_m + order
            row_m = tl.minimum(l_m, hi - 1).to(tl.int64)
            ok = (l_m < hi) & in_e2
            at_m = tl.max_contiguous(at_x + row_m * x_l + e2, [CPT, 1])
            x_m = tl.load(at_m, mask=in_e2, other=0.0).to(tl.float32)
            at_m = tl.max_contiguous(at_dt + row_m * dt_l + e2, [CPT, 1])
            raw_m, dt_m = _step_sizes(at_m, bias, SOFTPLUS, in_e2, l_m < hi)
            at_m = tl.max_contiguous(grad + image * g_b + row_m * g_l + e2, [CPT, 1])
            g = tl.load(at_m, mask=ok, other=0.0).to(tl.float32) * scale
            if HAS_Z:
                at_m = tl.max_contiguous(z + image * z_b + row_m * z_l + e2, [CPT, 1])
                gate = tl.load(at_m, mask=ok, other=0.0).to(tl.float32)
                if side == 0:
                    at_y = image * L * E + row_m * E + e2
                    y = tl.load(tl.max_contiguous(y_sum + at_y, [CPT, 1]), mask=ok, other=0.0).to(tl.float32)
                    dgate = (g * y * silu_slope(gate)).to(dz.dtype.element_ty)
                    tl.store(tl.max_contiguous(dz + at_y, [CPT, 1]), dgate, mask=ok)
                g = g * silu(gate)
            sum_D += tl.sum(g * x_m, axis=1)
            du_m = dt_m * x_m
            ddu = tl.zeros([BE, T], tl.float32)  # gradient of dt * x
            through = tl.zeros([BE, T], tl.float32)  # gradient of dt through the decay, times log2(e)
            source_m = tl.where(q_m == 0, at_state, at_inner + (q_m - 1) * N * E)
            for n in loop(N):
                a_m = tl.load(tl.max_contiguous(at_A + n * E + e, [CPT]), mask=in_e, other=0.0) * LOG2E
                ok_m = in_e & ((q_m > 0) | (from_zero == 0))
                h_m = tl.load(tl.max_contiguous(source_m + n * E + e, [CPT]), mask=ok_m, other=0.0)
                gh = tl.load(tl.max_contiguous(at_carry + n * E + e, [CPT]), mask=in_e, other=0.0)
                da = tl.load(tl.max_contiguous(at_dA + n * E + e, [CPT]), mask=in_e, other=0.0)
                tokens = n * padded + chunk_m + tl.arange(0, T)[None, :]
                b_m = tl.load(at_B + tokens)
                c_m = tl.load(at_C + tokens)
                decay = tl.exp2(dt_m * a_m[:, None])
                decay_t = unstack(decay, T)
                input_t = unstack(du_m * b_m, T)
                output_t = unstack(g * c_m, T)
                before = ()
                after = ()
                for i in tl.static_range(T):
                    before = before + (h_m,)
                    h_m = decay_t[i] * h_m + input_t[i]
                    after = after + (h_m,)
                dh = ()  # gradient of the state after each token, latest first
                for i in tl.static_range(T):
                    gh = gh + output_t[T - 1 - i]
                    dh = (gh,) + dh
                    gh = gh * decay_t[T - 1 - i]
                tl.store(tl.max_contiguous(at_carry + n * E + e, [CPT]), gh, mask=in_e)
                dh_m = stack(dh, T)
                ddu += dh_m * b_m
                slope = dh_m * decay * stack(before, T)
                through += slope * a_m[:, None]
                da += tl.sum(slope * dt_m, axis=1)
                tl.store(tl.max_contiguous(at_dA + n * E + e, [CPT]), da, mask=in_e)
                dB = tl.sum(dh_m * du_m, axis=0)
                dC = tl.sum(g * stack(after, T), axis=0)
                at_n = n * padded + chunk_m + tl.arange(0, T)
                if ATOMIC:
                    tl.atomic_add(at_dB + at_n, dB, sem="relaxed")
                    tl.atomic_add(at_dC + at_n, dC, sem="relaxed")
                else:
                    tl.store(at_dB + at_n, dB)
                    tl.store(at_dC + at_n, dC)
            at_m = tl.max_contiguous(at_dx + row_m * E + e2, [CPT, 1])
            tl.store(at_m, (g * skip[:, None] + dt_m * ddu).to(dx0.dtype.element_ty), mask=ok)
            ddt = through * LN2 + x_m * ddu
            if SOFTPLUS:
                ddt = ddt * sigmoid(raw_m)
            ddt = tl.where(ok, ddt, 0.0)
            sum_bias += tl.sum(ddt, axis=1)
            tl.store(tl.max_contiguous(at_ddt + row_m * E + e2, [CPT, 1]), ddt.to(ddt0.dtype.element_ty), mask=ok)
    tl.store(tl.max_contiguous(dD + entry * E + e, [CPT]), sum_D, mask=in_e)
    tl.store(tl.max_contiguous(dbias + entry * E + e, [CPT]), sum_bias, mask=in_e)
