"""Layers that were wrapped, parametrised, quantised or given hooks are called: nothing reads past them."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize, weight_norm

from mambascope import MambaEye, MambaScope
from mambascope.layers import BidirectionalMamba
from mambascope.layers.plain import is_plain
from mambascope.models.vim import VisionMamba
from mambascope.peers import ReducedVim

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 2, "d_state": 4, "num_classes": 4}
BACKENDS = (None, "torch")


class Lora(nn.Module):
    """A low-rank adapter as peft puts it around a linear layer or a convolution: the layer itself is inside, frozen."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        if isinstance(layer, nn.Linear):
            self.down, self.up = nn.Linear(layer.in_features, rank, False), nn.Linear(rank, layer.out_features, False)
        elif isinstance(layer, nn.Conv1d):
            shape = (layer.kernel_size, 1, layer.padding)
            self.down = nn.Conv1d(layer.in_channels, rank, *shape, bias=False)
            self.up = nn.Conv1d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, bias=False)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def model_of(kind, **options):
    torch.manual_seed(0)
    kinds = {"scope": MambaScope, "vim": VisionMamba, "reduced": ReducedVim}
    model = kinds[kind](**{**SIZES, **options})
    # larger weights: what is left out must show
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("proj.weight"):
                p.mul_(3)
    return model.eval()


def eye():
    torch.manual_seed(0)
    options = {"embed_dim": 16, "depth": 2, "d_state": 8, "head_dim": 8, "num_classes": 4}
    return MambaEye(**options).eval()


def read(model, steps=False):
    """Answers of a MambaEye to a sequence, at once or one glimpse at a time."""
    generator = torch.Generator().manual_seed(1)
    size = model.config.patch_size
    patches = torch.randn(2, 6, 3, size, size, generator=generator)
    moves = torch.rand(2, 6, 2, generator=generator)
    if not steps:
        return model(patches, moves)
    state, answers = model.start(2), []
    for i in range(6):
        state = model.step(state, patches[:, i], moves[:, i])
        answers.append(state.logits)
    return torch.stack(answers, 1)


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def both_stages(model):
    if isinstance(model, MambaScope):
        return torch.cat(model.forward_both(images()))
    return model(images())


def wrap(model, names, wrapper):
    """Replaces every submodule whose last name is one of `names`; returns how many."""
    result = [path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] in names]
    for path in result:
        model.set_submodule(path, wrapper(model.get_submodule(path)))
    return len(result)


READ = ("in_proj", "conv1d", "conv1d_b", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj", "proj", "head")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", READ)
def test_adapters_learn(name, backend):
    """With all cells or some re-read: both ways of embedding patches."""
    model = model_of("scope", scan_backend=backend, alpha=0.5)
    before = both_stages(model)
    assert wrap(model, (name,), Lora)
    # one that adds nothing yet changes nothing
    torch.testing.assert_close(both_stages(model), before, rtol=1e-4, atol=1e-5)
    for part in ("up", "down"):
        model.zero_grad()
        if part == "down":
            for path, p in model.named_parameters():
                if path.endswith("up.weight"):
                    nn.init.normal_(p.data)
        both_stages(model).square().sum().backward()
        left = [p for p, t in model.named_parameters() if p.endswith(f"{part}.weight") and t.grad is None]
        still = [p for p, t in model.named_parameters() if p.endswith(f"{part}.weight") and not t.grad.any()]
        assert not left + still


def test_the_usual_targets_of_peft():
    """Every tensor of its adapters has a gradient; it merges back into plain layers with the same answers."""
    peft = pytest.importorskip("peft")
    model = model_of("scope")
    settings = peft.LoraConfig(target_modules=["x_proj", "dt_proj", "dt_proj_b", "proj", "head"], r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, settings)
    for path, p in adapted.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(p.data)
    both_stages(adapted.base_model.model).square().sum().backward()
    lora = {path: p.grad for path, p in adapted.named_parameters() if "lora_" in path}
    assert len(lora) == 2 * (2 * 3 + 2)
    assert all(g is not None and g.any() for g in lora.values())
    expected = both_stages(adapted.base_model.model.eval())
    merged = adapted.merge_and_unload()
    assert is_plain(merged.layers[0].mixer.dt_proj, nn.Linear)
    torch.testing.assert_close(both_stages(merged), expected, rtol=1e-3, atol=1e-4)


class Double(nn.Module):
    def forward(self, w):
        return 2 * w


