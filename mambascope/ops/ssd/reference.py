"""The Mamba-2 recurrence the way the equations read: a loop over tokens that autograd differentiates.

Every other backend is compared with it. It keeps several [B, H, P, N] tensors per token for the backward pass.

Shape letters: B batch, L tokens, H heads, P head width, G groups, N states.
"""

from __future__ import annotations

import torch
from torch import Tensor


def per_head(t_BGN: Tensor, heads: int) -> Tensor:
    """Gives every head its group's row: [B, G, N] to [B, H, N]."""
    return t_BGN.repeat_interleave(heads // t_BGN.shape[1], dim=1)


def step_reference(
    state_BHPN: Tensor, x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor
) -> tuple[Tensor, Tensor]:
    """``S = exp(dt A) S + dt x (x) B``; ``y = S C``. All tensors share one dtype; ``dt`` is past its softplus.

    Returns:
        The output [B, H, P] and the new state [B, H, P, N].
    """
    return _advance(state_BHPN, dt_BH[..., None] * x_BHP, dt_BH * A_H, B_BGN, C_BGN)


def _advance(
    state_BHPN: Tensor, added_BHP: Tensor, log_decay_BH: Tensor, B_BGN: Tensor, C_BGN: Tensor
) -> tuple[Tensor, Tensor]:
    heads = added_BHP.shape[1]
    kept_BHPN = torch.exp(log_decay_BH)[..., None, None] * state_BHPN
    state_BHPN = torch.addcmul(kept_BHPN, added_BHP[..., None], per_head(B_BGN, heads)[:, :, None])
    return (state_BHPN @ per_head(C_BGN, heads)[..., None]).squeeze(-1), state_BHPN


def scan_reference(
    x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs :func:`step_reference` over all tokens from ``state_BHPN``.

    Returns:
        Outputs [B, L, H, P] without the skip term, and the state after the last token.
    """
    return scan_decayed(dt_BLH[..., None] * x_BLHP, dt_BLH * A_H, B_BLGN, C_BLGN, state_BHPN)


def scan_decayed(
    added_BLHP: Tensor, log_decay_BLH: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`scan_reference` from ``dt x`` [B, L, H, P] and ``dt A`` [B, L, H]."""
    outputs = []
    # unbind, not indexing: the backward of x[:, t] would make a full-size zero tensor for every token
    for added, log_decay, b, c in zip(*(t.unbind(1) for t in (added_BLHP, log_decay_BLH, B_BLGN, C_BLGN)), strict=True):
        y_BHP, state_BHPN = _advance(state_BHPN, added, log_decay, b, c)
        outputs.append(y_BHP)
    return torch.stack(outputs, dim=1), state_BHPN
