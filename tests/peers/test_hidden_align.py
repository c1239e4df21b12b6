"""HiddenAlign: what is kept, and states that advance at pruned positions."""

import pytest
import torch

from mambascope.ops import ScanDirection
from mambascope.ops.selective_scan.common import ScanSide
from mambascope.ops.selective_scan.reference import scan_reference
from mambascope.peers.hidden_align import aligned_scan, gaps_between
from tests.peers.common import images, small


def direction(length, dtype=torch.float64, e=5, n=3, rank=2, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return ScanDirection(
        draw(2, length, e), draw(2, length, rank + 2 * n), draw(e, rank), draw(e), -draw(e, n).exp(), draw(e)
    )


def with_empty_tokens(compact, places, length):
    """The full sequence: the tokens at their places [K], and nothing at the pruned ones."""
    x = compact.x.new_zeros(2, length, compact.x.shape[-1])
    proj = compact.proj.new_zeros(2, length, compact.proj.shape[-1])
    return compact._replace(
        x=x.index_copy(1, torch.tensor(places), compact.x), proj=proj.index_copy(1, torch.tensor(places), compact.proj)
    )


def loop(side, reverse):
    """The plain scan, one token after the other."""
    rank, n = side.dt_weight.shape[1], side.A.shape[1]
    dt, b, c = side.proj.split([rank, n, n], -1)
    return scan_reference(ScanSide(side.x, dt, side.A, b, c, side.D, side.dt_weight, side.dt_bias, reverse))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_aligned_scan_equals_the_loop_over_all_positions(reverse, backend):
    places, length = [1, 2, 6, 7, 11], 14
    compact = direction(len(places))
    gaps = torch.tensor(places).diff().sub(1).expand(2, -1)
    grads = []
    for run in (
        lambda side: aligned_scan(side, gaps, reverse=reverse, backend=backend),
        lambda side: loop(with_empty_tokens(side, places, length), reverse)[:, places],
    ):
        leaves = ScanDirection(*(t.clone().requires_grad_() for t in compact))
        y = run(leaves)
        grads.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for aligned, looped in zip(*grads, strict=True):
        torch.testing.assert_close(aligned, looped, rtol=1e-9, atol=1e-9)


def test_without_gaps_it_is_the_plain_scan_and_with_gaps_it_is_not():
    compact = direction(6)
    none = torch.zeros(2, 5, dtype=torch.long)
    torch.testing.assert_close(aligned_scan(compact, none), loop(compact, False))
    assert not torch.allclose(aligned_scan(compact, none + 3), loop(compact, False))
    # the first token of the walk has nothing before it
    torch.testing.assert_close(aligned_scan(compact, none + 3)[:, 0], loop(compact, False)[:, 0])


def test_wide_gaps_and_large_steps_stay_finite():
    compact = direction(6, torch.float32)
    compact = compact._replace(dt_bias=torch.full((5,), 40.0), x=compact.x.requires_grad_())
    y = aligned_scan(compact, torch.full((2, 5), 10**6))
    y.sum().backward()
    assert y.isfinite().all()
    assert compact.x.grad.isfinite().all()
    tiny = aligned_scan(compact._replace(dt_bias=torch.full((5,), -200.0)), torch.zeros(2, 5, dtype=torch.long))
    assert tiny.isfinite().all()


@pytest.mark.parametrize(
    ("places", "origin", "at", "gaps"),
    [
        ([0, 1, 2, 3], 2, 2, [0, 0, 0, 0]),  # nothing is pruned
        ([0, 3, 4, 5], 3, 2, [2, 0, 0, 0]),  # CLS stood before 3 and stands behind it: no gap is left on its way
        ([0, 1, 4, 7], 4, 2, [0, 2, 0, 2]),  # 2 and 3 were on CLS's left
        ([0, 1, 6, 7], 4, 2, [0, 2, 2, 0]),  # 2, 3 on its left, 4, 5 on its right
        ([2, 3, 4, 7], 0, 0, [2, 0, 0, 2]),  # CLS first
        ([0, 3, 4, 5], 8, 4, [2, 0, 0, 2]),  # CLS last
    ],
)
def test_gaps(places, origin, at, gaps):
    assert gaps_between(torch.tensor([places]), 8, origin, at).tolist() == [gaps]


@pytest.mark.parametrize("position", ["first", "middle", "last"])
def test_the_best_patches_stay_in_order_with_cls_at_its_place(position):
    model = small({"name": "hidden_align", "layers": [1], "keep": 0.25}, cls_position=position)
    reducer = model.reduction
    state = reducer.start(torch.randn(2, 65, 16), position)
    for layer in (0, 1):
        scored = reducer.step(layer, model.layers[layer], state) if layer == 0 else None
        state = scored if scored is not None else state
    # the block that prunes, without the pruning: its scores are read from the SSM outputs themselves
    mixer = model.layers[1].mixer
    normed, residual = model.layers[1].norm(state.hidden, state.residual)
    x, z = mixer.project(normed)
    forward, backward = mixer.directions(x)
    y = mixer.scan(forward, reverse=False) + mixer.scan(backward, reverse=True)
    score = y.clamp_min(0).sum(-1)
    cls = {"first": 0, "middle": 32, "last": 64}[position]
    patches = torch.tensor([row for row in range(65) if row != cls])
    best = score[:, patches].topk(16, dim=1).indices.sort(1).values
    out = mixer.finish(y, z)

    pruned = reducer.step(1, model.layers[1], state)
    assert pruned.places.tolist() == best.tolist()
    assert pruned.cls == {"first": 0, "middle": 8, "last": 16}[position]
    for b in range(2):
        rows = patches[best[b]].tolist()
        rows.insert(pruned.cls, cls)
        torch.testing.assert_close(pruned.residual[b], residual[b, rows])
        torch.testing.assert_close(pruned.hidden[b], out[b, rows])


def test_alignment_changes_only_the_blocks_behind_a_pruning():
    aligned, plain = (small({"name": "hidden_align", "layers": [2], "keep": 0.5, "align": a}) for a in (True, False))
    x = images()
    with torch.no_grad():
        a, p = (m.reduction.start(m._tokens(x)[0], "middle") for m in (aligned, plain))
        for layer in range(4):
            a = aligned.reduction.step(layer, aligned.layers[layer], a)
            p = plain.reduction.step(layer, plain.layers[layer], p)
            assert torch.equal(a.residual, p.residual)
            assert torch.equal(a.hidden, p.hidden) == (layer < 3)
    assert torch.equal(a.places, p.places)


def test_places_survive_several_prunings():
    model = small({"name": "hidden_align", "keep": 0.5})
    output = model.forward_reduced(images())
    assert output.patches.shape == (3, 8, 16)
    assert (output.places.diff(dim=1) > 0).all()
    assert output.places.amin() >= 0
    assert output.places.amax() < 64
    assert len({tuple(row) for row in output.places.tolist()}) == 3  # every image has its own
