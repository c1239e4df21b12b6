"""The official Vim's numbers, with its weights."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from mambascope import VisionMamba
from tests.conftest import GOLDEN, relative_error

FILE = GOLDEN / "vim_official_a.safetensors"


@pytest.fixture(scope="module")
def golden():
    with safe_open(FILE, framework="pt") as f:
        return json.loads(f.metadata()["config"]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118


def build(golden, backend):
    config, tensors = golden
    model = VisionMamba(scan_backend=backend, **config)
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    model.load_state_dict(weights, strict=True)
    return model.eval()


@pytest.mark.parametrize("backend", ["reference", "torch", None])
def test_outputs_and_layers(golden, backend):
    model, (_, tensors) = build(golden, backend), golden
    seen: dict[str, torch.Tensor] = {}
    for k, layer in enumerate(model.layers):
        layer.norm.register_forward_hook(lambda _m, _i, out, k=k: seen.update({f"layer{k}.residual_in": out[1]}))
        layer.mixer.register_forward_hook(lambda _m, _i, out, k=k: seen.update({f"layer{k}.mixer_out": out[0]}))
    with torch.no_grad():
        features = model.forward_features(tensors["input"])
        seen["cls_feature"] = model.pool(features)
        seen["logits"] = model.forward_head(features)
    errors = {name: relative_error(value, tensors[name]) for name, value in seen.items()}
    assert len(errors) == 10
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("backend", ["reference", "torch", None])
def test_loss_and_gradients(golden, backend):
    model, (_, tensors) = build(golden, backend), golden
    image = tensors["input"].clone().requires_grad_()
    loss = F.cross_entropy(model(image), torch.tensor([1, 0, 2]))
    loss.backward()
    assert relative_error(loss.detach(), tensors["loss"][0]) < 1e-5
    params = dict(model.named_parameters())
    names = [k.removeprefix("grad.") for k in tensors if k.startswith("grad.")]
    assert len(names) == 9
    for name in names:
        grad = image.grad if name == "input" else params[name].grad
        assert relative_error(grad, tensors[f"grad.{name}"]) < 1e-3, name
