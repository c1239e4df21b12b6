"""What the head reads: CLS, the mean, or CLS and the patches pooled by log-mean-exp."""

from dataclasses import replace

import pytest
import timm
import torch

import mambascope
from mambascope import MambaScope, VisionMamba
from mambascope.models import load_checkpoint, save_safetensors
from mambascope.models.checkpoint import CheckpointError
from mambascope.models.ready import ready_model
from mambascope.peers import ReducedVim
from mambascope.peers.teacher import Teacher

SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_classes": 5}


def pooled_by_hand(model, tokens, at):
    """``z_cls + log mean_i exp z_i``, image by image and class by class."""
    rows = []
    for image in tokens:
        pooled, neighbours = [], []
        for i, token in enumerate(image):
            logits = model.head.weight @ token + model.head.bias
            (pooled if i == at else neighbours).append(logits)
        rows.append(pooled[0] + torch.stack(neighbours).exp().mean(0).log())
    return torch.stack(rows)


@pytest.mark.parametrize("position", ["first", "middle", "last"])
@torch.no_grad()
def test_vim_pools_the_logits_of_cls_and_patches(position):
    torch.manual_seed(0)
    model = VisionMamba(**SMALL, cls_position=position, global_pool="lse").double().eval()
    model.head.weight.mul_(40)
    x = torch.randn(3, 3, 40, 56, dtype=torch.float64)
    features = model.forward_features(x)
    at = {"first": 0, "middle": 17, "last": 35}[position]
    assert features.shape[1] == 36
    expected = pooled_by_hand(model, features, at)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, at])
    assert not torch.allclose(expected, model.classify(features[:, at]))
    model.reset_classifier(0)
    assert torch.equal(model(x), features[:, at])


@torch.no_grad()
def test_both_stages_of_a_scope_pool_their_own_sequences():
    torch.manual_seed(0)
    model = MambaScope(**SMALL, global_pool="lse", fine_cls="last", alpha=0.4).double().eval()
    model.head.weight.mul_(40)
    x = torch.randn(4, 3, 48, 48, dtype=torch.float64)
    coarse = model.forward_coarse(x)
    tokens = torch.cat([coarse.cls.unsqueeze(1), coarse.features], 1)
    torch.testing.assert_close(coarse.logits, pooled_by_hand(model, tokens, 0), rtol=1e-9, atol=1e-9)
    fine = model.forward_fine(x, coarse)
    expected = pooled_by_hand(model, fine.tokens, fine.length - 1)
    torch.testing.assert_close(fine.logits, expected, rtol=1e-9, atol=1e-9)
    conf = coarse.logits.softmax(1).amax(1).sort().values
    out = model.forward_scope(x, threshold=float(conf[1:3].mean()))
    assert 0 < int(out.exited.sum()) < 4
    torch.testing.assert_close(out.logits, torch.where(out.exited.unsqueeze(1), coarse.logits, fine.logits))


def test_every_patch_learns_and_bfloat16_stays_close():
    torch.manual_seed(0)
    model = VisionMamba(**SMALL, global_pool="lse")
    tokens = torch.randn(2, 37, 32, requires_grad=True)
    model.answer(tokens)[:, 1].sum().backward()
    assert bool((tokens.grad.abs().amax(2) > 0).all())
    tokens, model = tokens.detach().bfloat16().float(), model.bfloat16().float()  # the same numbers in both
    exact, cls = model.answer(tokens), model.classify(model.pool(tokens))
    short = model.bfloat16().answer(tokens.bfloat16())
    assert short.dtype == torch.bfloat16
    torch.testing.assert_close(short.float(), exact, rtol=0, atol=3e-3)
    assert float((exact - cls).detach().abs().max()) > 1e-2
    large = VisionMamba(**SMALL, global_pool="lse")
    assert bool(large.answer(1e4 * torch.ones(1, 37, 32)).isfinite().all())


def test_a_classifier_that_reads_cls_starts_one_that_reads_patches(capsys):
    source = mambascope.load("scopedigits_published")
    model = timm.create_model("mambascope_nano_patch8_64", num_classes=10, fine_cls="middle", global_pool="lse")
    with pytest.raises(CheckpointError, match="global_pool is 'token' in the file and 'lse' in the model"):
        load_checkpoint(model, "scopedigits_published")  # by the name of a shipped model, as elsewhere
    report = load_checkpoint(model, "scopedigits_published", strict=False)
    assert "differs    3: global_pool is 'token' in the file" in capsys.readouterr().out
    assert not report.new
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="global_pool must be one of"):
        VisionMamba(**SMALL, global_pool="max")


@torch.no_grad()
def test_a_sequence_of_cls_alone_and_a_refused_head():
    model = MambaScope(**SMALL, global_pool="lse").eval()
    cls = torch.randn(2, 1, 32)
    assert torch.equal(model.forward_head(cls), model.classify(cls[:, 0]))
    reduced = ReducedVim(**SMALL, reduction={"name": "tome", "r": 1}).eval()
    with pytest.raises(ValueError, match="global_pool must be 'token'"):
        reduced.reset_classifier(3, "lse")
    assert (reduced.global_pool, reduced.num_classes) == ("token", 5)


@torch.no_grad()
def test_a_teacher_and_a_named_model_read_what_their_weights_were_trained_with(tmp_path):
    torch.manual_seed(0)
    pooled = VisionMamba(**SMALL, global_pool="lse", stem_width=6).eval()
    pooled.head.weight.mul_(40)
    save_safetensors(pooled, tmp_path / "vim.safetensors")
    x = torch.randn(2, 3, 48, 48)
    logits, _ = Teacher(replace(pooled.config, global_pool="token", stem_width=0), str(tmp_path / "vim.safetensors"))(x)
    torch.testing.assert_close(logits, pooled(x))
    torch.save({"model": pooled.state_dict()}, tmp_path / "vim.pth")  # says nothing of itself
    logits, _ = Teacher(replace(pooled.config, stem_width=0), str(tmp_path / "vim.pth"))(x)
    torch.testing.assert_close(logits, pooled(x))
    shipped = mambascope.load("scopedigits_dense")
    named = ready_model("scopedigits_dense", name="mambascope_nano_patch8_64")
    assert (named.config.global_pool, named.config.fine_cls, named.config.stem_width) == ("lse", "middle", 32)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(named.forward_both(images).fine, shipped.forward_both(images).fine)
