"""Operation counts of the ops for ``torch.utils.flop_counter``, which sees nothing inside a custom operator by itself.

Convention: :class:`~torch.utils.flop_counter.FlopCounterMode` counts two FLOPs per multiply-add, as PyTorch does for
matrix products. The field's "GFLOPs" are multiply-adds / 1e9: half of what the counter prints. :func:`count_macs`
returns multiply-adds.

Multiply-adds per token and direction (K taps, E inner width, N states, R dt rank), as in the published tables::

    convolution   K E
    scan          9 E N, + R E if the step sizes are projected inside, + 2 E for the skip term and the gate

The norm counts nothing, like PyTorch's own norms. A backward pass counts twice its forward pass, PyTorch's rule for
matrix products and convolutions; what a kernel computes again is not counted. The counts are those of the operators, so
they do not depend on the backend. Importing this module registers the formulas; ``mambascope.ops`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from mambascope.ops.causal_conv1d.op import BOTH, BOTH_BACKWARD, CONV, CONV_BACKWARD
from mambascope.ops.selective_scan.op import BIDIRECTIONAL, BIDIRECTIONAL_BACKWARD, SCAN, SCAN_BACKWARD

Shape = Sequence[int]


def conv_macs(x_shape: Shape, taps: int, directions: int = 1) -> int:
    """Multiply-adds of a depthwise convolution over tokens [B, L, E] with `taps` taps per direction."""
    batch, length, width = x_shape
    return directions * batch * length * taps * width


def scan_macs(x_shape: Shape, states: int, rank: int = 0, directions: int = 1) -> int:
    """Multiply-adds of a selective scan over tokens [B, L, E].

    Args:
        x_shape: [B, L, E].
        states: N.
        rank: R if step sizes are projected inside the scan, else 0.
        directions: 1 or 2.
    """
    batch, length, width = x_shape
    return directions * batch * length * (9 * width * states + rank * width + 2 * width)


def count_macs(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Multiply-adds of ``function(*args, **kwargs)``: matrix products, convolutions and the scans of this package.

    Includes the backward pass if `function` runs one. Divide by 1e9 for the GFLOPs of the published tables.
    """
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops() // 2


# The counter hands shapes to a formula in place of tensors.


def _conv(x: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * conv_macs(x, weight[-1])


def _both(x: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * conv_macs(x, weight[-1], directions=2)


def _scan(
    x: Shape,
    dt: Shape,
    A: Shape,
    B: Shape,
    C: Shape,
    D: Shape | None = None,
    z: Shape | None = None,
    dt_weight: Shape | None = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * scan_macs(x, A[1], 0 if dt_weight is None else dt_weight[1])


def _bidirectional(x: Shape, proj: Shape, dt_weight: Shape, dt_bias: Shape, A: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * scan_macs(x, A[1], dt_weight[1], directions=2)


def _backward_of(formula: Callable[..., int], leading: int) -> Callable[..., int]:
    """Twice the forward count; `leading` arguments (gradients, kept tensors) come before the forward's."""

    def twice(*args: Any, **kwargs: Any) -> int:
        kwargs.pop("out_shape", None)
        return 2 * formula(*args[leading:], **kwargs)

    return twice


for _operator, _backward, _leading, _formula in (
    (CONV, CONV_BACKWARD, 1, _conv),
    (BOTH, BOTH_BACKWARD, 2, _both),
    (SCAN, SCAN_BACKWARD, 3, _scan),
    (BIDIRECTIONAL, BIDIRECTIONAL_BACKWARD, 3, _bidirectional),
):
    register_flop_formula(_operator.overloadpacket)(_formula)
    register_flop_formula(_backward.overloadpacket)(_backward_of(_formula, _leading))
