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


def rows_for(model_name: str) -> tuple[PublishedRow, ...]:
    """The rows of the size that is part of a model's name (``tiny``, ``small``, ``base``); none for other models."""
    return tuple(row for row in IMAGENET_ROWS if f"_{row.size}_" in model_name)
