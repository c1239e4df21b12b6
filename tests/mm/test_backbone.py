"""Backbones: shapes, exits, identities, freezing and weights."""

import pytest
import torch
import torch.nn.functional as F

from mambascope.layers import remove_cls
from mambascope.mm import ScopeBackbone, VimBackbone
from mambascope.mm.backbone import default_indices
from mambascope.models import load_checkpoint, save_safetensors
from mambascope.models.cost import skipped_macs
from mambascope.models.scope import MambaScope
from mambascope.models.vim import VisionMamba
from mambascope.ops.flops import count_macs
from tests.mm import common

SCOPE, VIM = "mambascope_nano_patch8_64", "vim_nano_patch8_64"


def scope(**options):
    arch_options = {**common.TINY, **options.pop("arch_options", {})}
    options = {"gate": {"num_classes": 5}, **options}
    return ScopeBackbone(SCOPE, arch_options=arch_options, **options)


def vim(**options):
    return VimBackbone(VIM, arch_options={**common.TINY, **options.pop("arch_options", {})}, **options)


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
    assert default_indices(24) == (5, 11, 17, 23)
    assert default_indices(6) == (1, 2, 4, 5)


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
    model.threshold = 0.0
    confidence = model.forward_scope(x).confidence
    assert model.encoder.fine_calls == 0
    model.threshold = float(confidence.sort().values[3:5].mean())
    mixed = model.forward_scope(x)
    assert mixed.exited.tolist() == (confidence >= model.threshold).tolist()
    assert 0 < int(mixed.exited.sum()) < 7
    assert model.encoder.fine_calls == int((~mixed.exited).sum())
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
    model.threshold = 0.0
    assert bool(model.forward_scope(x).exited.all())
    assert model.encoder.fine_calls == 0
    model.threshold = 1.0
    assert not bool(model.forward_scope(x).exited.any())
    assert model.encoder.fine_calls == 3
    model.encoder.alpha = 0.0  # nothing to re-read: the coarse model alone
    assert bool(model.forward_scope(x).exited.all())


def copy_encoder(source, target):
    own = target.encoder.state_dict()
    target.encoder.load_state_dict({k: source.encoder.state_dict()[k] for k in own})
    target.pyramid.load_state_dict(source.pyramid.state_dict())
    if source.detail is not None:
        target.detail.load_state_dict(source.detail.state_dict())


@pytest.mark.parametrize("stem", [0, 12])
@pytest.mark.parametrize("options", [{}, {"readout": True}, {"detail": True}])
def test_everything_refined_equals_plain_vim(options, stem):
    exact = {"alpha": 1.0, "reuse": "off", "cell_order": "raster", "fine_cls": "middle", "stem_width": stem}
    ours = scope(arch_options=exact, threshold=1.0, **options).double().eval()
    plain = vim(arch_options={"stem_width": stem}, **options).double().eval()
    copy_encoder(ours, plain)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for a, b in zip(ours(x), plain(x), strict=True):
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


@torch.no_grad()
def test_learned_resize_starts_as_bilinear_and_gives_every_place_its_own_map():
    torch.manual_seed(0)
    plain, learned = scope(threshold=0.0).eval(), scope(threshold=0.0, coarse_resize="learned").eval()
    missing = learned.load_state_dict(plain.state_dict(), strict=False)
    assert all(k.startswith("coarse_up.") for k in missing.missing_keys)
    x = torch.randn(2, 3, 64, 64)
    for threshold in (0.0, 1.0):
        plain.threshold = learned.threshold = threshold
        for a, b in zip(plain(x), learned(x), strict=True):
            assert torch.equal(a, b)
    for up in learned.coarse_up:
        torch.nn.init.normal_(up.weight)
    taken = learned.encoder.forward_coarse(x, take=learned.out_indices)
    maps, bilinear = (m._coarse_look(taken, x, []).maps for m in (learned, plain))  # no detail: no image is read
    for level, tokens in enumerate(taken.taken):
        token = remove_cls(tokens, "middle").unflatten(1, taken.grid)[1, 2, 3]  # second image, third row, fourth column
        for row in (0, 1):
            for col in (0, 1):
                own = token @ learned.coarse_up[level].weight[:, :, row, col]
                expected = bilinear[level][1, :, 4 + row, 6 + col] + own
                torch.testing.assert_close(maps[level][1, :, 4 + row, 6 + col], expected, rtol=1e-4, atol=1e-4)
    refined, copied = learned._fine_look(x, taken)[0].maps, plain._fine_look(x, taken)[0].maps
    for level in range(4):
        torch.testing.assert_close(refined[level] - copied[level], maps[level] - bilinear[level], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="coarse_resize must be bilinear or learned, got 'nearest'"):
        scope(coarse_resize="nearest")


