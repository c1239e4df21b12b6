"""The identities of coarse-to-fine inference."""

import pytest
import torch
import torch.nn.functional as F

from mambascope import MambaScope, VisionMamba
from mambascope.models.cells import children, num_selected, select_cells
from mambascope.models.scores import largest, top_channels
from tests.conftest import FineCalls, relative_error

SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_classes": 5}


def scope(**kwargs) -> MambaScope:
    torch.manual_seed(1)
    model = MambaScope(**{**SMALL, **kwargs}).eval()
    with torch.no_grad():  # spread the confidences, so that a threshold can split a batch
        model.head.weight.mul_(60)
    return model


def twin(model: MambaScope, **kwargs) -> VisionMamba:
    """A plain Vim that shares the encoder's weights."""
    vim = VisionMamba(**{**SMALL, **kwargs}).eval()
    state = vim.state_dict()
    vim.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in state and v.shape == state[k].shape}, strict=False
    )
    return vim


def middle_threshold(model: MambaScope, x: torch.Tensor) -> float:
    conf = model.forward_scope(x, 0.0).confidence.sort().values
    return float(conf[len(conf) // 2 - 1 : len(conf) // 2 + 1].mean())


@pytest.mark.parametrize("size", [(48, 48), (32, 64)])
def test_exit_everything_is_a_plain_vim_on_the_half_image(size):
    model, x = scope(), torch.randn(3, 3, *size)
    vim = twin(model, img_size=24)
    with torch.no_grad():
        vim.pos_embed.copy_(model.pos_embed_coarse)
        fine = FineCalls(model)
        half = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        expected = vim(half)
        out = model.forward_scope(x, threshold=0.0)
    assert torch.allclose(out.logits, expected, rtol=1e-4, atol=1e-4)
    assert out.exited.all()
    assert (out.selected == -1).all()
    assert fine.images == 0


@pytest.mark.parametrize("size", [(48, 48), (32, 64)])
def test_refine_everything_is_a_plain_vim_on_the_full_image(size):
    model = scope(alpha=1.0, reuse="off", cell_order="raster", fine_cls="middle")
    x = torch.randn(2, 3, *size)
    vim = twin(model)
    with torch.no_grad():
        out, expected = model.forward_scope(x, threshold=1.0), vim(x)
    assert relative_error(out.logits, expected) < 1e-5
    assert not out.exited.any()


@torch.no_grad()
def test_mixed_batch_gives_each_image_what_it_gets_alone():
    model, x = scope(), torch.randn(8, 3, 48, 48)
    eta = middle_threshold(model, x)
    fine = FineCalls(model)
    out = model.forward_scope(x, eta)
    refined = int((~out.exited).sum())
    assert 0 < refined < 8
    assert fine.images == refined  # the fine stage saw nothing else
    for i in range(8):
        alone = model.forward_scope(x[i : i + 1], eta)
        assert alone.exited[0] == out.exited[i]
        assert relative_error(alone.logits[0], out.logits[i]) < 1e-4
        assert torch.equal(alone.selected[0], out.selected[i])
        assert alone.tokens[0] == out.tokens[i]
    exited = out.exited
    assert torch.equal(out.logits[exited], out.coarse_logits[exited])
    assert not torch.allclose(out.logits[~exited], out.coarse_logits[~exited])
    assert (out.selected[exited] == -1).all()
    assert (out.selected[~exited] >= 0).all()


@torch.no_grad()
def test_permuting_the_batch_permutes_the_output():
    model, x = scope(), torch.randn(6, 3, 48, 48)
    eta, order = middle_threshold(model, x), torch.randperm(6)
    assert relative_error(model.forward_scope(x[order], eta).logits, model.forward_scope(x, eta).logits[order]) < 1e-4


@torch.no_grad()
def test_exit_share_rises_when_the_threshold_falls():
    model, x = scope(), torch.randn(16, 3, 48, 48)
    shares = [model.forward_scope(x, eta).exited.float().mean().item() for eta in (1.0, 0.95, 0.9, 0.7, 0.5, 0.2, 0.0)]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 1


@torch.no_grad()
@pytest.mark.parametrize("eta", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_all_and_none_exit(batch, eta):
    model = scope()
    fine = FineCalls(model)
    out = model.forward_scope(torch.randn(batch, 3, 48, 48), eta)
    assert out.logits.shape == (batch, 5)
    assert fine.images == int((~out.exited).sum())


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.7, 1.0])
def test_token_count(alpha):
    model = scope(alpha=alpha)
    out = model.forward_scope(torch.randn(2, 3, 48, 48), 1.0)
    k = num_selected(alpha, 9)
    assert out.selected.shape == (2, k)
    assert out.tokens.tolist() == [10 + 1 + 4 * k + 9 - k] * 2


@torch.no_grad()
def test_alpha_zero_is_the_coarse_model():
    model, x = scope(alpha=0.0), torch.randn(2, 3, 48, 48)
    fine = FineCalls(model)
    out = model.forward_scope(x, 1.0)
    assert torch.equal(out.logits, out.coarse_logits)
    assert fine.images == 0


@torch.no_grad()
@pytest.mark.parametrize("size", [(192, 256), (225, 300), (17, 33), (1, 1)])
def test_any_size(size):
    model = scope()
    out = model.forward_scope(torch.randn(1, 3, *size), 1.0)
    assert out.grid == (-(-size[0] // 16), -(-size[1] // 16))
    assert out.importance.shape == (1, out.grid[0] * out.grid[1])
    assert torch.isfinite(out.logits).all()


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        *({"score_metric": m} for m in ("l2", "mean", "clip", "softplus", "topk")),
        {"score_layers": 1},
        {"score_layers": 4},
        {"beta": 0.0},
        {"fine_cls": "middle"},
        {"fine_cls": "last"},
        {"fine_order": "important_last"},
        {"cell_order": "raster"},
        {"reuse": "linear"},
        {"reuse": "off"},
        {"reuse_cls": True},
        {"coarse_pos": "resampled"},
        {"cls_position": "first"},
        {"global_pool": "avg"},
        {"global_pool": "lse"},
    ],
)
def test_every_option_changes_the_fine_logits(options):
    x = torch.randn(4, 3, 48, 48)
    base, model = scope(alpha=0.4), scope(alpha=0.4, **options)
    state = model.state_dict()
    model.load_state_dict(
        {k: v for k, v in base.state_dict().items() if k in state and state[k].shape == v.shape}, strict=False
    )
    expected, out = base.forward_both(x).fine, model.forward_both(x).fine
    assert out.shape == expected.shape
    changed = not torch.allclose(out, expected, rtol=1e-4, atol=1e-5)
    # another metric may happen to choose the same cells; the importance itself must then differ
    assert changed or not torch.allclose(model.forward_coarse(x).importance, base.forward_coarse(x).importance)


@torch.no_grad()
def test_fused_score_equals_the_materialised_one():
    model, x = scope(), torch.randn(2, 3, 48, 48)
    hidden, _ = model.layers[0].norm(model._tokens(x).tokens)
    mixer = model.layers[0].mixer
    out, fused = mixer(hidden, model.config.score.needs)
    assert fused.outputs is None  # not made
    out_slow, slow = mixer(hidden, ("outputs",))
    assert relative_error(out, out_slow) < 1e-5
    # the softplus of the one largest channel
    assert relative_error(largest(fused), top_channels(slow, 1)) < 1e-5


def test_training_returns_both_stages_and_every_parameter_gets_a_gradient():
    model = scope(alpha=0.5).train()
    coarse, fine = model(torch.randn(2, 3, 48, 48))
    kl = F.kl_div(coarse.log_softmax(-1), fine.detach().log_softmax(-1), log_target=True, reduction="batchmean")
    (F.cross_entropy(fine, torch.tensor([0, 1])) + kl).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_selection_breaks_ties_by_index_and_keeps_raster_order():
    importance = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    selected, others = select_cells(importance, 0.4)
    assert selected.tolist() == [[1, 2], [0, 1]]
    assert others.tolist() == [[0, 3, 4], [2, 3, 4]]
    assert num_selected(0.7, 10) == 7
    assert num_selected(0.7, 49) == 35


def test_children_are_the_four_fine_patches():
    grid = torch.arange(4 * 6).reshape(4, 6)
    for cell in range(6):
        r, c = divmod(cell, 3)
        expected = [grid[2 * r + i, 2 * c + j].item() for i in (0, 1) for j in (0, 1)]
        assert children(torch.tensor(cell), (2, 3)).tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"cell_order": "raster", "fine_cls": "middle"}, {"fine_order": "important_last", "fine_cls": "last"}],
)
def test_fine_map_puts_every_token_where_it_belongs(options):
    model, x = scope(alpha=0.5, **options), torch.randn(2, 3, 32, 48)
    coarse = model.forward_coarse(x)
    fine = model.forward_fine(x, coarse)
    selected, others = fine.selected, fine.remaining
    embedded = model.refined_tokens(x, [], coarse, selected)
    sequence = model.fine_sequence(embedded, coarse, others)
    spatial = model.fine_map(sequence, fine, coarse.grid).flatten(2).transpose(1, 2)
    for b in range(2):
        where = children(selected[b], coarse.grid).flatten()
        if model.config.cell_order == "raster":
            where = where.sort().values
        assert torch.equal(spatial[b, where], embedded[b])
        for cell, token in zip(others[b], coarse.tokens[b, others[b]], strict=True):
            assert torch.equal(spatial[b, children(cell, coarse.grid)], token.expand(4, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha must lie in"),
        ({"beta": 1.0}, "beta must lie in"),
        ({"score_metric": "best"}, "score_metric must be one of max, l2"),
        ({"fine_cls": "top"}, "fine_cls must be one of"),
        ({"reuse": "conv"}, "reuse must be one of"),
        ({"stride": 4}, "stride must equal patch_size"),
        ({"score_layers": 9}, "score_layers must lie in 1..4"),
        ({"widht": 9}, "unknown model argument widht"),
        ({"img_size": 0}, "img_size must be a positive"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MambaScope(**{**SMALL, **options})


def test_wrong_channels_are_named():
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\]"):
        scope().forward_scope(torch.randn(1, 1, 48, 48))


@pytest.mark.parametrize("size", [(0, 48), (48, 0)])
def test_images_without_a_pixel_are_named(size):
    model, vim = scope(), VisionMamba(img_size=48, patch_size=8, embed_dim=16, depth=1)
    for call in (model, lambda x: model.forward_scope(x, 0.5), vim):
        with pytest.raises(ValueError, match=f"images must have at least one pixel, got {size[0]} x {size[1]}"):
            call(torch.randn(1, 3, *size))


@torch.no_grad()
def test_alpha_zero_holds_in_both_stages_too():
    model = scope(alpha=0.0)
    coarse, fine = model.forward_both(torch.randn(2, 3, 48, 48))
    assert torch.equal(coarse, fine)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", ""])
def test_without_a_classifier_everything_is_refined(pool):
    model, x = scope(), torch.randn(3, 3, 48, 48)
    model.reset_classifier(0, pool)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x)))
    with pytest.raises(ValueError, match="threshold must be 0 or 1 in a model without a classifier"):
        model.forward_scope(x, 0.5)


