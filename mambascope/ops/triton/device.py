# Triton compiles these functions: it knows no starred tuples, and its types are not Python's.
# ruff: noqa: RUF005
# mypy: ignore-errors
"""Small functions that the kernels of this package share, written in Triton's language.

Layouts: Triton chooses by itself which thread holds which element. These kernels want one thread per channel with all
states of that channel in its registers, so that walking over tokens needs no exchange between threads. Triton ends up
there if every pointer tensor claims exactly ``CPT`` contiguous channels per thread (``tl.max_contiguous``) and if the
state axis comes from joined tensors, which it keeps in registers. Changing a hint can silently cost a factor of three:
``tests/ops/test_triton_compile.py`` looks at the compiled code.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from mambascope.ops.triton.launch import interpreted

if interpreted():

    def loop(count: Any) -> range:
        """``range`` for a number known at run time. The interpreter of Triton 3.6 cannot, with NumPy >= 2.4."""
        return range(int(count.handle.data.item()) if isinstance(count, tl.tensor) else int(count))

else:
    loop = tl.range

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-LOG2E * x))


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp2(-LOG2E * x))


@triton.jit
def silu_slope(x):
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def softplus(x):
    """max(x, 0) + log1p(exp(-|x|)); log1p as t * q(t) keeps the relative accuracy of small step sizes."""
    t = tl.exp2(-LOG2E * tl.abs(x))
    q = 5.232695142e-03 * t - 2.950524478e-02
    q = q * t + 7.822596641e-02
    q = q * t - 1.366324753e-01
    q = q * t + 1.910600788e-01
    q = q * t - 2.484298261e-01
    q = q * t + 3.331909688e-01
    q = q * t - 4.999949315e-01
    q = q * t + 9.999999699e-01
    return tl.maximum(x, 0.0) + t * q


@triton.jit
def stack(rows, COUNT: tl.constexpr):
    """COUNT (a power of two up to 16) tensors of rank 1 or 2 as one tensor; the new last axis stays in registers."""
    r = rows
    if COUNT >= 16:
        pairs = ()
        for i in tl.static_range(8):
            pairs = pairs + (tl.join(r[i], r[i + 8]),)
        r = pairs
    if COUNT >= 8:
        pairs = ()
        for i in tl.static_range(4):
            pairs = pairs + (tl.join(r[i], r[i + 4]),)
        r = pairs
    if COUNT >= 4:
        r = (tl.join(r[0], r[2]), tl.join(r[1], r[3]))
    if COUNT >= 2:
        r = (tl.join(r[0], r[1]),)
    if len(rows[0].shape) == 2:
        out = tl.reshape(r[0], [rows[0].shape[0], rows[0].shape[1], COUNT])
    else:
        out = tl.reshape(r[0], [rows[0].shape[0], COUNT])
    return out


@triton.jit
def unstack(tile, COUNT: tl.constexpr):
    """The inverse of ``stack`` for rank 2: columns of a tile [BE, COUNT], COUNT = 4 or 8, as a tuple."""
    if COUNT == 8:
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], 2, 2, 2]))
        r0, r2 = tl.split(even)
        r1, r3 = tl.split(odd)
        c0, c4 = tl.split(r0)
        c1, c5 = tl.split(r1)
        c2, c6 = tl.split(r2)
        c3, c7 = tl.split(r3)
        out = (c0, c1, c2, c3, c4, c5, c6, c7)
    else:
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], 2, 2]))
        c0, c2 = tl.split(even)
        c1, c3 = tl.split(odd)
        out = (c0, c1, c2, c3)
    return out


@triton.jit
def decay_rates(base, in_e, E, N: tl.constexpr, NB: tl.constexpr, NG: tl.constexpr, CPT: tl.constexpr):
    """A * log2(e) from rows of the transposed A [N, E], as NG tensors [DIRS, BE, NB]; zero beyond N and E."""
    groups = ()
    for k in tl.static_range(NG):
        rows = ()
        for n in tl.static_range(NB):
            if k * NB + n < N:
                row = tl.load(tl.max_contiguous(base + (k * NB + n) * E, [1, CPT]), mask=in_e, other=0.0) * LOG2E
            else:
                row = tl.zeros([in_e.shape[0], in_e.shape[1]], tl.float32)
            rows = rows + (row,)
        groups = groups + (stack(rows, NB),)
    return groups


@triton.jit
def load_states(at, k: tl.constexpr, N: tl.constexpr, NB: tl.constexpr, ALIGN: tl.constexpr):
    """Group k of a row of B or C [DIRS, 1, N] as [DIRS, 1, NB]. Kept small: Triton lets large loads dictate layouts."""
    n = k * NB + tl.arange(0, NB)[None, None, :]
    at_n = tl.multiple_of(at + n, [1, 1, ALIGN])
    if k * NB + NB <= N:
        v = tl.load(at_n)
    else:
        v = tl.load(at_n, mask=n < N, other=0.0)
    return v.to(tl.float32)
