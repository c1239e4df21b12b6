"""Weights files of MambaEye: the official ones, ours, published names, and timm's entries."""

import sys
import types

import pytest
import timm
import torch

import mambascope
from mambascope.eye import MambaEye
from mambascope.eye.glimpses import moves_from_positions
from mambascope.models.checkpoint import CheckpointError, load_checkpoint, read_state_dict, save_safetensors

NAMES = ("mambaeye_tiny", "mambaeye_small", "mambaeye_base")
SMALL = {"embed_dim": 32, "depth": 3, "d_state": 8, "head_dim": 16, "move_dim": 8, "patch_size": 4, "num_classes": 5}


@pytest.fixture
def sequence():
    positions = torch.randint(0, 60, (3, 37, 2))
    return torch.rand(3, 37, 48, dtype=torch.float64), moves_from_positions(positions)


def test_official_weights_file(tmp_path):
    source, path = MambaEye(**SMALL), tmp_path / "mambaeye_tiny.pt"
    torch.save(source.state_dict(), path)
    model = MambaEye(**SMALL)
    report = load_checkpoint(model, path, verbose=False)
    assert len(report.matched) == 5 + 9 * 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))


def test_official_lightning_file_with_pickled_settings(tmp_path, monkeypatch):
    """The settings in there are OmegaConf objects. They must neither be needed nor run, and nothing else may hide."""
    for name in ("omegaconf", "omegaconf.dictconfig", "omegaconf.base"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    config_class = type("DictConfig", (), {"__module__": "omegaconf.dictconfig", "__qualname__": "DictConfig"})
    meta_class = type("Metadata", (), {"__module__": "omegaconf.base", "__qualname__": "Metadata"})
    sys.modules["omegaconf.dictconfig"].DictConfig = config_class
    sys.modules["omegaconf.base"].Metadata = meta_class
    settings, meta = config_class(), meta_class()
    meta.__dict__.update(object_type=dict, element_type=int, parent=settings)
    settings.__dict__.update(_content={"depth": 12, "names": ["a"]}, _metadata=meta)
    source, path = MambaEye(**SMALL), tmp_path / "epoch=299.ckpt"
    content = {
        "state_dict": {f"model.{k}": v for k, v in source.state_dict().items()},
        "hyper_parameters": {"config": settings},
        "epoch": 299,
    }
    torch.save(content, path)
    torch.save({**content, "extra": pytest.fixture}, tmp_path / "more.ckpt")
    monkeypatch.undo()
    assert "omegaconf" not in sys.modules

    state, _ = read_state_dict(path)
    assert set(state) == set(source.state_dict())
    model = MambaEye(**SMALL)
    load_checkpoint(model, path, verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        read_state_dict(tmp_path / "more.ckpt")
    with pytest.raises(CheckpointError, match=r"depth|no place|missing"):
        load_checkpoint(MambaEye(**{**SMALL, "depth": 2}), path, verbose=False)


def test_our_own_file_is_a_ready_model(tmp_path, sequence):
    model = MambaEye(**SMALL).eval()
    save_safetensors(model, tmp_path / "eye.safetensors", {"labels": list("abcde")})
    again = mambascope.load(tmp_path / "eye.safetensors")
    assert isinstance(again, MambaEye)
    assert again.config == model.config
    assert again.description["labels"] == list("abcde")
    assert torch.equal(again(*sequence), model(*sequence))


def test_published_weights_are_named_and_loadable(tmp_path):
    """Everything of ``pretrained=True`` but the download."""
    for name in NAMES:
        for tag, file in (("in1k", f"{name}.pt"), ("ft_in1k", f"{name}_ft.pt")):
            cfg = timm.models.get_pretrained_cfg(f"{name}.{tag}")
            assert (cfg.hf_hub_id, cfg.hf_hub_filename) == (f"usingcolor/MambaEye-{name.split('_')[1]}", file)
    source = timm.create_model("mambaeye_tiny", depth=2)
    torch.save(source.state_dict(), tmp_path / "tiny.pt")
    local = {"pretrained": True, "depth": 2, "pretrained_cfg_overlay": {"file": str(tmp_path / "tiny.pt")}}
    model = timm.create_model("mambaeye_tiny", **local)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    other = timm.create_model("mambaeye_tiny", num_classes=7, **local)
    assert torch.equal(other.init_fc[0].weight, source.init_fc[0].weight)
    assert other.get_classifier().out_features == 7


def test_timm_contract():
    assert set(timm.list_models("mambaeye_*")) >= {*NAMES, "mambaeye_nano_patch16"}
    model = timm.create_model("mambaeye_nano_patch16", num_classes=4, depth=2).eval()
    patches, moves = torch.randint(0, 256, (2, 9, 3, 16, 16), dtype=torch.uint8), torch.zeros(2, 9, 2)
    logits = model(patches, moves)
    assert logits.shape == (2, 9, 4)
    assert torch.allclose(model(patches.float() / 255, moves), logits, atol=1e-6)  # bytes are scaled to [0, 1]
    features = model.forward_features(patches, moves)
    assert torch.equal(model.forward_head(features), logits)
    assert model.forward_head(features, pre_logits=True) is features
    assert model.no_weight_decay() == {
        n for n, p in model.named_parameters() if n.split(".")[-1] in ("A_log", "D", "dt_bias")
    }
    model.reset_classifier(3)
    assert model(patches, moves).shape == (2, 9, 3)
    model.reset_classifier(0)
    assert torch.equal(model(patches, moves), features)
    with pytest.raises(ValueError, match="unknown model argument img_size"):
        timm.create_model("mambaeye_tiny", img_size=64)
    with pytest.raises(ValueError, match="features_only"):
        timm.create_model("mambaeye_tiny", features_only=True)
