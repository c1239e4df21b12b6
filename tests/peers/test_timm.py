"""Classifiers of timm's own, trained and read back like ours."""

import pytest
import torch
import yaml

import mambascope
from mambascope.commands.train import main
from mambascope.data import ScopeDigitsDataModule
from mambascope.data.scopedigits_config import ScopeDigitsConfig
from mambascope.models.flop_count import costs_of
from mambascope.peers.timm_classifier import TimmConfig, create_timm_classifier, is_timm_classifier
from mambascope.training.runs import shipped_configs
from tests.training.helpers import TINY

DEIT = {"name": "deit_tiny_patch16_224", "args": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}}
RESNET = {"name": "resnet50", "args": {"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 8], "stem_width": 8}}


@pytest.mark.parametrize("net", [DEIT, RESNET], ids=lambda net: net["name"])
def test_trains_reports_and_loads(net, here, capsys):
    settings = {k: v for k, v in TINY.items() if not k.startswith(("model.net", "model.full"))}
    settings |= {"run.report": "true", "trainer.max_epochs": 2, "run.name": "a", "data.img_size": 24}
    (here / "net.yaml").write_text(yaml.safe_dump({"model": {"net": net}}))
    config = yaml.safe_load(shipped_configs()["scopedigits"].read_text())
    config["model"].pop("net")
    config["model"].pop("full_refine_epochs")
    config["model"].pop("loss")
    (here / "base.yaml").write_text(yaml.safe_dump(config))
    options = [f"--{key}={value}" for key, value in settings.items()]
    assert main(["--config", "base.yaml", "--config", "net.yaml", *options]) == 0
    printed = capsys.readouterr().out
    assert f"{net['name']}: " in printed
    assert "24x24 pixels, 10 classes" in printed
    assert "top-1 " in printed
    run = here / "runs" / "a"
    model = mambascope.load(run / "model.safetensors")
    assert isinstance(model.config, TimmConfig)
    assert (model.config.name, model.config.args, model.config.image_hw) == (net["name"], net["args"], (24, 24))
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(mambascope.load(run / "checkpoints" / "last.ckpt")(images), model(images))
    # its weights start another training, and the run is resumed from its own state
    again = ["--config", "base.yaml", "--config", "net.yaml", *options, "--run.name=b"]
    assert main([*again, "--model.net.checkpoint", str(run / "model.safetensors")]) == 0
    assert main(["--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--trainer.max_epochs=3"]) == 0


def test_counted_cost_includes_attention():
    config = TimmConfig.of("deit_tiny_patch16_224", {**DEIT["args"], "img_size": 32, "num_classes": 10})
    model = create_timm_classifier(config)
    tokens, dim, depth = 17, 16, 2
    expected = 16 * 3 * 8 * 8 * dim + depth * (12 * tokens * dim**2 + 2 * tokens**2 * dim) + 10 * dim
    costs = costs_of(model)
    assert {cost.fine for cost in costs.values()} == {expected}
    assert costs["one_direction"].params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("resnet18", {"depth": 3}, "resnet18 cannot be built from these arguments: .*depth"),
        ("deit_tiny_patch16_224", {"embed_dim": 10, "num_heads": 3}, "deit_tiny_patch16_224 cannot be built"),
        ("resnet51", {}, "timm has no model 'resnet51'"),
        ("vim_nano_patch8_64", {}, "timm has no model 'vim_nano_patch8_64'"),
    ],
)
def test_mistakes_are_named(name, args, message):
    with pytest.raises(ValueError, match=message):
        create_timm_classifier(TimmConfig.of(name, args))


def test_own_models_are_not_timms():
    assert is_timm_classifier("resnet50.a1_in1k")
    assert not is_timm_classifier("mambascope_tiny_patch16_224")


def test_digits_at_another_size_are_the_same_images():
    def batch(**options):
        data = ScopeDigitsDataModule(8, 12, ScopeDigitsConfig(size=32), batch_size=4, val_batch_size=12, **options)
        return data.img_size, next(iter(data.val_dataloader())), next(iter(data.train_dataloader()))

    size, (full, labels), _ = batch()
    half_size, (half, half_labels), (train, _) = batch(img_size=16)
    assert (size, half_size, half.shape[2:], train.shape[2:]) == ((32, 32), (16, 16), (16, 16), (16, 16))
    assert torch.equal(labels, half_labels)
    # halving averages over about four pixels: means agree but for the weights at the border
    assert torch.allclose(half.mean((2, 3)), full.mean((2, 3)), atol=0.02)
    with pytest.raises(ValueError, match="img_size must be at least 1, got 0"):
        batch(img_size=0)
