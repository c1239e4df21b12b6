"""Inference form of an encoder on the CPU: parameters packed once, all blocks as one call.

A frozen model is the same module with the same parameters and answers (to rounding). Its blocks run in the packed form
only where nothing of a layer can be seen from outside: evaluation mode, no gradients, float32 on the CPU, no export or
tracing, no hooks. Everywhere else they run as before. A parameter that was replaced or changed in place is packed anew.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from operator import is_
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mambascope.layers import BidirectionalMamba, LookOffsets, RMSNorm, VimBlock
from mambascope.layers.look import BlockOffsets
from mambascope.layers.plain import is_plain
from mambascope.ops._library import transformed
from mambascope.ops.backends import ENV as BACKEND_ENV
from mambascope.ops.native import library
from mambascope.ops.native.pointwise import supports_conv
from mambascope.ops.native.scan import supports
from mambascope.ops.native.stack import BlockWeights, DirectionWeights, PackedStack


class NotFreezable(ValueError):
    """A model, or something in it, that has no packed form."""


_MIXER = {
    **dict.fromkeys(("in_proj", "x_proj", "dt_proj", "x_proj_b", "dt_proj_b", "out_proj"), nn.Linear),
    **dict.fromkeys(("conv1d", "conv1d_b"), nn.Conv1d),
}


_STEPS = [0]  # optimizer steps of this process: fused ones change parameters without raising their version


def _count_step(*_: Any) -> None:
    _STEPS[0] += 1


register_optimizer_step_post_hook(_count_step)


class _Watch:
    """Sees whether modules and parameters are still those that were packed. Runs before every call: plain lists."""

    def __init__(self) -> None:
        self.places: list[dict[str, Any]] = []  # where modules and parameters are looked up, by name
        self.names: list[str] = []
        self.objects: list[Any] = []
        self.states: list[dict[str, Any]] = []  # of the modules
        self.norms: list[tuple[RMSNorm, float]] = []
        self.drops: list[DropPath] = []
        self.tensors: list[Tensor] = []
        self.seen: tuple = ()

    def _add(self, place: dict[str, Any], name: str) -> Any:
        thing = place.get(name)
        self.places.append(place)
        self.names.append(name)
        self.objects.append(thing)
        return thing

    def module(self, parent: nn.Module, name: str, *kinds: type[nn.Module]) -> Any:
        """A child of `parent`; raises :class:`NotFreezable` unless it does what its parameters say."""
        child = self._add(parent._modules, name)
        if not any(is_plain(child, kind) for kind in kinds):
            raise NotFreezable(
                f"{name} ({type(child).__name__}) cannot be packed: it is no plain {kinds[0].__name__} or has hooks"
            )
        self.states.append(child.__dict__)
        return child

    def norm(self, parent: nn.Module, name: str) -> RMSNorm:
        """A norm, whose epsilon is watched too."""
        norm = self.module(parent, name, RMSNorm)
        self.norms.append((norm, norm.eps))
        return norm

    def parameter(self, parent: nn.Module, name: str, *shape: int) -> Tensor:
        """A parameter of `parent`; raises :class:`NotFreezable` unless it is float32 on the CPU and of that shape."""
        tensor = self._add(parent._parameters, name)
        if type(tensor) is not nn.Parameter or tensor.is_inference():
            raise NotFreezable(f"{name} is no parameter whose changes can be seen")
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            kind = f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device.type}"
            raise NotFreezable(f"the packed form takes float32 parameters on the CPU; {name} is {kind}")
        if tensor.shape != shape:
            raise NotFreezable(
                f"{name} must be {list(shape)} to be packed, as in the first block, got {list(tensor.shape)}"
            )
        self.tensors.append(tensor)
        return tensor.detach().contiguous()

    def remember(self) -> None:
        """Takes what the parameters hold now for what was packed."""
        self.seen = self._contents()

    def _contents(self) -> tuple:
        return _STEPS[0], [t._version for t in self.tensors], [t.data_ptr() for t in self.tensors]

    def unchanged(self) -> bool:
        if not all(map(is_, map(dict.get, self.places, self.names), self.objects)):
            return False
        if any(s["_forward_hooks"] or s["_forward_pre_hooks"] or "forward" in s for s in self.states):
            return False
        if any(drop.training for drop in self.drops):
            return False
        return all(norm.eps == eps for norm, eps in self.norms) and self._contents() == self.seen


class _Sizes(NamedTuple):
    """Sizes that all blocks share, those of the first."""

    dim: int
    inner: int
    states: int
    rank: int
    taps: int

    @classmethod
    def of(cls, block: Any) -> _Sizes:
        try:
            inner, states = block.mixer.A_log.shape
            return cls(
                block.norm.weight.shape[0],
                inner,
                states,
                block.mixer.dt_proj.weight.shape[1],
                block.mixer.conv1d.weight.shape[-1],
            )
        except (AttributeError, ValueError, IndexError):
            raise NotFreezable("the first block is no plain VimBlock") from None


class _PackedLook:
    """The blocks as one look sees them, with or without offsets of its own."""

    def __init__(self, model: Any, offsets: LookOffsets | None) -> None:
        self.watch = watch = _Watch()
        self.training = model.training
        if len(model.layers) == 0:
            raise NotFreezable("the model has no blocks")
        sizes = _Sizes.of(model.layers[0])
        for reason in (supports(torch.float32, None, sizes.states), supports_conv(torch.float32, sizes.taps)):
            if reason is not None:
                raise NotFreezable(f"the native kernel {reason}")
        blocks = []
        for i in range(len(model.layers)):
            block = watch.module(model.layers, str(i), VimBlock)
            more = None if offsets is None else watch.module(offsets.layers, str(i), BlockOffsets)
            blocks.append(self._block(block, more, sizes))
        final = None
        if not isinstance(model.norm_f, nn.Identity):
            norm = watch.norm(model, "norm_f")
            final = (self._sum(norm, "weight", offsets, "norm_f", sizes.dim), norm.eps)
        self.layers, self.norm_f, self.offsets = model.layers, model.norm_f, offsets
        watch.remember()
        self.stack = PackedStack(blocks, final)

    def fits(self, model: Any, offsets: LookOffsets | None) -> bool:
        """Whether this is still what `model` would compute."""
        same = self.layers is model.layers and self.norm_f is model.norm_f and self.offsets is offsets
        return same and len(self.stack.blocks) == len(model.layers) and self.watch.unchanged()

    def _sum(self, module: nn.Module, name: str, offsets: nn.Module | None, offset: str, size: int) -> Tensor:
        value = self.watch.parameter(module, name, size)
        return value if offsets is None else value + self.watch.parameter(offsets, offset, size)

    def _block(self, block: VimBlock, offsets: BlockOffsets | None, sizes: _Sizes) -> BlockWeights:
        watch = self.watch
        norm = watch.norm(block, "norm")
        drop = watch.module(block, "drop_path", DropPath, nn.Identity)  # does nothing in evaluation mode
        if isinstance(drop, DropPath):
            watch.drops.append(drop)
            if drop.training and not self.training:
                raise NotFreezable("drop_path is in training mode")
        mixer = watch.module(block, "mixer", BidirectionalMamba)
        layers = {name: watch.module(mixer, name, kind) for name, kind in _MIXER.items()}
        for name in ("in_proj", "out_proj", "x_proj", "x_proj_b"):
            if layers[name].bias is not None:
                raise NotFreezable(f"{name} has a bias, which the packed form has no place for")
        return BlockWeights(
            norm=(self._sum(norm, "weight", offsets, "norm", sizes.dim), norm.eps),
            in_proj=watch.parameter(layers["in_proj"], "weight", 2 * sizes.inner, sizes.dim),
            out_proj=watch.parameter(layers["out_proj"], "weight", sizes.dim, sizes.inner),
            directions=(
                self._direction(mixer, layers, "", offsets, sizes),
                self._direction(mixer, layers, "_b", offsets, sizes),
            ),
        )

    def _direction(
        self, mixer: BidirectionalMamba, layers: dict[str, Any], side: str, offsets: BlockOffsets | None, sizes: _Sizes
    ) -> DirectionWeights:
        conv, steps, watch = layers[f"conv1d{side}"], layers[f"dt_proj{side}"], self.watch
        _, inner, states, rank, taps = sizes
        if (conv.padding, conv.stride, conv.dilation, conv.groups) != ((taps - 1,), (1,), (1,), inner):
            raise NotFreezable(f"conv1d{side} is not the causal depthwise convolution of a mixer")
        return DirectionWeights(
            conv_weight=watch.parameter(conv, "weight", inner, 1, taps),
            conv_bias=None if conv.bias is None else watch.parameter(conv, "bias", inner),
            x_proj=watch.parameter(layers[f"x_proj{side}"], "weight", rank + 2 * states, inner),
            dt_weight=watch.parameter(steps, "weight", inner, rank),
            dt_bias=self._sum(steps, "bias", offsets, f"dt_bias{side}", inner),
            A=-torch.exp(watch.parameter(mixer, "A_b_log" if side else "A_log", inner, states)),
            D=self._sum(mixer, f"D{side}", offsets, f"D{side}", inner),
        )


class _Frozen:
    """Packed looks of one model."""

    def __init__(self) -> None:
        self.looks: dict[int, _PackedLook] = {}  # by the identity of the offsets

    def stack(self, model: Any, offsets: LookOffsets | None) -> PackedStack | None:
        look = self.looks.get(id(offsets))
        if look is None or not look.fits(model, offsets):
            with torch.inference_mode():
                try:
                    look = _PackedLook(model, offsets)
                except NotFreezable:
                    return None
            self.looks[id(offsets)] = look
        return look.stack


_FROZEN: weakref.WeakKeyDictionary[nn.Module, _Frozen] = weakref.WeakKeyDictionary()


def _other_backend() -> bool:
    return os.environ.get(BACKEND_ENV) not in (None, "", "cpu")


def _refusal(model: Any) -> str | None:
    if not getattr(model, "encodes_all_blocks", False):
        return f"a {type(model).__name__} has no frozen form; a VisionMamba or a MambaScope has"
    if library.why_unavailable() is not None:
        return f"the frozen form needs the compiled kernels: {library.why_unavailable()}"
    if model.config.scan_backend not in (None, "cpu"):
        return f"the frozen form runs on backend 'cpu', scan_backend is {model.config.scan_backend!r}"
    if _other_backend():
        return f"the frozen form runs on backend 'cpu', {BACKEND_ENV} is {os.environ[BACKEND_ENV]!r}"
    return None


def freeze(model: Any) -> Any:
    """Packs the parameters of a Vim or a MambaScope for inference on the CPU.

    The model stays the same object with the same parameters, state dict, methods and answers (to 1e-5); it is put into
    evaluation mode. Its blocks then run as one call in ``torch.no_grad`` or ``torch.inference_mode``; with gradients,
    in an export, on another device or in another dtype they run as before. Parameters that are changed are packed
    again, except through ``parameter.data``, which PyTorch does not record: call :func:`freeze` again after that. A
    copy of a frozen model is not frozen.

    Args:
        model: VisionMamba or MambaScope with float32 parameters on the CPU.

    Returns:
        `model`.

    Raises:
        ValueError: A model that has no such form, or a layer of it that was replaced or given hooks.
        RuntimeError: The compiled kernels are not available.
    """
    _pack(model)
    return model.eval()


def _pack(model: Any) -> None:
    reason = _refusal(model)
    if reason is not None:
        raise (ValueError if library.why_unavailable() is None else RuntimeError)(reason)
    frozen = _Frozen()
    with torch.inference_mode():
        for offsets in {None, getattr(model, "coarse_offsets", None)}:
            frozen.looks[id(offsets)] = _PackedLook(model, offsets)
    _FROZEN[model] = frozen


def freeze_where_possible(model: nn.Module) -> None:
    """:func:`freeze` for every encoder in `model` that can be, whose mode is left as it is."""
    for part in model.modules():
        if _refusal(part) is None and part not in _FROZEN:
            with contextlib.suppress(NotFreezable):
                _pack(part)


def unfreeze(model: Any) -> Any:
    """Forgets the packed parameters; returns `model`. Commands, reports and the engine freeze it again."""
    _FROZEN.pop(model, None)
    return model


def is_frozen(model: nn.Module) -> bool:
    """Whether :func:`freeze` was called."""
    return model in _FROZEN


def packed_stack(model: Any, tokens: Tensor, trace: tuple[str, ...], offsets: LookOffsets | None) -> PackedStack | None:
    """The packed blocks of a frozen model if they may stand for its modules in this call."""
    if torch.compiler.is_compiling():  # before anything that a graph could not hold
        return None
    frozen = _FROZEN.get(model)
    if (
        frozen is None
        or _other_backend()
        or model.training
        or torch.is_grad_enabled()
        or type(tokens) is not Tensor
        or tokens.dtype != torch.float32
        or tokens.device.type != "cpu"
        or tokens.numel() == 0
        or not set(trace) <= {"top"}
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or _get_current_dispatch_mode() is not None
        or transformed()
        or _has_any_global_hook()
    ):
        return None
    return frozen.stack(model, offsets)
