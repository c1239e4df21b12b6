"""Weights of every origin, and the files that must be refused."""

import argparse
import os

import pytest
import torch

from mambascope import MambaScope, VisionMamba, load_checkpoint
from mambascope import load as load_model
from mambascope.layers import remove_cls, resample_pos_embed
from mambascope.models.checkpoint import CheckpointError, read_state_dict, save_safetensors

SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 5}


def official(tmp_path, **kwargs):
    vim = VisionMamba(**{**SMALL, **kwargs}).eval()
    path = tmp_path / "vim.pth"
    torch.save({"model": vim.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path)
    return vim, path


def test_official_file_into_vim(tmp_path, capsys):
    vim, path = official(tmp_path)
    model = VisionMamba(**SMALL).eval()
    report = load_checkpoint(model, path)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), vim(x))
    assert (len(report.matched), report.resampled, report.new, report.unused) == (len(vim.state_dict()), [], [], [])
    assert "matched" in capsys.readouterr().out


def test_official_file_starts_a_mambascope(tmp_path):
    vim, path = official(tmp_path)
    model = MambaScope(**SMALL).eval()
    report = load_checkpoint(model, path)
    assert report.resampled == ["pos_embed_coarse"]
    assert all(k.startswith("reuse.") for k in report.new)
    assert len(report.new) == 6
    assert torch.equal(model.pos_embed, vim.pos_embed)
    assert torch.equal(model.pos_embed_coarse[:, 8], vim.pos_embed[:, 32])  # the CLS row moves to the middle
    assert torch.allclose(
        remove_cls(model.pos_embed_coarse, "middle"),
        remove_cls(resample_pos_embed(vim.pos_embed, (8, 8), (4, 4)), "middle"),
    )


def test_other_resolution_is_resampled(tmp_path):
    _, path = official(tmp_path)
    model = VisionMamba(**{**SMALL, "img_size": (96, 64)})
    assert load_checkpoint(model, path).resampled == ["pos_embed"]


@pytest.mark.parametrize("size", [(32, 64), (16, 64)])  # 16 rows of (16, 64) could be taken for a 4 x 4 grid
def test_a_table_of_the_models_own_grid_is_copied(tmp_path, size):
    vim, path = official(tmp_path, img_size=size)
    model = VisionMamba(**{**SMALL, "img_size": size})
    assert load_checkpoint(model, path).resampled == []
    assert torch.equal(model.pos_embed, vim.pos_embed)


def test_another_place_of_cls_is_named(tmp_path):
    path = tmp_path / "first.safetensors"
    save_safetensors(VisionMamba(**SMALL, cls_position="first"), path)
    with pytest.raises(CheckpointError, match="cls_position is 'first' in the file and 'middle' in the model"):
        load_checkpoint(VisionMamba(**SMALL), path)


def test_lightning_layout_and_wrappers(tmp_path):
    vim = VisionMamba(**SMALL)
    path = tmp_path / "last.ckpt"
    state = {f"model._orig_mod.{k}": v for k, v in vim.state_dict().items()} | {"metric.total": torch.zeros(1)}
    torch.save({"state_dict": state, "epoch": 1}, path)
    model = VisionMamba(**SMALL)
    assert load_checkpoint(model, path).unused == []
    assert torch.equal(model.cls_token, vim.cls_token)


def test_safetensors_round_trip(tmp_path):
    model = MambaScope(**{**SMALL, "img_size": (64, 96), "reuse": "linear"}).eval()
    model.threshold = 0.35
    path = tmp_path / "deep" / "model.safetensors"
    save_safetensors(model, path, {"labels": ["a", "b"]})
    again = load_model(path)
    assert again.config.img_size == (64, 96)
    assert again.threshold == 0.35
    assert again.description["labels"] == ["a", "b"]
    x = torch.randn(2, 3, 64, 96)
    assert torch.equal(again.forward_both(x).fine, model.forward_both(x).fine)
    assert os.listdir(path.parent) == ["model.safetensors"]
    larger = MambaScope(**{**SMALL, "img_size": 128, "reuse": "linear"})
    assert load_checkpoint(larger, path).resampled == ["pos_embed", "pos_embed_coarse"]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_safetensors(VisionMamba(**SMALL), path)
    before = path.read_bytes()

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_safetensors(VisionMamba(**SMALL), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_mismatch_is_an_error_unless_allowed(tmp_path):
    _, path = official(tmp_path)
    other = VisionMamba(**{**SMALL, "num_classes": 9})
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"does not fit VisionMamba .*head.weight is \[5, 32\] in the file and \[9, 32\]"
    ):
        load_checkpoint(other, path)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    report = load_checkpoint(other, path, strict=False)
    assert report.new == ["head.weight", "head.bias"]
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(VisionMamba(**{**SMALL, "embed_dim": 48}), path)


def test_scope_into_vim_names_what_has_no_place(tmp_path):
    path = tmp_path / "scope.safetensors"
    save_safetensors(MambaScope(**SMALL), path)
    with pytest.raises(CheckpointError, match="pos_embed_coarse has no place"):
        load_checkpoint(VisionMamba(**SMALL), path)
    assert "pos_embed_coarse" in load_checkpoint(VisionMamba(**SMALL), path, strict=False).unused


class Evil:
    def __reduce__(self):
        return (os.system, ("touch mambascope_was_here",))


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "truncated", "evil", "list", "empty", "safetensors"])
def test_unreadable_files_are_named(tmp_path, kind):
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")
    if kind == "folder":
        path.mkdir()
    elif kind in ("text", "safetensors"):
        path.write_text("not a checkpoint at all")
    elif kind == "truncated":
        torch.save({"model": VisionMamba(**SMALL).state_dict()}, path)
        path.write_bytes(path.read_bytes()[:20_000])
    elif kind == "evil":
        torch.save({"model": Evil()}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "empty":
        torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match=str(path)) as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)
    assert not os.path.exists("mambascope_was_here")


def test_official_names_are_frozen():
    names = set(VisionMamba(**{**SMALL, "depth": 1}).state_dict())
    twice = ("conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias")
    mixer = ["A_log", "A_b_log", "D", "D_b", "in_proj.weight", "out_proj.weight", *twice]
    mixer += [n.replace(".", "_b.") for n in twice]
    expected = {f"layers.0.mixer.{n}" for n in mixer} | {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "layers.0.norm.weight",
        "norm_f.weight",
        "head.weight",
        "head.bias",
    }
    assert names == expected
    scope = set(MambaScope(**{**SMALL, "depth": 1}).state_dict())
    assert scope - names == {
        "pos_embed_coarse",
        "reuse.norm.weight",
        "reuse.norm.bias",
        "reuse.mlp.fc1.weight",
        "reuse.mlp.fc1.bias",
        "reuse.mlp.fc2.weight",
        "reuse.mlp.fc2.bias",
    }
