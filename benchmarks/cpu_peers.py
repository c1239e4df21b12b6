"""Selective scans by others that run on a CPU: x, dt, z [B, L, E], A [E, N], B, C [B, L, N], D, bias [E]."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.layers.mixer import BidirectionalMamba

Scan = Callable[..., Tensor]


def official_formula(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """The loop over tokens as the official reference function is written: decays of all tokens first [B, E, L, N]."""
    dt = F.softplus(dt + bias)
    decay = torch.exp(torch.einsum("ble,en->blen", dt, A))
    driven = torch.einsum("ble,bln,ble->blen", dt, B, x)
    state, rows = x.new_zeros(x.shape[0], *A.shape), []
    for t in range(x.shape[1]):
        state = decay[:, t] * state + driven[:, t]
        rows.append(torch.einsum("ben,bn->be", state, C[:, t]))
    return (torch.stack(rows, 1) + x * D) * F.silu(z)


def _official_mixer(mixer: BidirectionalMamba, u: Tensor, trace: tuple[str, ...] = ()) -> tuple[Tensor, None]:
    """The mixer as the official code computes it without CUDA: flips, one scan each way, gated twice."""
    assert not trace
    x, z = F.linear(u, mixer.in_proj.weight).chunk(2, dim=-1)
    total: Tensor | float = 0.0
    for end, flip in (("", False), ("_b", True)):
        conv, proj, step = (getattr(mixer, f"{name}{end}") for name in ("conv1d", "x_proj", "dt_proj"))
        a_log, skip = (mixer.A_b_log, mixer.D_b) if flip else (mixer.A_log, mixer.D)
        x_d, z_d = (x.flip(1), z.flip(1)) if flip else (x, z)
        c = F.silu(conv(x_d.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        n = a_log.shape[1]
        low, b, d = F.linear(c, proj.weight).split([step.weight.shape[1], n, n], dim=-1)
        y = official_formula(c, F.linear(low, step.weight), -torch.exp(a_log), b, d, skip, z_d, step.bias)
        total = total + (y.flip(1) if flip else y)
    return F.linear(total * 0.5, mixer.out_proj.weight), None


def use_official_formulas(model: torch.nn.Module) -> torch.nn.Module:
    """Replaces the forward function of every mixer of a Vim; parameters stay."""
    for module in model.modules():
        if isinstance(module, BidirectionalMamba):
            module.forward = _official_mixer.__get__(module)  # type: ignore[method-assign]
    return model


def mamba_ssm_reference() -> Scan:
    """``selective_scan_ref`` of mamba_ssm, its path without CUDA, in the layout it wants.

    The function is plain PyTorch but lies in a module that imports the compiled extension: a package built without it
    (``MAMBA_SKIP_CUDA_BUILD=TRUE``) gets an empty one for as long as the import takes.
    """
    extension = "selective_scan_cuda"
    missing = importlib.util.find_spec(extension) is None
    if missing:
        sys.modules[extension] = types.ModuleType(extension)
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
    finally:
        if missing:
            del sys.modules[extension]

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        u, delta, b, c, gate = (t.transpose(1, 2) for t in (x, dt, B, C, z))
        return selective_scan_ref(u, delta, A, b, c, D, gate, bias, True).transpose(1, 2)

    return scan


def mambapy_scan() -> Scan:
    """The parallel scan of mambapy's block."""
    from mambapy.mamba import MambaBlock, MambaConfig

    block = MambaBlock(MambaConfig(d_model=8, n_layers=1))

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        return block.selective_scan(x, F.softplus(dt + bias), A, B, C, D) * F.silu(z)

    return scan


@contextlib.contextmanager
def hidden(package: str) -> Iterator[None]:
    """Makes a package impossible to import for a while."""
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package}
    for name in modules:
        del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(modules)


def transformers_mixer(width: int, states: int) -> torch.nn.Module:
    """The Mamba mixer of transformers (one direction), whose loop runs where it finds no CUDA packages."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=width, state_size=states, num_hidden_layers=1, vocab_size=8)
    return MambaMixer(config, layer_idx=0)


def scans() -> dict[str, Scan | str]:
    """Peers by name; the reason in words where one cannot be used."""
    peers: dict[str, Scan | str] = {
        "official formula": official_formula,
        "official formula, torch.compile": torch.compile(official_formula, dynamic=False),
    }
    for name, make in (("mamba_ssm selective_scan_ref", mamba_ssm_reference), ("mambapy pscan", mambapy_scan)):
        try:
            peers[name] = make()
        except Exception as error:  # whatever a foreign package raises where it cannot run
            peers[name] = f"{type(error).__name__}: {error}"
    return peers
