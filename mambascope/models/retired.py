"""Options that were removed: what names them still is read where they had no effect, and refused elsewhere.

Weights carry the whole config of their model, runs the whole configuration of their training; both may be older than
the removal. Results of the options are in ``benchmarks/results/ablations/removed.md``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

LAST_COMMIT = "ed6fe22"
"""The last commit that has the options."""

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
"""Fields of a model's config, each with the value that computes what models without it compute."""

RETIRED_LOSS: dict[str, Any] = {"focal_gamma": 0.0, "coarse_label_smoothing": None}
"""The same of the loss's arguments."""

_SWITCHES = {"alpha_min": "alpha_rule", "alpha_max": "alpha_rule", "alpha_buckets": "alpha_rule"}
"""Fields that did nothing where another one had its default."""


def without_retired(options: Mapping[str, Any], retired: Mapping[str, Any] = RETIRED) -> dict[str, Any]:
    """Options without those that were removed.

    Args:
        options: Fields of a model's config, or arguments of a loss.
        retired: The removed ones, each with the value that had no effect.

    Raises:
        ValueError: If one of them has another value; the message names it.
    """
    for name, default in retired.items():
        switch = _SWITCHES.get(name)
        idle = switch is not None and options.get(switch, retired[switch]) == retired[switch]
        if name in options and not idle and not _same(options[name], default):
            value = repr(options[name])
            value = value if len(value) <= 40 else f"{value[:40]}..."
            raise ValueError(
                f"{name}={value} is of an option that was removed; commit {LAST_COMMIT} is the last one that has it"
            )
    return {name: value for name, value in options.items() if name not in retired}


def without_retired_loss(text: str) -> str:
    """The YAML of a training without the loss's removed arguments, which the runs before their removal all have.

    Raises:
        ValueError: If one of them has another value than the one without effect; the message names it.
    """

    def line(match: re.Match[str]) -> str:
        without_retired({match[1]: yaml.safe_load(match[2])}, RETIRED_LOSS)
        return ""

    return re.sub(rf"^ *({'|'.join(RETIRED_LOSS)}):(.*)\n?", line, text, flags=re.MULTILINE)


_IDLE_TEACHER = "  teacher:\n    checkpoint: null\n    kl_weight: 0.0\n    token_weight: 0.0\n"
_IDLE_LOSS = "    kl_weight: 1.0\n    temperature: 1.0\n    coarse_ce_weight: 0.0\n"


def without_other_kinds(text: str) -> str:
    """The YAML of a run from when all kinds of models had one training module, without idle options of other kinds."""
    if not re.search(r"^  teacher:\n", text, re.MULTILINE):
        return text
    text = text.replace(_IDLE_TEACHER, "").replace("  full_refine_epochs: 0\n", "")
    return text.replace(f"  loss:\n{_IDLE_LOSS}", "  loss:\n")


def _same(value: Any, default: Any) -> bool:
    """Whether a value is the default; numbers may be of another type, but no bool, save for how YAML reads "off"."""
    if default == "off" and value is False:
        return True
    return isinstance(value, bool) == isinstance(default, bool) and bool(value == default)
