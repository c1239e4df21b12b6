"""What the maps gain beside the tokens: the learned resize of coarse tokens and convolutions of the image."""

import pytest
import torch
import torch.nn.functional as F

from mambascope.layers import remove_cls
from mambascope.mm import VimBackbone
from tests.mm.common import scope, vim


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
    maps, bilinear = (m._coarse_look(x, taken).maps for m in (learned, plain))
    for level, tokens in enumerate(taken.taken):
        token = remove_cls(tokens, "middle").unflatten(1, taken.grid)[1, 2, 3]  # second image, third row, fourth column
        for row in (0, 1):
            for col in (0, 1):
                summand = token @ learned.coarse_up[level].weight[:, :, row, col]
                expected = bilinear[level][1, :, 4 + row, 6 + col] + summand
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
    exits = model._coarse_look(x, coarse)
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
    for level, out, addition in zip([*convs.levels, model.detail.last], model.detail.outs, fine.detail, strict=True):
        conv, norm, _ = level if len(level) == 3 else level[0]
        seen = F.gelu(norm(F.conv2d(seen, conv.weight, conv.bias, stride=2, padding=1)))
        torch.testing.assert_close(addition, out(seen))
    # it is added to the encoder's levels
    for look in (fine, exits):
        levels = zip(model.pyramid(*look), model.pyramid(look.maps, look.cls), look.detail, strict=True)
        for joined, summand, detail in levels:
            torch.testing.assert_close(joined, summand + detail)


def test_detail_of_other_patch_sizes():
    model = VimBackbone("vim_tiny_patch16_224", arch_options={"depth": 4, "embed_dim": 32}, detail=True)
    assert [m.shape[-2:] for m in model(torch.zeros(1, 3, 70, 40))] == [(18, 10), (9, 5), (5, 3), (3, 2)]
    with pytest.raises(ValueError, match=r"patch_size must be 8, 16, 32, ... with a stem or detail, got 12"):
        vim(arch_options={"patch_size": 12}, detail=True)
