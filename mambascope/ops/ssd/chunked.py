"""The Mamba-2 scan as matrix products over chunks of tokens (arXiv 2405.21060, section 6), in plain PyTorch.

Within a chunk the output is masked attention, ``y_i = sum_{j<=i} exp(s_i - s_j) (C_i . B_j) dt_j x_j`` with ``s`` the
running sum of ``dt A``; between chunks only the state is carried. The backward pass is written out: it keeps the inputs
and the state at the head of every chunk, and makes the [Q, Q] matrices again.

A product with a masked matrix gives NaN to every token of a chunk if one of them is NaN or infinite. On a CPU, where
looking costs little, such a sequence is walked token by token instead.

Shape letters: B batch, L tokens, H heads, P head width, N states, K chunks of a segment, Q tokens of a chunk, E = H P.
B and C belong to one group here: the caller moves further groups into the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambascope.ops._library import needs_grad, refusing, transformed
from mambascope.ops.ssd.reference import scan_decayed

CHUNK_SIZE = 64
# Decay matrices made at once. On CPU they should stay in cache; on a GPU few large launches are better.
_SEGMENT_ELEMENTS = {"cpu": 2**19}
_SEGMENT_ELEMENTS_OTHER = 2**26


class _Segment(NamedTuple):
    start: int
    chunks: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.chunks * self.size

    def cut(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """This segment's tokens of [B, L, ...] as [B, K, Q, ...]."""
        return t[:, self.start : self.stop].unflatten(1, (self.chunks, self.size)).to(dtype)


