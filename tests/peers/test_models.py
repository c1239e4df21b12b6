"""Reduced models as a whole: equal to Vim where nothing is reduced, timm's contract, files, mistakes."""

import json

import pytest
import timm
import torch

import mambascope
from mambascope.models import load_checkpoint, save_safetensors
from mambascope.models.checkpoint import CheckpointError
from mambascope.models.vim import VisionMamba
from mambascope.peers import REDUCTIONS, ReducedConfig, reduction_config
from tests.peers.common import METHODS, NOTHING, SMALL, images, small, spread_switches


@pytest.mark.parametrize("name", NOTHING)
def test_equals_vim_where_nothing_is_reduced(name):
    plain, model = small(), small(NOTHING[name])
    x = images()
    with torch.no_grad():
        assert torch.equal(plain(x), model(x))
        assert torch.equal(plain.forward_features(x), model.forward_features(x))
    grads = []
    for m in (plain, model):
        m.train()(x).square().sum().backward()
        grads.append({n: p.grad for n, p in m.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for n, g in grads[0].items():
        assert torch.equal(g, grads[1][n]), n


def test_vim_itself_knows_of_no_reduction():
    model = small()
    assert type(model) is VisionMamba
    assert not hasattr(model.config, "reduction")
    assert not hasattr(model, "forward_reduced")
    assert not [n for n in model.state_dict() if "reduction" in n]


@pytest.mark.parametrize("name", METHODS)
def test_every_image_is_answered_as_if_alone(name):
    model, x = small(METHODS[name]), images(4)
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(image) for image in x.split(1)])
        mixed = model(x.flip(0)).flip(0)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, mixed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", ["first", "middle", "last"])
