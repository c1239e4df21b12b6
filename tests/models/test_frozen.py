"""The frozen form of models: the same answers, seen through everything that may happen to a module."""

import copy
import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

import mambascope
from mambascope.layers import BidirectionalMamba
from mambascope.models import MambaScope, ScopeConfig, VisionMamba
from mambascope.models.flop_count import count_macs
from mambascope.models.frozen import _FROZEN, freeze_where_possible, is_frozen
from mambascope.ops.native import library
from mambascope.peers.model import ReducedVim
from tests.conftest import relative_error

pytestmark = pytest.mark.skipif(library.why_unavailable() is not None, reason="kernels were not compiled")
SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_classes": 5, "d_state": 8}


def stir(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def scope(**options):
    return stir(MambaScope(ScopeConfig(**{**SMALL, "alpha": 0.5, **options})))


def vim(**options):
    return stir(VisionMamba(**{**SMALL, **options}))


def calls(monkeypatch):
    """How often a packed stack ran, in a list of one number."""
    from mambascope.ops.native.stack import PackedStack

    count, call = [0], PackedStack.__call__

    def counted(self, *args, **kwargs):
        count[0] += 1
        return call(self, *args, **kwargs)

    monkeypatch.setattr(PackedStack, "__call__", counted)
    return count


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score_metric": "max"},
        {"global_pool": "lse", "score_metric": "evidence_contrast", "coarse_offsets": True},
        {"fine_cls": "middle", "cell_order": "raster", "reuse_cls": True, "coarse_pos": "own"},
        {"score_metric": "l2"},  # reads what the packed form does not leave: its coarse look runs as before
        {"patch_size": 8, "stem_width": 8},
    ],
)
@pytest.mark.parametrize(("batch", "size"), [(1, 32), (3, 32), (4, 48)])
def test_a_scope_answers_the_same(options, batch, size, level):
    model, x = scope(**options), torch.randn(batch, 3, size, size)
    other = mambascope.freeze(copy.deepcopy(model))
    with torch.inference_mode():
        for threshold in (0.0, 0.3, 1.0):
            expected, output = model.forward_scope(x, threshold), other.forward_scope(x, threshold)
            assert relative_error(output.logits, expected.logits) < 1e-5
            assert torch.equal(output.exited, expected.exited)
        coarse, expected = other.forward_coarse(x, take=(0, 2)), model.forward_coarse(x, take=(0, 2))
        assert relative_error(coarse.importance, expected.importance) < 1e-5
        for map_, other_map in zip(coarse.taken, expected.taken, strict=True):
            assert relative_error(map_, other_map) < 1e-5
        fine = other.forward_fine(x, expected, take=(1,))
        assert relative_error(fine.tokens, model.forward_fine(x, expected).tokens) < 1e-5


def test_the_blocks_run_packed_and_as_before_where_they_must(monkeypatch):
    model, x, count = mambascope.freeze(scope()), torch.randn(2, 3, 32, 32), calls(monkeypatch)
    with torch.no_grad():
        model.forward_scope(x, 1.0)
        assert count == [2]
        model.train()
        model(x)
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        torch.func.vmap(lambda image: model.forward_coarse(image[None]).logits)(x)
        torch.export.export(CoarseAnswer(model), (x,))
        copy.deepcopy(model)(x)
        copy.deepcopy(model).double()(x.double())
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.layers.parameters())
    assert count == [2]


