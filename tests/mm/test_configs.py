"""Every shipped config is parsed and its model built; the optimizer's groups."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

from mambascope.mm import LayerDecayConstructor, ScopeBackbone
from mambascope.mm.loading import plain_config, register
from tests.mm import common

CONFIGS = sorted(p.name for p in common.CONFIGS.glob("*.py"))
RECIPES = {
    "upernet": {"max_iters": 160000, "lr": 6e-5, "weight_decay": 0.01, "warmup": 1500, "batch": 16},
    "cascade": {"max_iters": 380000, "lr": 1e-4, "weight_decay": 0.1, "warmup": 250, "batch": 64},
}


def load(name):
    cfg = Config.fromfile(common.CONFIGS / name)
    register(cfg.default_scope)
    return cfg


def build(cfg):
    model = copy.deepcopy(cfg.model)
    if "pretrained" in model.backbone:
        model.backbone.pretrained = False  # would be downloaded
    return MODELS.build(model)


def test_all_named_configs_exist():
    names = {
        f"{task}_{kind}_{size}.py"
        for task in ("upernet", "cascade")
        for kind in ("scope", "vim")
        for size in ("ti", "s")
    }
    names |= {"upernet_deit_ti.py", "upernet_r50.py", "upernet_scope_demo.py", "cascade_scope_demo.py"}
    assert names <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds(name):
    cfg = load(name)
    model = build(cfg)
    assert cfg.default_scope == ("mmdet" if name.startswith("cascade") else "mmseg")
    assert f"mambascope.mm.{'detector' if name.startswith('cascade') else 'segmentor'}" in cfg.custom_imports.imports
    metrics = [m.type for m in cfg.test_evaluator]
    scope = "_scope_" in name
    assert isinstance(model.backbone, ScopeBackbone) == scope
    assert ("GateMetric" in metrics) == scope
    assert type(model).__name__.startswith("Scope") == scope
    if scope:
        assert model.backbone.exit_prob == (0.5 if "demo" in name else 0.25)
        assert model.backbone.gate.num_classes == model.num_classes
    recipe = RECIPES[name.split("_")[0]]
    if "demo" not in name:
        assert cfg.train_cfg.max_iters == recipe["max_iters"]
        assert cfg.optim_wrapper.optimizer.lr == recipe["lr"]
        assert cfg.optim_wrapper.optimizer.weight_decay == recipe["weight_decay"]
        assert cfg.param_scheduler[0].end == recipe["warmup"]
        assert cfg.param_scheduler[1].power == 1.0
        assert cfg.param_scheduler[1].end == recipe["max_iters"]
        assert 8 * cfg.train_dataloader.batch_size == recipe["batch"]
    with torch.no_grad():
        size = 64 if "demo" in name else 96
        maps = model.extract_feat(torch.zeros(1, 3, size, size)) if name != "upernet_r50.py" else ()
    assert len(maps) in (0, 4, 5)


def test_plain_config_is_the_shipped_plain_config():
    for task in ("upernet", "cascade"):
        derived, shipped = build(plain_config(load(f"{task}_scope_demo.py"))), build(load(f"{task}_vim_demo.py"))
        assert {k: v.shape for k, v in derived.state_dict().items()} == {
            k: v.shape for k, v in shipped.state_dict().items()
        }


def test_wrong_gate_and_wrong_backbone():
    cfg = load("upernet_scope_demo.py")
    cfg.model.backbone.gate.num_classes = 7
    with pytest.raises(ValueError, match="num_classes of the gate must equal that of the heads, 11, got 7"):
        build(cfg)
    cfg = load("upernet_vim_demo.py")
    cfg.model.type = "ScopeEncoderDecoder"
    with pytest.raises(ValueError, match="backbone must be a ScopeBackbone with a gate"):
        build(cfg)


def test_layer_decay_and_weight_decay():
    cfg = common.demo_config("seg")
    cfg.optim_wrapper.paramwise_cfg = {"layer_decay_rate": 0.5, "lr_mult": {"backbone.gate": 3.0}}
    model = build(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    lr = cfg.optim_wrapper.optimizer.lr
    groups = {name: g for g in wrapper.optimizer.param_groups for name in g["param_names"]}
    assert set(groups) == {n for n, _ in model.named_parameters()}
    encoder = "backbone.encoder."
    expected = {  # four blocks; norm and feature reuse go with the last one, as in classification
        encoder + "patch_embed.proj.weight": 0.5**4,
        encoder + "pos_embed_coarse": 0.5**4,
        encoder + "layers.0.mixer.in_proj.weight": 0.5**3,
        encoder + "layers.3.mixer.in_proj.weight": 1.0,
        encoder + "norm_f.weight": 1.0,
        encoder + "reuse.mlp.fc1.weight": 1.0,
        "backbone.pyramid.scales.0.0.0.weight": 1.0,
        "backbone.gate.fc.weight": 3.0,
        "decode_head.conv_seg.weight": 1.0,
    }
    for name, scale in expected.items():
        assert groups[name]["lr"] == pytest.approx(lr * scale), name
    decayed = {n for n, g in groups.items() if g["weight_decay"] > 0}
    for name, parameter in model.named_parameters():
        kept = parameter.ndim < 2 or name.endswith(("A_log", "A_b_log", "cls_token", "pos_embed", "pos_embed_coarse"))
        assert (name in decayed) != kept, name


def test_frozen_parameters_are_left_out_and_options_checked():
    cfg = common.demo_config("seg", **{"model.backbone.frozen_stages": 4})
    wrapper = build_optim_wrapper(build(cfg), cfg.optim_wrapper)
    names = [n for g in wrapper.optimizer.param_groups for n in g["param_names"]]
    assert not any(n.startswith("backbone.encoder.layers") for n in names)
    optimizer = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1.0}}
    with pytest.raises(ValueError, match="paramwise_cfg accepts layer_decay_rate and lr_mult here, got num_layers"):
        LayerDecayConstructor(optimizer, {"num_layers": 12})
    with pytest.raises(ValueError, match="layer_decay_rate must lie in"):
        LayerDecayConstructor(optimizer, {"layer_decay_rate": 2.0})
    with pytest.raises(ValueError, match=r"lr_mult must name parts of the model; it has no backbone\.gat"):
        LayerDecayConstructor(optimizer, {"lr_mult": {"backbone.gat": 3.0}})(build(cfg))
    nested = LayerDecayConstructor(optimizer, {"lr_mult": {"backbone": {"gate": 3.0}}})  # as --cfg-options makes it
    assert nested.paramwise_cfg["lr_mult"] == {"backbone.gate": 3.0}
    with pytest.raises(ValueError, match="lr_mult must be a dict of names and factors"):
        LayerDecayConstructor(optimizer, {"lr_mult": "{'backbone.encoder': 1}"})
