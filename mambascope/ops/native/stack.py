"""A stack of Vision Mamba blocks whose parameters are packed once and that runs as one call, without gradient.

Shape letters: B images, L tokens, D model width, E inner width, N states, R rank of the step size, T threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mambascope.ops.native import library
from mambascope.ops.native.scan import _Arguments

_SCAN, _CONV, _NORM, _GEMM, _ADD = range(5)  # StepKind in program.h
_ROWS = 256  # tokens that one pass of several images takes through the stack: their buffers stay in the second cache
_SHARED_ROWS = 4096  # the same where all threads share each step
_KEPT = 2**28  # bytes of buffers that are kept for the latest shapes


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")  # whatever the caller's defaults are


def _addresses(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


@dataclass(frozen=True)
class DirectionWeights:
    """Parameters of one direction of a mixer: convolution, projection, scan; all float32."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor


@dataclass(frozen=True)
class BlockWeights:
    """Parameters of a block, all float32.

    Attributes:
        norm: Gain [D] and epsilon of the RMSNorm in front.
        in_proj: [2E, D].
        out_proj: [D, E].
        directions: Forward and backward.
    """

    norm: tuple[Tensor, float]
    in_proj: Tensor
    out_proj: Tensor
    directions: tuple[DirectionWeights, DirectionWeights]


class StackOutput(NamedTuple):
    """What a stack gives.

    Attributes:
        tokens: Normalised output [B, L, D]; the residual stream where there is no final norm.
        taken: Residual stream [B, L, D] after each of the blocks that were asked for.
        tops: Largest SSM output of each token [B, L] in each of the blocks that were asked for.
    """

    tokens: Tensor
    taken: list[Tensor]
    tops: list[Tensor]


class _PackedBlock:
    """A block's parameters in the order in which the kernels read them."""

    def __init__(self, weights: BlockWeights) -> None:
        lib = library.get()
        self.gain, self.eps = weights.norm
        self.in_proj, self.out_proj = lib.packed_weight(weights.in_proj), lib.packed_weight(weights.out_proj)
        self.conv = [(d.conv_weight.flatten(1).contiguous(), d.conv_bias) for d in weights.directions]
        self.x_proj = [lib.packed_weight(d.x_proj) for d in weights.directions]
        self.directions = weights.directions
        first = weights.directions[0]
        self.inner, self.taps = self.conv[0][0].shape
        self.states, self.rank, self.width = first.A.shape[1], first.dt_weight.shape[1], first.x_proj.shape[0]
        nothing = _zeros(1, 1, self.inner)
        proj = _zeros(1, 1, self.width)
        self.scan = lib.packed_scan(self.scan_arguments(nothing, nothing, proj, proj, nothing, nothing, None, 1, 0))

    def scan_arguments(
        self,
        x_f: Tensor,
        x_b: Tensor,
        proj_f: Tensor,
        proj_b: Tensor,
        z: Tensor,
        out: Tensor,
        top: Tensor | None,
        threads: int,
        packed: int,
    ) -> bytes:
        """``ForwardArgs`` of both directions, gated and halved."""
        args = _Arguments(torch.float32)
        args.fields += (*x_f.shape, self.states, self.rank, 1, 0, threads)
        for x, proj, d, reverse in zip((x_f, x_b), (proj_f, proj_b), self.directions, (False, True), strict=True):
            args.proj_direction(x, proj, d.dt_weight, d.dt_bias, d.A, d.D, self.states, reverse)
        args.fields.append(2)
        args.gate(z)
        args.fields += (0.5, out.data_ptr(), 0, 0 if top is None else top.data_ptr(), 0, packed)
        return library.FORWARD.pack(*args.fields)


