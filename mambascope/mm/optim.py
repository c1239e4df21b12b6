"""Optimizer groups as in classification, with layer-wise learning rates, and mixed precision on CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from timm.models import group_parameters
from torch import nn

from mambascope.models.vim import VisionMamba
from mambascope.utils import flat


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Weight decay and learning rates as in classification, for a model that holds one of our encoders.

    Biases, gains and what the encoder names in ``no_weight_decay`` (CLS, positions, A_log, D) are not decayed. With
    ``paramwise_cfg=dict(layer_decay_rate=r)`` the encoder's block i of 0..n-1 learns with ``lr * r ** (n - 1 - i)``,
    embeddings with ``lr * r ** n``, everything after the last block with ``lr``. ``lr_mult=dict(name=factor)`` in
    the same dict scales the parameters of the part ``name``, e.g. ``{'backbone.encoder': 0.5}``; nested as
    ``--cfg-options optim_wrapper.paramwise_cfg.lr_mult.backbone.encoder=0.5`` makes it, it means the same.

    Raises:
        ValueError: If an option is unknown or out of range, or a name fits no parameter.
    """

    paramwise_cfg: dict[str, Any]

    def _validate_cfg(self) -> None:
        unknown = sorted(set(self.paramwise_cfg) - {"layer_decay_rate", "lr_mult"})
        if unknown:
            raise ValueError(f"paramwise_cfg accepts layer_decay_rate and lr_mult here, got {', '.join(unknown)}")
        rate = self.paramwise_cfg.get("layer_decay_rate", 1.0)
        if not 0 < rate <= 1:
            raise ValueError(f"layer_decay_rate must lie in (0, 1], got {rate!r}")
        if self.base_lr is None:
            raise ValueError("optimizer must give lr: layer-wise rates are multiples of it")
        lr_mult = self.paramwise_cfg.get("lr_mult", {})
        factors = flat(lr_mult) if isinstance(lr_mult, Mapping) else None
        if factors is None or not all(isinstance(v, (int, float)) and v >= 0 for v in factors.values()):
            raise ValueError(f"lr_mult must be a dict of names and factors >= 0, got {lr_mult!r}")
        self.paramwise_cfg = {"layer_decay_rate": rate, "lr_mult": factors}

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", is_dcn_module: Any = None) -> None:
        """Appends one group per learning rate and weight decay to ``params``."""
        del is_dcn_module
        rate: float = self.paramwise_cfg["layer_decay_rate"]
        scales: dict[str, float] = {}
        undecayed: set[str] = set()
        for place, encoder in module.named_modules():
            if isinstance(encoder, VisionMamba):
                start = f"{place}." if place else ""
                undecayed |= {start + name for name in encoder.no_weight_decay()}
                layers = group_parameters(encoder, encoder.group_matcher(), reverse=True)
                # the last group is the last block with norm and feature reuse, which learn at the full rate
                scales |= {start + name: rate ** (max(layers.values()) - layer) for name, layer in layers.items()}
        names = [name for name, _ in module.named_parameters(prefix=prefix)]
        if unknown := [p for p in self.paramwise_cfg["lr_mult"] if not any(_within(name, p) for name in names)]:
            raise ValueError(f"lr_mult must name parts of the model; it has no {', '.join(unknown)}")
        groups: dict[tuple[float, bool], dict] = {}
        for name, param in module.named_parameters(prefix=prefix):
            if not param.requires_grad:
                continue
            scale = scales.get(name, 1.0)
            for part, factor in self.paramwise_cfg["lr_mult"].items():
                scale *= factor if _within(name, part) else 1.0
            decayed = param.ndim > 1 and name not in undecayed
            group = groups.setdefault(
                (scale, decayed), {"params": [], "param_names": [], "lr": self.base_lr * scale, "lr_scale": scale}
            )
            if not decayed:
                group["weight_decay"] = 0.0
            group["params"].append(param)
            group["param_names"].append(name)
        params.extend(groups[key] for key in sorted(groups))


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """Mixed precision on CPU in bfloat16, which needs no loss scale; mmengine's own wrapper asks for a GPU."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast around the forward pass."""
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield
