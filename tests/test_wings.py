"""A wing is deleted with its folder and its line in ``mambascope/__init__.py``; everything else goes on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mambascope"

USE = """
import torch, mambascope
from mambascope.models.architectures import ARCHITECTURES

model = mambascope.MambaScope(embed_dim=32, depth=2, img_size=64, patch_size=8, num_classes=5).eval()
assert model.forward_scope(torch.randn(2, 3, 64, 64), 0.5).logits.shape == (2, 5)
print(*ARCHITECTURES)
"""
TRAIN = """
import sys
from mambascope.commands import evaluate, predict, train

small = ["--model.net.args.embed_dim=32", "--model.net.args.depth=2", "--data.init_args.train_length=32"]
small += ["--data.init_args.val_length=20", "--data.init_args.batch_size=16", "--trainer.max_steps=2"]
assert train.main(["--config=scopedigits", "--trainer.accelerator=cpu", "--run.name=small", *small]) == 0
weights = "runs/small/model.safetensors"
assert evaluate.main([weights, "--length=20", "--device=cpu", "--rounds=1", "--no-figures"]) == 0
assert predict.main([weights, "picture.png", "--device=cpu"]) == 0
assert not any(name.startswith(("mambascope.eye", "mambascope.peers", "mambascope.mm")) for name in sys.modules)
"""


def without(wings, folder):
    """A copy of the package without these wings; returns the environment in which it is the one that is imported."""
    copy = folder / "mambascope"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", *wings))
    start = copy / "__init__.py"
    lines = start.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(tuple(f"import mambascope.{wing}" for wing in wings))]
    assert len(lines) - len(kept) == len(set(wings) - {"mm"})  # the one for OpenMMLab needs no line
    start.write_text("".join(kept))
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def run(code, folder, env):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("wings", "architectures"),
    [
        (("eye",), "vim mambascope reduced_vim timm"),
        (("peers",), "vim mambascope mambaeye"),
    ],
    ids=["eye", "peers"],
)
def test_each_wing_can_be_deleted(wings, architectures, tmp_path):
    assert set(run(USE, tmp_path, without(wings, tmp_path)).split()) == set(architectures.split())


def test_the_classifier_trains_evaluates_and_predicts_without_any_wing(tmp_path):
    from PIL import Image

    env = without(("eye", "peers", "mm"), tmp_path)
    Image.new("RGB", (70, 64), "white").save(tmp_path / "picture.png")
    assert run(USE + TRAIN, tmp_path, env).splitlines()[0] == "vim mambascope"
    assert (tmp_path / "runs" / "small" / "model.safetensors").is_file()
