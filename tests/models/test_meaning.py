"""Fields of a config that say what weights mean are compared wherever weights are loaded."""

from dataclasses import fields

import pytest
import timm
import torch

from mambascope import MambaEye, MambaScope, ScopeConfig, VimConfig, VisionMamba, load_checkpoint
from mambascope.eye.config import MambaEyeConfig
from mambascope.models.checkpoint import CheckpointError, save_safetensors
from mambascope.models.meaning import CHOICES, MEANING, SILENT, SIZES
from mambascope.models.ready import ready_model
from mambascope.peers import ReducedConfig, ReducedVim
from mambascope.peers.teacher import Teacher
from mambascope.peers.timm_classifier import TimmConfig, create_timm_classifier
from mambascope.training.args import ModelArgs
from mambascope.training.module import build_model

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "d_state": 4, "num_classes": 3}
EYE = {"in_chans": 3, "embed_dim": 16, "depth": 1, "d_state": 4, "head_dim": 8, "num_classes": 3}
NANO = "mambascope_nano_patch8_64"


def saved(model, path):
    save_safetensors(model, path)
    return path


def test_every_field_of_every_config_is_in_one_list():
    listed = [*SIZES, *MEANING, *CHOICES, *SILENT]
    lists = {
        f.name for kind in (VimConfig, ScopeConfig, MambaEyeConfig, TimmConfig, ReducedConfig) for f in fields(kind)
    }
    assert len(listed) == len(set(listed))
    assert lists == set(listed)


def test_the_shipped_weights_do_not_load_into_a_model_of_other_answers():
    model = timm.create_model(NANO, num_classes=10)
    before = model.head.weight.clone()
    with pytest.raises(CheckpointError, match="fine_cls is 'middle' in the file and 'first' in the model") as caught:
        load_checkpoint(model, "scopedigits_published")
    assert "create the model with fine_cls='middle', alpha=0.8, " in str(caught.value)  # what to pass
    assert "\n" not in str(caught.value)
    assert torch.equal(model.head.weight, before)
    report = load_checkpoint(
        timm.create_model(NANO, num_classes=10, fine_cls="middle"), "scopedigits_published", verbose=False
    )
    # free, but results depend on them
    assert {difference.name for difference in report.differs} == {"alpha", "threshold"}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (MambaScope, "fine_cls", "last"),
        (MambaScope, "fine_order", "important_last"),
        (MambaScope, "cell_order", "raster"),
        (MambaScope, "reuse_cls", True),
        (MambaScope, "global_pool", "lse"),
        (VisionMamba, "global_pool", "avg"),
        (VisionMamba, "norm_eps", 1e-3),
        (VisionMamba, "cls_position", "last"),
        (VisionMamba, "stride", 4),
    ],
)
def test_each_is_named_and_reported(kind, field, value, tmp_path, capsys):
    path = saved(kind(**SMALL, **{field: value}), tmp_path / "a.safetensors")
    model = kind(**SMALL)
    with pytest.raises(CheckpointError, match=rf"with {field}={value!r}.*: {field} is {value!r} in the file and "):
        load_checkpoint(model, path)
    assert [difference.name for difference in load_checkpoint(model, path, strict=False).differs] == [field]
    assert f"differs    1: {field} is {value!r} in the file" in capsys.readouterr().out
    same = load_checkpoint(kind(**SMALL, **{field: value}), path)
    assert (same.differs, same.new, same.unused) == ([], [], [])


@pytest.mark.parametrize(
    ("stored", "current"),
    [
        ({"stride": 8}, {}),
        ({"score_layers": 2}, {}),
        ({"reuse": False}, {"reuse": "off"}),
        ({"drop_rate": 0.5, "drop_path_rate": 0.1, "scan_backend": "torch"}, {}),
    ],
)
def test_two_ways_to_say_the_same_are_equal(stored, current, tmp_path):
    path = saved(MambaScope(**SMALL, **stored), tmp_path / "a.safetensors")
    assert load_checkpoint(MambaScope(**SMALL, **current), path, verbose=False).differs == []


def test_a_choice_stays_the_models_and_is_reported(tmp_path, capsys):
    source = MambaScope(**SMALL, score_metric="l2")
    source.threshold = 0.25
    path = saved(source, tmp_path / "a.safetensors")
    model = MambaScope(**SMALL, alpha=0.5)
    report = load_checkpoint(model, path)
    assert (model.threshold, model.alpha) == (0.8, 0.5)
    assert {difference.name for difference in report.differs} == {"alpha", "score_metric", "threshold"}
    assert "alpha is 0.7 in the file and 0.5 in the model" in capsys.readouterr().out


