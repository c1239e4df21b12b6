"""A gate of one's own: registered, named in a config, trained, saved, loaded and evaluated."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mambascope.mm import DenseGate, GateHead, loading
from mambascope.mm.evaluate import build_metrics, collect
from mambascope.mm.runner import ScopeRunner
from mambascope.mm.scope_backbone import ScopeBackbone
from tests.mm import common


@MODELS.register_module(force=True)
class PatchGate(DenseGate):
    """Classes from the mean of all patches; sure of an image in which it is sure of every class."""

    def __init__(self, dim, hidden, **options):
        super().__init__(**options)
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, self.num_classes))

    def logits(self, coarse):
        return self.layers(coarse.features.mean(1))

    def cell_logits(self, features):
        return self.layers(features)

    def confidence(self, logits):
        return logits.detach().float().abs().amin(1).tanh()


OPTIONS = {"type": "PatchGate", "hidden": 8, "num_classes": 11}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A config with that gate on its data, and what a step of training left."""
    root = tmp_path_factory.mktemp("gate")
    data = common.make_data("seg", root / "data", train=4, val=3)
    cfg = common.demo_config("seg", data, root / "run", **{"train_cfg.max_iters": 1})
    cfg.model.backbone.gate = dict(OPTIONS)
    runner = common.named_runner(cfg)
    before = {name: value.clone() for name, value in runner.model.backbone.gate.state_dict().items()}
    runner.train()
    runner.save_checkpoint(str(root), "one.pth")
    return cfg, runner.model, before, root / "one.pth"


def test_it_learns_with_the_model(trained):
    _, model, before, _ = trained
    assert isinstance(model.backbone.gate, PatchGate)
    after = model.backbone.gate.state_dict()
    assert before.keys() == after.keys()
    assert all(not torch.equal(after[name], value) for name, value in before.items())


def test_it_is_saved_and_loaded(trained):
    cfg, model, _, path = trained
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert {name for name in saved if name.startswith("backbone.gate.")} == {
        f"backbone.gate.layers.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    }
    loaded = loading.build_model(cfg, path)
    images = torch.randn(2, 3, 64, 64)
    model.eval()
    model.backbone.threshold = loaded.backbone.threshold = 0.0
    with torch.no_grad():
        expected, output = model.backbone.forward_scope(images), loaded.backbone.forward_scope(images)
        coarse = loaded.backbone.encoder.forward_coarse(images)
        torch.testing.assert_close(loaded.backbone.gate(coarse), output.confidence)
    torch.testing.assert_close(output.confidence, expected.confidence)  # the loaded one is frozen
    assert torch.equal(output.confidence, output.gate_logits.abs().amin(1).tanh())


def test_it_decides_in_an_evaluation(trained):
    cfg, _, _, path = trained
    model = loading.build_model(cfg, path)
    loader = ScopeRunner.build_dataloader(cfg.test_dataloader)
    record = collect(model, loader, build_metrics(cfg, loader.dataset.metainfo))
    assert len(record) == 3
    model.backbone.threshold = float((record.confidence.min() + record.confidence.max()) / 2)
    refined = [model.test_step(batch)[0].metainfo["scope"]["refined"] for batch in loader]
    assert refined == (record.confidence < model.backbone.threshold).tolist()


def test_gates_in_configs():
    def backbone(gate):
        return ScopeBackbone("mambascope_nano_patch8_64", arch_options=common.TINY, gate=gate)

    assert isinstance(backbone({"num_classes": 3}).gate, GateHead)
    assert isinstance(backbone(OPTIONS).gate, PatchGate)
    assert backbone(None).gate is None
    with pytest.raises(KeyError, match="MissingGate is not in the"):
        backbone({"type": "MissingGate", "num_classes": 3})
    with pytest.raises(ValueError, match=r"gate must be a mambascope\.mm\.DenseGate, got NoGate"):
        backbone({"type": NoGate, "num_classes": 3})


class NoGate(nn.Module):
    """No gate."""

    def __init__(self, **options):
        super().__init__()
