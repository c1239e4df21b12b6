"""Glimpses that are chosen: by importance, contrast and lookahead."""

import numpy as np
import pytest
import torch

from mambascope.eye.choice import (
    ByContrast,
    ByLookahead,
    local_contrast,
    make_chooser,
    places,
    positions_by_importance,
)
from mambascope.eye.glimpses import information_ratio
from mambascope.eye.placement import Placement, place_image
from mambascope.eye.stopping import corrected_confidence
from mambascope.models import MambaScope, ScopeConfig
from mambascope.models.checkpoint import save_safetensors
from tests.eye.common import OPTIONS, Pictures


def test_important_places_are_seen_more_often():
    placement = Placement.centred(40, 56, 64)
    rows, columns = places(placement, 16)
    spans = placement.spans(16)
    assert (rows[0], rows[-1] + 16, columns[0], columns[-1] + 16) == (*spans[0], *spans[1])
    importance = torch.zeros(5, 7)
    importance[4, 6] = 1
    sharp = positions_by_importance(importance, placement, 200, sharpness=50, seed=1)
    corner = np.array([placement.top + 40 - 16, placement.left + 56 - 16])
    assert np.abs(sharp - corner).max() <= 3
    for flat in ({"sharpness": 0}, {}):  # the map is not looked at, or it shows nothing
        even = positions_by_importance(importance * bool(flat), placement, 3000, seed=1, **flat)
        assert np.abs(even.mean(0) - [rows.mean(), columns.mean()]).max() < 1
        assert (even.min(0) == [rows[0], columns[0]]).all()
        assert (even.max(0) == [rows[-1], columns[-1]]).all()
    assert np.array_equal(sharp, positions_by_importance(importance, placement, 200, sharpness=50, seed=1))
    # twice as important is twice as often
    halves = torch.cat([torch.ones(8, 4), 2 * torch.ones(8, 4)], 1)
    wide = Placement.centred(16, 400, 400)
    often = positions_by_importance(halves, wide, 20_000, patch_size=16, seed=0)[:, 1]
    assert (often >= 230).sum() / (often < 154).sum() == pytest.approx(2, rel=0.1)
    for bad in (torch.zeros(3), torch.full((2, 2), float("nan")), -torch.ones(2, 2)):
        with pytest.raises(ValueError, match="importance must be a finite map"):
            positions_by_importance(bad, placement, 5)


def test_contrast_finds_the_detail():
    pixels = np.full((64, 64, 3), 90, dtype=np.uint8)
    pixels[40:56, 8:24] = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    canvas, placement = place_image(pixels, 64)
    contrast = local_contrast(canvas)
    assert contrast.shape == (64, 64)
    assert contrast[44:52, 12:20].min() > 10 * contrast[:32, 32:].max()
    (positions,) = ByContrast(50, 16)([canvas], [placement], [(0, 0)])
    overlaps = (np.abs(positions - [40, 8]) < 16).all(1)
    assert overlaps.mean() > 0.9  # a random scan has one in five


def test_lookahead_takes_the_surest_of_its_candidates(model):
    canvas, placement = OPTIONS.place(Pictures()(0)[0])
    chooser = ByLookahead(model, 6, candidates=3)
    (positions,) = chooser([canvas], [placement], [(0, 5)])
    assert chooser.cost == 4
    # the first glimpse by hand
    rng, (rows, columns) = np.random.default_rng((0, 5)), places(placement, 8)
    picked = [rng.integers(0, len(axis), 3) for axis in (rows, columns)]
    cells = np.stack([rows[picked[0]], columns[picked[1]]], 1)
    sure = []
    for row, column in cells.tolist():
        patch = canvas[:, row : row + 8, column : column + 8].reshape(1, -1)
        with torch.no_grad():
            logits = model.step(model.start(1), patch, torch.zeros(1, 2)).logits
        ratio = torch.tensor(information_ratio([[row, column]], placement, 8))
        sure.append(corrected_confidence(logits, ratio).item())
    assert positions[0].tolist() == cells[int(np.argmax(sure))].tolist()
    both = chooser([canvas, canvas], [placement, placement], [(0, 5), (0, 6)])
    assert np.array_equal(both[0], positions)  # a batch does not change it


def test_chooser_names(model, tmp_path):
    scope = MambaScope(ScopeConfig(img_size=32, patch_size=4, embed_dim=16, depth=1, num_classes=3))
    save_safetensors(scope, tmp_path / "scope.safetensors")
    chooser = make_chooser(f"scope:{tmp_path / 'scope.safetensors'}", model, 9)
    canvas, placement = OPTIONS.place(Pictures()(1)[0])
    (positions,) = chooser([canvas], [placement], [(0, 1)])
    assert positions.shape == (9, 2)
    assert chooser.importance(canvas).shape == (4, 4)
    assert make_chooser("lookahead:2", model, 9).candidates == 2
    for bad in ("best", "lookahead:0", "contrast:3"):
        with pytest.raises(ValueError, match="choice must be contrast, scope:WEIGHTS or lookahead"):
            make_chooser(bad, model, 9)
    save_safetensors(model, tmp_path / "eye.safetensors")
    with pytest.raises(ValueError, match="needs a MambaScope, got a MambaEye"):
        make_chooser(f"scope:{tmp_path / 'eye.safetensors'}", model, 9)
