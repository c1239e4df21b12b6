"""Cheaper fine passes: each against a plain reference written out, and equal to the default where it saves nothing."""

import pytest
import torch

from mambascope.layers import CellPool, cls_index, remove_cls
from mambascope.models import MambaScope, ScopeConfig
from mambascope.models.cost import stage_macs
from mambascope.models.export import export_program, stages
from mambascope.ops import selective_scan
from tests.conftest import relative_error

SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_classes": 5, "alpha": 0.5}


def scope(**kwargs) -> MambaScope:
    torch.manual_seed(1)
    return MambaScope(**{**SMALL, **kwargs}).eval()


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 3, 48, 48)


def encoded(model: MambaScope, tokens: torch.Tensor, blocks: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual stream [B, L, d] after some blocks, one at a time, and the normalised one."""
    stream = tokens
    for i in blocks:
        normed = torch.nn.functional.rms_norm(stream, stream.shape[-1:], model.layers[i].norm.weight, 1e-5)
        stream = stream + model.layers[i].mixer(normed)[0]
    return stream, torch.nn.functional.rms_norm(stream, stream.shape[-1:], model.norm_f.weight, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cls", ["first", "middle", "last"])
def test_rest_none_reads_cls_and_the_refined_tokens_alone(x, cls):
    model = scope(rest_tokens="none", fine_cls=cls)
    coarse = model.forward_coarse(x)
    fine = model.forward_fine(x, coarse)
    own, _, token, _, _ = model._fine_parts(x, coarse, None)
    at = cls_index(own.shape[1], cls)
    sequence = torch.cat([own[:, :at], token.expand(3, -1, -1), own[:, at:]], dim=1)
    assert fine.length == sequence.shape[1] == 1 + 4 * 5
    assert relative_error(fine.tokens, encoded(model, sequence, range(4))[1]) < 1e-4
    with pytest.raises(ValueError, match="rest_tokens must not be 'none' for a map"):
        model.fine_map(fine.tokens, fine, coarse.grid)
    # with nothing left over it is the default
    default = scope()
    assert torch.equal(model.forward_both(x, 1.0).fine, scope(fine_cls=cls).forward_both(x, 1.0).fine)
    assert not torch.allclose(model.forward_both(x).fine, default.forward_both(x).fine)


@torch.no_grad()
@pytest.mark.parametrize("start", [1, 3])
def test_fine_depth_runs_the_last_blocks(x, start):
    model = scope(fine_depth=4 - start)
    coarse = model.forward_coarse(x)
    sequence, _ = model._arrange(*model._fine_parts(x, coarse, None)[:3])
    fine = model.forward_fine(x, coarse, take=(3,))
    stream, normed = encoded(model, sequence, range(start, 4))
    assert relative_error(fine.tokens, normed) < 1e-4
    assert relative_error(fine.taken[0], stream) < 1e-4
    with pytest.raises(ValueError, match=rf"take must name blocks from {start} on in this fine pass, got \[0, 3\]"):
        model.forward_fine(x, coarse, take=[0, 3])


@torch.no_grad()
@pytest.mark.parametrize(("depth", "join"), [(None, 2), (3, 3), (2, None), (None, 0)])
@pytest.mark.parametrize("layout", [{"fine_cls": "middle"}, {"fine_cls": "last", "fine_order": "important_last"}])
def test_rest_state_joins_where_the_coarse_pass_left_it(x, depth, join, layout):
    model = scope(rest_tokens="state", fine_depth=depth, rest_join=join, **layout)
    start, joined = model.config.fine_start, model.config.rest_start
    assert (start, joined) == (4 - (depth or 4), (4 - (depth or 4)) if join is None else join)
    plain = scope(**layout).forward_coarse(x, take=range(4))
    coarse = model.forward_coarse(x, take=(1, 3))
    assert torch.equal(coarse.logits, plain.logits)
    assert torch.equal(coarse.importance, plain.importance)
    assert [relative_error(a, plain.taken[i]) for a, i in zip(coarse.taken, (1, 3), strict=True)] == [0, 0]
    state = plain.tokens if joined == 0 else remove_cls(plain.taken[joined - 1], model.config.cls_position)
    assert torch.equal(coarse.tokens, state)

    own, rest, cls, _, others = model._fine_parts(x, coarse, None)
    assert torch.equal(rest, state.gather(1, others.unsqueeze(-1).expand(-1, -1, 32)))
    place = layout["fine_cls"]
    alone, _ = model._arrange(own, rest[:, :0], cls)
    stream, _ = encoded(model, alone, range(start, joined))
    at = cls_index(own.shape[1], place)
    whole, _ = model._arrange(remove_cls(stream, place), rest, stream[:, at : at + 1])
    expected = encoded(model, whole, range(joined, 4))[1]
    assert relative_error(model.forward_fine(x, coarse).tokens, expected) < 1e-4


@torch.no_grad()
def test_state_before_the_first_block_is_the_embedding(x):
    state, embedding = scope(rest_tokens="state", rest_join=0), scope()
    assert torch.equal(state.forward_both(x).fine, embedding.forward_both(x).fine)


def naive_pool(sequence: list, groups: list[list[int]]) -> list:
    return [sum(sequence[i] for i in group) / len(group) for group in groups]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("cells", [0, 1, 3])
@pytest.mark.parametrize("singles", [0, 2])
def test_cell_pool_by_hand(first, cells, singles):
    length = 4 * cells + singles + 1
    values = torch.randn(length)
    for at in range(length):
        body = [i for i in range(length) if i != at]
        split = 0 if first else singles
        groups = [body[split + 4 * c : split + 4 * c + 4] for c in range(cells)]
        single = [[i] for i in (body[4 * cells :] if first else body[:singles])]
        ordered = groups + single if first else single + groups
        ahead = sum(group[0] < at for group in ordered)  # a group that CLS splits comes before it
        ordered.insert(ahead, [at])
        pool = CellPool(cells, at, first)
        pooled = pool.pool(values.view(1, -1, 1))
        assert pooled.flatten().tolist() == pytest.approx(naive_pool(values.tolist(), ordered), abs=1e-6)
        back = pool.unpool(pooled).flatten()
        expected = torch.empty(length)
        for row, group in zip(pooled.flatten(), ordered, strict=True):
            expected[group] = row
        assert torch.equal(back, expected)


def plain_pooled_mixer(mixer, u, pool):
    """FastVim's mixer with cells in place of rows: one direction at a time, nothing fused."""
    x, z = mixer.in_proj(u).chunk(2, dim=-1)
    total = 0
    for x_dir, side, reverse in zip(mixer.convolve(x), ("", "_b"), (False, True), strict=True):
        x_proj, dt_proj = getattr(mixer, f"x_proj{side}"), getattr(mixer, f"dt_proj{side}")
        a, d = getattr(mixer, f"A{side}_log"), getattr(mixer, f"D{side}")
        means = pool.pool(x_dir)
        low, b, c = x_proj(means).split([mixer.dt_proj.weight.shape[1], 16, 16], dim=-1)
        y = selective_scan(
            means, low, -a.exp(), b, c, None, dt_weight=dt_proj.weight, dt_bias=dt_proj.bias, reverse=reverse,
            backend="reference",
        )  # fmt: skip
        total = total + pool.unpool(y) + d * x_dir
    return mixer.out_proj(total * torch.nn.functional.silu(z) / 2)


@pytest.mark.parametrize("at", [0, 6, 14])
def test_pooled_mixer_equals_the_plain_one_and_its_gradients(at):
    torch.manual_seed(0)
    mixer = scope().layers[1].mixer
    pool = CellPool(3, at)
    u = torch.randn(2, 3 * 4 + 2 + 1, 32, requires_grad=True)
    weights = torch.randn(2, 15, 32)
    results = []
    for run in (lambda: mixer(u, None, pool)[0], lambda: plain_pooled_mixer(mixer, u, pool)):
        out = run()
        grads = torch.autograd.grad((out * weights).sum(), [u, *mixer.parameters()])
        results.append([out, *grads])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-4


@torch.no_grad()
def test_groups_of_one_are_the_mixer_itself():
    mixer, u = scope().layers[0].mixer, torch.randn(2, 11, 32)
    assert relative_error(mixer(u, None, CellPool(7, 4, size=1))[0], mixer(u)[0]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("kind", "depth", "blocks"), [("all", None, (0, 1, 2, 3)), ("alternate", None, (1, 3)),
                                                       ("alternate", 3, (2,)), ("all", 1, (3,))])  # fmt: skip
def test_fine_pool_names_blocks_of_the_fine_pass(x, kind, depth, blocks):
    model = scope(fine_pool=kind, fine_depth=depth, fine_cls="middle")
    assert model.config.pooled_layers == blocks
    seen = []
    for i, block in enumerate(model.layers):
        block.mixer.register_forward_pre_hook(lambda _, args, i=i: seen.append((i, args[2] is not None)))
    coarse = model.forward_coarse(x)
    assert seen == [(i, False) for i in range(4)]  # the coarse pass has no cells to average
    seen.clear()
    model.forward_fine(x, coarse)
    assert seen == [(i, i in blocks) for i in range(model.config.fine_start, 4)]


def test_every_option_is_cheaper():
    base = ScopeConfig(**SMALL)
    full = stage_macs(base, convention="both_directions")
    for change in ({"rest_tokens": "none"}, {"rest_tokens": "state", "rest_join": 2}, {"fine_depth": 3},
                   {"fine_pool": "alternate"}, {"fine_pool": "all"}):  # fmt: skip
        cost = stage_macs(ScopeConfig(**SMALL, **change), convention="both_directions")
        assert cost.fine < full.fine, change
        assert cost.coarse == full.coarse


OPTIONS = [
    {"rest_tokens": "none"},
    {"rest_tokens": "state", "rest_join": 2},
    {"fine_depth": 2, "rest_tokens": "state"},
    {"fine_pool": "alternate", "fine_cls": "middle"},
    {"fine_pool": "all", "rest_tokens": "none", "fine_order": "important_last"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_parameter_gets_a_gradient(x, options):
    model = scope(**options).train()
    coarse, fine = model(x)
    (coarse.square().sum() + fine.square().sum()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
def test_exported_stages_agree(x, options):
    model = scope(**options)
    expected = model.forward_both(x)
    module, inputs = stages(model, x)["fine"]
    assert torch.allclose(export_program(module, inputs).module()(*inputs)[0], expected.fine, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
def test_images_alone_and_in_a_batch(x, options):
    model = scope(**options)
    with torch.no_grad():
        model.head.weight.mul_(60)
    both = model.forward_scope(x, 1.0)
    for i in range(3):
        assert relative_error(model.forward_scope(x[i : i + 1], 1.0).logits[0], both.logits[i]) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rest_tokens": "all"}, "rest_tokens must be one of 'embedding', 'features', 'state', 'none', got 'all'"),
        ({"fine_depth": 5}, r"fine_depth must lie in 1..4 \(the depth\), got 5"),
        ({"fine_depth": 0}, "fine_depth must be a positive integer"),
        ({"rest_join": 1}, "rest_join needs rest_tokens to be 'state', got 'embedding'"),
        ({"rest_tokens": "state", "rest_join": 4}, r"rest_join must lie in 0..3 \(blocks of the fine pass\), got 4"),
        ({"rest_tokens": "state", "rest_join": 1, "fine_depth": 2}, "rest_join must lie in 2..3"),
        ({"fine_pool": "rows"}, "fine_pool must be one of 'off', 'alternate', 'all'"),
        ({"fine_pool": "all", "cell_order": "raster"}, "fine_pool needs cell_order to be 'cell', got 'raster'"),
        ({"fine_pool": "all", "registers": 2}, "fine_pool needs registers to be 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MambaScope(**{**SMALL, **options})
