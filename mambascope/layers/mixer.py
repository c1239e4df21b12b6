"""Vim's bidirectional Mamba mixer (spec of Vim, arXiv 2401.09417, algorithm 1).

Shape letters: B batch, L tokens, D model width, E inner width, N states, R dt rank, K conv width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambascope.layers.look import BlockOffsets
from mambascope.layers.plain import convolve, is_plain, project
from mambascope.layers.trace import BlockTrace
from mambascope.ops import ScanDirection, bidirectional_conv, bidirectional_scan, selective_scan
from mambascope.ops.selective_scan.common import step_sizes


def step_size(direction: ScanDirection) -> Tensor:
    """Step sizes [B, L, E] of a scan's direction, at least fp32."""
    low = direction.proj[..., : direction.proj.shape[-1] - 2 * direction.A.shape[1]]
    dtype = torch.promote_types(direction.proj.dtype, torch.float32)
    return step_sizes(low, direction.dt_weight, direction.dt_bias, True, dtype)


def _at_least_fp32(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


class BidirectionalMamba(nn.Module):
    """One selective scan from each side, summed, gated once and halved.

    State-dict names are those of the official Vim (``*_b`` and ``A_b_log`` belong to the backward direction).

    Args:
        dim: Model width D.
        d_state: States N per channel.
        d_conv: Width K of the causal depthwise convolution.
        expand: Inner width E as a multiple of D.
        dt_rank: Rank R of the step-size projection; ``None`` means ``ceil(D / 16)``.
        depth: Number of blocks in the encoder; scales the output projection's initial weights by ``1/sqrt(depth)``.
        scan_backend: Name of the scan backend, ``None`` for the automatic choice.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        depth: int = 1,
        scan_backend: str | None = None,
    ) -> None:
        super().__init__()
        inner = expand * dim
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.depth = depth
        self.scan_backend = scan_backend
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.conv1d_b = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.x_proj_b = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj_b = nn.Linear(rank, inner)
        self.A_b_log = nn.Parameter(torch.empty(inner, d_state))
        self.D_b = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba's initialisation; linear and convolution layers keep PyTorch's default, as the official code does."""
        for dt_proj, a_log, d_skip in ((self.dt_proj, self.A_log, self.D), (self.dt_proj_b, self.A_b_log, self.D_b)):
            inner, rank = dt_proj.weight.shape
            nn.init.uniform_(dt_proj.weight, -(rank**-0.5), rank**-0.5)
            low, high = math.log(1e-3), math.log(0.1)
            dt = torch.exp(torch.rand(inner) * (high - low) + low).clamp(min=1e-4)
            dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
            a_log.copy_(torch.log(torch.arange(1, a_log.shape[1] + 1, dtype=torch.float32)).expand_as(a_log))
            d_skip.fill_(1.0)
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self.out_proj.weight.div_(math.sqrt(self.depth))

    def project(self, u_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, D] as the SSM's input x and its gate z, both [B, L, E]."""
        x_BLE, z_BLE = project(self.in_proj, u_BLD).chunk(2, dim=-1)
        return x_BLE, z_BLE

    def convolve(self, x_BLE: Tensor) -> tuple[Tensor, Tensor]:
        """Causal and anti-causal convolution with SiLU, both [B, L, E]."""
        ahead, back = self.conv1d, self.conv1d_b
        if is_plain(ahead, nn.Conv1d) and is_plain(back, nn.Conv1d):
            return bidirectional_conv(
                x_BLE, ahead.weight, ahead.bias, back.weight, back.bias, backend=self.scan_backend
            )
        return self.convolve_one(x_BLE, reverse=False), self.convolve_one(x_BLE, reverse=True)

    def convolve_one(self, x_BLE: Tensor, *, reverse: bool) -> Tensor:
        """One of the two convolutions with SiLU, [B, L, E]."""
        return convolve(self.conv1d_b if reverse else self.conv1d, x_BLE, reverse=reverse, backend=self.scan_backend)

    def direction(self, x_BLE: Tensor, *, reverse: bool, offsets: BlockOffsets | None = None) -> ScanDirection:
        """What the scan of one direction needs, from its convolved tokens [B, L, E]."""
        if reverse:
            x_proj, dt_proj, a_log, d_skip = self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b
        else:
            x_proj, dt_proj, a_log, d_skip = self.x_proj, self.dt_proj, self.A_log, self.D
        weight: Tensor | None = None
        bias: Tensor | None = None
        proj = project(x_proj, x_BLE)
        if is_plain(dt_proj, nn.Linear) and dt_proj.bias is not None:
            weight, bias = dt_proj.weight, dt_proj.bias
        else:
            n = a_log.shape[1]
            low, b, c = proj.split([proj.shape[-1] - 2 * n, n, n], dim=-1)
            proj = torch.cat([dt_proj(low), b, c], dim=-1)
        skip = _at_least_fp32(d_skip)
        if offsets is not None:
            more_bias, more_skip = offsets.direction(reverse)
            bias, skip = more_bias if bias is None else bias + more_bias, skip + more_skip
        return ScanDirection(x_BLE, proj, weight, bias, -torch.exp(_at_least_fp32(a_log)), skip)

    def directions(self, x_BLE: Tensor, offsets: BlockOffsets | None = None) -> tuple[ScanDirection, ScanDirection]:
        """Both directions of tokens [B, L, E] that are not yet convolved."""
        x_f, x_b = self.convolve(x_BLE)
        return (
            self.direction(x_f, reverse=False, offsets=offsets),
            self.direction(x_b, reverse=True, offsets=offsets),
        )

    def forward(
        self, u_BLD: Tensor, trace: tuple[str, ...] = (), offsets: BlockOffsets | None = None
    ) -> tuple[Tensor, BlockTrace | None]:
        """Mixes tokens [B, L, D].

        Args:
            u_BLD: Tokens.
            trace: Fields of :class:`~mambascope.layers.trace.BlockTrace` that are wanted.
            offsets: What this look adds to the step-size biases and to D.

        Returns:
            The mixed tokens [B, L, D] and, if anything was asked for, the trace.
        """
        x_BLE, z_BLE = self.project(u_BLD)
        forward, backward = self.directions(x_BLE, offsets)
        if not trace:
            return project(self.out_proj, self.scan_both(forward, backward, z_BLE)), None
        top, outputs = None, None
        if "outputs" in trace:
            out, outputs = self._scan_apart(forward, backward, z_BLE)
        elif "top" in trace:
            out, top = self._scan_with_top(forward, backward, z_BLE)
        else:
            out = project(self.out_proj, self.scan_both(forward, backward, z_BLE))
        with torch.no_grad():
            if "top" in trace and outputs is not None:
                top = (outputs[0] + outputs[1]).amax(-1)
            return out, BlockTrace(
                top=top,
                outputs=outputs,
                steps=(step_size(forward), step_size(backward)) if "steps" in trace else None,
                gate=z_BLE.detach() if "gate" in trace else None,
            )

    def scan_both(self, forward: ScanDirection, backward: ScanDirection, z_BLE: Tensor) -> Tensor:
        """Half the gated sum of both directions' SSM outputs [B, L, E], in one call."""
        return bidirectional_scan(forward, backward, z_BLE, scale=0.5, backend=self.scan_backend)

    def _scan_with_top(self, forward: ScanDirection, backward: ScanDirection, z_BLE: Tensor) -> tuple[Tensor, Tensor]:
        """The mixer's output [B, L, D] and each token's largest SSM output [B, L], which the fused scan returns."""
        y, top = bidirectional_scan(forward, backward, z_BLE, scale=0.5, return_score=True, backend=self.scan_backend)
        return project(self.out_proj, y), top.detach()

    def _scan_apart(
        self, forward: ScanDirection, backward: ScanDirection, z_BLE: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The mixer's output [B, L, D] and the SSM outputs of both directions, two [B, L, E], one after the other."""
        # the sum of both directions overflows half precision before it is halved
        y_f = _at_least_fp32(self.scan(forward, reverse=False))
        y_b = _at_least_fp32(self.scan(backward, reverse=True))
        return self.finish(y_f + y_b, z_BLE), (y_f.detach(), y_b.detach())

    def finish(self, y_BLE: Tensor, z_BLE: Tensor) -> Tensor:
        """The mixer's output [B, L, D] from the sum of both directions' SSM outputs and the gate, both [B, L, E]."""
        y_BLE = _at_least_fp32(y_BLE)
        return project(self.out_proj, (y_BLE * F.silu(_at_least_fp32(z_BLE)) * 0.5).to(z_BLE.dtype))

    def scan(self, direction: ScanDirection, *, reverse: bool) -> Tensor:
        """SSM output [B, L, E] of one direction, not gated."""
        n = direction.A.shape[1]
        dt, b, c = direction.proj.split([direction.proj.shape[-1] - 2 * n, n, n], dim=-1)
        return selective_scan(
            direction.x,
            dt,
            direction.A,
            b,
            c,
            direction.D,
            dt_weight=direction.dt_weight,
            dt_bias=direction.dt_bias,
            reverse=reverse,
            backend=self.scan_backend,
        )
