"""Scans over cells instead of patches in the fine stage (after FastVim, which averages rows and columns).

Shape letters: B batch, L tokens, S pooled tokens, E width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CellPool:
    """Averages the tokens of each cell for the scan, and gives each of them the scan's output.

    The sequence is CLS among ``cells`` groups of ``size`` tokens and single tokens before or behind all of them.

    Attributes:
        cells: Groups.
        cls: Index of CLS in the sequence; it may stand inside a group.
        groups_first: Whether the groups come before the single tokens.
        size: Tokens of a group.
    """

    cells: int
    cls: int
    groups_first: bool = True
    size: int = 4

    def pool(self, x_BLE: Tensor) -> Tensor:
        """[B, L, E] to [B, S, E] with S = cells + single tokens + 1; a CLS inside a group comes behind it."""
        body = torch.cat([x_BLE[:, : self.cls], x_BLE[:, self.cls + 1 :]], dim=1)
        grouped, single = self._parts(body, self.cells * self.size)
        means = grouped.unflatten(1, (self.cells, self.size)).mean(2)
        pooled = self._join(means, single)
        at = self._pooled_cls(single.shape[1])
        return torch.cat([pooled[:, :at], x_BLE[:, self.cls : self.cls + 1], pooled[:, at:]], dim=1)

    def unpool(self, y_BSE: Tensor) -> Tensor:
        """[B, S, E] to [B, L, E]: every token of a group gets the group's row."""
        singles = y_BSE.shape[1] - 1 - self.cells
        at = self._pooled_cls(singles)
        body = torch.cat([y_BSE[:, :at], y_BSE[:, at + 1 :]], dim=1)
        grouped, single = self._parts(body, self.cells)
        copies = grouped.unsqueeze(2).expand(-1, -1, self.size, -1).flatten(1, 2)
        full = self._join(copies, single)
        return torch.cat([full[:, : self.cls], y_BSE[:, at : at + 1], full[:, self.cls :]], dim=1)

    def _parts(self, body: Tensor, grouped: int) -> tuple[Tensor, Tensor]:
        """The rows of the groups, ``grouped`` of them, and the single ones."""
        if self.groups_first:
            return body[:, :grouped], body[:, grouped:]
        single = body.shape[1] - grouped
        return body[:, single:], body[:, :single]

    def _join(self, grouped: Tensor, single: Tensor) -> Tensor:
        return torch.cat([grouped, single] if self.groups_first else [single, grouped], dim=1)

    def _pooled_cls(self, singles: int) -> int:
        """Index of CLS among the pooled tokens."""
        ahead = 0 if self.groups_first else min(self.cls, singles)
        inside = min(self.cls - ahead, self.cells * self.size)
        return ahead + -(-inside // self.size) + self.cls - ahead - inside