class CoarseAnswer(nn.Module):
    """The coarse answer alone, which has no branch that depends on data."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.forward_coarse(x).logits


def replace_layer(model):
    model.layers[1].mixer.in_proj = nn.Sequential(model.layers[1].mixer.in_proj)
    return model.layers[1].mixer.in_proj[0]


def plain_tensor(model):
    weight = model.layers[1].mixer.x_proj.weight
    del model.layers[1].mixer.x_proj.weight
    model.layers[1].mixer.x_proj.weight = weight.detach() * 2


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.layers[0].mixer.in_proj.weight.mul_(1.3),
        lambda m: m.layers[2].mixer.A_b_log.add_(0.5),
        lambda m: m.norm_f.weight.mul_(2),
        lambda m: setattr(m.layers[1].mixer, "out_proj", nn.Linear(48, 24, bias=False)),
        lambda m: setattr(m.layers[1].mixer, "D", nn.Parameter(torch.randn(48))),
        lambda m: m.load_state_dict(vim().state_dict()),
        lambda m: setattr(m, "layers", m.layers[:2]),
        lambda m: m.prune_intermediate_layers([0], prune_norm=True, prune_head=False),
        lambda m: m.layers[1].mixer.in_proj.register_forward_hook(lambda module, args, out: out * 2),
        lambda m: setattr(m.layers[0], "drop_path", nn.Tanh()),
        lambda m: nn.utils.parametrizations.weight_norm(m.layers[0].mixer.in_proj),
        lambda m: m.layers[0].mixer.in_proj.to(torch.float64).to(torch.float32),
        lambda m: setattr(m.layers[1], "mixer", BidirectionalMamba(24, d_state=8, expand=1)),
        lambda m: setattr(m.layers[1], "mixer", BidirectionalMamba(24, d_state=16, expand=3)),
        lambda m: setattr(m.layers[1].mixer, "dt_proj", nn.Linear(2, 48, bias=False)),
        lambda m: setattr(m.layers[0].norm, "weight", nn.Parameter(torch.randn(24, 3)[:, 1])),
        lambda m: setattr(m.layers[0].mixer.conv1d, "bias", nn.Parameter(torch.randn(48, 3)[:, 1])),
        lambda m: m.layers[0].drop_path.register_forward_hook(lambda module, args, out: out * 2),
        lambda m: setattr(m.layers[0].drop_path, "forward", lambda x: x * 2),
        lambda m: setattr(m.norm_f, "eps", 1.0),
        plain_tensor,
        replace_layer,
    ],
)
def test_changes_are_seen(change):
    model, x = mambascope.freeze(vim()), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        change(model)
        after = model(x)
        expected = mambascope.unfreeze(model)(x)
    assert relative_error(after, expected) < 1e-5
    del before


@pytest.mark.parametrize("how", ["fused", "foreach"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_step_is_seen(kind, how):
    model, x = mambascope.freeze(vim()), torch.randn(2, 3, 32, 32)
    optimizer = kind(model.parameters(), lr=0.05, **{how: True})
    with torch.no_grad():
        before = model(x)
    model(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = model(x)
        assert relative_error(after, mambascope.unfreeze(model)(x)) < 1e-5
    assert relative_error(after, before) > 1e-3


def test_gradients_of_a_frozen_model():
    model, x = vim(), torch.randn(2, 3, 32, 32)
    frozen = mambascope.freeze(copy.deepcopy(model))
    for m in (model, frozen):
        m(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), frozen.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_the_cost_is_counted_as_before():
    for model in (vim(), scope()):
        assert count_macs(mambascope.freeze(copy.deepcopy(model))) == count_macs(model)


def test_nothing_else_of_the_model_changes():
    model = vim()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert mambascope.freeze(model) is model
    assert not model.training
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not is_frozen(copy.deepcopy(model))
    maps = model.forward_intermediates(torch.randn(1, 3, 32, 32), indices=[0, 2], intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(1, 24, 8, 8)] * 2


def test_packed_parameters_go_with_their_model():
    model = mambascope.freeze(vim())
    packed = weakref.ref(_FROZEN[model])
    del model
    gc.collect()
    assert packed() is None


def test_a_nan_is_seen():
    model, x = mambascope.freeze(vim()), torch.randn(2, 3, 32, 32)
    x[1, 0, 3, 3] = float("nan")
    with torch.no_grad():
        logits = model(x)
    assert logits[1].isnan().all()
    assert not logits[0].isnan().any()


def hooked():
    model = vim()
    model.layers[0].mixer.x_proj.register_forward_hook(lambda module, args, out: out)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(2, 2), "a Linear has no frozen form; a VisionMamba or a MambaScope has"),
        (lambda: ReducedVim(depth=4), "a ReducedVim has no frozen form"),
        (lambda: vim().double(), "the packed form takes float32 parameters on the CPU; .* is float64 on cpu"),
        (lambda: vim(scan_backend="torch"), "runs on backend 'cpu', scan_backend is 'torch'"),
        (hooked, r"x_proj \(Linear\) cannot be packed: it is no plain Linear or has hooks"),
    ],
)
def test_what_cannot_be_frozen_is_named(model, message):
    model = model()
    with pytest.raises(ValueError, match=message):
        mambascope.freeze(model)
    freeze_where_possible(model)
    assert not is_frozen(model)


def test_a_backend_that_was_asked_for_is_used(monkeypatch):
    model, x, count = mambascope.freeze(vim()), torch.randn(2, 3, 32, 32), calls(monkeypatch)
    with torch.no_grad():
        expected = model(x)
        monkeypatch.setenv("MAMBASCOPE_SCAN_BACKEND", "reference")
        assert relative_error(model(x), expected) < 1e-5
        assert count == [1]
        with pytest.raises(ValueError, match="MAMBASCOPE_SCAN_BACKEND is 'reference'"):
            mambascope.freeze(model)
        monkeypatch.setenv("MAMBASCOPE_SCAN_BACKEND", "cuda")
        with pytest.raises(ValueError, match="MAMBASCOPE_SCAN_BACKEND must be one of reference, torch, cpu"):
            model(x)
        monkeypatch.setenv("MAMBASCOPE_SCAN_BACKEND", "cpu")
        model(x)
        assert count == [2]


def test_stochastic_depth_in_an_evaluation_is_seen():
    model, x = mambascope.freeze(vim(drop_path_rate=0.9)), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        first = model(x)
        for block in model.layers:
            block.drop_path.train()
        assert relative_error(model(x), first) > 1e-3


def test_a_block_in_training_mode_is_seen_and_costs_no_packing():
    model, x = mambascope.freeze(vim(drop_path_rate=0.9)), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        first = model(x)
        model.layers[0].mixer.train()  # nothing in it depends on the mode
        look = next(iter(_FROZEN[model].looks.values()))
        assert torch.equal(model(x), first)
        assert next(iter(_FROZEN[model].looks.values())) is look
        model.layers[2].train()
        assert relative_error(model(x), first) > 1e-3


def test_parameters_made_in_inference_mode_run_as_before():
    model, x = vim(), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        model.layers[1].mixer.out_proj = nn.Linear(48, 24, bias=False)
    with pytest.raises(ValueError, match="weight is no parameter whose changes can be seen"):
        mambascope.freeze(model)
    freeze_where_possible(model)
    with torch.inference_mode():
        assert model(x).isfinite().all()


@pytest.mark.parametrize(
    "setting", ["torch.set_default_dtype(torch.float64)", "torch.set_default_dtype(torch.bfloat16)"]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_other_defaults_of_pytorch(setting, when):
    program = f"""
import torch, mambascope
model = mambascope.VisionMamba(img_size=32, patch_size=8, embed_dim=24, depth=2, num_classes=5).eval()
x = torch.randn(3, 3, 32, 32)
with torch.no_grad():
    expected = model(x)
    {setting if when == "before" else ""}
    mambascope.freeze(model)
    {setting if when == "after" else ""}
    for count in (1, 3):
        torch.testing.assert_close(model(x[:count]), expected[:count])
    torch.set_default_dtype(torch.float32)
    stack = mambascope.models.frozen.packed_stack(model, torch.randn(1, 4, 24), (), None)
    tokens = torch.randn(1, 4, 24)
    with torch.device("meta"):
        stack(tokens)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


def test_without_kernels():
    program = """
import torch, mambascope
model = mambascope.VisionMamba(img_size=32, patch_size=8, embed_dim=24, depth=1, num_classes=5)
mambascope.models.frozen.freeze_where_possible(model)
assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
try:
    mambascope.freeze(model)
except RuntimeError as error:
    print(error)
"""
    environment = {**os.environ, "MAMBASCOPE_NATIVE_ISA": "off"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("the frozen form needs the compiled kernels: switched off by"), done.stderr
