"""Cost of reduced models: the closed form against the counter and against the published figures."""

import pytest
import torch

from mambascope.commands.cost import model_config
from mambascope.models.cost import CONVENTIONS, count_parameters, plain_vim, stage_macs
from mambascope.models.flop_count import count_macs, expected_count
from mambascope.ops import flops
from mambascope.peers.cost import scan_share
from tests.peers.common import METHODS, images, small

STATIC = [name for name in METHODS if name not in ("dyvm", "dyvm_scans")]


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("size", [(32, 32), (40, 44)])
def test_counted_equals_the_closed_form(name, size):
    model = small(METHODS[name])
    assert count_macs(model, size) == expected_count(model, size)
    assert scan_share(model, []) is None


@pytest.mark.parametrize("name", ["dyvm", "dyvm_scans"])
def test_counted_mean_over_images_equals_the_closed_form_with_the_measured_share(name):
    model, x = small(METHODS[name]), images(7)
    share = scan_share(model, [(x[:4], torch.zeros(4)), (x[4:], torch.zeros(3))])
    assert len(share) == 6
    assert any(0 < block < 1 for block in share)
    with torch.no_grad():
        counted = flops.count_macs(model, x)
    form = stage_macs(model.config, convention="both_directions", scan_share=share).fine + 16 * 5
    assert counted == pytest.approx(7 * form, abs=7)  # rounded to whole operations per image


@pytest.mark.parametrize("name", METHODS)
def test_counted_parameters_equal_the_closed_form(name):
    model = small(METHODS[name])
    assert sum(p.numel() for p in model.parameters()) == count_parameters(model.config)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", METHODS)
def test_reduction_costs_less_than_vim(name, convention):
    config = small(METHODS[name]).config
    share = [0.8] * 6 if name == "dyvm_scans" else None
    plain = stage_macs(plain_vim(config), convention=convention).fine
    assert stage_macs(config, convention=convention, scan_share=share).fine < plain


@pytest.mark.parametrize(
    ("size", "reduction", "share", "published"),
    [
        ("tiny", {"name": "r_meeto", "r": 5}, None, 1.28),
        ("small", {"name": "r_meeto", "r": 11}, None, 3.58),
        ("base", {"name": "r_meeto", "r": 11}, None, 13.21),
        ("small", {"name": "hidden_align", "keep": 0.8}, None, 3.6),
        ("base", {"name": "dyvm", "keep": 0.7, "block_ratio": 0.7}, 0.7, 12.1),
    ],
)
def test_published_gflops(size, reduction, share, published):
    """One direction, as the papers count; they leave out or estimate what the decisions cost."""
    config = model_config(f"vim_{size}_patch16_224", reduction=reduction)
    shares = None if share is None else [share] * 24
    assert stage_macs(config, scan_share=shares).fine / 1e9 == pytest.approx(published, rel=0.02)


def test_mistakes():
    config = small(METHODS["dyvm"]).config
    for wrong in ([0.5], [0.5] * 5 + [1.5]):
        with pytest.raises(ValueError, match=r"scan_share must be 6 numbers in \[0, 1\]"):
            stage_macs(config, scan_share=wrong)
    with pytest.raises(ValueError, match="a Vim with token reduction has one stage"):
        stage_macs(config, alpha=0.5)
    with pytest.raises(ValueError, match="no images"):
        scan_share(small(METHODS["dyvm"]), [])