class _Lane:
    """Buffers for some images and the steps that work on them."""

    def __init__(self, stack: PackedStack, images: int, length: int, threads: int, request: _Request) -> None:
        blocks, dim = stack.blocks[: request.depth], stack.dim
        self.rows, self.threads = images * length, threads
        self.shape, self.bytes = (images, length), 0
        self.steps: list[tuple[int, bytes]] = []
        self.hidden = self._buffer(dim)
        self.residual, self.normed, self.rstd = self._buffer(dim), self._buffer(dim), _zeros(self.rows)
        self.taken: list[Tensor] = []
        self.tops: list[Tensor] = []
        inner, width = blocks[0].inner, blocks[0].width
        self.xz, self.y = self._buffer(2 * inner), self._buffer(inner)
        self.x, self.proj = [self._buffer(inner) for _ in "fb"], [self._buffer(width) for _ in "fb"]
        for i, block in enumerate(blocks):
            self._norm(block.gain, block.eps, first=i == 0)
            self._mix(block, top=i in request.top)
            if i in request.take:
                self.taken.append(self._sum())
        if request.final is None:
            self.tokens = self.taken[-1] if len(blocks) - 1 in request.take else self._sum()
        else:
            self._norm(*request.final, first=False)
            self.tokens = self.normed

    @property
    def outputs(self) -> list[Tensor]:
        return [self.tokens, *self.taken, *self.tops]

    def _buffer(self, width: int) -> Tensor:
        self.bytes += 4 * self.rows * width
        return _zeros(*self.shape, width)

    def _norm(self, gain: Tensor, eps: float, first: bool) -> None:
        residual = 0 if first else self.residual.data_ptr()
        fields = (self.rows, gain.numel(), self.threads, 0, 0, eps, self.hidden.data_ptr(), residual, gain.data_ptr())
        more = (self.normed.data_ptr(), self.residual.data_ptr(), self.rstd.data_ptr(), 0, 0, 0, 0)
        self.steps.append((_NORM, library.NORM.pack(*fields, *more)))

    def _product(self, x: Tensor, packed: Tensor, out: Tensor) -> None:
        sizes = (self.rows, x.shape[-1], out.shape[-1], self.threads)
        rows = (x.data_ptr(), x.stride(1), packed.data_ptr(), out.data_ptr(), out.stride(1))
        self.steps.append((_GEMM, library.GEMM.pack(*sizes, *rows)))

    def _sum(self) -> Tensor:
        out = self._buffer(self.hidden.shape[-1])
        pointers = (t.data_ptr() for t in (self.hidden, self.residual, out))
        self.steps.append((_ADD, library.ADD.pack(out.numel(), *pointers)))
        return out

    def _mix(self, block: _PackedBlock, top: bool) -> None:
        self._product(self.normed, block.in_proj, self.xz)
        x, z = self.xz.chunk(2, dim=-1)
        sizes = (*x.shape, block.taps, 1, 0, self.threads, 2, x.data_ptr(), x.stride(0), x.stride(1))
        weights = [w.data_ptr() for w, _ in block.conv]
        biases = [0 if b is None else b.data_ptr() for _, b in block.conv]
        outs = [t.data_ptr() for t in self.x]
        self.steps.append((_CONV, library.CONV.pack(*sizes, *weights, *biases, 0, 1, *outs, *[0] * 11)))
        for x_one, packed, proj in zip(self.x, block.x_proj, self.proj, strict=True):
            self._product(x_one, packed, proj)
        if top:
            self.tops.append(_zeros(*self.shape))
        score = self.tops[-1] if top else None
        (x_f, x_b), (proj_f, proj_b) = self.x, self.proj
        streams = (x_f, x_b, proj_f, proj_b, z, self.y)
        self.steps.append((_SCAN, block.scan_arguments(*streams, score, self.threads, block.scan.data_ptr())))
        self._product(self.y, block.out_proj, self.hidden)


class _Request(NamedTuple):
    """Which blocks run and what they leave; ``final``: gain and epsilon of the norm behind them."""

    depth: int
    take: tuple[int, ...]
    top: tuple[int, ...]
    final: tuple[Tensor, float] | None


