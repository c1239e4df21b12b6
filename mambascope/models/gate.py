"""When the coarse answer is accepted (MambaScope section 3.2).

A gate reads what the coarse stage left and says how sure it is; an image leaves when that reaches the threshold. The
paper's gate is the largest class probability. One's own is an entry of :data:`GATES`:

    class Learned(Gate):
        def __init__(self, config):
            super().__init__(config)
            self.linear = nn.Linear(config.embed_dim, 1)

        def forward(self, coarse):
            return self.linear(coarse.cls).sigmoid().squeeze(1)

    GATES["learned"] = Learned

and is then named by ``gate="learned"``. It is part of the model: saved, loaded and exported with it.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambascope.models.states import CoarseState
from mambascope.utils import as_number


def check_threshold(threshold: Any) -> float:
    """Returns the threshold as a float, or raises ``ValueError`` if it is no number."""
    if type(threshold) is float and not math.isnan(threshold):  # what torch.compile can follow
        return threshold
    number = as_number(threshold)
    if number is None:
        raise ValueError(f"threshold must be a number (<= 0 always exits, >= 1 always refines), got {threshold!r}")
    return number


def confidence(logits: Tensor) -> Tensor:
    """The largest class probability of logits [B, C], per image [B] in at least fp32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).amax(-1)


class Gate(nn.Module):
    """How sure an answer is: of MambaScope's coarse look, of a dense model's, of a MambaEye after some glimpses.

    Training a model does not train its gate: no loss reads the confidence unless one's own does.

    Args:
        config: The model's config.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        del config

    def forward(self, coarse: Any) -> Tensor:
        """Confidence [B], 0 to 1, in at least fp32.

        Args:
            coarse: What was left behind with the answer; of MambaScope a
                :class:`~mambascope.models.states.CoarseState`.
        """
        raise NotImplementedError


class MaxProbability(Gate):
    """The largest class probability (the paper's)."""

    def forward(self, coarse: CoarseState) -> Tensor:
        """Confidence [B]."""
        return confidence(coarse.logits)


GATES: dict[str, Callable[[Any], Gate]] = {"max": MaxProbability}
"""What makes a gate from the model's config, by name, see ``ScopeConfig.gate``."""


def exit_mask(conf: Tensor, threshold: float) -> Tensor:
    """Which images [B] leave after the coarse stage: ``conf >= threshold``.

    A threshold of 0 or less always exits and one of 1 or more never does, whatever the confidences round to.
    """
    threshold = check_threshold(threshold)
    if threshold <= 0:
        return torch.ones_like(conf, dtype=torch.bool)
    if threshold >= 1:
        return torch.zeros_like(conf, dtype=torch.bool)
    return conf >= threshold