@pytest.mark.parametrize("stem", [0, 12])
def test_detail_is_of_the_image_that_was_read(stem):
    torch.manual_seed(0)
    model = scope(detail=True, out_channels=24, arch_options={"stem_width": stem}).eval()
    x = torch.randn(2, 3, 64, 96)
    coarse = model.encoder.forward_coarse(x, take=model.out_indices)
    fine, _ = model._fine_look(x, coarse)
    half = torch.nn.functional.avg_pool2d(x, 2)
    levels = model.encoder.patch_embed.stem_maps
    exits = model._coarse_look(coarse, half, levels(half))
    # each map of the half-size image is one level finer there, the finest is resized
    finer = model.detail(half, levels(half))
    for level in (1, 2, 3):
        torch.testing.assert_close(exits.detail[level], finer[level - 1])
    resized = torch.nn.functional.interpolate(finer[0], scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(exits.detail[0], resized)
    # level by level, written out: strides 2, 4, 8 and 16 for patches of 8 pixels; the encoder's stem, if there is one
    assert (model.detail.stem is None) == (stem > 0)
    convs = (model.encoder.patch_embed if stem else model.detail).stem
    seen = x
    for level, out, found in zip([*convs.levels, model.detail.last], model.detail.outs, fine.detail, strict=True):
        conv, norm, _ = level if len(level) == 3 else level[0]
        seen = F.gelu(norm(F.conv2d(seen, conv.weight, conv.bias, stride=2, padding=1)))
        torch.testing.assert_close(found, out(seen))
    # it is added to the encoder's levels
    for look in (fine, exits):
        levels = zip(model.pyramid(*look), model.pyramid(look.maps, look.cls), look.detail, strict=True)
        for both, own, detail in levels:
            torch.testing.assert_close(both, own + detail)


def test_detail_of_other_patch_sizes():
    model = VimBackbone("vim_tiny_patch16_224", arch_options={"depth": 4, "embed_dim": 32}, detail=True)
    assert [m.shape[-2:] for m in model(torch.zeros(1, 3, 70, 40))] == [(18, 10), (9, 5), (5, 3), (3, 2)]
    with pytest.raises(ValueError, match=r"patch_size must be 8, 16, 32, ... with a stem or detail, got 12"):
        vim(arch_options={"patch_size": 12}, detail=True)


@pytest.mark.parametrize(
    "options",
    [
        {"coarse_resize": "bilinear"},
        {"coarse_resize": "learned"},
        {"coarse_resize": "learned", "detail": True},
        {"detail": True, "arch_options": {"stem_width": 12}},
        {"gate": None},
        {"gate": None, "arch_options": {"reuse": "off", "alpha": 1.0}},
        {"gate": None, "out_indices": (0, 1, 2, 3), "arch_options": {"depth": 5}},
        {"arch_options": {"alpha": 0.0}},
    ],
)
@pytest.mark.parametrize("exit_prob", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sizes", [(), ([(64, 64), (64, 64), (32, 64), (17, 20)],)])
def test_every_parameter_learns_in_every_step(sizes, exit_prob, options):
    model = scope(exit_prob=exit_prob, **options).train()
    torch.manual_seed(3)
    features = model.forward_scope(torch.randn(4, 3, 64, 64), *sizes)
    if model.encoder.alpha:
        assert sizes or float(features.exited.float().mean()) == exit_prob
    loss = sum(m.square().mean() for m in features.maps)
    if model.gate is not None:
        loss = loss + features.gate_logits.square().mean()
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert missing == []
    fine_only = model.encoder.pos_embed.grad.abs().max()
    assert (fine_only == 0) == bool(features.exited.all())


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("make", [scope, vim])
def test_every_parameter_learns_from_any_map(make, level):
    """In mmseg's and mmdet's own models, which read some of the maps and have no loss for the gate."""
    options = {"exit_prob": 1.0} if make is scope else {}
    model = make(out_indices=(0, 1, 2, 3), arch_options={"depth": 5}, **options).train()
    model(torch.randn(2, 3, 64, 64))[level].square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("make", [scope, vim])
def test_distributed_steps_in_which_all_exit(make, tmp_path):
    """DDP refuses the second step if the first left a parameter without a gradient."""
    options = {"gate": None, "exit_prob": 1.0} if make is scope else {"out_indices": (0, 1, 2, 3)}
    model = make(arch_options={"depth": 5, "embed_dim": 16}, **options).train()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            sum(m.square().mean() for m in wrapped(torch.randn(2, 3, 32, 32))).backward()
    finally:
        torch.distributed.destroy_process_group()


def test_exits_in_training_are_drawn_at_random():
    model = scope(exit_prob=0.25).train()
    share = torch.stack([model._decide(torch.zeros(64, 1), None, 4).float().mean() for _ in range(30)]).mean()
    assert 0.2 < float(share) < 0.3


def test_checkpointing_gives_the_same_gradients():
    plain, saving = scope(exit_prob=0.0), scope(exit_prob=0.0, with_cp=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    grads = []
    for model in (plain, saving):
        sum(m.square().mean() for m in model.train()(x)).backward()
        grads.append(model.encoder.layers[0].mixer.in_proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_overlapping_patches_are_refused():
    with pytest.raises(ValueError, match="stride must equal patch_size, 8, in a backbone, got 4"):
        vim(arch_options={"stride": 4})


@pytest.mark.parametrize("stem", [0, 12])
def test_frozen_stages_and_norm_eval(stem):
    arch = {"stem_width": stem}
    model = scope(frozen_stages=2, norm_eval=True, norm_cfg={"type": "BN"}, detail=True, arch_options=arch)
    model.train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(n.startswith(("encoder.patch_embed", "encoder.layers.0.", "encoder.layers.1.")) for n in trained)
    assert "encoder.pos_embed" not in trained
    assert {"encoder.layers.2.norm.weight", "detail.outs.0.weight"} <= trained
    assert not model.encoder.layers[1].training
    assert model.encoder.layers[2].training
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(m.training for m in norms)


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


# ---- weights -------------------------------------------------------------------------------------------------------


def same_encoder(a, b, names=None):
    own = a.state_dict()
    return all(torch.equal(v, own[k]) for k, v in b.state_dict().items() if not names or k in names)


@pytest.fixture
def classifier():
    return MambaScope(img_size=64, patch_size=8, num_classes=10, fine_cls="middle", **common.TINY)


def start(path, **options):
    model = scope(init_cfg={"type": "Pretrained", "checkpoint": str(path)}, **options)
    model.init_weights()
    return model


def test_starts_from_our_files_with_a_report(tmp_path, classifier, caplog):
    save_safetensors(classifier, tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"model.{k}": v for k, v in classifier.state_dict().items()}}, tmp_path / "a.ckpt")
    for name in ("a.safetensors", "a.ckpt"):
        model = start(tmp_path / name, arch_options={"fine_cls": "middle"})
        own = dict(classifier.state_dict())
        assert all(torch.equal(v, own[k]) for k, v in model.encoder.state_dict().items())
    bigger = start(tmp_path / "a.safetensors", img_size=96, arch_options={"fine_cls": "middle"})
    assert bigger.encoder.pos_embed.shape[1] == 12 * 12 + 1


def test_starts_from_an_official_vim(tmp_path):
    source = VisionMamba(img_size=64, patch_size=8, num_classes=10, **common.TINY)
    torch.save({"model": source.state_dict()}, tmp_path / "vim.pth")
    model = start(tmp_path / "vim.pth")
    assert torch.equal(model.encoder.layers[3].mixer.A_log, source.layers[3].mixer.A_log)
    assert torch.equal(model.encoder.pos_embed, source.pos_embed)
    plain = vim(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "vim.pth")})
    plain.init_weights()
    assert torch.equal(plain.encoder.pos_embed, source.pos_embed)


