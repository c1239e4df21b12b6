"""The causal Mamba-2 mixer and its block, with a state that lets a sequence be read in pieces (arXiv 2405.21060).

Shape letters: B batch, L tokens, D model width, E inner width, H heads, P head width, N states, K conv width, F conv
channels (E + 2N).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from mambascope.layers.norm import RMSNorm
from mambascope.layers.plain import convolve, is_plain, project
from mambascope.ops.selective_scan.common import state_dtype
from mambascope.ops.ssd import ssd_scan, ssd_step


class Mamba2State(NamedTuple):
    """What one mixer remembers of the tokens it has read; its size does not depend on how many they were.

    Attributes:
        conv: The last K - 1 inputs of the convolution [B, K - 1, F].
        ssm: The scan's state [B, H, P, N], at least fp32.
    """

    conv: Tensor
    ssm: Tensor


class GatedRMSNorm(nn.Module):
    """``RMSNorm(y * SiLU(z))`` over all channels: the gate comes first.

    Args:
        dim: Channels.
        eps: Added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Normalises ``y`` [..., E] gated by ``z`` [..., E], in at least fp32; the result has the dtype of ``y``."""
        dtype = state_dtype(y.dtype)
        with torch.autocast(y.device.type, enabled=False):
            gated = y.to(dtype) * F.silu(z.to(dtype))
            return F.rms_norm(gated, (gated.shape[-1],), self.weight.to(dtype), self.eps).to(y.dtype)


class Mamba2(nn.Module):
    """Mamba-2 with one group: B and C are shared by all heads, and every head has one scalar decay.

    State-dict names and shapes are those of ``mamba_ssm.Mamba2``.

    Args:
        dim: Model width D.
        d_state: States N.
        d_conv: Width K of the causal depthwise convolution.
        expand: Inner width E as a multiple of D.
        head_dim: Head width P; it must divide E.
        depth: Number of blocks; scales the output projection's initial weights by ``1/sqrt(depth)``.
        norm_eps: Epsilon of the gated norm.
        chunk_size: Tokens per chunk of the scan.
        scan_backend: Name of the scan backend, ``None`` for the automatic choice.

    Raises:
        ValueError: If ``head_dim`` does not divide the inner width.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        depth: int = 1,
        norm_eps: float = 1e-5,
        chunk_size: int = 64,
        scan_backend: str | None = None,
    ) -> None:
        super().__init__()
        inner = expand * dim
        if inner % head_dim:
            raise ValueError(f"head_dim must divide the inner width {inner} (expand * dim), got {head_dim}")
        self.depth = depth
        self.d_state = d_state
        self.d_conv = d_conv
        self.head_dim = head_dim
        self.inner = inner
        self.chunk_size = chunk_size
        self.scan_backend = scan_backend
        heads = inner // head_dim
        conv_dim = inner + 2 * d_state
        self.in_proj = nn.Linear(dim, inner + conv_dim + heads, bias=False)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim, padding=d_conv - 1)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = GatedRMSNorm(inner, norm_eps)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba-2's initialisation; projections and convolution keep PyTorch's default, as the official code does."""
        heads = self.dt_bias.numel()
        low, high = math.log(1e-3), math.log(0.1)
        dt = torch.exp(torch.rand(heads) * (high - low) + low).clamp(min=1e-4)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.A_log.copy_(torch.empty(heads).uniform_(1, 16).log())
        self.D.fill_(1.0)
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self.out_proj.weight.div_(math.sqrt(self.depth))

    def start(self, batch: int, device: torch.device, dtype: torch.dtype) -> Mamba2State:
        """The state before the first token."""
        channels = self.inner + 2 * self.d_state
        shape = (batch, self.dt_bias.numel(), self.head_dim, self.d_state)
        return Mamba2State(
            torch.zeros(batch, self.d_conv - 1, channels, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=state_dtype(dtype)),
        )

    def _convolve(self, xbc_BLF: Tensor, history_BKF: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolution and SiLU after the remembered inputs; returns the outputs [B, L, F] and the new history."""
        past, length = self.d_conv - 1, xbc_BLF.shape[1]
        if history_BKF is None:
            window = xbc_BLF if length >= past else F.pad(xbc_BLF, (0, 0, past - length, 0))
            out = convolve(self.conv1d, xbc_BLF, backend=self.scan_backend)
        else:
            window = torch.cat([history_BKF.to(xbc_BLF.dtype), xbc_BLF], dim=1)
            if length == 1 and is_plain(self.conv1d, nn.Conv1d):
                out = self._convolve_one(window)
            else:
                out = convolve(self.conv1d, window, backend=self.scan_backend)[:, past:]
        # a copy: a view would keep the whole sequence alive
        return out, window[:, window.shape[1] - past :].clone()

    def _convolve_one(self, window_BKF: Tensor) -> Tensor:
        dtype = state_dtype(window_BKF.dtype)
        with torch.autocast(window_BKF.device.type, enabled=False):
            taps = self.conv1d.weight.to(dtype).squeeze(1).T
            out = (window_BKF.to(dtype) * taps).sum(1, keepdim=True) + self.conv1d.bias.to(dtype)  # type: ignore[union-attr]
            return F.silu(out).to(window_BKF.dtype)

    def forward(self, u_BLD: Tensor, state: Mamba2State | None = None) -> tuple[Tensor, Mamba2State]:
        """Mixes tokens [B, L, D] that follow those of ``state`` (none if ``None``).

        Returns:
            The mixed tokens [B, L, D] and the state after them; ``state`` itself is not changed.
        """
        n = self.d_state
        z_BLE, xbc_BLF, dt_BLH = project(self.in_proj, u_BLD).split(
            [self.inner, self.inner + 2 * n, self.dt_bias.numel()], dim=-1
        )
        xbc_BLF, history = self._convolve(xbc_BLF, None if state is None else state.conv)
        x_BLE, b_BLN, c_BLN = xbc_BLF.split([self.inner, n, n], dim=-1)
        x_BLHP = x_BLE.unflatten(-1, (-1, self.head_dim))
        decay_H = -torch.exp(self.A_log.to(state_dtype(self.A_log.dtype)))
        b_BLGN, c_BLGN = b_BLN[:, :, None], c_BLN[:, :, None]
        if state is not None and u_BLD.shape[1] == 1:
            y_BHP, ssm = ssd_step(
                state.ssm,
                x_BLHP[:, 0],
                dt_BLH[:, 0],
                decay_H,
                b_BLGN[:, 0],
                c_BLGN[:, 0],
                self.D,
                dt_bias=self.dt_bias,
            )
            y_BLHP = y_BHP[:, None]
        else:
            y_BLHP, ssm = ssd_scan(
                x_BLHP,
                dt_BLH,
                decay_H,
                b_BLGN,
                c_BLGN,
                self.D,
                dt_bias=self.dt_bias,
                initial_state=None if state is None else state.ssm,
                chunk_size=self.chunk_size,
                backend=self.scan_backend,
            )
        return project(self.out_proj, self.norm(y_BLHP.flatten(2), z_BLE)), Mamba2State(history, ssm)


class Mamba2Block(nn.Module):
    """``residual += hidden; hidden = drop(mixer(RMSNorm(residual)))``; the residual stream is at least fp32.

    Args:
        mixer: The token mixer.
        dim: Model width D.
        norm_eps: Epsilon of the RMSNorm.
        drop: Dropout of the block's output.
        drop_path: Probability of dropping the block's output for a whole sequence.
    """

    def __init__(
        self, mixer: Mamba2, dim: int, norm_eps: float = 1e-5, drop: float = 0.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, norm_eps)
        self.mixer = mixer
        self.drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def start(self, batch: int, device: torch.device, dtype: torch.dtype) -> Mamba2State:
        """The mixer's state before the first token."""
        return self.mixer.start(batch, device, dtype)

    def forward(
        self, hidden: Tensor, residual: Tensor | None, state: Mamba2State | None = None
    ) -> tuple[Tensor, Tensor, Mamba2State]:
        """Returns the branch output [B, L, D], the residual stream it joins [B, L, D] and the mixer's new state."""
        normed, residual = self.norm(hidden, residual)
        out, state = self.mixer(normed, state)
        return self.drop_path(self.drop(out)), residual, state