class _Plan:
    """Buffers and steps for one shape: a lane for all threads together, or one for each."""

    def __init__(self, stack: PackedStack, shares: tuple[int, int, int], length: int, request: _Request) -> None:
        images, lanes, threads = shares
        self.images = images
        self.kept: list[Tensor] = []
        self.lanes = [_Lane(stack, images, length, threads, request) for _ in range(lanes)]
        self.taken = len(request.take)
        steps = [
            value
            for lane in self.lanes
            for kind, arguments in lane.steps
            for value in (kind, self._keep(torch.frombuffer(bytearray(arguments), dtype=torch.uint8)))
        ]
        entrances = [value for lane in self.lanes for value in self._port(lane.hidden)]
        exits = [value for lane in self.lanes for out in lane.outputs for value in self._port(out)]
        self.bytes = sum(lane.bytes for lane in self.lanes)
        self.count = (lanes, len(self.lanes[0].steps), len(self.lanes[0].outputs))
        self.tables = [self._keep(_addresses(table)) for table in (steps, entrances, exits)]

    def _keep(self, memory: Tensor) -> int:
        self.kept.append(memory)
        return memory.data_ptr()

    @staticmethod
    def _port(buffer: Tensor) -> tuple[int, int]:
        return buffer.data_ptr(), buffer[0].numel() * buffer.element_size()

    def run(self, tokens: Tensor) -> StackOutput:
        outputs = [tokens.new_empty(len(tokens), *out.shape[1:]) for out in self.lanes[0].outputs]
        pointers = _addresses([out.data_ptr() for out in outputs])
        lanes, steps, count = self.count
        sizes = (len(tokens), self.images, lanes, steps, count)
        library.get().run("program", library.PROGRAM.pack(*sizes, tokens.data_ptr(), *self.tables, pointers.data_ptr()))
        return StackOutput(outputs[0], outputs[1 : 1 + self.taken], outputs[1 + self.taken :])


class PackedStack:
    """Blocks in a row and the norm behind them, in float32.

    One call of a stack runs at a time; the buffers of the latest shapes are kept. Weights are copied or, as gains and
    biases, referred to: after a change of theirs the stack has to be made anew.

    Args:
        blocks: At least one.
        final: Gain [D] and epsilon of the final norm; None for none.
    """

    def __init__(self, blocks: list[BlockWeights], final: tuple[Tensor, float] | None) -> None:
        self.blocks = [_PackedBlock(block) for block in blocks]
        self.final = final
        self.dim = blocks[0].in_proj.shape[1]
        self._plans: OrderedDict[tuple, _Plan] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(
        self, tokens: Tensor, take: tuple[int, ...] = (), top: tuple[int, ...] = (), stop_after: int | None = None
    ) -> StackOutput:
        """Runs the blocks.

        Args:
            tokens: [B, L, D] float32 on the CPU, with at least one image and token.
            take: Blocks after which the residual stream is returned.
            top: Blocks whose token scores are returned.
            stop_after: Last block to run; the final norm is then skipped.
        """
        batch, length, _ = tokens.shape
        depth = len(self.blocks) if stop_after is None else stop_after + 1
        request = _Request(
            depth,
            tuple(sorted({i for i in take if i < depth})),
            tuple(sorted({i for i in top if i < depth})),
            self.final if stop_after is None else None,
        )
        shares = _shares(batch, length, torch.get_num_threads())
        key = (*shares, length, *request[:3], request.final is None)
        with self._lock:
            plan = self._plans.pop(key, None) or _Plan(self, shares, length, request)
            self._plans[key] = plan
            while len(self._plans) > 1 and sum(p.bytes for p in self._plans.values()) > _KEPT:
                self._plans.popitem(last=False)
            return plan.run(tokens.contiguous())


def _shares(batch: int, length: int, threads: int) -> tuple[int, int, int]:
    """Images of a pass, lanes, and threads of a step: whole images for each thread where they are enough to share."""
    lanes = threads if batch % threads == 0 or batch >= 4 * threads else 1
    together = lanes == 1 and threads > 1  # all threads in every step: more rows, for each to have enough
    images = max(1, min((_SHARED_ROWS if together else _ROWS) // length, batch // lanes))
    rounds = -(-batch // (lanes * images))
    return -(-batch // (lanes * rounds)), lanes, 1 if lanes > 1 else threads
