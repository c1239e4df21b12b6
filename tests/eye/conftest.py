"""A small MambaEye, its weights file, and a folder of pictures."""

import pytest
import torch

from mambascope.eye import MambaEye
from mambascope.models.checkpoint import save_safetensors
from tests.eye.common import LABELS, SMALL, Pictures


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    eye = MambaEye(**SMALL).eval()
    with torch.no_grad():
        eye.get_classifier().weight.mul_(8)
    return eye


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    glimpses = {"length": 20, "canvas_size": 32, "pattern": "random", "resize_mode": "fit", "patch_size": 8}
    save_safetensors(model, path, {"labels": LABELS, "glimpses": glimpses})
    return path


@pytest.fixture
def data(tmp_path):
    for i, name in enumerate(LABELS):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        for k in range(2):
            Pictures()(3 * k + i)[0].save(tmp_path / "data" / "val" / name / f"{k}.png")
    return tmp_path / "data"
