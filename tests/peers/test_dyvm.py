"""DyVM: training computes what the test computes, predictors learn, and scans that are off cost nothing."""

import pytest
import torch
import torch.nn.functional as F

from mambascope.ops.flops import count_macs
from mambascope.peers.dyvm import keep_best, keep_in_front
from tests.peers.common import images, small


def states(model, upto, seed=0):
    """The same sequence before block `upto` for stays paths."""
    torch.manual_seed(seed)
    state = model.reduction.start(torch.randn(3, 65, 16), model.config.cls_position)
    for layer in range(upto):
        state = model.reduction.step(layer, model.layers[layer], state)
    return state


@pytest.mark.parametrize("position", ["first", "middle", "last"])
def test_training_computes_what_the_test_computes(position):
    """Twice pruned, with the same patches: rows in front behind the masks equal the gathered sequence."""
    model = small({"name": "dyvm", "keep": 0.9, "block_ratio": 1}, cls_position=position)
    reducer = model.reduction
    reducer.ratios = {}  # pruning is done by hand
    state = states(model, 2)
    first, second = torch.rand(3, 64), torch.rand(3, 64)
    kept = torch.zeros_like(first).scatter(1, first.topk(40).indices, 1.0)
    # the second score belongs to places; stays paths see the patches in another sequence
    stays = kept * second
    left = torch.zeros_like(first).scatter(1, stays.topk(17).indices, 1.0)

    short = keep_best(state, first, 40)
    long = keep_in_front(state, kept)
    for layer in (2, 3):
        short, long = (reducer.step(layer, model.layers[layer], s) for s in (short, long))
    short = keep_best(short, second.gather(1, short.places), 17)
    long = keep_in_front(long, left.gather(1, long.places) * long.kept)
    for layer in (4, 5):
        short, long = (reducer.step(layer, model.layers[layer], s) for s in (short, long))

    assert long.places[:, :17].tolist() == short.places.tolist()
    assert long.kept.sum(1).tolist() == [17, 17, 17]
    assert torch.unique(long.cls).tolist() == [short.cls]
    for name in ("hidden", "residual"):
        torch.testing.assert_close(getattr(long, name)[:, :18], getattr(short, name), rtol=1e-4, atol=1e-6)


def test_dropped_patches_reach_no_other():
    model = small({"name": "dyvm", "keep": 0.9, "block_ratio": 1})
    model.reduction.ratios = {}
    state = states(model, 1)
    decision = torch.zeros(3, 64)
    decision[0, :5], decision[1, 10:40], decision[2] = 1, 1, 1
    state = keep_in_front(state, decision)
    counts = [5, 30, 64]
    changed = state.hidden.clone()
    for b, count in enumerate(counts):
        changed[b, count + 1 :] += 100
    step = model.reduction.step
    out, other = (
        step(1, model.layers[1], type(state)(**{**vars(state), "hidden": h})) for h in (state.hidden, changed)
    )
    for b, count in enumerate(counts):
        assert state.cls[b].item() == count // 2
        torch.testing.assert_close(out.hidden[b, : count + 1], other.hidden[b, : count + 1])
        if count < 64:
            assert not torch.allclose(out.hidden[b, count + 1 :], other.hidden[b, count + 1 :])


def test_an_image_may_lose_every_patch():
    model = small({"name": "dyvm", "keep": 0.9, "block_ratio": 1})
    model.reduction.ratios = {}
    state = keep_in_front(states(model, 1), torch.zeros(3, 64))
    state = model.reduction.step(1, model.layers[1], state)
    assert state.cls.flatten().tolist() == [0, 0, 0]
    assert state.hidden.isfinite().all()


