"""Backbones: shapes, exits, identities, costs and arguments."""

import pytest
import torch
import torch.nn.functional as F

from mambascope.mm import ScopeBackbone, VimBackbone
from mambascope.models.cost import skipped_macs
from mambascope.models.registry import feature_blocks
from mambascope.models.vim import VisionMamba
from mambascope.ops.flops import count_macs
from tests.mm.common import refined_images, scope, vim


@pytest.mark.parametrize("make", [scope, vim])
@pytest.mark.parametrize("size", [(64, 64), (70, 101), (16, 16), (9, 130)])
def test_maps_cover_any_image(make, size):
    model = make(out_channels=24).eval()
    maps = model(torch.randn(2, 3, *size))
    assert [m.shape for m in make(out_channels=24, detail=True).eval()(torch.zeros(2, 3, *size))] == [
        m.shape for m in maps
    ]
    assert model.strides == (2, 4, 8, 16)
    expected = [(2, 24, -(-size[0] // s), -(-size[1] // s)) for s in (2, 4, 8, 16)]
    assert [tuple(m.shape) for m in maps] == expected


def test_patch16_strides_and_default_blocks():
    assert VimBackbone("vim_tiny_patch16_224", arch_options={"depth": 4, "embed_dim": 32}).strides == (4, 8, 16, 32)
    assert VimBackbone("vim_nano_patch8_64").out_indices == feature_blocks(6) == (1, 2, 4, 5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"readout": True},
        {"detail": True},
        {"detail": True, "coarse_resize": "learned"},
        {"detail": True, "out_channels": 24, "arch_options": {"stem_width": 12}},
        {"detail": True, "out_channels": 24, "arch_options": {"patch_size": 16}},
    ],
)
def test_mixed_batch_equals_single_images_and_fine_pass_reads_refined_rows_only(options):
    model = scope(**options).double().eval()
    x = torch.randn(7, 3, 70, 45, dtype=torch.float64)
    passes = refined_images(model)
    model.threshold = 0.0
    confidence = model.forward_scope(x).confidence
    assert passes == []
    model.threshold = float(confidence.sort().values[3:5].mean())
    mixed = model.forward_scope(x)
    assert mixed.exited.tolist() == (confidence >= model.threshold).tolist()
    assert 0 < int(mixed.exited.sum()) < 7
    assert passes == [int((~mixed.exited).sum())]
    assert bool(((mixed.selected == -1).all(1) == mixed.exited).all())
    for i in range(7):
        alone = model.forward_scope(x[i : i + 1])
        assert bool(alone.exited) == bool(mixed.exited[i])
        for a, b in zip(alone.maps, mixed.maps, strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=1e-9, atol=1e-9)
    order = torch.randperm(7)
    for a, b in zip(model(x[order]), mixed.maps, strict=True):
        torch.testing.assert_close(a, b[order], rtol=1e-9, atol=1e-9)


def test_all_exit_and_none_exit():
    model = scope().eval()
    x = torch.randn(3, 3, 64, 64)
    passes = refined_images(model)
    model.threshold = 0.0
    assert bool(model.forward_scope(x).exited.all())
    assert passes == []
    model.threshold = 1.0
    assert not bool(model.forward_scope(x).exited.any())
    assert passes == [3]
    model.encoder.alpha = 0.0  # nothing to re-read: the coarse model alone
    assert bool(model.forward_scope(x).exited.all())


def copy_encoder(source, target):
    tensors = target.encoder.state_dict()
    target.encoder.load_state_dict({k: source.encoder.state_dict()[k] for k in tensors})
    target.pyramid.load_state_dict(source.pyramid.state_dict())
    if source.detail is not None:
        target.detail.load_state_dict(source.detail.state_dict())


@pytest.mark.parametrize("stem", [0, 12])
@pytest.mark.parametrize("options", [{}, {"readout": True}, {"detail": True}])
def test_everything_refined_equals_plain_vim(options, stem):
    exact = {"alpha": 1.0, "reuse": "off", "cell_order": "raster", "fine_cls": "middle", "stem_width": stem}
    exact_model = scope(arch_options=exact, threshold=1.0, **options).double().eval()
    plain = vim(arch_options={"stem_width": stem}, **options).double().eval()
    copy_encoder(exact_model, plain)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for a, b in zip(exact_model(x), plain(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_exit_gives_the_half_size_image_resized():
    model = scope(threshold=0.0).double().eval()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    plain = (
        VisionMamba(
            model.encoder.config.__class__.__mro__[1](
                **{f: getattr(model.encoder.config, f) for f in ("embed_dim", "depth", "patch_size")},
                img_size=32,
                num_classes=0,
            )
        )
        .double()
        .eval()
    )
    state = model.encoder.state_dict()
    plain.load_state_dict({k: state["pos_embed_coarse" if k == "pos_embed" else k] for k in plain.state_dict()})
    half = plain.forward_intermediates(F.avg_pool2d(x, 2), indices=list(model.out_indices), intermediates_only=True)
    half = [F.interpolate(m, scale_factor=2, mode="bilinear", align_corners=False) for m in half]
    for a, b in zip(model(x), model.pyramid(half), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_unrefined_cells_get_their_coarse_token_four_times():
    model = scope(threshold=1.0, arch_options={"alpha": 0.5}).eval()
    x = torch.randn(1, 3, 64, 64)
    coarse = model.encoder.forward_coarse(x, take=model.out_indices)
    look, selected = model._fine_look(x, coarse)
    others = sorted(set(range(16)) - set(selected[0].tolist()))
    assert len(others) == 8
    for cell in range(16):
        r, c = divmod(cell, 4)
        block = look.maps[0][0, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten(1)
        same = bool((block == block[:, :1]).all())
        assert same == (cell in others)


def test_exits_in_training_are_drawn_at_random():
    model = scope(exit_prob=0.25).train()
    coarse = model.encoder.forward_coarse(torch.zeros(64, 3, 16, 16))
    share = torch.stack([model._decide(coarse)[2].float().mean() for _ in range(30)]).mean()
    assert 0.2 < float(share) < 0.3


def test_overlapping_patches_are_refused():
    with pytest.raises(ValueError, match="stride must equal patch_size, 8, in a backbone, got 4"):
        vim(arch_options={"stride": 4})


@pytest.mark.parametrize("stem", [0, 12])
def test_cost_equals_the_counted_operations(stem):
    size = (64, 96)
    x = torch.zeros(1, 3, *size)
    arch = {"arch_options": {"stem_width": stem}}
    plain = vim(out_channels=24, readout=True, detail=True, **arch).eval()
    assert count_macs(plain, x) == round(plain.cost(*size)[0] * 1e9)
    assert plain.cost(*size)[0] == plain.cost(*size)[1]
    learned = scope(out_channels=24, coarse_resize="learned", detail=True, threshold=0.0, **arch).eval()
    assert count_macs(learned, x) == round(learned.cost(*size)[0] * 1e9) + learned.encoder.embed_dim * 5
    learned.threshold = 1.0
    rest = learned.encoder.embed_dim * 5 - skipped_macs(learned.encoder.config, size)
    assert count_macs(learned, x) == round(learned.cost(*size)[1] * 1e9) + rest
    model = scope(out_channels=24).eval()
    gate = model.encoder.embed_dim * 5
    exits, refined = (round(v * 1e9) for v in model.cost(*size))
    model.threshold = 0.0
    assert count_macs(model, x) == exits + gate
    model.threshold = 1.0
    assert count_macs(model, x) == refined + gate - skipped_macs(model.encoder.config, size)
    assert model.cost(60, 90) == model.cost(*size)  # padded


def test_one_class_serves_both_packages():
    from mmdet.registry import MODELS as DET
    from mmseg.registry import MODELS as SEG

    for registry in (SEG, DET):
        for name in ("ScopeBackbone", "VimBackbone"):
            assert registry.get(name).__name__ == name


@pytest.mark.parametrize("stem", [0, 12])
@pytest.mark.parametrize("make", [scope, vim])
def test_wrong_images_are_named(make, stem):
    model = make(arch_options={"stem_width": stem})
    for shape in ((1, 1, 64, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\], got \["):
            model(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": (0, 1, 2)}, "out_indices must be 4 rising block numbers in 0..3"),
        ({"out_indices": (0, 2, 1, 3)}, "out_indices"),
        ({"frozen_stages": 5}, "frozen_stages must lie in -1..4"),
        ({"exit_prob": 1.5}, "exit_prob must lie"),
        ({"threshold": "high"}, "threshold must be a number"),
        ({"arch_options": {"depth": 2}}, "depth must be at least 4"),
        ({"arch_options": {"alpah": 1}}, "unknown model argument alpah"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        scope(**options)


def test_unknown_arch_and_threshold_without_gate():
    with pytest.raises(ValueError, match="arch must be one of mambascope_"):
        ScopeBackbone("vim_tiny_patch16_224")
    model = scope(gate=None, threshold=0.5).eval()
    with pytest.raises(ValueError, match="threshold must be 0 or 1 in a backbone without a gate"):
        model(torch.zeros(1, 3, 32, 32))