def test_plain_vim_starts_from_a_mambascope_file(tmp_path, classifier):
    save_safetensors(classifier, tmp_path / "a.safetensors")
    plain = vim(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "a.safetensors")})
    plain.init_weights()
    assert torch.equal(plain.encoder.layers[3].mixer.A_log, classifier.layers[3].mixer.A_log)


@torch.no_grad()
def test_a_stem_comes_with_the_weights(tmp_path):
    torch.manual_seed(0)
    source = MambaScope(img_size=64, patch_size=8, num_classes=10, stem_width=12, **common.TINY)
    save_safetensors(source, tmp_path / "a.safetensors")
    stem = source.patch_embed.stem.state_dict()
    assert len(stem) == 12
    for make in (scope, vim):
        model = make(
            init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "a.safetensors")},
            arch_options={"stem_width": 12},
            detail=True,
        )
        model.init_weights()
        assert all(torch.equal(v, stem[k]) for k, v in model.encoder.patch_embed.stem.state_dict().items())
        assert torch.equal(model.encoder.patch_embed.stem_proj.weight, source.patch_embed.stem_proj.weight)
    with pytest.raises(ValueError, match=r"\): stem_width is 12 in the file and 16 in the model$"):
        start(tmp_path / "a.safetensors", arch_options={"stem_width": 16})
    with pytest.raises(ValueError, match=r"\): stem_width is 12 in the file and 0 in the model$"):
        start(tmp_path / "a.safetensors")
    # files from elsewhere do not describe themselves
    torch.save({"model": VisionMamba(img_size=64, patch_size=8, **common.TINY).state_dict()}, tmp_path / "vim.pth")
    with pytest.raises(ValueError, match=r"\): stem_width is 0 in the file and 12 in the model; norm_f.weight has no"):
        load_checkpoint(model.encoder, tmp_path / "vim.pth")
    model = scope(
        init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "vim.pth"), "strict": False},
        arch_options={"stem_width": 12},
    )
    before = model.encoder.patch_embed.stem_proj.weight.clone()
    model.init_weights()
    assert torch.equal(model.encoder.patch_embed.stem_proj.weight, before)


