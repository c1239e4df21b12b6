"""Names of the files of a run, and the configs and trained weights that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

WEIGHTS = "model.safetensors"
"""Weights in a run's or a saved model's folder."""

RUN_CONFIG = "config.yaml"
"""Configuration in a run's folder."""

CHECKPOINT_DIR, LAST_NAME, BEST_NAME = "checkpoints", "last.ckpt", "best.ckpt"
"""Folder of a run's checkpoints, and the names of the newest and of the best."""

LOG_DIR, METRICS_NAME = "logs", "metrics.csv"
"""Folder of a run's logs, and the name of the table there."""

REPORT_DIR, REPORT_DATA, REPORT_TEXT = "report", "report.json", "report.txt"
"""Folder of a run's report, and the names of its data and of its table there."""

CONFIG_DIR = Path(__file__).parent.parent / "configs"
"""Configs that come with the package, by name."""

_FOLDER = Path(__file__).parent.parent / "weights"
SHIPPED = {
    "scopedigits": _FOLDER / "scopedigits_nano.safetensors",
    "scopedigits_published": _FOLDER / "scopedigits_published_nano.safetensors",
    "scopedigits_dense": _FOLDER / "scopedigits_dense_nano.safetensors",
    "fashion_mambascope": _FOLDER / "fashion_pico.safetensors",
}
"""File of each model that is shipped, by the name that stands for it, which is also its training configuration's."""

PRETRAINED = {"mambascope_nano_patch8_64": SHIPPED["scopedigits"]}
"""What ``timm.create_model(name, pretrained=True)`` loads."""


def find_weights(weights: str | os.PathLike[str]) -> Path:
    """The file meant by a path, by a folder that holds ``model.safetensors``, or by the name of a shipped model.

    A file or folder of the same name goes first. Whether the file exists is left to whoever reads it.
    """
    path = Path(weights)
    if path.is_dir() and (path / WEIGHTS).is_file():
        return path / WEIGHTS
    if isinstance(weights, str) and weights in SHIPPED and not path.exists():
        return SHIPPED[weights]
    return path