def test_files_that_do_not_say_and_models_of_another_kind(tmp_path):
    vim = VisionMamba(**SMALL, norm_eps=1e-3)
    torch.save({"model": vim.state_dict()}, tmp_path / "vim.pth")
    assert load_checkpoint(VisionMamba(**SMALL), tmp_path / "vim.pth", verbose=False).differs == []
    saved(vim, tmp_path / "vim.safetensors")
    with pytest.raises(CheckpointError, match=r"norm_eps is 0\.001 in the file"):
        load_checkpoint(MambaScope(**SMALL), tmp_path / "vim.safetensors")
    # what only a MambaScope has starts anew
    assert load_checkpoint(MambaScope(**SMALL, norm_eps=1e-3), tmp_path / "vim.safetensors", verbose=False).new
    headless = saved(VisionMamba(**{**SMALL, "num_classes": 0}, global_pool="avg"), tmp_path / "b.safetensors")
    assert load_checkpoint(VisionMamba(**{**SMALL, "num_classes": 0}), headless, verbose=False).differs == []


def test_token_reduction_is_compared_by_method(tmp_path):
    plain = saved(VisionMamba(**SMALL), tmp_path / "plain.safetensors")
    tome = saved(ReducedVim(**SMALL, reduction={"name": "tome", "r": 2}), tmp_path / "tome.safetensors")
    reduced = ReducedVim(**SMALL, reduction={"name": "tome", "r": 1})
    assert load_checkpoint(reduced, plain, verbose=False).differs == []  # every reduced Vim starts from a plain one
    assert load_checkpoint(reduced, tome, verbose=False).differs == []  # how much is free
    with pytest.raises(CheckpointError, match="reduction is 'tome' in the file and None in the model"):
        load_checkpoint(VisionMamba(**SMALL), tome)


def test_a_mambaeye_whose_first_layer_only_looks_the_same(tmp_path):
    path = saved(MambaEye(**EYE, patch_size=2, move_dim=26), tmp_path / "a.safetensors")  # 3 * 2 * 2 + 2 * 26 = 64
    with pytest.raises(CheckpointError, match="patch_size is 2 in the file and 4 in the model; move_dim is 26"):
        load_checkpoint(MambaEye(**EYE, patch_size=4, move_dim=8), path)  # 3 * 4 * 4 + 2 * 8 = 64


def test_a_timm_classifier_of_other_heads_or_another_name(tmp_path):
    options = {"patch_size": 8, "embed_dim": 16, "depth": 2, "img_size": 32, "num_classes": 3}

    def model(name="deit_tiny_patch16_224", **args):
        return create_timm_classifier(TimmConfig.of(name, {**options, **args}))

    path = saved(model(num_heads=2), tmp_path / "a.safetensors")
    assert load_checkpoint(model(num_heads=2, drop_path_rate=0.1), path, verbose=False).differs == []
    with pytest.raises(CheckpointError, match=r"with num_heads=2.* num_heads is 2 in the file and 4 in the model"):
        load_checkpoint(model(num_heads=4), path)
    with pytest.raises(CheckpointError, match="name is 'deit_tiny_patch16_224' in the file and 'vit_tiny_patch16_224'"):
        load_checkpoint(model("vit_tiny_patch16_224", num_heads=2), path)


def test_trainings_and_teachers_start_from_weights_of_the_same_meaning(tmp_path):
    path = str(saved(VisionMamba(**SMALL, norm_eps=1e-3), tmp_path / "a.safetensors"))
    with pytest.raises(CheckpointError, match=r"norm_eps is 0\.001 in the file"):
        build_model(ModelArgs("vim_nano_patch8_64", SMALL, path), verbose=False)
    build_model(ModelArgs("vim_nano_patch8_64", SMALL, path, strict=False), verbose=False)
    with pytest.raises(CheckpointError, match=r"norm_eps is 0\.001 in the file"):
        Teacher(VimConfig(**SMALL), path)


def test_pretrained_weights_keep_their_meaning():
    with pytest.raises(CheckpointError, match=r"another fine_cls \(fine_cls is 'middle' in the file and 'last' in"):
        timm.create_model(NANO, pretrained=True, fine_cls="last")
    with pytest.raises(CheckpointError, match="another global_pool"):
        timm.create_model(NANO, pretrained=True, global_pool="avg")
    # a head of one's own may read what it likes, and what is free after training stays free
    model = timm.create_model(NANO, pretrained=True, global_pool="avg", num_classes=4, alpha=0.5)
    assert (model.global_pool, model.alpha) == ("avg", 0.5)


def test_the_commands_say_what_they_changed(tmp_path, capsys):
    vim = VisionMamba(img_size=48, patch_size=8, embed_dim=96, depth=6, num_classes=3)
    torch.save({"model": vim.state_dict()}, tmp_path / "vim.pth")
    ready_model(tmp_path / "vim.pth", name="vim_nano_patch8_64")
    assert capsys.readouterr().err.endswith("vim.pth: resampled: pos_embed\n")
