"""Position tables that were made with another stride, for another image, or for neither."""

import pytest
import timm
import torch

from mambascope import MambaScope, VisionMamba, load_checkpoint
from mambascope.commands import evaluate as eval_cli
from mambascope.models.checkpoint import CheckpointError, save_safetensors
from mambascope.models.ready import ready_model
from mambascope.training.args import ModelArgs
from mambascope.training.module import build_model

TINY = {"embed_dim": 16, "depth": 1, "d_state": 4, "num_classes": 3}
NANO = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_classes": 3}


def official(path, **options):
    """A file that says nothing about itself, and its model."""
    model = VisionMamba(**options).eval()
    torch.save({"model": model.state_dict()}, path)
    return model


@pytest.mark.parametrize(
    ("size", "patch", "stride", "patch_stride"),
    [
        (224, 16, 8, None),
        (224, 16, 4, None),
        (384, 16, 8, None),
        (32, 8, 4, None),
        ((32, 48), 8, 4, None),
        (32, 8, 8, 4),
    ],
)
def test_a_table_of_another_stride_is_named(size, patch, stride, patch_stride, tmp_path):
    sizes = {**TINY, "img_size": size, "patch_size": patch}
    official(tmp_path / "vim.pth", **sizes, stride=stride)
    model = VisionMamba(**sizes, stride=patch_stride)
    before = model.pos_embed.clone()
    with pytest.raises(
        CheckpointError, match=f"is {stride} in the file and {patch_stride or patch} .*pass stride={stride}"
    ):
        load_checkpoint(model, tmp_path / "vim.pth")
    assert torch.equal(model.pos_embed, before)
    report = load_checkpoint(model, tmp_path / "vim.pth", strict=False, verbose=False)  # for who wants it resampled
    assert report.resampled == ["pos_embed"]
    assert [difference.argument for difference in report.differs] == [f"stride={stride}"]
    assert load_checkpoint(VisionMamba(**sizes, stride=stride), tmp_path / "vim.pth", verbose=False).resampled == []


@pytest.mark.parametrize("size", [512, (384, 640)])
def test_the_published_image_is_known_where_the_models_is_larger(size, tmp_path):
    """Dense models and finetuning enlarge the image: 27 x 27 positions are still stride 8 of 224 pixels."""
    official(tmp_path / "vim.pth", **TINY, img_size=224, patch_size=16, stride=8)
    with pytest.raises(CheckpointError, match="its 27 x 27 positions for 224 pixels say: pass stride=8"):
        load_checkpoint(VisionMamba(**TINY, img_size=size, patch_size=16), tmp_path / "vim.pth")
    model = VisionMamba(**TINY, img_size=size, patch_size=16, stride=8)
    assert load_checkpoint(model, tmp_path / "vim.pth", verbose=False).resampled == ["pos_embed"]
    same = VisionMamba(**TINY, img_size=432, patch_size=16)  # has just such a table of its own
    assert load_checkpoint(same, tmp_path / "vim.pth", verbose=False).resampled == []


def test_a_mambascope_cannot_have_it(tmp_path):
    official(tmp_path / "vim.pth", **TINY, img_size=32, patch_size=8, stride=4)
    with pytest.raises(CheckpointError, match=r"stride is 4 in the file and 8 .*: which only a VisionMamba can have"):
        load_checkpoint(MambaScope(**TINY, img_size=32, patch_size=8), tmp_path / "vim.pth")


@pytest.mark.parametrize("size", [384, 256, 192, 240])
def test_tables_of_other_images_are_resampled_as_before(size, tmp_path):
    official(tmp_path / "vim.pth", **TINY, img_size=size, patch_size=16)
    report = load_checkpoint(VisionMamba(**TINY, img_size=224, patch_size=16), tmp_path / "vim.pth", verbose=False)
    assert (report.resampled, report.differs) == (["pos_embed"], [])


def test_a_file_that_says_its_sizes_is_believed(tmp_path):
    """56 pixels with stride 8 and 32 pixels with stride 4 both make 7 x 7 positions."""
    model = VisionMamba(**TINY, img_size=32, patch_size=8)
    save_safetensors(VisionMamba(**TINY, img_size=56, patch_size=8), tmp_path / "a.safetensors")
    assert load_checkpoint(model, tmp_path / "a.safetensors", verbose=False).resampled == ["pos_embed"]
    save_safetensors(VisionMamba(**TINY, img_size=32, patch_size=8, stride=4), tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="create the model with stride=4"):
        load_checkpoint(model, tmp_path / "b.safetensors")


def test_every_way_to_load_knows_it(tmp_path, capsys):
    path = tmp_path / "vim.pth"
    source = official(path, **NANO, stride=4)
    name = "vim_nano_patch8_64"
    with pytest.raises(CheckpointError, match="pass stride=4"):
        build_model(ModelArgs(name, {"num_classes": 3}, str(path)), verbose=False)
    overlay = {"file": str(path)}
    with pytest.raises(CheckpointError, match="pass stride=4"):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    assert capsys.readouterr().err == ""
    # a command has no option for it: the table is enough
    model, x = ready_model(path, name=name), torch.randn(1, 3, 64, 64)
    assert f"{path}: stride=4, as its position table says" in capsys.readouterr().err
    with torch.no_grad():
        assert torch.equal(model(x), source(x))
    assert eval_cli.main([str(path), "--model", "mambascope_nano_patch8_64", "--data", "scopedigits"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "stride is 4 in the file" in error
