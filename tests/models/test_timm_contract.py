"""Every registered model honours timm's contract."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from mambascope import MambaScope
from mambascope.models import SCOPE_CONFIGS, VIM_CONFIGS

NAMES = sorted({**VIM_CONFIGS, **SCOPE_CONFIGS})
COUNTS = {
    "vim_tiny_patch16_224": 7_148_008,
    "vim_small_patch16_224": 25_796_584,
    "vim_base_patch16_224": 97_598_440,
    "mambascope_tiny_patch16_224": 7_453_864,
    "mambascope_small_patch16_224": 26_998_120,
    "mambascope_base_patch16_224": 102_360_808,
}
SMALL = {"depth": 4, "embed_dim": 32, "img_size": 64}


def create(name, **kwargs):
    return timm.create_model(
        name,
        **{**SMALL, "num_classes": 7, "threshold": 1.0, **kwargs}
        if "scope" in name
        else {**SMALL, "num_classes": 7, **kwargs},
    ).eval()


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_every_model_is_listed():
    assert set(NAMES) <= set(timm.list_models("vim_*") + timm.list_models("mambascope_*"))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_forward_contract(name):
    model = create(name, in_chans=1, drop_path_rate=0.1)
    x = torch.randn(2, 1, 64, 64)
    features = model.forward_features(x)
    assert features.ndim == 3
    assert features.shape[2] == model.num_features == 32
    assert torch.allclose(model.forward_head(features), model(x), atol=1e-5)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.get_classifier() is model.head
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, 32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 64), (192, 256), (225, 300)])
@torch.no_grad()
def test_intermediates_and_features_only(name, size):
    model = create(name)
    patch = model.config.patch_size
    cell = 2 * patch if isinstance(model, MambaScope) else patch
    rows, cols = (-(-s // cell) * cell // patch for s in size)
    x = torch.randn(1, 3, *size)
    final, maps = model.forward_intermediates(x)
    assert len(maps) == 4
    assert all(m.shape == (1, 32, rows, cols) for m in maps)
    assert torch.allclose(model.forward_head(final), model(x), atol=1e-4)
    two = model.forward_intermediates(
        x, indices=[1, 3], intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
    )
    assert [tuple(m.shape) for m, _ in two] == [(1, rows * cols, 32)] * 2
    assert [tuple(p.shape) for _, p in two] == [(1, 1, 32)] * 2
    assert torch.allclose(two[0][0], maps[1].flatten(2).transpose(1, 2), atol=1e-4)
    early = model.forward_intermediates(x, indices=[1], intermediates_only=True, stop_early=True)
    assert torch.allclose(early[0], maps[1], atol=1e-4)
    as_dict = model.forward_intermediates(x, indices=1, norm=True, output_dict=True)
    assert set(as_dict) == {"image_features", "image_intermediates"}

    net = timm.create_model(name, features_only=True, **SMALL, out_indices=(0, 2)).eval()
    inner = {k.removeprefix("model."): v for k, v in net.state_dict().items()}
    net.model.load_state_dict({k: v for k, v in model.state_dict().items() if k in inner})
    got = net(x)
    assert [g.shape for g in got] == [maps[0].shape, maps[2].shape]
    assert torch.allclose(got[1], maps[2], atol=1e-4)
    assert net.feature_info.channels() == [32, 32]
    assert net.feature_info.reduction() == [patch, patch]


@pytest.mark.parametrize(("depth", "blocks"), [(24, [5, 11, 17, 23]), (6, [1, 2, 4, 5]), (4, [0, 1, 2, 3]), (2, [1])])
def test_feature_maps_are_of_the_last_block_of_every_quarter(depth, blocks):
    model = timm.create_model("vim_nano_patch8_64", features_only=True, depth=depth)
    assert [info["module"] for info in model.feature_info.get_dicts()] == [f"layers.{block}" for block in blocks]


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_groups(name):
    model = create(name)
    skip = model.no_weight_decay()
    assert {"cls_token", "pos_embed", "layers.0.mixer.A_log", "layers.3.mixer.D_b"} <= skip
    names = {id(p): n for n, p in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=skip)
    decayed = {names[id(p)] for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    assert "layers.0.mixer.in_proj.weight" in decayed
    assert not {n for n in decayed if n.endswith((".bias", "A_log", ".D", "norm.weight", "pos_embed"))}
    layered = param_groups_layer_decay(model, 0.05, no_weight_decay_list=skip, layer_decay=0.5)
    scale = {names[id(p)]: g["lr_scale"] for g in layered for p in g["params"]}
    assert len(scale) == len(names)
    assert scale["pos_embed"] < scale["layers.0.mixer.A_log"] < scale["layers.3.mixer.A_log"] < scale["head.weight"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_set_input_size(name):
    model = create(name)
    patch = model.config.patch_size
    model.set_input_size((96, 128))
    assert model.grid == (96 // patch, 128 // patch)
    assert model.pos_embed.shape[1] == model.grid[0] * model.grid[1] + 1
    if isinstance(model, MambaScope):
        assert model.pos_embed_coarse.shape[1] == model.grid[0] * model.grid[1] // 4 + 1
    assert model(torch.randn(1, 3, 96, 128)).shape == (1, 7)
    model.set_input_size(patch_size=patch // 2)
    assert model.grid == (192 // patch, 256 // patch)
    assert model(torch.randn(1, 3, 96, 128)).shape == (1, 7)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_no_gradient(name):
    x, grads = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        torch.manual_seed(3)
        model = create(name).train()
        model.set_grad_checkpointing(enable)
        out = model(x)
        sum(o.square().sum() for o in out).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for n, g in grads[0].items():
        assert torch.allclose(g, grads[1][n], rtol=1e-4, atol=1e-6), n


def test_overlapping_patches_of_the_official_stride_option():
    model = timm.create_model("vim_tiny_patch16_224", **SMALL, stride=8, num_classes=4).eval()
    assert model.grid == (7, 7)
    with torch.no_grad():
        assert model.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 50, 32)
        assert model(torch.randn(1, 3, 70, 45)).shape == (1, 4)


def test_unknown_argument_and_pretrained_are_refused():
    with pytest.raises(ValueError, match="unknown model argument dephts"):
        timm.create_model("vim_tiny_patch16_224", dephts=3)
    with pytest.raises(ValueError, match="no pretrained weights are published"):
        timm.create_model("vim_tiny_patch16_224", pretrained=True)