@pytest.mark.parametrize("name", READ)
@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("way", ["parametrize", "weight_norm", "hook", "pre-hook", "backward hook", "forward replaced"])
def test_what_hangs_on_a_layer_is_used(way, name):
    """The same change by other means gives the answers of the model with changed weights."""
    model = model_of("scope", alpha=0.5)
    changed = copy.deepcopy(model)
    paths = [path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] == name]
    calls = []
    for path in paths:
        layer, other = model.get_submodule(path), changed.get_submodule(path)
        if way == "parametrize":
            parametrize.register_parametrization(layer, "weight", Double())
            other.weight.data.mul_(2)
        elif way == "weight_norm":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                weight_norm(layer)
            layer.weight_g.data.mul_(2)
            other.weight.data.mul_(2)
        elif way == "hook":
            layer.register_forward_hook(lambda module, args, out: 2 * out)
            other.weight.data.mul_(2)
            if other.bias is not None:
                other.bias.data.mul_(2)
        elif way == "pre-hook":
            layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
            other.weight.data.mul_(2)
        elif way == "backward hook":
            layer.register_full_backward_hook(lambda module, grad, out: calls.append(1))
        else:
            inner = layer.forward
            layer.forward = lambda x, inner=inner: inner(2 * x)
            other.weight.data.mul_(2)
    result = both_stages(model)
    torch.testing.assert_close(result, both_stages(changed), rtol=1e-3, atol=1e-4)
    if way == "backward hook":
        result.sum().backward()
        assert len(calls) >= len(paths)


def test_scores_with_wrapped_steps():
    """The other ways through a mixer: fused score, other scores."""
    for options in ({}, {"score_metric": "clip"}):
        model = model_of("scope", alpha=0.5, **options)
        expected = model.forward_scope(images(), 1.0)
        wrap(model, ("dt_proj", "conv1d_b"), Lora)
        result = model.forward_scope(images(), 1.0)
        torch.testing.assert_close(result.importance, expected.importance, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.logits, expected.logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reduction", ["dyvm", "mtr", "tome", "r_meeto", "hidden_align"])
def test_reductions(reduction):
    model = model_of("reduced", depth=4, reduction={"name": reduction})
    expected = model(images())
    wrap(model, ("in_proj", "out_proj", "conv1d"), Lora)
    torch.testing.assert_close(model(images()), expected, rtol=1e-3, atol=1e-4)
    wrap(model, ("dt_proj_b",), Lora)
    if reduction == "hidden_align":
        with pytest.raises(ValueError, match="hidden_align needs plain dt_proj and dt_proj_b"):
            model(images())
    else:
        torch.testing.assert_close(model(images()), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["in_proj", "conv1d", "out_proj", "0"])
@pytest.mark.parametrize("steps", [False, True])
def test_mambaeye(name, steps):
    model = eye()
    expected = read(model, steps)
    assert wrap(model, (name,), lambda layer: Lora(layer) if hasattr(layer, "weight") else layer)
    torch.testing.assert_close(read(model, steps), expected, rtol=1e-4, atol=1e-5)
    for path, p in model.named_parameters():
        if path.endswith("up.weight"):
            nn.init.normal_(p.data)
    read(model, steps).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.any() for path, p in model.named_parameters() if path.endswith("up.weight")
    )


def test_dynamic_quantisation_converts_every_linear_layer():
    model = timm.create_model("mambascope_nano_patch8_64", pretrained=True).eval()
    linears = sum(isinstance(m, nn.Linear) for m in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    kinds = [type(m) for m in small.modules()]
    assert kinds.count(torch.ao.nn.quantized.dynamic.Linear) == linears > 30
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        expected, result = model.forward_both(x), small.forward_both(x)
    assert not torch.equal(result.coarse, expected.coarse)
    assert (result.coarse - expected.coarse).norm() < 0.2 * expected.coarse.norm()


def test_patch_size_is_not_changed_under_a_wrapper():
    model = model_of("vim")
    wrap(model, ("proj",), Lora)
    with pytest.raises(ValueError, match=r"patch_size cannot be changed while patch_embed\.proj is wrapped"):
        model.set_input_size(patch_size=8)
    assert model.config.patch_size == 4


def test_weights_that_are_more_than_tensors_are_not_read():
    """As torchao's quantised weights and distributed tensors are: their memory is not what they stand for."""

    class Special(torch.Tensor):
        pass

    layer = nn.Linear(4, 4)
    assert is_plain(layer, nn.Linear)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Special))
    assert not is_plain(layer, nn.Linear)


def test_global_hooks_see_the_linear_layers():
    """Profilers and torch's FLOP counter attribute what they see to modules by them."""
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        BidirectionalMamba(16, d_state=4)(torch.randn(1, 5, 16))
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 4


def test_compiled_with_hooks():
    model = model_of("scope")
    for block in model.layers:
        block.mixer.dt_proj.register_forward_hook(lambda module, args, out: 2 * out)
    with torch.no_grad():
        expected = model(images())
        result = torch.compile(model, backend="aot_eager")(images())
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
