"""Folders that hold a ready model."""

import pytest
import torch
from PIL import Image

import mambascope
from mambascope import MambaEye, MambaScope, VisionMamba
from mambascope.models.checkpoint import CheckpointError

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 2}


def test_a_saved_folder_is_a_ready_model(tmp_path):
    model = MambaScope(**SMALL, alpha=0.5).eval()
    model.threshold = 0.42
    model.description = {
        "labels": ["cat", "dog"],
        "transform": {"mean": [0.5] * 3, "std": [0.5] * 3},
        "report": {"table": [{"stage": "coarse", "top1": 71.25}, {"stage": "fine", "top1": 88.5}]},
    }
    folder = tmp_path / "tiny-model"
    model.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = (folder / "README.md").read_text()
    assert "# tiny-model" in card
    assert "| coarse | 71.25 |" in card

    for again in (MambaScope.from_pretrained(folder), mambascope.load(folder / "model.safetensors")):
        assert not again.training
        assert (again.alpha, again.threshold, again.labels) == (0.5, 0.42, ["cat", "dog"])
        pixels = again.transform()(Image.new("RGB", (50, 40), (255, 0, 255)))
        assert pixels.shape == (3, 32, 32)
        assert pixels.amax() == 1
        assert pixels.amin() == -1
        assert torch.equal(again(pixels[None]), model(pixels[None]))


def test_what_is_no_model_is_named(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        MambaScope.from_pretrained(tmp_path)
    VisionMamba(**SMALL).save_pretrained(tmp_path / "vim")
    with pytest.raises(CheckpointError, match="holds a VisionMamba, not a MambaScope"):
        MambaScope.from_pretrained(tmp_path / "vim")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="neither a folder with"):
        MambaScope.from_pretrained("nobody/nothing", local_files_only=True)


def test_a_mambaeye_is_saved_and_loaded_too(tmp_path):
    model = MambaEye(patch_size=8, embed_dim=32, depth=2, d_state=8, head_dim=16, move_dim=8, num_classes=2).eval()
    model.description = {"labels": ["cat", "dog"], "glimpses": {"length": 5}}
    model.save_pretrained(tmp_path / "eye")
    assert "images of any size" in (tmp_path / "eye" / "README.md").read_text()
    again = MambaEye.from_pretrained(tmp_path / "eye")
    assert again.config == model.config
    assert again.labels == ["cat", "dog"]
    assert again.description["glimpses"] == {"length": 5}
    pixels = again.transform()(Image.new("RGB", (50, 40), (255, 0, 51)))
    assert pixels.shape == (3, 40, 50)
    assert pixels[:, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    glimpse, move = pixels[None, None, :, :8, :8], torch.zeros(1, 1, 2)
    assert torch.equal(again(glimpse, move), model(glimpse, move))
    with pytest.raises(CheckpointError, match="holds a MambaEye, not a MambaScope"):
        MambaScope.from_pretrained(tmp_path / "eye")
    with pytest.raises(ValueError, match="is_training must be false"):
        again.transform(is_training=True)
