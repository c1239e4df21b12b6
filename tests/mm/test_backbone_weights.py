"""Backbones start from classifiers of this package and from official files."""

import pytest
import torch

from mambascope.models import load_checkpoint, save_safetensors
from mambascope.models.scope import MambaScope
from mambascope.models.vim import VisionMamba
from tests.mm import common
from tests.mm.common import scope, vim


@pytest.fixture
def classifier():
    return MambaScope(img_size=64, patch_size=8, num_classes=10, fine_cls="middle", **common.TINY)


def start(path, **options):
    model = scope(init_cfg={"type": "Pretrained", "checkpoint": str(path)}, **options)
    model.init_weights()
    return model


def test_starts_from_our_files_with_a_report(tmp_path, classifier, caplog):
    save_safetensors(classifier, tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"model.{k}": v for k, v in classifier.state_dict().items()}}, tmp_path / "a.ckpt")
    for name in ("a.safetensors", "a.ckpt"):
        model = start(tmp_path / name, arch_options={"fine_cls": "middle"})
        state = dict(classifier.state_dict())
        assert all(torch.equal(v, state[k]) for k, v in model.encoder.state_dict().items())
    bigger = start(tmp_path / "a.safetensors", img_size=96, arch_options={"fine_cls": "middle"})
    assert bigger.encoder.pos_embed.shape[1] == 12 * 12 + 1


def test_starts_from_an_official_vim(tmp_path):
    source = VisionMamba(img_size=64, patch_size=8, num_classes=10, **common.TINY)
    torch.save({"model": source.state_dict()}, tmp_path / "vim.pth")
    model = start(tmp_path / "vim.pth")
    assert torch.equal(model.encoder.layers[3].mixer.A_log, source.layers[3].mixer.A_log)
    assert torch.equal(model.encoder.pos_embed, source.pos_embed)
    plain = vim(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "vim.pth")})
    plain.init_weights()
    assert torch.equal(plain.encoder.pos_embed, source.pos_embed)


def test_plain_vim_starts_from_a_mambascope_file(tmp_path, classifier):
    save_safetensors(classifier, tmp_path / "a.safetensors")
    plain = vim(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "a.safetensors")})
    plain.init_weights()
    assert torch.equal(plain.encoder.layers[3].mixer.A_log, classifier.layers[3].mixer.A_log)


def test_parameters_of_the_coarse_look_come_with_the_weights(tmp_path):
    source = MambaScope(img_size=64, patch_size=8, num_classes=10, coarse_offsets=True, **common.TINY)
    with torch.no_grad():
        for parameter in source.coarse_offsets.parameters():
            parameter.normal_()
    save_safetensors(source, tmp_path / "a.safetensors")
    model = start(tmp_path / "a.safetensors", arch_options={"coarse_offsets": True})
    state = source.coarse_offsets.state_dict()
    assert state
    assert all(torch.equal(v, state[k]) for k, v in model.encoder.coarse_offsets.state_dict().items())
    with pytest.raises(ValueError, match="coarse_offsets=True"):
        start(tmp_path / "a.safetensors")
    plain = vim(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "a.safetensors")})
    plain.init_weights()  # a plain Vim has no coarse look
    assert torch.equal(plain.encoder.pos_embed, source.pos_embed)


@torch.no_grad()
def test_a_stem_comes_with_the_weights(tmp_path):
    torch.manual_seed(0)
    source = MambaScope(img_size=64, patch_size=8, num_classes=10, stem_width=12, **common.TINY)
    save_safetensors(source, tmp_path / "a.safetensors")
    stem = source.patch_embed.stem.state_dict()
    assert len(stem) == 12
    for make in (scope, vim):
        model = make(
            init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "a.safetensors")},
            arch_options={"stem_width": 12},
            detail=True,
        )
        model.init_weights()
        assert all(torch.equal(v, stem[k]) for k, v in model.encoder.patch_embed.stem.state_dict().items())
        assert torch.equal(model.encoder.patch_embed.stem_proj.weight, source.patch_embed.stem_proj.weight)
    with pytest.raises(ValueError, match=r"\): stem_width is 12 in the file and 16 in the model$"):
        start(tmp_path / "a.safetensors", arch_options={"stem_width": 16})
    with pytest.raises(ValueError, match=r"\): stem_width is 12 in the file and 0 in the model$"):
        start(tmp_path / "a.safetensors")
    # files from elsewhere do not describe themselves
    torch.save({"model": VisionMamba(img_size=64, patch_size=8, **common.TINY).state_dict()}, tmp_path / "vim.pth")
    with pytest.raises(ValueError, match=r"\): stem_width is 0 in the file and 12 in the model; norm_f.weight has no"):
        load_checkpoint(model.encoder, tmp_path / "vim.pth")
    model = scope(
        init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "vim.pth"), "strict": False},
        arch_options={"stem_width": 12},
    )
    before = model.encoder.patch_embed.stem_proj.weight.clone()
    model.init_weights()
    assert torch.equal(model.encoder.patch_embed.stem_proj.weight, before)


def test_refuses_other_weights(tmp_path, classifier):
    save_safetensors(classifier, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"another architecture than mambascope_nano_patch8_64.*depth=4 \(here 5\)"):
        start(tmp_path / "a.safetensors", arch_options={"depth": 5})
    with pytest.raises(ValueError, match=r"fine_cls='middle' \(here 'first'\)"):
        start(tmp_path / "a.safetensors")
    torch.save({"model": VisionMamba(depth=3, embed_dim=32).state_dict()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit MambaScope"):
        start(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not exist"):
        start(tmp_path / "none.pth")
    model = scope(init_cfg={"type": "TruncNormal", "layer": "Linear"})
    with pytest.raises(ValueError, match="init_cfg must be"):
        model.init_weights()