@torch.no_grad()
def test_refining_synchronises_once():
    """Each of these operators would wait for the device."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name().split("::")[1].split(".")[0])
            return func(*args, **(kwargs or {}))

    model, x = scope(), torch.randn(8, 3, 48, 48)
    eta = middle_threshold(model, x)
    with Count() as count:
        out = model.forward_scope(x, eta)
    assert 0 < int(out.exited.sum()) < 8
    waits = [n for n in count.names if n in ("nonzero", "_local_scalar_dense", "item", "is_nonzero", "lift_fresh")]
    assert waits == ["nonzero"]


@torch.no_grad()
def test_copies_and_low_precision():
    import copy
    import pickle

    model, x = scope(), torch.randn(2, 3, 48, 48)
    expected = model.forward_both(x).fine
    for twin_ in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin_.forward_both(x).fine, expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.forward_both(x).fine
    assert relative_error(low.float(), expected) < 0.1
    wide = copy.deepcopy(model).double().forward_both(x.double()).fine
    assert wide.dtype == torch.float64
    assert relative_error(expected, wide) < 1e-3


@pytest.mark.parametrize("alpha", [-1.0, 2.0])
def test_alpha_outside_its_range_is_named(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
        scope().forward_scope(torch.randn(1, 3, 48, 48), 0.5, alpha=alpha)


def test_gradients_are_the_same_bits_in_every_run():
    """Resumed training is exact only if no sum depends on which thread came first."""
    torch.manual_seed(0)
    model = scope(img_size=64, embed_dim=96).train()
    x = torch.randn(32, 3, 64, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        for shift in range(4):
            moved = torch.empty(x.numel() + 16)[shift : shift + x.numel()].view_as(x).copy_(x)
            model.zero_grad()
            sum(logits.square().sum() for logits in model(moved)).backward()
            seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    finally:
        torch.set_num_threads(before)
    assert len(seen[0]) > 50
    different = {name for grads in seen[1:] for name, grad in grads.items() if not torch.equal(grad, seen[0][name])}
    assert not different
