"""Fields that configs had once: weights that carry them load if the field was never used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RETIRED: dict[str, Any] = {
    "registers": 0,
    "shuffle_rate": 0.0,
    "alpha_rule": "constant",
    "alpha_min": 0.25,
    "alpha_max": 1.0,
    "alpha_buckets": 4,
    "confidence": "max",
    "temperature": 1.0,
    "score_source": "pre_gate",
    "score_direction": "sum",
    "score_stride": 2,
    "rest_tokens": "embedding",
    "rest_join": None,
    "fine_depth": None,
    "fine_pool": "off",
    "coarse_interpolation": "bilinear",
}
"""Each retired field and the value that computes what models without it compute."""

_UNUSED = {"alpha_min": "alpha_rule", "alpha_max": "alpha_rule", "alpha_buckets": "alpha_rule"}
"""Fields that did nothing where another one had its default."""


def without_retired(config: Mapping[str, Any]) -> dict[str, Any]:
    """A file's config without the retired fields.

    Raises:
        ValueError: If one of them had another value than its default; the message names it.
    """
    for name, default in RETIRED.items():
        switch = _UNUSED.get(name)
        if name not in config or (switch is not None and config.get(switch, RETIRED[switch]) == RETIRED[switch]):
            continue
        if config[name] != default:
            raise ValueError(
                f"{name} was removed; weights of a model with {name}={config[name]!r:.40} need the version that "
                "made them"
            )
    return {name: value for name, value in config.items() if name not in RETIRED}
