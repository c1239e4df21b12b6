"""The weights that come with the package: by name, through timm, and at once in the tool."""

import itertools
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image

import mambascope
from mambascope.data import SmallImageDataModule
from mambascope.data.scopedigits import ScopeDigits
from mambascope.data.scopedigits_config import ScopeDigitsConfig
from mambascope.data.small_images import DEBIAN_FASHION
from mambascope.models.checkpoint import CheckpointError, save_safetensors
from mambascope.models.weights import PRETRAINED, SHIPPED

ROOT = Path(__file__).parents[2]
NANO = "mambascope_nano_patch8_64"
CONFIGS = ROOT / "mambascope" / "configs"  # what the shipped models were trained with


def digits(length, name="scopedigits"):
    """Validation images that look like those it was trained on, as pictures, and their labels."""
    options = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["data"]["init_args"]["digits"]
    config = ScopeDigitsConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    pairs = list(itertools.islice(ScopeDigits(split="val", length=length, config=config), length))
    return [Image.fromarray(pixels) for pixels, _ in pairs], torch.tensor([int(label) for _, label in pairs])


def test_shipped_files_are_small_and_in_the_package_data():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["mambascope"]
    for path in SHIPPED.values():
        assert any(path.relative_to(ROOT / "mambascope").match(pattern) for pattern in patterns)
        assert path.stat().st_size < 5e6
    assert set(timm.list_models("mambascope*", pretrained=True)) == set(PRETRAINED) == {NANO}


@pytest.mark.parametrize(
    ("name", "least"), [("scopedigits", 0.9), ("scopedigits_published", 0.65), ("scopedigits_dense", 0.8)]
)
@torch.no_grad()
def test_the_shipped_models_are_ready_and_know_digits(name, least):
    model = mambascope.load(name)
    assert not model.training
    assert model.labels == list("0123456789")
    assert 0 < model.threshold == model.description["report"]["threshold"] < 1
    recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["net"]
    assert all(getattr(model.config, field) == value for field, value in recipe["args"].items())
    pictures, labels = digits(200, name)
    transform = model.transform()
    out = model.forward_scope(torch.stack([transform(picture) for picture in pictures]))
    right = (out.logits.argmax(1) == labels).double().mean()
    coarse = (out.coarse_logits.argmax(1) == labels).double().mean()
    assert right > least
    assert right > coarse
    assert 0.1 < out.exited.double().mean() < 0.9


@torch.no_grad()
def test_timm_pretrained_is_the_same_model_and_adapts():
    model, x = mambascope.load("scopedigits"), torch.randn(2, 3, 64, 64)
    twin = timm.create_model(NANO, pretrained=True).eval()
    assert twin.config == model.config
    assert twin.labels == model.labels
    assert torch.equal(twin(x), model(x))
    other = timm.create_model(NANO, pretrained=True, num_classes=5, img_size=96, in_chans=1, alpha=0.25).eval()
    assert other(torch.randn(2, 1, 96, 96)).shape == (2, 5)
    assert (other.labels, other.alpha) == (None, 0.25)
    assert torch.equal(other.layers[3].mixer.A_log, model.layers[3].mixer.A_log)
    assert other.pos_embed.shape[1] == 12 * 12 + 1
    maps = timm.create_model(NANO, pretrained=True, features_only=True).eval()(x)
    assert torch.allclose(maps[-1], model.forward_intermediates(x)[1][-1], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 4}, r"another depth \(\d+ parameters differ, e\.g\. (coarse_offsets\.)?layers\.4"),
        ({"embed_dim": 64, "num_classes": 3}, "another num_classes, embed_dim|another embed_dim"),
        ({"reuse": "linear"}, "another reuse"),
    ],
)
def test_pretrained_weights_of_another_structure_are_refused_in_one_line(options, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        timm.create_model(NANO, pretrained=True, **options)
    assert "\n" not in str(caught.value)


def test_timm_loads_files_of_ours_for_any_entry(tmp_path):
    saved = timm.create_model("mambascope_tiny_patch16_224", depth=2, embed_dim=32, num_classes=4, fine_cls="last")
    save_safetensors(saved, tmp_path / "own.safetensors", {"labels": list("abcd")})
    overlay = {"file": tmp_path / "own.safetensors"}
    again = timm.create_model("mambascope_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay)
    assert again.config == saved.config
    assert again.labels == list("abcd")
    assert all(torch.equal(v, saved.state_dict()[k]) for k, v in again.state_dict().items())
    with pytest.raises(ValueError, match="no pretrained weights are published for mambascope_small"):
        timm.create_model("mambascope_small_patch16_224", pretrained=True)


def test_names_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"names of shipped models: scopedigits"):
        mambascope.load("scopedigit")
    mambascope.load("scopedigits").save_pretrained(tmp_path / "saved")
    assert mambascope.load(tmp_path / "saved").threshold == mambascope.load("scopedigits").threshold
    (tmp_path / "scopedigits").mkdir()  # what lies here goes first
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        mambascope.load("scopedigits")


def test_the_tool_predicts_at_once(tmp_path):
    for i, picture in enumerate(digits(3)[0]):
        picture.save(tmp_path / f"{i}.png")
    command = [sys.executable, str(ROOT / "tools" / "predict.py"), "scopedigits", str(tmp_path), "--format", "jsonl"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(row["file"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    assert all(row["label"] in "0123456789" for row in rows)


def test_the_shipped_model_of_fashion_is_ready():
    model = mambascope.load("fashion_mambascope")
    assert model.labels[0] == "T-shirt/top"
    assert len(model.labels) == model.num_classes == 10
    assert (model.in_chans, model.alpha) == (1, 1.0)
    assert 0 < model.threshold == model.description["report"]["threshold"] < 1
    recipe = yaml.safe_load((CONFIGS / "fashion_mambascope.yaml").read_text())["model"]["net"]
    assert all(getattr(model.config, field) == value for field, value in recipe["args"].items())
    assert model.transform()(Image.new("L", (28, 28))).shape == (1, 28, 28)


@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
@torch.no_grad()
def test_the_shipped_model_of_fashion_knows_clothes():
    model, data = mambascope.load("fashion_mambascope"), SmallImageDataModule(dataset="fashion_mnist", shift=0)
    data.setup("fit")
    images, labels = next(iter(data.val_dataloader()))[:2]
    out = model.forward_scope(images)
    assert (out.logits.argmax(1) == labels).double().mean() > 0.8
    assert 0.6 < out.exited.double().mean() < 1
