"""The convolution as a dispatcher operator with a backward pass that is an operator itself.

One operator serves one or both directions, reading x once. Shape letters: B batch, L tokens, E width, K taps.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mambascope.ops._library import absent, define, dense, differentiable, present, where_present
from mambascope.ops.backends import implementation
from mambascope.ops.causal_conv1d.common import ConvSide

_ONE = "Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, str backend"
_TWO = "Tensor x, Tensor weight_f, Tensor? bias_f, Tensor weight_b, Tensor? bias_b, bool silu, str backend"


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool, backend: str) -> Tensor:
    module = implementation("conv", backend, x, weight.shape[1])
    return module.conv_forward(dense(x), (ConvSide(weight, bias, reverse),), silu=silu)[0]


def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    module = implementation("conv", backend, x, weight.shape[1])
    dx, ((dw, db),) = module.conv_backward([grad.contiguous()], dense(x), (ConvSide(weight, bias, reverse),), silu=silu)
    return dx, dw, present(db, x)


def _like(tensor: Tensor | None, x: Tensor) -> Tensor:
    return absent(x) if tensor is None else tensor.new_empty(tensor.shape)


CONV = define(f"causal_conv1d({_ONE}) -> Tensor", _conv, lambda x, *_: x.new_empty(x.shape))
CONV_BACKWARD = define(
    f"causal_conv1d_backward(Tensor grad, {_ONE}) -> (Tensor, Tensor, Tensor)",
    _conv_backward,
    lambda grad, x, weight, bias, *_: (_like(x, x), _like(weight, x), _like(bias, x)),
)


def _conv_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.silu, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _conv_autograd(ctx: Any, grad: Tensor) -> tuple:
    tensors = ctx.saved_tensors
    grads = CONV_BACKWARD(grad, *tensors, ctx.silu, ctx.reverse, ctx.backend)
    return (*where_present(tensors, grads), None, None, None)


differentiable("causal_conv1d", _conv_context, _conv_autograd)


def _sides(wf: Tensor, bf: Tensor | None, wb: Tensor, bb: Tensor | None) -> tuple[ConvSide, ConvSide]:
    return ConvSide(wf, bf, False), ConvSide(wb, bb, True)


def _both(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *params, silu, backend = args
    module = implementation("conv", backend, x, params[0].shape[1])
    first, second = module.conv_forward(dense(x), _sides(*params), silu=silu)
    return first, second


def _both_backward(grad_f: Tensor, grad_b: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *params, silu, backend = args
    module = implementation("conv", backend, x, params[0].shape[1])
    grads = [grad_f.contiguous(), grad_b.contiguous()]
    dx, ((dwf, dbf), (dwb, dbb)) = module.conv_backward(grads, dense(x), _sides(*params), silu=silu)
    return dx, dwf, present(dbf, x), dwb, present(dbb, x)


BOTH = define(
    f"bidirectional_conv({_TWO}) -> (Tensor, Tensor)",
    _both,
    lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
BOTH_BACKWARD = define(
    f"bidirectional_conv_backward(Tensor grad_f, Tensor grad_b, {_TWO}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _both_backward,
    lambda grad_f, grad_b, x, *rest: tuple(_like(t, x) for t in (x, *rest[:4])),
)


def _both_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _both_autograd(ctx: Any, grad_f: Tensor, grad_b: Tensor) -> tuple:
    tensors = ctx.saved_tensors
    grads = BOTH_BACKWARD(grad_f, grad_b, *tensors, ctx.silu, ctx.backend)
    return (*where_present(tensors, grads), None, None)


differentiable("bidirectional_conv", _both_context, _both_autograd)
