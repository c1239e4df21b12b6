"""The convolutional stem: what it computes, alone and in both encoders."""

import pytest
import timm
import torch
import torch.nn.functional as F

import mambascope
from mambascope import MambaScope, VisionMamba
from mambascope.layers import ConvStem, PatchEmbed, stem_convs
from mambascope.models import save_safetensors

SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 5}


@pytest.mark.parametrize("patch_size", [8, 16, 32])
def test_maps_lie_at_a_quarter_half_and_the_whole_stride(patch_size):
    torch.manual_seed(0)
    stem = ConvStem(3, patch_size, 6).double()
    x = torch.randn(2, 3, 2 * patch_size, 3 * patch_size, dtype=torch.float64)
    result = stem(x)
    assert [tuple(m.shape[1:]) for m in result] == [(6, 8, 12), (12, 4, 6), (12, 2, 3)]
    # written out: every second place of a convolution over the map with a border of zeros
    seen, maps = x, []
    for conv, norm in zip(
        [m for m in stem.modules() if isinstance(m, torch.nn.Conv2d)],
        [m for m in stem.modules() if isinstance(m, torch.nn.LayerNorm)],
        strict=True,
    ):
        padded = F.pad(seen, (1, 1, 1, 1))
        rows, cols = seen.shape[2] // 2, seen.shape[3] // 2
        total = conv.bias[None, :, None, None].expand(2, -1, rows, cols)
        for i in range(3):
            for j in range(3):
                taps = padded[:, :, i : i + 2 * rows : 2, j : j + 2 * cols : 2]
                total = total + torch.einsum("bchw,oc->bohw", taps, conv.weight[:, :, i, j])
        mean, var = total.mean(1, keepdim=True), total.var(1, keepdim=True, unbiased=False)
        normed = (total - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        seen = F.gelu(normed)
        maps.append(seen)
    for mine, expected in zip(result, maps[-3:], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)
    assert len(maps) == len(stem_convs(3, patch_size, 6)) == patch_size.bit_length() - 1


def test_tokens_are_the_linear_ones_and_the_projected_map():
    torch.manual_seed(0)
    embed = PatchEmbed(8, 8, 3, 16, stem_width=6).double()
    x = torch.randn(2, 3, 44, 61, dtype=torch.float64)  # is padded to 48 x 64
    padded = F.pad(x, (0, 3, 0, 4))
    levels = embed.stem_maps(x)
    expected = embed.proj(padded) + torch.einsum("bchw,oc->bohw", levels[-1], embed.stem_proj.weight[:, :, 0, 0])
    torch.testing.assert_close(embed(x), expected.flatten(2).transpose(1, 2), rtol=1e-9, atol=1e-9)
    assert torch.equal(embed(x, levels), embed(x))
    # cells: the same tokens, four at a time
    rows, cols = torch.tensor([[0, 2, 1], [2, 0, 0]]), torch.tensor([[3, 1, 2], [0, 0, 3]])
    cells = embed.embed_cells(padded, rows, cols)
    whole = embed(padded).unflatten(1, (6, 8))
    for b in range(2):
        for k in range(3):
            for child in range(4):
                row, col = 2 * rows[b, k] + child // 2, 2 * cols[b, k] + child % 2
                torch.testing.assert_close(cells[b, k, child], whole[b, row, col], rtol=1e-9, atol=1e-9)
    assert torch.equal(embed.embed_cells(padded, rows, cols, levels), cells)
    assert PatchEmbed(8, 8, 3, 16).stem_maps(x) == []


def test_both_stages_read_it_and_learn_it():
    torch.manual_seed(0)
    model = MambaScope(**SMALL, stem_width=6, alpha=0.4)
    stem = list(model.patch_embed.stem.parameters())
    assert len(stem) == 3 * 4
    x = torch.randn(2, 3, 48, 48)
    for stage in ("coarse", "fine"):
        model.zero_grad()
        getattr(model.train()(x), stage).square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in stem), stage
    model = model.double().eval()
    x = x.double()
    coarse = model.forward_coarse(x)
    fine = model.forward_fine(x, coarse)
    for state, images in ((coarse, F.avg_pool2d(x, 2)), (fine, x)):  # dense models read what the stem made
        pairs = zip(state.stem_maps, model.patch_embed.stem_maps(images), strict=True)
        assert all(torch.equal(kept, made) for kept, made in pairs)
    model.patch_embed.stem_proj.weight.data.zero_()
    assert not torch.allclose(model.forward_coarse(x).logits, coarse.logits)
    assert not torch.allclose(model.forward_fine(x, coarse).logits, fine.logits)


