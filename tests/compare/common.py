"""The smallest comparison that the real command can make, and a way to run it."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "compare.py"

DIGITS = {
    "class_path": "mambascope.data.ScopeDigitsDataModule",
    "init_args": {
        "train_length": 32,
        "val_length": 40,
        "calibration_length": 8,
        "batch_size": 8,
        "val_batch_size": 16,
        "digits": {"size": 32},
    },
}
SMALL = {"embed_dim": 16, "depth": 2, "d_state": 4}
RECIPE = {
    "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "log_every_n_steps": 1},
    "data": DIGITS,
    "model": {
        "net": {"name": "vim_nano_patch8_64", "args": SMALL},
        "optimizer": {"lr": 1e-3, "lr_batch": None},
        "schedule": {"warmup_epochs": 0.5},
    },
    "checkpoint": {"every_steps": 1},
}


def comparison(folder, **changes):
    """A list with a plain Vim at two sizes, a MambaScope, and a small DeiT, written beside its training config."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    recipe = str(folder / "recipe.yaml")
    net = {"name": "deit_tiny_patch16_224", "args": {"patch_size": 8, "num_heads": 2, "embed_dim": 16, "depth": 2}}
    scope = {"name": "mambascope_nano_patch8_64", "args": {"alpha": 0.5}}
    entries = {
        "vim": {"label": "Vim", "config": recipe, "settings": [{}, {"data": {"img_size": 16}}]},
        "scope": {
            "label": "MambaScope",
            "config": recipe,
            "options": {"model": {"net": scope}},
            "thresholds": [0.13, 0.16],
        },
        "longer": {"label": "longer", "config": recipe, "start": "vim", "options": {"trainer": {"max_epochs": 1}}},
        "deit": {"label": "DeiT", "config": str(folder / "deit.yaml")},
    }
    deit = {**RECIPE, "model": {**RECIPE["model"], "net": net}}
    (folder / "deit.yaml").write_text(yaml.safe_dump(deit))
    content = {
        "title": "tiny",
        "baseline": "vim",
        "curve": "scope",
        "seeds": [0],
        "entries": entries,
        "timing": {"batch_sizes": [16, 1], "images": 16, "rounds": 3, "max_seconds": 5},
    }
    content.update(changes)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def environment(**extra):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def run(*args, cwd, timeout=400):
    """The real command."""
    command = [sys.executable, str(TOOL), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout)
