"""Merging: which tokens, into which, in what order, and with what weight."""

import pytest
import torch
import torch.nn.functional as F

from mambascope.models.scores import mean_step
from mambascope.ops.selective_scan.common import step_sizes
from mambascope.peers import MTRConfig, RMeeToConfig, ToMeConfig
from mambascope.peers.merging import Matching, MergeState, match_bipartite, match_least, merge
from tests.peers.common import images, small


def tokens(b=2, m=9, d=6, seed=0):
    return torch.randn(b, m, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("m", [8, 9])
def test_bipartite_matching_against_a_loop(m):
    x, r = tokens(m=m), 3
    matching = match_bipartite(x, r)
    for b in range(2):
        best = []
        for even in range(0, m, 2):
            similar = {odd: F.cosine_similarity(x[b, even], x[b, odd], dim=0).item() for odd in range(1, m, 2)}
            partner = max(similar, key=similar.get)
            best.append((similar[partner], even, partner))
        pairs = sorted(best, reverse=True)[:r]
        assert matching.sources[b].tolist() == [even for _, even, _ in pairs]
        assert matching.targets[b].tolist() == [odd for _, _, odd in pairs]
        assert matching.stay[b].tolist() == sorted(set(range(m)) - {even for _, even, _ in pairs})


def test_tome_forgets_the_order():
    x = tokens()
    matching, ordered = match_bipartite(x, 2, ordered=False), match_bipartite(x, 2)
    assert matching.stay[0].tolist() != ordered.stay[0].tolist()
    assert sorted(matching.stay[0].tolist()) == ordered.stay[0].tolist()
    assert matching.stay[0].tolist()[-4:] == [1, 3, 5, 7]


def test_the_least_important_leave_for_the_most_similar():
    x = tokens()
    score = torch.tensor([5.0, 1, 7, 3, 9, 2, 8, 6, 4]).expand(2, -1)
    matching = match_least(x, score, 3)
    for b in range(2):
        assert sorted(matching.sources[b].tolist()) == [1, 3, 5]
        assert matching.stay[b].tolist() == [0, 2, 4, 6, 7, 8]
        for source, target in zip(matching.sources[b].tolist(), matching.targets[b].tolist(), strict=True):
            similar = {stay: F.cosine_similarity(x[b, source], x[b, stay], dim=0).item() for stay in (0, 2, 4, 6, 7, 8)}
            assert target == max(similar, key=similar.get)


def test_of_equal_scores_the_later_leave():
    matching = match_least(tokens(), torch.zeros(2, 9), 2)
    assert sorted(matching.sources[0].tolist()) == [7, 8]


def test_merged_tokens_are_size_weighted_means_and_cls_is_left_alone():
    hidden, residual = tokens(m=7, seed=1), tokens(m=7, seed=2)
    sizes = torch.tensor([1.0, 2, 3, 1, 4, 1, 1]).expand(2, -1)  # CLS is row 3: patches are rows 0 1 2 4 5 6
    # patches 0 and 4 (rows 0 and 5) go into patch 2 (row 2)
    matching = Matching(torch.tensor([[0, 4]] * 2), torch.tensor([[2, 2]] * 2), torch.tensor([[1, 2, 3, 5]] * 2))
    state = merge(MergeState(hidden, residual, "middle", 3, sizes), matching)
    assert state.cls == 3 * 5 // 7 == 2
    assert state.sizes[0].tolist() == [2, 5, 1, 4, 1]
    for before, after in ((hidden, state.hidden), (residual, state.residual)):
        mean = (1 * before[:, 0] + 1 * before[:, 5] + 3 * before[:, 2]) / 5
        merged = torch.stack([before[:, 1], mean, before[:, 3], before[:, 4], before[:, 6]], dim=1)
        torch.testing.assert_close(after, merged)


@pytest.mark.parametrize("config", [RMeeToConfig(r=13), ToMeConfig(r=13), MTRConfig(r=13)], ids=lambda c: c.name)
def test_nothing_is_lost_and_every_token_gets_a_gradient(config):
    """Size-weighted sums are those of the patches; so each patch reaches the sequence that is left."""
    model = small({"name": config.name, "r": 13})
    reducer = model.reduction
    x = torch.randn(2, 65, 16, requires_grad=True)
    state = reducer.start(x * 1.0, "middle")
    state.residual = torch.randn(2, 65, 16)
    for layer in (2, 4):
        state.score = torch.rand(2, state.hidden.shape[1])
        state = reducer.before(layer, state)
    assert state.hidden.shape == (2, 39, 16)
    assert state.sizes.sum(1).tolist() == [65, 65]
    torch.testing.assert_close((state.hidden * state.sizes.unsqueeze(-1)).sum(1), x.sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.hidden[:, state.cls], x[:, 32])
    state.hidden.sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()


def test_blocks_run_on_what_is_left():
    model, lengths = small({"name": "r_meeto", "r": 10, "start": 1, "every": 2}), []
    for block in model.layers:
        block.register_forward_pre_hook(lambda *_: lengths.append("whole block"))
        block.mixer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    with torch.no_grad():
        assert model.forward_features(images()).shape == (3, 35, 16)
    assert lengths == [65, 55, 55, 45, 45, 35]
    assert model.config.reduction.patch_counts(64, 6) == (64, 54, 54, 44, 44, 34)


def test_r_meeto_keeps_the_order_and_tome_does_not():
    """With patches that say where they are, the first feature must rise along what is left."""

    def left(name):
        model = small({"name": name, "r": 20})
        state = model.reduction.start(torch.randn(1, 65, 16), "middle")
        place = torch.linspace(0, 1, 65).view(1, 65, 1).expand(1, 65, 16)
        state.residual, state.sizes = place.clone(), torch.ones(1, 65)
        matching = model.reduction.match(torch.randn(1, 64, 16), state)
        return matching.stay[0]

    assert (left("r_meeto").diff() > 0).all()
    assert not (left("tome").diff() > 0).all()


def test_mtr_scores_by_the_mean_step_size():
    mixer = small().layers[0].mixer
    tokens = torch.randn(2, 7, 16)
    _, trace = mixer(tokens, ("steps",))
    assert not mean_step(trace).requires_grad
    torch.testing.assert_close(mean_step(trace), mean_steps(mixer, tokens))


def mean_steps(mixer, tokens):
    """Of both directions, from what their scans are given."""
    total = 0
    for side in mixer.directions(mixer.project(tokens)[0]):
        rank = side.dt_weight.shape[1]
        steps = step_sizes(side.proj[..., :rank], side.dt_weight, side.dt_bias, True, torch.float32)
        total = total + steps.mean(-1)
    return total


def test_mtr_merges_what_the_block_before_scored_least():
    model = small({"name": "mtr", "r": 7, "start": 3, "every": 3})
    reducer, block = model.reduction, model.layers[2]
    state = reducer.start(torch.randn(2, 65, 16), "middle")
    state = reducer.step(2, block, state)
    normed, _ = block.norm(torch.zeros_like(state.residual), state.residual)
    score = mean_steps(block.mixer, normed)
    torch.testing.assert_close(state.score, score)
    patches = torch.cat([score[:, :32], score[:, 33:]], 1)
    leave = reducer.match(torch.randn(2, 64, 16), state).sources
    assert (patches.gather(1, leave).amax(1) <= patches.sort(1).values[:, 6] + 1e-6).all()
