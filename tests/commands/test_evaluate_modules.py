"""The eval command on data modules: this package's by name, and a user's own as training takes it."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from mambascope.commands import evaluate as eval_cli
from mambascope.models.checkpoint import save_safetensors

QUICK = ["--timing-images", "8", "--rounds", "1", "--batch-size", "4", "--measure", "--max-seconds", "1"]
OWN = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class Scale:
    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor


class Noise(LightningDataModule):
    def __init__(self, count: int = 12, scale: Scale | None = None) -> None:
        super().__init__()
        self.count, self.scale = count, scale or Scale()

    def setup(self, stage: str) -> None:
        if stage == "fit":  # as in Lightning's own examples
            images = self.scale.factor * torch.randn(self.count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            self.val = TensorDataset(images, torch.arange(self.count) % 7)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 5)
"""


@pytest.fixture
def checkpoint(tiny_scope, tmp_path, monkeypatch):
    """Weights in a run's folder, and importable modules beside it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_data.py").write_text(OWN)
    (tmp_path / "stranger.py").write_text("open('imported', 'w').close()\nclass Scale: pass\n")
    (tmp_path / "run").mkdir()
    save_safetensors(tiny_scope, tmp_path / "run" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run" / "model.safetensors"


def evaluate(capsys, checkpoint, *options, config=None):
    if config is not None:
        (checkpoint.parent / "config.yaml").write_text(yaml.safe_dump({"data": config}))
    status = eval_cli.main([str(checkpoint), *map(str, options), *QUICK, "--no-figures", "--out", "out"])
    return status, capsys.readouterr().err


def images():
    return json.loads(Path("out/report.json").read_text())["images"]


def test_a_plain_lightning_data_module(checkpoint, capsys):
    status, err = evaluate(capsys, checkpoint, "--data", "own_data.Noise")
    assert status == 0, err
    assert (images(), "evaluating on own_data.Noise" in err) == (12, True)


def test_its_arguments_are_those_of_the_run(checkpoint, capsys):
    scale = {"class_path": "own_data.Scale", "init_args": {"factor": 0.5}}
    config = {"class_path": "own_data.Noise", "init_args": {"count": 9, "scale": scale}}
    status, err = evaluate(capsys, checkpoint, "--data", "own_data.Noise", config=config)
    assert status == 0, err
    assert images() == 9


def test_modules_of_the_package_by_name(tmp_path, capsys):
    from mambascope.models import MambaScope, ScopeConfig

    torch.manual_seed(0)
    model = MambaScope(ScopeConfig(img_size=32, patch_size=4, embed_dim=16, depth=1, num_classes=10))
    save_safetensors(model, tmp_path / "model.safetensors")
    section = {
        "class_path": "mambascope.data.digits_datamodule.ScopeDigitsDataModule",
        "init_args": {"val_length": 20, "digits": {"size": 32}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": section}))
    for name in ("ScopeDigitsDataModule", "mambascope.data.ScopeDigitsDataModule"):
        options = ["--data", name, "--out", str(tmp_path / "out"), "--no-figures"]
        assert eval_cli.main([str(tmp_path), *options, *QUICK]) == 0
        assert json.loads((tmp_path / "out" / "report.json").read_text())["images"] == 20


@pytest.mark.parametrize("scale", [{"class_path": "stranger.Scale"}, "stranger.Scale"])
def test_the_runs_configuration_imports_nothing_more(checkpoint, capsys, scale):
    config = {"class_path": "own_data.Noise", "init_args": {"scale": scale}}
    status, err = evaluate(capsys, checkpoint, "--data", "own_data.Noise", config=config)
    assert (status, err.count("\n")) == (2, 1)
    assert "scale" in err
    assert "is not imported by own_data.Noise" in err
    assert not Path("imported").exists()


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("no_such_module.Data", "neither a folder nor a data module: No module named 'no_such_module'"),
        ("own_data.Missing", "neither a folder nor a data module"),
        ("own_data.Scale", "neither a folder nor a data module"),
        ("ImageDataModule", "the following arguments are required: root"),
    ],
)
def test_other_names_are_refused_in_one_line(checkpoint, capsys, name, word):
    status, err = evaluate(capsys, checkpoint, "--data", name)
    assert (status, err.count("\n")) == (2, 1)
    assert word in err


def test_reasons_are_not_cut(checkpoint, capsys):
    config = {"class_path": "own_data.Noise", "init_args": {"number_of_images_that_the_module_makes": 3}}
    status, err = evaluate(capsys, checkpoint, "--data", "own_data.Noise", config=config)
    assert status == 2
    assert err.endswith("cannot be opened: Option 'number_of_images_that_the_module_makes' is not accepted\n")
