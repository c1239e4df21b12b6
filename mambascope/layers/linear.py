"""Linear layer on :func:`mambascope.ops.linear`."""

from __future__ import annotations

from torch import Tensor, nn

from mambascope.ops import linear


class Linear(nn.Linear):
    """``torch.nn.Linear`` with the faster of torch's two CPU libraries behind it."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps [..., in] to [..., out]."""
        return linear(input, self.weight, self.bias)