def _segments(length: int, chunk: int, decays_per_chunk: int, device: torch.device) -> Iterator[_Segment]:
    """Runs of whole chunks, small enough to hold their decay matrices, then the shorter last chunk."""
    most = max(1, _SEGMENT_ELEMENTS.get(device.type, _SEGMENT_ELEMENTS_OTHER) // decays_per_chunk)
    start, whole = 0, length // chunk
    while whole:
        chunks = min(most, whole)
        yield _Segment(start, chunks, chunk)
        start, whole = start + chunks * chunk, whole - chunks
    if start < length:
        yield _Segment(start, 1, length - start)


class _Decays(NamedTuple):
    """Decay factors of a segment; none is above 1, so nothing overflows."""

    from_head: Tensor  # [B, K, Q, H]: head of the chunk -> token
    to_end: Tensor  # [B, K, Q, H]: token -> end of the chunk
    whole: Tensor  # [B, K, H]
    between: Tensor  # [B, K, H, Q, Q]: token j -> token i, zero above the diagonal


def _decays(log_decay_BKQH: Tensor) -> _Decays:
    exact = log_decay_BKQH.to(torch.float32 if log_decay_BKQH.device.type == "mps" else torch.float64).cumsum(2)
    total = exact.to(log_decay_BKQH.dtype)
    rows = total.transpose(2, 3)
    between = rows[..., :, None] - rows[..., None, :]
    if total.dtype != torch.float64:
        # After one huge step the running sum has lost the digits of the small ones; the remainder brings them back.
        rest = (exact - total).to(total.dtype).transpose(2, 3)
        between += rest[..., :, None]
        between -= rest[..., None, :]
    to_end = (exact[:, :, -1:] - exact).to(total.dtype)
    # above the diagonal exp may reach infinity; tril_ writes zeros there, it does not multiply
    return _Decays(total.exp(), to_end.exp(), total[:, :, -1].exp(), between.exp_().tril_())


def _across(outer: Tensor, states_BKHPN: Tensor) -> Tensor:
    """``outer_i . S`` of each chunk: [B, K, Q, N] and [B, K, H, P, N] give [B, K, Q, H, P]."""
    heads = states_BKHPN.shape[2]
    return (outer @ states_BKHPN.flatten(2, 3).transpose(-1, -2)).unflatten(-1, (heads, -1))


def _into_state(x_BKQHP: Tensor, rows_BKQN: Tensor) -> Tensor:
    """``sum_i x_i (x) rows_i`` of each chunk as [B, K, H, P, N]."""
    return (x_BKQHP.flatten(3).transpose(-1, -2) @ rows_BKQN).unflatten(2, x_BKQHP.shape[3:])


def chunked_forward(
    x: Tensor, dt: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk: int, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs without the skip term, the last state and, if ``keep``, the state at the head of every chunk.

    Args:
        x: [B, L, H, P].
        dt: Step sizes after softplus [B, L, H].
        log_decay: ``dt A`` [B, L, H], not positive.
        b: [B, L, N].
        c: [B, L, N].
        state: [B, H, P, N], fp32 or fp64; everything is computed in its dtype.
        chunk: Q.
        keep: Whether the backward pass will need the states.

    Returns:
        [B, L, H, P], [B, H, P, N], and [B, ceil(L / Q), H, P, N] or ``None``.
    """
    batch, length, heads, _ = x.shape
    dtype = state.dtype
    outputs, heads_of_chunks = [], []
    for segment in _segments(length, chunk, batch * heads * chunk * chunk, x.device):
        b_BKQN, c_BKQN = segment.cut(b, dtype), segment.cut(c, dtype)
        decays = _decays(segment.cut(log_decay, dtype))
        xd_BKQHP = segment.cut(x, dtype) * segment.cut(dt, dtype)[..., None]
        added = _into_state(xd_BKQHP * decays.to_end[..., None], b_BKQN)
        entries = []
        for k in range(segment.chunks):
            entries.append(state)
            state = torch.addcmul(added[:, k], decays.whole[:, k, :, None, None], state)
        entry_BKHPN = torch.stack(entries, dim=1)
        if keep:
            heads_of_chunks.append(entry_BKHPN)
        weights = decays.between.mul_((c_BKQN @ b_BKQN.transpose(-1, -2))[:, :, None])
        inside = (weights @ xd_BKQHP.transpose(2, 3)).transpose(2, 3)
        y_BKQHP = torch.addcmul(inside, _across(c_BKQN, entry_BKHPN), decays.from_head[..., None])
        outputs.append(y_BKQHP.flatten(1, 2))
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return y, state, torch.cat(heads_of_chunks, dim=1) if keep else None


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        y, last, entries = chunked_forward(x, dt, log_decay, b, c, state, chunk, keep=True)
        ctx.save_for_backward(x, dt, log_decay, b, c, entries)
        ctx.chunk = chunk
        return y, last

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, log_decay, b, c, entries = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            grads = _chunked_backward(x, dt, log_decay, b, c, entries, dy, dstate, ctx.chunk)
            if _seen_odd(grads[-1]):  # every token's gradient reaches the state before the first
                grads = _token_by_token_backward((x, dt, log_decay, b, c, entries[:, 0]), dy, dstate)
        if torch.is_grad_enabled():
            return (*refusing("ssd_scan", grads, (*ctx.saved_tensors, dy, dstate)), None)
        return (*grads, None)


def _token_by_token(
    x: Tensor, dt: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, P] and last state of :func:`chunked_forward`, by the recurrence."""
    dtype = state.dtype
    b_BLGN, c_BLGN = b[:, :, None].to(dtype), c[:, :, None].to(dtype)
    return scan_decayed(x.to(dtype) * dt.to(dtype)[..., None], log_decay.to(dtype), b_BLGN, c_BLGN, state)


def _token_by_token_backward(inputs: tuple[Tensor, ...], dy: Tensor, dstate: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        outputs = _token_by_token(*leaves)
    return torch.autograd.grad(outputs, leaves, (dy, dstate))


def _seen_odd(*tensors: Tensor) -> bool:
    """Whether numbers that may be looked at are not all finite."""
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():
        return False
    return not all(bool(t.sum().isfinite()) for t in tensors)


def _chunked_backward(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    entries: Tensor,
    dy: Tensor,
    dstate: Tensor,
    chunk: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, log_decay, b, c and the initial state.

    The gradient of ``log_decay_t`` is the sum over every path i >= t > j that the decay lies on. It is summed over just
    those paths: the usual difference of two running sums also holds the paths i = j, which cancel only approximately.
    """
    batch, length, heads, _ = x.shape
    dtype = entries.dtype
    grads: list[tuple[Tensor, ...]] = []
    first = entries.shape[1]
    for segment in reversed(list(_segments(length, chunk, batch * heads * chunk * chunk, x.device))):
        first -= segment.chunks
        entry_BKHPN = entries[:, first : first + segment.chunks]
        b_BKQN, c_BKQN, x_BKQHP = (segment.cut(t, dtype) for t in (b, c, x))
        dt_BKQH = segment.cut(dt, dtype)
        decays = _decays(segment.cut(log_decay, dtype))
        xd_BKQHP = x_BKQHP * dt_BKQH[..., None]
        dy_BKQHP = segment.cut(dy, dtype)

        from_head = dy_BKQHP * decays.from_head[..., None]
        added = _into_state(from_head, c_BKQN)
        exits: list[Tensor] = []
        for k in reversed(range(segment.chunks)):
            exits.append(dstate)
            dstate = torch.addcmul(added[:, k], decays.whole[:, k, :, None, None], dstate)
        exit_BKHPN = torch.stack(exits[::-1], dim=1)

        scores_BKQQ = c_BKQN @ b_BKQN.transpose(-1, -2)
        dy_heads, xd_heads = dy_BKQHP.transpose(2, 3), xd_BKQHP.transpose(2, 3)
        dweights = (dy_heads @ xd_heads.transpose(-1, -2)).mul_(decays.between)  # [B, K, H, Q, Q]
        dscores = dweights.sum(2)
        dc = dscores @ b_BKQN + from_head.flatten(3) @ entry_BKHPN.flatten(2, 3)
        to_end = xd_BKQHP * decays.to_end[..., None]
        db = dscores.transpose(-1, -2) @ c_BKQN + to_end.flatten(3) @ exit_BKHPN.flatten(2, 3)

        weights = decays.between.mul_(scores_BKQQ[:, :, None])
        out_of_state = _across(b_BKQN, exit_BKHPN) * decays.to_end[..., None]
        dxd = (weights.transpose(-1, -2) @ dy_heads).transpose(2, 3) + out_of_state

        # paths i >= t > j inside the chunk, from its head to i, from j to its end, and straight through
        paths = dweights.mul_(scores_BKQQ[:, :, None])
        before = torch.ones_like(scores_BKQQ[0, 0]).triu_(1)  # [j, t]: j < t
        inside = (paths @ before).tril_().sum(-2).transpose(2, 3)
        arriving = (from_head * _across(c_BKQN, entry_BKHPN)).sum(-1)
        leaving = (xd_BKQHP * out_of_state).sum(-1)
        dlog = inside + arriving.flip(2).cumsum(2).flip(2) + leaving.cumsum(2) - leaving
        dlog += ((entry_BKHPN * exit_BKHPN).sum((-1, -2)) * decays.whole)[:, :, None]

        ddt = (dxd * x_BKQHP).sum(-1)
        grads.append(tuple(g.flatten(1, 2) for g in (dxd * dt_BKQH[..., None], ddt, dlog, db, dc)))
    joined = (torch.cat(parts, dim=1) for parts in zip(*grads[::-1], strict=True))
    cast = (g.to(t.dtype) for g, t in zip(joined, (x, dt, log_decay, b, c), strict=True))
    return (*cast, dstate)


def scan_chunked(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk: int = CHUNK_SIZE
) -> tuple[Tensor, Tensor]:
    """The scan from ``state``; see :func:`chunked_forward`, with ``A`` [H] and groups: ``b`` and ``c`` [B, L, G, N].

    Returns:
        Outputs [B, L, H, P] without the skip term in the state's dtype, and the state after the last token.
    """
    batch, _, heads, _ = x.shape
    groups = b.shape[2]
    log_decay = dt * A

    def fold(t: Tensor, dim: int) -> Tensor:
        """Moves the groups of the head dimension into the batch."""
        if groups == 1:
            return t
        return t.unflatten(dim, (groups, heads // groups)).movedim(dim, 1).flatten(0, 1)

    def group(t: Tensor) -> Tensor:
        return t.squeeze(2) if groups == 1 else t.movedim(2, 1).flatten(0, 1)

    inputs = (fold(x, 2), fold(dt, 2), fold(log_decay, 2), group(b), group(c), fold(state, 1))
    chunk = min(chunk, x.shape[1])
    if not needs_grad(*inputs):
        y, last, _ = chunked_forward(*inputs, chunk, keep=False)
    elif transformed():  # the written-out backward pass is for torch.autograd alone
        y, last = _token_by_token(*inputs)
    else:
        y, last = _ChunkedScan.apply(*inputs, chunk)
    if _seen_odd(y.detach(), last.detach()):
        y, last = _token_by_token(*inputs)
    if groups > 1:
        y = y.unflatten(0, (batch, groups)).movedim(1, 2).flatten(2, 3)
        last = last.unflatten(0, (batch, groups)).flatten(1, 2)
    return y, last
