"""The data modules in typed YAML: nested settings, and errors that name the key."""

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule

from mambascope.data import ImageDataModule, ScopeDigitsDataModule


@pytest.fixture
def parser():
    result = ArgumentParser(exit_on_error=False)
    result.add_subclass_arguments(LightningDataModule, "data")
    result.add_argument("--config", action="config")
    return result


def test_digits_from_yaml_and_overrides(parser, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "data:\n  class_path: mambascope.data.ScopeDigitsDataModule\n"
        "  init_args: {train_length: 50, digits: {size: 112, easy_size: [0.4, 0.8]}}\n"
    )
    config = parser.parse_args(["--config", str(path), "--data.digits.jitter=0.1", "--data.batch_size=5"])
    data = parser.instantiate_classes(config).data
    assert isinstance(data, ScopeDigitsDataModule)
    assert (data.digits.size, data.digits.jitter, data.digits.easy_size) == (112, 0.1, (0.4, 0.8))
    assert (data.img_size, data.num_classes, data.in_chans, data.batch_size) == ((112, 112), 10, 3, 5)
    assert next(iter(data.train_dataloader()))[0].shape == (5, 3, 112, 112)


def test_images_from_arguments(parser):
    args = [
        "--data=mambascope.data.ImageDataModule",
        "--data.root=x",
        "--data.img_size=[192,256]",
        "--data.mean=[0,0,0]",
    ]
    data = parser.instantiate_classes(parser.parse_args([*args, "--data.auto_augment=null"])).data
    assert isinstance(data, ImageDataModule)
    assert data.img_size == (192, 256)
    assert data.mean == (0, 0, 0)


@pytest.mark.parametrize("key", ["digits.colour=3", "bath_size=3", "batch_size=many"])
def test_wrong_keys_are_named(parser, key):
    with pytest.raises(ArgumentError, match=key.partition("=")[0].partition(".")[2] or key.partition("=")[0]):
        parser.parse_args(["--data=mambascope.data.ScopeDigitsDataModule", f"--data.{key}"])


def test_help_describes_the_arguments(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--data.help=mambascope.data.ImageDataModule"])
    text = capsys.readouterr().out
    assert "Repeated augmentation" in text
    assert "skip_bad_files" in text