def test_without_its_projection_the_model_is_the_published_one():
    torch.manual_seed(0)
    model = MambaScope(**SMALL, stem_width=6).eval()
    plain = MambaScope(**SMALL).eval()
    plain.load_state_dict({k: model.state_dict()[k] for k in plain.state_dict()})
    model.patch_embed.stem_proj.weight.data.zero_()
    x = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        assert torch.equal(model.forward_both(x).fine, plain.forward_both(x).fine)


def test_it_goes_with_the_embedding():
    model = VisionMamba(**SMALL, stem_width=6)
    groups = [name for name, _ in model.named_parameters() if name.startswith("patch_embed")]
    assert any("stem.levels" in name for name in groups)
    from timm.models import group_parameters

    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert {layers[name] for name in groups} == {0}


def test_saved_and_loaded(tmp_path):
    model = MambaScope(**SMALL, stem_width=6, global_pool="lse").eval()
    save_safetensors(model, tmp_path / "m.safetensors")
    loaded = mambascope.load(tmp_path / "m.safetensors")
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert loaded.config.stem_width == 6
        assert torch.equal(loaded(x), model(x))


@torch.no_grad()
def test_timm_adapts_both_first_convolutions(tmp_path):
    model = MambaScope(img_size=64, patch_size=8, stem_width=6, num_classes=10, embed_dim=128, depth=6)
    save_safetensors(model, tmp_path / "m.safetensors")
    file = {"file": str(tmp_path / "m.safetensors")}
    name = "mambascope_nano_patch8_64"
    grey = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=file, in_chans=1, num_classes=3)
    assert grey.config.stem_width == 6
    for grey_conv, reference in (
        (grey.patch_embed.proj, model.patch_embed.proj),
        (grey.patch_embed.stem.levels[0][0][0], model.patch_embed.stem.levels[0][0][0]),
    ):
        torch.testing.assert_close(grey_conv.weight, reference.weight.sum(1, keepdim=True))
    assert grey.eval()(torch.randn(1, 1, 64, 64)).shape == (1, 3)


def test_bfloat16_stays_close():
    torch.manual_seed(0)
    model = VisionMamba(**SMALL, stem_width=6).eval()
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        exact = model.patch_embed(x)
        with torch.autocast("cpu", torch.bfloat16):
            short = model.patch_embed(x)
    assert short.dtype == torch.bfloat16
    torch.testing.assert_close(short.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem_width": -1}, "stem_width must be an integer >= 0, got -1"),
        ({"stem_width": True}, "stem_width must be an integer >= 0, got True"),
        ({"stem_width": 4.0}, "stem_width must be an integer >= 0, got 4.0"),
        ({"stem_width": 4, "patch_size": 12}, "patch_size must be 8, 16, 32, ... with a stem or detail, got 12"),
        ({"stem_width": 4, "patch_size": 4}, "patch_size must be 8, 16, 32, ... with a stem or detail, got 4"),
        ({"stem_width": 4, "stride": 4}, "stride must equal patch_size, 8, with a stem, got 4"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VisionMamba(**{**SMALL, **options})


def test_another_patch_size_is_refused_and_changes_nothing():
    model = VisionMamba(**SMALL, stem_width=6).eval()
    before, x = model.config, torch.randn(1, 3, 48, 48)
    answer = model(x)
    with pytest.raises(ValueError, match="patch_size must stay 8 with a stem, got 16"):
        model.set_input_size(96, patch_size=16)
    assert model.config == before
    assert torch.equal(model(x), answer)
    model.set_input_size(64, patch_size=8)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)
