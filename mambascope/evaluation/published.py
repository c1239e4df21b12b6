"""Rows of the literature to compare with, as printed there; none of them was measured with this code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedRow:
    """ImageNet-1k top-1 (%) at GFLOPs (``one_direction`` convention) of a published model."""

    label: str
    size: str
    top1: float
    gflops: float


def _rows(size: str, *rows: tuple[str, float, float]) -> tuple[PublishedRow, ...]:
    return tuple(PublishedRow(label, size, top1, gflops) for label, top1, gflops in rows)


# as printed in MambaScope (arXiv 2512.00647)
IMAGENET_ROWS = (
    *_rows(
        "tiny",
        ("ViM-T", 76.1, 1.5),
        ("HA-T", 75.1, 1.3),
        ("R-MeeTo-T", 75.3, 1.3),
        ("DyVM-T", 75.2, 1.3),
        ("MambaScope-T", 76.4, 1.4),
    ),
    *_rows(
        "small",
        ("ViM-S", 80.3, 5.1),
        ("HA-S", 78.8, 3.6),
        ("R-MeeTo-S", 79.9, 3.6),
        ("DyVM-S", 78.8, 3.5),
        ("MambaScope-S η 0.5", 79.8, 2.5),
        ("MambaScope-S η 0.55", 80.3, 2.7),
        ("MambaScope-S η 0.65", 80.7, 3.1),
        ("MambaScope-S", 81.2, 4.3),
    ),
    *_rows(
        "base",
        ("ViM-B", 81.9, 18.9),
        ("R-MeeTo-B", 81.3, 13.2),
        ("DyVM-B", 80.0, 12.1),
        ("MambaScope-B", 82.8, 11.8),
    ),
)


@dataclass(frozen=True)
class DynamicSystem:
    """A published system that spends less on easy images or tokens, on ImageNet-1k.

    Attributes:
        label: Its name.
        backbone: What it is built on.
        top1: Accuracy (%) at ``gflops``.
        gflops: Mean multiply-adds per image / 1e9, in the convention of its authors.
        means: How it saves.
        source: Where the figures were read.
    """

    label: str
    backbone: str
    top1: float
    gflops: float
    means: str
    source: str


DYNAMIC_SYSTEMS = (
    DynamicSystem("MambaScope", "Vim-S", 80.7, 3.1, "exit, regions re-read", "paper, arXiv 2512.00647"),
    DynamicSystem("MambaScope", "Vim-S", 81.2, 4.3, "exit, regions re-read", "paper, arXiv 2512.00647"),
    DynamicSystem("ThinkingViT", "DeiT, 3 to 6 heads", 81.4, 3.19, "exit, more heads", "README, arXiv 2507.10800"),
    DynamicSystem("AdaptiveNN", "DeiT-S", 81.6, 3.1, "exit, fixations", "off a figure, arXiv 2509.15333"),
    DynamicSystem("DVT", "T2T-ViT-12", 76.7, 1.78, "exit, finer patches", "README, arXiv 2105.15075"),
    DynamicSystem("LF-ViT", "DeiT-S", 79.8, 1.7, "exit, one region", "63 % off 4.6, arXiv 2402.00033"),
    DynamicSystem("DyVM", "Vim-S", 78.8, 3.5, "tokens and scans left out", "MambaScope's tables"),
    DynamicSystem("R-MeeTo", "Vim-S", 79.9, 3.58, "tokens merged", "README, arXiv 2412.12496"),
    DynamicSystem("FastVim", "Vim-S", 81.1, 4.3, "pooled scan for all images", "GFLOPs counted here, arXiv 2502.01692"),
)
"""None of them was reproduced here. CF-ViT (arXiv 2203.03821) states no such point in what was read: the accuracy of
LV-ViT at 53 % fewer GFLOPs."""


def rows_for(model_name: str) -> tuple[PublishedRow, ...]:
    """The rows of the size that is part of a model's name (``tiny``, ``small``, ``base``); none for other models."""
    return tuple(row for row in IMAGENET_ROWS if f"_{row.size}_" in model_name)
