"""Layers whose weights the fast operators read, and what is done where they must be called instead.

A layer may have been wrapped (an adapter, a quantised layer), parametrised, given hooks, or hold weights that are more
than tensors. Reading its weight would then pass all of that by. Such layers are called, which is slower and right.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from typing_extensions import TypeIs

from mambascope.ops import causal_conv1d, linear

_Layer = TypeVar("_Layer", bound=nn.Module)
_TENSORS = (nn.Parameter, Tensor, type(None))


def is_plain(module: nn.Module, kind: type[_Layer]) -> TypeIs[_Layer]:
    """Whether `module` does what its weight and bias say, so that an operator may take them.

    Hooks on all modules (``register_module_forward_hook``) are for observers and are not asked about.
    """
    if type(module) is not kind:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if torch.compiler.is_compiling():  # weights are stand-ins then
        return True
    attributes = module.__dict__  # runs for every layer of every call: looking them up on the module is slow
    if "forward" in attributes:  # replaced on the object, as accelerate does
        return False
    weights = attributes["_parameters"]
    return type(weights.get("weight")) in _TENSORS and type(weights.get("bias")) in _TENSORS


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, a plain linear layer by :func:`mambascope.ops.linear`: [..., in] to [..., out]."""
    if is_plain(layer, nn.Linear) and (torch.compiler.is_compiling() or not _has_any_global_hook()):
        return linear(x, layer.weight, layer.bias)
    return layer(x)


def run_all(layers: nn.Module, x: Tensor) -> Tensor:
    """``layers(x)`` of a sequence of layers, with :func:`project` for each of them."""
    if not is_plain(layers, nn.Sequential):
        return layers(x)
    for layer in layers:
        x = project(layer, x)
    return x


def convolve(conv: nn.Module, x_BLE: Tensor, *, reverse: bool = False, backend: str | None = None) -> Tensor:
    """Depthwise convolution that only looks back (ahead, if `reverse`) and SiLU, [B, L, E] to [B, L, E].

    Args:
        conv: ``nn.Conv1d`` with ``padding=K - 1``, or what stands for it.
        x_BLE: Tokens.
        reverse: Anti-causal instead of causal.
        backend: Of the operator, by name.
    """
    if is_plain(conv, nn.Conv1d):
        return causal_conv1d(x_BLE, conv.weight, conv.bias, reverse=reverse, backend=backend)
    x_BEL = (x_BLE.flip(1) if reverse else x_BLE).transpose(1, 2)
    y_BLE = F.silu(conv(x_BEL)[..., : x_BEL.shape[2]]).transpose(1, 2)
    return y_BLE.flip(1) if reverse else y_BLE


def embed_patches(conv: nn.Module, pixels: Tensor, side: int) -> Tensor:
    """What a convolution with kernel and stride `side` makes of single patches, [..., C * side**2] to [..., d]."""
    if is_plain(conv, nn.Conv2d):
        return linear(pixels, conv.weight.flatten(1), conv.bias)
    patches = conv(pixels.reshape(-1, pixels.shape[-1] // side**2, side, side))
    return patches.reshape(*pixels.shape[:-1], patches.shape[1])
