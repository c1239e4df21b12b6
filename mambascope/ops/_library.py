"""Registration with the dispatcher: namespace ``mambascope``, one kernel per operator that picks a backend by name.

The operators are opaque to ``torch.compile`` on purpose: Inductor has been seen to miscompile an unrolled scan, and a
walk over tokens must not be unrolled into a graph anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("mambascope", "DEF")


def define(schema: str, kernel: Callable, fake: Callable) -> Any:
    """Registers an operator of this package and returns its overload.

    ``torch.library.custom_op`` would do the same with three times the overhead per call. There is no autocast rule to
    register: every operator takes the dtypes it is given and computes in fp32 (or fp64) inside, so autocast, which
    would make the matrix products inside a kernel bf16, is switched off around the kernel.

    Args:
        schema: ``name(arguments) -> results``.
        kernel: Runs on every device; the first argument is a tensor.
        fake: Returns empty tensors of the right shapes and dtypes.
    """
    name = schema.split("(", 1)[0]

    def run(first: Tensor, *args: Any) -> Any:
        device = first.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return kernel(first, *args)
        return kernel(first, *args)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mambascope::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.mambascope, name).default


def differentiable(name: str, setup_context: Callable, backward: Callable) -> None:
    """Gives an operator of this package its backward pass, which itself cannot be differentiated."""

    def once(ctx: Any, *grads: Tensor | None) -> tuple:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        return refusing(name, gradients, (*ctx.saved_tensors, *grads))

    torch.library.register_autograd(f"mambascope::{name}", once, setup_context=setup_context, lib=_LIBRARY)


class _NoSecondDerivative(torch.autograd.Function):
    """Gradients that hang on what they were made of, by a node that refuses.

    With ``torch.autograd.function.once_differentiable`` they hang on nothing: ``backward()`` meets its error, while
    ``torch.autograd.grad`` finds no way to its inputs and leaves the second derivatives of this part out.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"{ctx.name} has no second derivative")


def refusing(name: str, grads: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients, made without a graph, whose own gradients are an error.

    Args:
        name: Of the operator, for the message.
        grads: The gradients.
        sources: What they were computed from: saved tensors and incoming gradients.
    """
    tensors = [g for g in grads if g is not None]
    marked = iter(_NoSecondDerivative.apply(name, len(tensors), *tensors, *(s for s in sources if s is not None)))
    return tuple(None if g is None else next(marked) for g in grads)


def transformed() -> bool:
    """Whether tangents are being pushed forward or one of ``torch.func``'s transforms is at work."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _check_transforms(operator: Any) -> None:
    """Refuses what would drop tangents or end deep inside ``torch.library``; ``torch.func.vmap`` alone is fine."""
    kinds = {level.key() for level in torch._C._functorch.get_interpreter_stack() or ()}
    name, transforms = operator.name(), torch._C._functorch.TransformType
    if forward_ad._current_level >= 0 or transforms.Jvp in kinds:
        raise RuntimeError(f"{name} has no forward-mode derivative")
    if transforms.Grad in kinds:
        raise RuntimeError(f"{name} works with torch.autograd, not with grad, vjp and jacrev of torch.func")


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def call(operator: Any, grad: bool, *args: Any) -> Any:
    """Calls an operator; without gradients in eager mode it skips autograd's Python layer (7 of 11 us per call)."""
    if torch.compiler.is_compiling():
        return operator(*args)
    if transformed():
        _check_transforms(operator)
        return operator(*args)
    if grad:
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def absent(like: Tensor) -> Tensor:
    """Stands for "no tensor" in an operator's results, which cannot be optional."""
    return like.new_empty(0)


def present(tensor: Tensor | None, like: Tensor) -> Tensor:
    """`tensor`, or the stand-in if there is none."""
    return absent(like) if tensor is None else tensor


def where_present(arguments: Sequence[Tensor | None], results: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients for autograd: ``None`` where the argument was ``None``."""
    return [None if a is None else r for a, r in zip(arguments, results, strict=True)]


def dense(tensor: Tensor) -> Tensor:
    """`tensor` itself if neighbours in its last dimension are neighbours in memory, else a contiguous copy.

    All kernels take any strides in the other dimensions: halves of ``in_proj`` and slices of ``x_proj`` need no copy.
    """
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