@pytest.mark.parametrize("name", METHODS)
def test_timm_contract(name, position):
    model, x = small(METHODS[name], cls_position=position), images()
    count = model.config.reduction.patch_counts(64, 6)[-1]
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (3, count + 1, 16)
        torch.testing.assert_close(model.forward_head(features), model(x))
        assert model.forward_head(features, pre_logits=True).shape == (3, 16)
        output = model.forward_reduced(x)
        torch.testing.assert_close(output.logits, model(x))
        assert output.patches.shape == (3, count, 16)
        assert model(images(size=44)).shape == (3, 5)  # other sizes than the configured one
    model.train()
    assert model(x).shape == (3, 5)
    model.reset_classifier(3)
    assert model.eval()(x).shape == (3, 3)
    assert model.config.reduction == reduction_config(METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_gradient_checkpointing_changes_no_gradient(name):
    grads = []
    for enable in (False, True):
        model = small(METHODS[name]).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        model(images()).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for n, g in grads[0].items():
        assert g is not None, n
        torch.testing.assert_close(g, grads[1][n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_round_trip_through_a_file(name, tmp_path):
    model, x = small(METHODS[name]), images()
    save_safetensors(model, tmp_path / "a.safetensors")
    loaded = mambascope.load(tmp_path / "a.safetensors")
    assert loaded.config == model.config
    assert loaded.config.reduction.name == METHODS[name]["name"]
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    model.save_pretrained(tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["config"]["reduction"]["name"]
    with torch.no_grad():
        assert torch.equal(mambascope.load(tmp_path / "folder")(x), model(x))


@pytest.mark.parametrize("name", METHODS)
def test_a_trained_vim_starts_it(name, tmp_path, capsys):
    plain = small(seed=7)
    save_safetensors(plain, tmp_path / "vim.safetensors")
    model = timm.create_model("vim_nano_patch8_64", **SMALL, reduction=METHODS[name])
    report = load_checkpoint(model, tmp_path / "vim.safetensors")
    additions = {n for n in model.state_dict() if n.startswith("reduction.")}
    assert set(report.new) == additions
    assert bool(additions) == name.startswith("dyvm")
    assert set(report.matched) == plain.state_dict().keys()
    assert f"new {len(additions):4d}" in capsys.readouterr().out
    # but a file with half of a method's parameters is a mistake
    if additions:
        save_safetensors(model, tmp_path / "reduced.safetensors")
        state = dict(model.state_dict())
        state.pop(sorted(additions)[0])
        torch.save(state, tmp_path / "half.pth")
        with pytest.raises(CheckpointError, match="is missing"):
            load_checkpoint(model, tmp_path / "half.pth", verbose=False)
        with pytest.raises(CheckpointError, match="no place in the model"):
            load_checkpoint(plain, tmp_path / "reduced.safetensors", verbose=False)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_autocast(name):
    model = small(METHODS[name])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(images()).isfinite().all()
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(images()).float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_maps_and_missing_layers_are_refused():
    model = small(METHODS["r_meeto"])
    with pytest.raises(ValueError, match="intermediate maps need every token"):
        model.forward_intermediates(images())
    with pytest.raises(ValueError, match="layers cannot be removed"):
        model.prune_intermediate_layers(2)


@pytest.mark.parametrize(
    ("reduction", "message"),
    [
        ({"name": "tomes"}, "reduction.name must be one of hidden_align, r_meeto, dyvm, mtr, tome, got 'tomes'"),
        ({"r": 3}, "must be a mapping with a name"),
        ("r_meeto", "must be a mapping with a name"),
        ({"name": "r_meeto", "keep": 0.5}, "unknown reduction setting keep; r_meeto accepts r, start, every"),
        ({"name": "r_meeto", "r": -1}, "reduction.r must be an integer >= 0, got -1"),
        ({"name": "r_meeto", "r": 2.5}, "reduction.r must be an integer"),
        ({"name": "mtr", "r": 33}, "at most 32, half of the 64 patches before block 2, got 33"),
        ({"name": "tome", "r": 30}, "at most 17, half of the 34 patches before block 4, got 30"),
        ({"name": "tome", "start": 0}, "reduction.start must be an integer >= 1"),
        ({"name": "tome", "start": 6}, "reduction.start must lie in 1..5 for an encoder of 6 blocks, got 6"),
        ({"name": "tome", "ordered": 1}, "reduction.ordered must be true or false"),
        ({"name": "hidden_align", "keep": 0}, r"reduction.keep must lie in \(0, 1\], got 0"),
        ({"name": "hidden_align", "keep": 1.2}, r"reduction.keep must lie in \(0, 1\]"),
        ({"name": "hidden_align", "keep": [0.5, 0.5]}, "one number or 3, one per layer, got 2"),
        (
            {"name": "hidden_align", "layers": [1, 5]},
            "reduction.layers must lie in 0..4 for an encoder of 6 blocks, got 5",
        ),
        ({"name": "hidden_align", "layers": [3, 1]}, "must be ascending layer numbers"),
        ({"name": "hidden_align", "align": "yes"}, "reduction.align must be true or false"),
        ({"name": "dyvm", "keep": True}, r"reduction.keep must lie in \(0, 1\]"),
        ({"name": "dyvm", "block_ratio": 0}, r"reduction.block_ratio must lie in \(0, 1\]"),
        ({"name": "dyvm", "ratio_weight": float("nan")}, "reduction.ratio_weight must be a finite number"),
        ({"name": "dyvm", "layers": [0, 3]}, "reduction.layers must lie in 1..5 for an encoder of 6 blocks, got 0"),
        ({"name": "dyvm", "layers": [3, 6]}, "reduction.layers must lie in 1..5"),
    ],
)
def test_mistakes_are_named(reduction, message):
    with pytest.raises(ValueError, match=message):
        ReducedConfig(img_size=64, patch_size=8, depth=6, embed_dim=16, reduction=reduction)


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="reduction is for a plain Vim"):
        timm.create_model("mambascope_nano_patch8_64", reduction={"name": "r_meeto"})
    for pool in ("avg", "lse"):
        with pytest.raises(ValueError, match=f"global_pool must be 'token' or '' .*, got '{pool}'"):
            small(METHODS["tome"], global_pool=pool)
    model = small(METHODS["r_meeto"])
    with pytest.raises(ValueError, match="half of the 16 patches"), torch.no_grad():
        model(images(size=16))  # the same r is too much for fewer patches
    with pytest.raises(ValueError, match="half of the 16 patches"):
        model.set_input_size(16)
    assert model.config.img_size == 32


def test_settings_are_the_same_from_a_mapping_and_from_the_dataclass():
    assert reduction_config({"name": "dyvm", "layers": [1, 2]}) == REDUCTIONS["dyvm"](layers=(1, 2))
    assert reduction_config(None) is None
    config = ReducedConfig(img_size=64, patch_size=8, depth=6, reduction=REDUCTIONS["r_meeto"](r=3))
    assert config.reduction.r == 3


def test_new_switches_are_open_at_test_time():
    """So a Vim that gets switches answers as before until they are trained."""
    plain, model = small(), small({"name": "dyvm", "keep": 1})
    model.reduction.reset_parameters()
    x = images()
    with torch.no_grad():
        assert torch.equal(model.forward_reduced(x).switches, torch.ones(3, 6, 2))
        assert torch.equal(plain(x), model(x))
        spread_switches(model)
        assert not torch.equal(plain(x), model(x))
