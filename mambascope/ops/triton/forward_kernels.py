# Triton compiles these functions: it knows no starred tuples, and its types are not Python's.
# ruff: noqa: RUF005
# mypy: ignore-errors
"""Triton kernels of the selective scan, forward: one thread per channel walks the tokens, its N states in registers.

Tensors are channel-last. DIRS directions are walked by one program. With two, the forward threads take the chunks of
the first half while the backward threads take those of the second half, both leaving their raw output in memory; then
each crosses into the other's half, adds what the other left there, gates and writes. So the outputs of both directions
meet without a second kernel, without flipping and without atomics.

Long sequences are cut into segments, one program each. A segment's start states come from ``segment_state_kernel``,
which walks every segment from zero, and ``segment_carry_kernel``, which strings the segments together; a segment's
total decay is ``exp(A * sum(dt))``, so only the sum of its step sizes has to be kept.

Letters: B batch, L tokens, E channels, N states (NG groups of NB), BE channels of a program, CPT channels of a thread,
T tokens of a chunk, KEEP tokens between states that are kept for the backward pass, G groups of KEEP tokens, S
segments. Kept states are [DIRS, G - 1, B, N, E]: the state in which the walk enters each group but its first, groups in
the order of the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambascope.ops.triton.device import LOG2E, decay_rates, load_states, loop, silu, softplus

# sizes that change from call to call: compiling again for L = 1 or L = 16 k is worth nothing
_RUN_TIME = ["B", "L", "S", "seg"]


@triton.jit(do_not_specialize=_RUN_TIME)
def scan_forward_kernel(
    x0, x1, dt0, dt1, b0, b1, c0, c1, a0, a1, d0, d1, bias0, bias1, z, raw, out, states, starts, score,
    B, L, E, seg, x_b, x_l, dt_b, dt_l, bc_b, bc_l, z_b, z_l, scale,
    N: tl.constexpr, NB: tl.constexpr, NG: tl.constexpr, DIRS: tl.constexpr, REVERSE: tl.constexpr,
    BE: tl.constexpr, CPT: tl.constexpr,
    T: tl.constexpr, KEEP: tl.constexpr, ALIGN: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, SAVE_SUM: tl.constexpr, SAVE_STATES: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_SCORE: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(E / BE), S, B). ``raw`` may be ``out`` unless SAVE_SUM."""
    block = tl.program_id(0)
    lo = tl.program_id(1) * seg
    hi = tl.minimum(lo + seg, L)
    image = tl.program_id(2).to(tl.int64)
    side = tl.arange(0, DIRS)[:, None]
    back = (side == 1) if DIRS == 2 else (side < REVERSE)
    e = tl.max_contiguous(tl.broadcast_to(block * BE + tl.arange(0, BE)[None, :], [DIRS, BE]), [1, CPT])
    in_e = e < E
    n3 = tl.arange(0, NB)[None, None, :]
    e3 = tl.max_contiguous(tl.broadcast_to((block * BE + tl.arange(0, BE))[None, :, None], [DIRS, BE, NB]), [1, CPT, 1])
    at_x = tl.where(back, x1, x0) + image * x_b
    at_dt = tl.where(back, dt1, dt0) + image * dt_b
    at_B = (tl.where(back, b1, b0) + image * bc_b)[:, :, None]
    at_C = (tl.where(back, c1, c0) + image * bc_b)[:, :, None]
    at_z = z + image * z_b
    at_raw = raw + image * L * E
    at_out = out + image * L * E
    A = decay_rates(tl.where(back, a1, a0) + e, in_e, E, N, NB, NG, CPT)
    skip = tl.zeros([DIRS, BE], tl.float32)
    if HAS_D:
        skip = tl.load(tl.max_contiguous(tl.where(back, d1, d0) + e, [1, CPT]), mask=in_e, other=0.0).to(tl.float32)
    bias = tl.zeros([DIRS, BE], tl.float32)
    if HAS_BIAS:
        at_bias = tl.max_contiguous(tl.where(back, bias1, bias0) + e, [1, CPT])
        bias = tl.load(at_bias, mask=in_e, other=0.0).to(tl.float32)
    h = ()
    for k in tl.static_range(NG):
        if HAS_STARTS:
            row = (side * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * B + image
            at_h = starts + row[:, :, None] * N * E + (k * NB + n3) * E + e3
            ok_h = in_e[:, :, None] & (k * NB + n3 < N)
            h = h + (tl.load(tl.max_contiguous(at_h, [1, CPT, 1]), mask=ok_h, other=0.0),)
        else:
            h = h + (tl.zeros([DIRS, BE, NB], tl.float32),)

    chunks = tl.cdiv(hi - lo, T)
    low = chunks // 2 if DIRS == 2 else 0  # chunks of the first half; the second half may have one more
    half = chunks - low
    for j in loop(DIRS * half):
        if DIRS == 2:  # known when compiling  # noqa: SIM102
            if j == half:
                tl.debug_barrier()  # what one direction left in memory becomes visible to the other
        second = (j >= half) if DIRS == 2 else (j >= 0)
        i = j - half
        chunk_f = tl.where(second, low + i, j) if DIRS == 2 else j
        chunk_b = tl.where(second, tl.maximum(low - 1 - i, 0), chunks - 1 - j) if DIRS == 2 else chunks - 1 - j
        live_f = second | (j < low)
        live_b = ((j < half) | (i < low)) if DIRS == 2 else (j >= 0)
        chunk = tl.where(back, chunk_b, chunk_f)
        live = tl.where(back, live_b, live_f)
        first = lo + chunk * T + tl.where(back, T - 1, 0)
        step = tl.where(back, -1, 1)
        if SAVE_STATES:
            enters_f = live_f & (chunk_f % (KEEP // T) == 0)
            enters_b = live_b & ((chunk_b % (KEEP // T) == KEEP // T - 1) | (chunk_b == chunks - 1))
            if enters_f | enters_b:
                kept = tl.cdiv(L, KEEP) - 1
                slot = (lo + chunk * T) // KEEP - tl.where(back, 0, 1)
                enters = tl.where(back, enters_b, enters_f) & (slot >= 0) & (slot < kept)
                group = (side * kept + slot).to(tl.int64) * B + image
                for kk in tl.static_range(NG):
                    at_kept = states + group[:, :, None] * N * E + (kk * NB + n3) * E + e3
                    ok_kept = (enters & in_e)[:, :, None] & (kk * NB + n3 < N)
                    tl.store(tl.max_contiguous(at_kept, [1, CPT, 1]), h[kk], mask=ok_kept)

        # everything that may come from far away is asked for before the walk
        gates = ()
        forward_ys = ()
        for t in tl.static_range(T):
            l_g = first + step * t
            ok_g = live & (l_g < hi) & in_e & second
            if HAS_Z:
                at = tl.max_contiguous(at_z + l_g.to(tl.int64) * z_l + e, [1, CPT])
                gates = gates + (tl.load(at, mask=ok_g, other=0.0).to(tl.float32),)
            if DIRS == 2:
                at = tl.max_contiguous(at_raw + l_g.to(tl.int64) * E + e, [1, CPT])
                forward_ys = forward_ys + (tl.load(at, mask=ok_g, other=0.0).to(tl.float32),)
        ys = ()
        for t in tl.static_range(T):
            l = first + step * t
            ok = live & (l < hi)
            row_l = tl.minimum(l, hi - 1).to(tl.int64)
            at = tl.max_contiguous(at_x + row_l * x_l + e, [1, CPT])
            x = tl.load(at, mask=in_e, other=0.0).to(tl.float32)
            at = tl.max_contiguous(at_dt + row_l * dt_l + e, [1, CPT])
            dt = tl.load(at, mask=in_e, other=0.0).to(tl.float32) + bias
            if SOFTPLUS:
                dt = softplus(dt)
            dt = tl.where(ok, dt, 0.0)  # a step of size 0 leaves the state as it is
            y = skip * x
            h_t = ()
            for g in tl.static_range(NG):
                Bt = load_states(at_B + (row_l * bc_l)[:, :, None], g, N, NB, ALIGN)
                Ct = load_states(at_C + (row_l * bc_l)[:, :, None], g, N, NB, ALIGN)
                new = tl.exp2(dt[:, :, None] * A[g]) * h[g] + (dt * x)[:, :, None] * Bt
                y += tl.sum(new * Ct, axis=2)
                h_t = h_t + (new,)
            h = h_t
            ys = ys + (y,)
        if second:
            for t in tl.static_range(T):
                l_s = first + step * t
                ok_s = live & (l_s < hi) & in_e
                v = ys[t]
                if DIRS == 2:
                    v = v + forward_ys[t]
                if SAVE_SUM:
                    at_s = tl.max_contiguous(at_raw + l_s.to(tl.int64) * E + e, [1, CPT])
                    tl.store(at_s, v.to(raw.dtype.element_ty), mask=ok_s)
                if HAS_SCORE:
                    top = tl.max(tl.where(in_e, v, float("-inf")), axis=1)[:, None]
                    at_top = score + (image * L + l_s) * tl.num_programs(0) + block
                    tl.store(at_top, top, mask=live & (l_s < hi))
                v = v * scale
                if HAS_Z:
                    v = v * silu(gates[t])
                at_s = tl.max_contiguous(at_out + l_s.to(tl.int64) * E + e, [1, CPT])
                tl.store(at_s, v.to(out.dtype.element_ty), mask=ok_s)
        else:
            for t in tl.static_range(T):
                l_r = first + step * t
                at_r = tl.max_contiguous(at_raw + l_r.to(tl.int64) * E + e, [1, CPT])
                tl.store(at_r, ys[t].to(raw.dtype.element_ty), mask=live & (l_r < hi) & in_e)


@triton.jit(do_not_specialize=_RUN_TIME)
def segment_state_kernel(
    x0, x1, dt0, dt1, v0, v1, a0, a1, bias0, bias1, z, grad, ends, dt_sums,
    B, L, E, seg, x_b, x_l, dt_b, dt_l, v_b, v_l, z_b, z_l, g_b, g_l, scale,
    N: tl.constexpr, NB: tl.constexpr, NG: tl.constexpr, DIRS: tl.constexpr, REVERSE: tl.constexpr,
    BE: tl.constexpr, CPT: tl.constexpr,
    T: tl.constexpr, ALIGN: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr,
    GRAD: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state that leaves it: ``s = e s + dt x B`` from zero, in the order of the walk.

    With GRAD the same for the gradient of the state, against the walk: ``s = e (s + g C)``, where g is the gradient of
    the ungated output; ``v`` is B or C. Grid (ceil(E / BE), S, B); ends [DIRS, S, B, N, E], dt_sums [DIRS, S, B, E].
    """
    block = tl.program_id(0)
    lo = tl.program_id(1) * seg
    hi = tl.minimum(lo + seg, L)
    image = tl.program_id(2).to(tl.int64)
    side = tl.arange(0, DIRS)[:, None]
    back = (side == 1) if DIRS == 2 else (side < REVERSE)
    e = tl.max_contiguous(tl.broadcast_to(block * BE + tl.arange(0, BE)[None, :], [DIRS, BE]), [1, CPT])
    in_e = e < E
    n3 = tl.arange(0, NB)[None, None, :]
    e3 = tl.max_contiguous(tl.broadcast_to((block * BE + tl.arange(0, BE))[None, :, None], [DIRS, BE, NB]), [1, CPT, 1])
    at_x = tl.where(back, x1, x0) + image * x_b
    at_dt = tl.where(back, dt1, dt0) + image * dt_b
    at_V = (tl.where(back, v1, v0) + image * v_b)[:, :, None]
    A = decay_rates(tl.where(back, a1, a0) + e, in_e, E, N, NB, NG, CPT)
    bias = tl.zeros([DIRS, BE], tl.float32)
    if HAS_BIAS:
        at_bias = tl.max_contiguous(tl.where(back, bias1, bias0) + e, [1, CPT])
        bias = tl.load(at_bias, mask=in_e, other=0.0).to(tl.float32)
    s = ()
    for _ in tl.static_range(NG):
        s = s + (tl.zeros([DIRS, BE, NB], tl.float32),)
    dt_sum = tl.zeros([DIRS, BE], tl.float32)
    from_end = (back == 0) if GRAD else back
    first = tl.where(from_end, hi - 1, lo)
    step = tl.where(from_end, -1, 1)
    for j in loop(tl.cdiv(hi - lo, T)):
        for t in tl.static_range(T):
            i = j * T + t
            ok = i < hi - lo
            row_l = (first + step * tl.minimum(i, hi - lo - 1)).to(tl.int64)
            at = tl.max_contiguous(at_dt + row_l * dt_l + e, [1, CPT])
            dt = tl.load(at, mask=in_e, other=0.0).to(tl.float32) + bias
            if SOFTPLUS:
                dt = softplus(dt)
            dt = tl.where(ok, dt, 0.0)
            if GRAD:
                at = tl.max_contiguous(grad + image * g_b + row_l * g_l + e, [1, CPT])
                u = tl.load(at, mask=in_e & ok, other=0.0).to(tl.float32) * scale
                if HAS_Z:
                    at = tl.max_contiguous(z + image * z_b + row_l * z_l + e, [1, CPT])
                    u = u * silu(tl.load(at, mask=in_e, other=0.0).to(tl.float32))
            else:
                at = tl.max_contiguous(at_x + row_l * x_l + e, [1, CPT])
                u = tl.load(at, mask=in_e, other=0.0).to(tl.float32) * dt
            s_t = ()
            for g in tl.static_range(NG):
                new = u[:, :, None] * load_states(at_V + (row_l * v_l)[:, :, None], g, N, NB, ALIGN)
                decay = tl.exp2(dt[:, :, None] * A[g])
                s_t = s_t + ((decay * (s[g] + new)) if GRAD else (decay * s[g] + new),)
            s = s_t
            dt_sum += dt
    row = (side * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * B + image
    for kk in tl.static_range(NG):
        at_end = tl.max_contiguous(ends + row[:, :, None] * N * E + (kk * NB + n3) * E + e3, [1, CPT, 1])
        tl.store(at_end, s[kk], mask=in_e[:, :, None] & (kk * NB + n3 < N))
    tl.store(tl.max_contiguous(dt_sums + row * E + e, [1, CPT]), dt_sum, mask=in_e)


@triton.jit(do_not_specialize=_RUN_TIME)
def segment_carry_kernel(
    ends, dt_sums, a0, a1, B, E, S, N: tl.constexpr, DIRS: tl.constexpr, REVERSE: tl.constexpr, BE: tl.constexpr,
    GRAD: tl.constexpr,
):  # fmt: skip
    """Replaces each segment's own contribution by the state that enters it. Grid (ceil(E / BE), N, DIRS * B)."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    n = tl.program_id(1)
    side = tl.program_id(2) // B
    image = (tl.program_id(2) % B).to(tl.int64)
    in_e = e < E
    back = (side == 1) if DIRS == 2 else (side < REVERSE)
    A = tl.load(tl.where(side == 1, a1, a0) + n * E + e, mask=in_e, other=0.0) * LOG2E
    from_end = (back == 0) if GRAD else back
    carry = tl.zeros([BE], tl.float32)
    for i in loop(S):
        s = tl.where(from_end, S - 1 - i, i)
        row = (side * S + s).to(tl.int64) * B + image
        at = ends + (row * N + n) * E + e
        chunk_end = tl.load(at, mask=in_e, other=0.0)
        tl.store(at, carry, mask=in_e)
        carry = tl.exp2(tl.load(dt_sums + row * E + e, mask=in_e, other=0.0) * A) * carry + chunk_end
