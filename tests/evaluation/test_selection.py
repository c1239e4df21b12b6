"""How much of the objects lies in the selected cells: exact by hand, in the report where the data know the objects."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mambascope import MambaScope
from mambascope.commands import evaluate as eval_cli
from mambascope.data import ScopeDigitsConfig, ScopeDigitsDataModule
from mambascope.evaluation.selection import cell_pixels, object_shares, selection_quality
from mambascope.models.checkpoint import save_safetensors
from tests.evaluation.test_choice import save_image


def test_by_hand():
    importance = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 1, 1, 1]])
    pixels = torch.tensor([[0.0, 6, 2, 2], [0, 0, 0, 5], [0, 0, 0, 0]])  # the third image shows nothing
    half, none, all_cells = object_shares(importance, pixels, (0.5, 0.0, 1.0))
    expected = {"selected": (0.6 + 1) / 2, "random": 0.5, "fixed": (0.2 + 0) / 2, "best": 0.9}
    assert half == {"alpha": 0.5, **{name: pytest.approx(value) for name, value in expected.items()}}
    assert (none["selected"], none["random"], none["best"]) == (0, 0, 0)
    assert (all_cells["selected"], all_cells["random"], all_cells["best"]) == pytest.approx((1, 1, 1))


def test_fixed_places_are_those_of_other_images():
    """They hold everything where all objects stand at one place, and nothing more than their share where none does."""
    same = torch.zeros(10, 16)
    same[:, 5] = 1
    generator = torch.Generator().manual_seed(0)
    anywhere = torch.zeros(4000, 16).scatter_(1, torch.randint(16, (4000, 1), generator=generator), 1.0)
    scores = torch.rand(4000, 16, generator=generator)
    assert object_shares(scores[:10], same, (1 / 16,))[0]["fixed"] == 1
    assert object_shares(scores, anywhere, (0.5,))[0]["fixed"] == pytest.approx(0.5, abs=0.03)
    assert object_shares(scores[:1], same[:1], (0.5,))[0]["fixed"] in (0, 1)  # no other image to learn from


def test_random_cells_have_the_share_of_the_cells():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(4000, 16, generator=generator)
    for row in object_shares(torch.rand(4000, 16, generator=generator), pixels):
        assert row["selected"] == pytest.approx(row["random"], abs=0.01)
        assert row["best"] > row["selected"]


def test_pixels_are_counted_per_cell_and_padding_is_none():
    masks = torch.zeros(1, 7, 5, dtype=torch.bool)
    masks[0, :4, 2:] = True
    assert cell_pixels(masks, (2, 2), 2).tolist() == [[8, 4, 0, 0]]


def digits(size=None, length=40):
    config = ScopeDigitsConfig(size=32, easy_size=(0.45, 0.85), hard_size=(0.3, 0.4))
    return ScopeDigitsDataModule(1, length, config, batch_size=1, val_batch_size=20, img_size=size)


def test_masks_are_where_the_digits_were_painted():
    data = digits()
    masks = data.object_masks(range(40))
    for row, mask in enumerate(masks):
        x0, y0, x1, y1 = data.val_digits.meta(row)["box"]
        assert 0.02 < mask[y0:y1, x0:x1].mean() < 0.8
        assert mask.sum() == mask[y0:y1, x0:x1].sum()
    smaller = digits(16).object_masks(range(40))
    assert smaller.shape == (40, 16, 16)
    assert np.array_equal(smaller, masks.reshape(40, 16, 2, 16, 2).any((2, 4)))
    assert digits(48).object_masks([3, 1]).shape == (2, 48, 48)


@pytest.fixture
def model():
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "d_state": 4, "num_classes": 10}
    return MambaScope(**options, threshold=0.7).eval()


def test_cells_by_contrast_of_the_mask_itself_are_the_best(model):
    """An image that is its own mask, looked at by a model whose score counts its pixels."""
    masks = torch.from_numpy(digits().object_masks(range(40)))
    images = masks[:, None].float().expand(-1, 3, -1, -1).contiguous()
    forward = model.forward_coarse

    def counted(x):
        return replace(forward(x), importance=cell_pixels(x[:, 0] > 0, (2, 2), 8))

    model.forward_coarse = counted
    for row in selection_quality(model, images, masks)["rows"]:
        assert row["selected"] == pytest.approx(row["best"])


QUICK = ["--timing-images", 8, "--rounds", 1, "--batch-size", 8, "--measure"]


def test_the_report_has_it_where_the_data_know_the_objects(model, tmp_path, capsys):
    weights = tmp_path / "model.safetensors"
    save_safetensors(model, weights)
    args = [weights, "--data", "scopedigits", "--length", 40, "--out", tmp_path / "digits", *QUICK]
    assert eval_cli.main([str(a) for a in args]) == 0
    data = json.loads((tmp_path / "digits" / "report.json").read_text())
    rows = {row["alpha"]: row for row in data["selection"]["rows"]}
    assert list(rows) == [0.3, 0.5, 0.7]
    assert data["selection"]["images"] == 12  # of the sample: those timed and half as many
    assert "selection.png" in data["files"]
    assert (tmp_path / "digits" / "selection.png").stat().st_size > 5000
    selected = f"{100 * rows[0.3]['selected']:.0f} % at α 0.3"
    line = f"object pixels in re-read cells, 12 images: {selected} (random 50, fixed places"
    assert line in capsys.readouterr().out
    for name in "abcdefghij":
        (tmp_path / "images" / name).mkdir(parents=True)
        save_image(tmp_path / "images" / name / "0.png")
    args = [weights, "--data", tmp_path / "images", "--out", tmp_path / "folder", *QUICK]
    assert eval_cli.main([str(a) for a in args]) == 0
    assert json.loads((tmp_path / "folder" / "report.json").read_text())["selection"] is None
    assert not (tmp_path / "folder" / "selection.png").exists()