@pytest.mark.parametrize("stem", [0, 12])
@pytest.mark.parametrize("make", [scope, vim])
def test_wrong_images_are_named(make, stem):
    model = make(arch_options={"stem_width": stem})
    for shape in ((1, 1, 64, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\], got \["):
            model(torch.zeros(shape))


@pytest.mark.parametrize("options", [{}, {"detail": True, "readout": True, "arch_options": {"stem_width": 12}}])
def test_every_parameter_of_a_plain_vim_learns(options):
    model = vim(**options).train()
    sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64))).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_refuses_other_weights(tmp_path, classifier):
    save_safetensors(classifier, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"another architecture than mambascope_nano_patch8_64.*depth=4 \(here 5\)"):
        start(tmp_path / "a.safetensors", arch_options={"depth": 5})
    with pytest.raises(ValueError, match=r"fine_cls='middle' \(here 'first'\)"):
        start(tmp_path / "a.safetensors")
    torch.save({"model": VisionMamba(depth=3, embed_dim=32).state_dict()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit MambaScope"):
        start(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not exist"):
        start(tmp_path / "none.pth")
    model = scope(init_cfg={"type": "TruncNormal", "layer": "Linear"})
    with pytest.raises(ValueError, match="init_cfg must be"):
        model.init_weights()


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
