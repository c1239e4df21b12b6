"""Weights that say nothing of their images: all commands, the model and timm prepare images alike."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from mambascope import MambaScope, ScopeConfig, load
from mambascope.commands.export import describe_export
from mambascope.commands.predict import main as predict
from mambascope.data.open import validation_loader
from mambascope.models import save_safetensors
from mambascope.models.preprocessing import default_preprocessing, make_transform, preprocessing


@pytest.mark.parametrize("side", [32, 160])
def test_all_prepare_an_image_alike(tmp_path, monkeypatch, side):
    config = ScopeConfig(img_size=side, patch_size=16, embed_dim=16, depth=1, num_classes=2)
    path = tmp_path / "model.safetensors"
    save_safetensors(MambaScope(config), path)
    model = load(path)
    for name in ("ant", "bee"):
        folder = tmp_path / "val" / name
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(len(name)).integers(0, 256, (side + 40, side + 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "a.png")
    picture = tmp_path / "val" / "ant" / "a.png"
    expected = model.transform()(picture)

    images, _ = next(iter(validation_loader(model, path, str(tmp_path / "val"), batch_size=2).loader))[:2]
    torch.testing.assert_close(images[0], expected)

    inputs = []
    look = MambaScope.forward_coarse
    monkeypatch.setattr(MambaScope, "forward_coarse", lambda self, x, *rest: inputs.append(x) or look(self, x, *rest))
    assert predict([str(path), str(picture)]) == 0
    torch.testing.assert_close(inputs[0][0], expected)

    facts = describe_export(model, None)
    assert {key: facts[key] for key in ("crop_pct", "interpolation")} == {
        key: preprocessing(model)[key] for key in ("crop_pct", "interpolation")
    }
    torch.testing.assert_close(make_transform(model)(Image.open(picture)), expected)


@pytest.mark.parametrize("name", ["vim_nano_patch8_64", "mambascope_tiny_patch16_224"])
def test_timms_entries_say_the_same(name):
    entry = timm.get_pretrained_cfg(name, allow_unregistered=False)
    defaults = default_preprocessing(entry.input_size[1:])
    assert {key: getattr(entry, key) for key in defaults} == defaults