def test_predictors_and_switches_learn_from_the_answer_alone():
    model = small({"name": "dyvm", "keep": 0.7}).train()
    torch.manual_seed(0)
    output = model.forward_reduced(images(8))
    F.cross_entropy(output.logits, torch.arange(8) % 5).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        if name.startswith("reduction.") and not name.endswith("switches.5.weight"):
            assert p.grad.abs().sum() > 0, name
    # decisions are samples: hard, and once dropped is dropped
    first, second, third = output.decisions
    assert first.unique().round().tolist() in ([0.0, 1.0], [0.0, 1.0, 1.0])
    assert second.sum() < first.sum()
    assert third.sum() < second.sum()
    torch.testing.assert_close(output.kept.sum(1), third.sum(1))
    assert (output.kept.diff(dim=1) < 0.5).all()  # kept patches come first


def test_samples_follow_the_seed():
    model = small({"name": "dyvm"}).train()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model(images()))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_switched_scans_against_a_loop_over_images():
    model = small({"name": "dyvm", "keep": 1, "block_ratio": 0.5})
    reducer, x = model.reduction, images(6)
    with torch.no_grad():
        # in the first block the CLS token does not know the image yet
        first = reducer.step(0, model.layers[0], reducer.start(model._tokens(x)[0], "middle"))
        assert len(first.switches[0].unique(dim=0)) == 1
        mixer = model.layers[1].mixer
        normed, _ = model.layers[1].norm(first.hidden, first.residual)
        out, state = reducer.mix(1, mixer, normed, first)
        on = state.switches[1]
        assert 0 < on.mean() < 1
        inputs, z = mixer.project(normed)
        for b in range(6):
            forward, backward = mixer.directions(inputs[b : b + 1])
            y = on[b, 0] * mixer.scan(forward, reverse=False) + on[b, 1] * mixer.scan(backward, reverse=True)
            torch.testing.assert_close(out[b : b + 1], mixer.finish(y, z[b : b + 1]), rtol=1e-4, atol=1e-6)


def test_the_switch_reads_the_cls_row():
    model = small({"name": "dyvm", "keep": 1, "block_ratio": 0.5})
    reducer, mixer = model.reduction, model.layers[0].mixer
    state = reducer.start(torch.randn(2, 65, 16), "middle")
    with torch.no_grad():
        _, mixed = reducer.mix(0, mixer, state.hidden, state)
        row = mixer.in_proj(state.hidden[:, 32])
    assert mixed.switches[0].tolist() == (reducer.switches[0](row) > 0).float().tolist()


def test_scans_that_are_off_are_not_computed():
    model = small({"name": "dyvm", "keep": 1, "block_ratio": 0.5})
    x = images(4)
    with torch.no_grad():
        some = count_macs(model, x)
        for switch in model.reduction.switches:
            switch.weight.zero_()
            switch.bias.fill_(1.0)
        every = count_macs(model, x)
        assert torch.equal(model.forward_reduced(x).switches, torch.ones(4, 6, 2))
        for switch in model.reduction.switches:
            switch.bias.fill_(-1.0)
        none = count_macs(model, x)
        assert model(x).isfinite().all()
    assert none < some < every


def test_penalties():
    model = small({"name": "dyvm", "keep": 0.5, "ratio_weight": 3}).train()
    torch.manual_seed(0)
    output = model.forward_reduced(images())
    terms = model.reduction.penalties(output)
    distance = sum(((d.mean(1) - 0.5**stage) ** 2).mean().item() for stage, d in enumerate(output.decisions, start=1))
    assert terms["token_ratio"][0] == terms["block_ratio"][0] == 3
    assert terms["token_ratio"][1].item() == pytest.approx(distance / 3, rel=1e-5)
    assert terms["block_ratio"][1].item() == pytest.approx((output.switches.mean().item() - 0.8) ** 2, rel=1e-4)
    assert (
        small({"name": "dyvm", "keep": 1, "block_ratio": 1}).reduction.penalties(
            output._replace(decisions=(), switches=None)
        )
        == {}
    )


def test_shares_at_test_time_are_of_all_patches():
    model = small({"name": "dyvm", "keep": 0.7})
    output = model.forward_reduced(images())
    assert model.config.reduction.patch_counts(64, 6) == (64, 44, 44, 31, 21, 21)
    assert output.patches.shape[1] == 21
    assert output.kept is None
    assert output.decisions == ()
