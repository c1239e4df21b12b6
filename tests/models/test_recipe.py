"""Registers and layer-wise shuffle: where the tokens stand, what is drawn, and what stays as it was."""

import pytest
import torch

from mambascope.layers import insert_registers, remove_registers
from mambascope.layers.registers import chunk_sizes
from mambascope.models import MambaScope, VisionMamba, load_model
from mambascope.models.checkpoint import save_safetensors
from tests.conftest import relative_error

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_classes": 5}


def create(kind, **kwargs):
    torch.manual_seed(1)
    return kind(**{**SMALL, **kwargs}).eval()


@pytest.mark.parametrize(("length", "registers"), [(17, 3), (16, 4), (5, 9), (1, 1), (0, 2), (49, 12)])
def test_registers_stand_evenly_and_come_out_again(length, registers):
    tokens, own = torch.randn(2, length, 4), torch.randn(1, registers, 4)
    full = insert_registers(tokens, own)
    assert full.shape == (2, length + registers, 4)
    assert torch.equal(remove_registers(full, registers), tokens)
    assert torch.equal(remove_registers(full[..., 0], registers), tokens[..., 0])
    runs = chunk_sizes(length, registers)
    assert (sum(runs), len(runs)) == (length, registers + 1)
    assert max(runs) - min(runs) <= 1
    at = [sum(runs[: i + 1]) + i for i in range(registers)]
    assert torch.equal(full[:, at], own.expand(2, -1, -1))


@torch.no_grad()
@pytest.mark.parametrize("kind", [VisionMamba, MambaScope])
def test_registers_are_read_and_take_no_place(kind, tmp_path):
    model, plain, x = create(kind, registers=3), create(kind), torch.randn(2, 3, 32, 32)
    assert model.forward_features(x).shape == plain.forward_features(x).shape
    assert "register_tokens" in model.no_weight_decay()
    names = {n for n, _ in model.named_parameters()} ^ {n for n, _ in plain.named_parameters()}
    assert names == {"register_tokens"}
    before = model(x)
    model.register_tokens.mul_(50)
    assert relative_error(model(x), before) > 1e-3
    save_safetensors(model, tmp_path / "m.safetensors")
    assert torch.equal(load_model(tmp_path / "m.safetensors")(x), model(x))


@torch.no_grad()
def test_registers_by_hand():
    model, x = create(VisionMamba, registers=2), torch.randn(2, 3, 32, 32)
    tokens, _ = model._tokens(x)
    sequence = torch.cat([tokens[:, :5], model.register_tokens[:, :1].expand(2, -1, -1), tokens[:, 5:11],
                          model.register_tokens[:, 1:].expand(2, -1, -1), tokens[:, 11:]], dim=1)  # fmt: skip
    stream = sequence
    for block in model.layers:
        normed = torch.nn.functional.rms_norm(stream, (32,), block.norm.weight, 1e-5)
        stream = stream + block.mixer(normed)[0]
    out = torch.nn.functional.rms_norm(stream, (32,), model.norm_f.weight, 1e-5)
    keep = [i for i in range(19) if i not in (5, 12)]
    assert relative_error(model.encode(tokens)[0], out[:, keep]) < 1e-4


@torch.no_grad()
def test_tokens_used_count_registers():
    model, x = create(MambaScope, registers=3, alpha=0.5), torch.randn(2, 3, 32, 32)
    out = model.forward_scope(x, 1.0)
    assert out.importance.shape == (2, 4)
    assert out.tokens.tolist() == [5 + 3 + 1 + 8 + 2 + 3] * 2


@pytest.mark.parametrize("kind", [VisionMamba, MambaScope])
def test_every_parameter_gets_a_gradient(kind):
    model = create(kind, registers=2, shuffle_rate=1.0).train()
    out = model(torch.randn(2, 3, 32, 32))
    sum(o.square().sum() for o in (out if kind is MambaScope else [out])).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_shuffle_is_off_in_evaluation_and_at_rate_zero():
    x = torch.randn(2, 3, 32, 32)
    model, plain = create(VisionMamba, shuffle_rate=1.0), create(VisionMamba)
    assert torch.equal(model(x), plain(x))
    state = torch.get_rng_state()
    plain.train()(x)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn where nothing is shuffled


def test_shuffle_follows_the_seed_and_the_depth():
    model, x = create(VisionMamba, shuffle_rate=0.6).train(), torch.randn(2, 3, 32, 32)
    seen = dict.fromkeys(range(4), 0)
    original = model._shuffled

    def spy(layer, tokens):
        order = original(layer, tokens)
        seen[layer] += order is not None
        return order

    model._shuffled = spy
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(torch.stack([model(x) for _ in range(4)]))
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])
    torch.manual_seed(2)
    seen.update(dict.fromkeys(seen, 0))
    with torch.no_grad():
        for _ in range(300):
            for layer in range(4):
                spy(layer, x[:, 0])
    shares = [seen[i] / 300 for i in range(4)]
    assert shares == pytest.approx([0.15, 0.3, 0.45, 0.6], abs=0.1)


@torch.no_grad()
def test_a_shuffled_block_is_the_block_on_shuffled_tokens():
    block = create(MambaScope).layers[1]
    hidden, residual, order = torch.randn(2, 9, 32), torch.randn(2, 9, 32), torch.randperm(9)
    score = create(MambaScope).config.score
    out, stream, scores = block(hidden, residual, score, None, order)
    expected = block(hidden[:, order], residual[:, order], score)
    for found, wanted in zip((out, stream, scores), expected, strict=True):
        assert relative_error(found[:, order], wanted) < 1e-5


def test_shuffle_and_checkpointing_agree():
    grads = []
    for enable in (False, True):
        model = create(MambaScope, shuffle_rate=0.9, registers=2).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(5)
        sum(o.square().sum() for o in model(torch.ones(2, 3, 32, 32))).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for n, g in grads[0].items():
        assert torch.allclose(g, grads[1][n], rtol=1e-4, atol=1e-6), n


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"registers": -1}, "registers must be an integer >= 0, got -1"),
        ({"registers": 2.0}, "registers must be an integer >= 0"),
        ({"shuffle_rate": 1.5}, r"shuffle_rate must lie in \[0, 1\], got 1.5"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        VisionMamba(**{**SMALL, **options})
