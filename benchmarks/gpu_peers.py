"""mamba_ssm and causal_conv1d as Vim's own code uses them: in their layout, with their order of operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.layers.mixer import BidirectionalMamba
from mambascope.ops import mamba_ssm
from mambascope.ops.selective_scan.common import ScanSide


def functions() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Their scan and their convolution.

    Raises:
        RuntimeError: One of them cannot be used; says why.
    """
    for package in ("mamba_ssm", "causal_conv1d"):
        reason = mamba_ssm.why_unavailable(package)
        if reason is not None:
            raise RuntimeError(reason)
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn, causal_conv1d_fn


class OwnLayout:
    """Two scans on operands that already are in their layout: the least that a Vim on mamba_ssm has to do.

    Transposing and flipping are left out in their favour; the projection of the step sizes is inside, as in our op.

    Args:
        tensors: The operator's x, proj, dt_weight, dt_bias, A and D with the suffixes ``_f`` and ``_b``, and z.
        pad: Pad L to what fills their thread blocks.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, pad: bool) -> None:
        self.scan, _ = functions()
        self.sides = []
        for name, reverse in (("f", False), ("b", True)):
            n = tensors[f"A_{name}"].shape[1]
            proj = tensors[f"proj_{name}"]
            low, b, c = proj.split([proj.shape[-1] - 2 * n, n, n], -1)
            parameters = [tensors[f"{k}_{name}"] for k in ("x", "A", "D", "dt_bias")]
            side = ScanSide(parameters[0], low, parameters[1], b, c, parameters[2], None, parameters[3], reverse)
            operands = [t.detach().clone() for t in mamba_ssm.operands(side, tensors["z"], pad=pad) if t is not None]
            self.sides.append((operands, tensors[f"dt_weight_{name}"].detach().to(proj.dtype)))

    def leaves(self) -> list[Tensor]:
        """Every input, asking for a gradient from now on."""
        return [t.requires_grad_() for operands, weight in self.sides for t in (*operands, weight)]

    def outputs(self) -> list[Tensor]:
        """Gated output [B, E, L] of each direction, in the order of its walk."""
        return [
            self.scan(u, torch.matmul(weight, low), A, B, C, D, z, bias, True)
            for (u, low, A, B, C, D, z, bias), weight in self.sides
        ]

    def __call__(self) -> Tensor:
        first, second = self.outputs()
        return (first + second) * 0.5


def mixer_forward(mixer: BidirectionalMamba, u_BLD: Tensor, score: None = None) -> tuple[Tensor, None]:
    """The mixer with their functions: tensors stay [B, E, L] between the products, flips as in Vim's code."""
    assert score is None
    scan, conv = functions()
    batch, length, _ = u_BLD.shape
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else u_BLD.dtype
    with torch.autocast("cuda", enabled=False):
        tokens = u_BLD.to(dtype)
        xz = torch.matmul(mixer.in_proj.weight.to(dtype), tokens.transpose(1, 2))
        x, z = xz.chunk(2, dim=1)
        total = None
        for suffix, reverse in (("", False), ("_b", True)):
            conv1d, x_proj = getattr(mixer, f"conv1d{suffix}"), getattr(mixer, f"x_proj{suffix}")
            dt_proj, a_log = getattr(mixer, f"dt_proj{suffix}"), mixer.A_b_log if reverse else mixer.A_log
            skip = mixer.D_b if reverse else mixer.D
            n, rank = a_log.shape[1], dt_proj.weight.shape[1]
            x_d, z_d = (x.flip(2), z.flip(2)) if reverse else (x, z)
            c = conv(x_d, conv1d.weight.squeeze(1).to(dtype), conv1d.bias.to(dtype), activation="silu")
            rows = F.linear(c.transpose(1, 2).reshape(batch * length, -1), x_proj.weight.to(dtype))
            low, b, d = rows.split([rank, n, n], dim=-1)
            delta = (dt_proj.weight.to(dtype) @ low.t()).view(-1, batch, length).transpose(0, 1)
            b, d = (t.view(batch, length, n).transpose(1, 2).contiguous() for t in (b, d))
            y = scan(c, delta, -torch.exp(a_log.float()), b, d, skip.float(), z_d, dt_proj.bias.float(), True)
            total = y if total is None else total + y.flip(2)
        assert total is not None
        return F.linear((total * 0.5).transpose(1, 2), mixer.out_proj.weight.to(dtype)), None


def use_their_mixer(model: torch.nn.Module) -> torch.nn.Module:
    """Replaces the forward function of every mixer of a Vim; parameters stay."""
    functions()
    for module in model.modules():
        if isinstance(module, BidirectionalMamba):
            module.forward = mixer_forward.__get__(module)  # type: ignore[method-assign]
    return model
