"""Glimpse sequences: placement, positions, patches and the information ratio."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.utils.data import DataLoader

from mambascope.data.errors import DataError
from mambascope.eye.dataset import GlimpseDataset, GlimpseOptions, ImageGlimpses
from mambascope.eye.glimpses import (
    Coverage,
    extract_patches,
    information_ratio,
    make_sequence,
    moves_from_positions,
    point_positions,
    scan_positions,
    training_positions,
)
from mambascope.eye.patterns import GRID_ORDERS, LEGACY_PATTERNS, PATTERNS
from mambascope.eye.placement import Placement, paste, place_image
from tests.conftest import GOLDEN


def painted(positions, placement, patch_size):
    """The information ratio as its definition reads: paint patch after patch and count."""
    seen = np.zeros(placement.canvas, dtype=bool)
    image = np.s_[placement.top : placement.top + placement.height, placement.left : placement.left + placement.width]
    ratios = []
    for row, column in positions.tolist():
        seen[row : row + patch_size, column : column + patch_size] = True
        ratios.append(np.float32(seen[image].sum() / (placement.height * placement.width)))
    return np.array(ratios)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- information ratio -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 5, 8, 16])
@pytest.mark.parametrize(("height", "width", "canvas"), [(40, 61, 64), (64, 64, 64), (17, 33, 96), (20, 50, (31, 77))])
def test_ratio_is_bit_equal_to_painting(patch, height, width, canvas):
    placement = Placement.centred(height, width, canvas)
    last = np.array(placement.canvas) - patch
    positions = np.random.default_rng(patch).integers(0, last, (150, 2), endpoint=True)
    positions[40] = positions[10]  # a place that is visited twice
    ratio = information_ratio(positions, placement, patch)
    expected = painted(positions, placement, patch)
    assert ratio.dtype == np.float32
    assert ratio.tobytes() == expected.tobytes()
    assert (np.diff(ratio) >= 0).all()

    coverage = Coverage(placement, patch)
    assert [np.float32(coverage.add(*xy)) for xy in positions.tolist()] == expected.tolist()
    assert coverage.ratio == pytest.approx(coverage.seen.mean())


def test_padding_does_not_count():
    placement = Placement.centred(20, 20, 100)  # at (40, 40)
    positions = np.array([[0, 0], [24, 24], [25, 25], [60, 40], [55, 55]])
    # beside the image twice, then one pixel of it, then below it, then its last 5x5
    assert information_ratio(positions, placement).tolist() == pytest.approx([0, 0, 1 / 400, 1 / 400, 26 / 400])


def test_long_sequences_use_a_wider_counter():
    placement = Placement.centred(16, 24, 24)
    positions = np.tile([4, 0], (70_000, 1))
    positions[69_999] = (4, 8)
    ratio = information_ratio(positions, placement)
    assert ratio[69_998] == np.float32(2 / 3)
    assert ratio[69_999] == 1


def test_golden():
    with safe_open(GOLDEN / "mambaeye_official_a.safetensors", framework="pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys() if not k.startswith("weights.")}  # noqa: SIM118
        assert json.loads(f.metadata()["config"])["input_dim"] == 1280
    for image, rows, columns, expected in zip(
        tensors["image"], tensors["rows"], tensors["cols"], tensors["information_ratio"], strict=True
    ):
        positions = torch.stack([rows, columns], -1).numpy()
        placement = Placement((96, 80), 0, 0, 96, 80)
        assert torch.equal(torch.from_numpy(information_ratio(positions, placement)), expected)
        sequence = make_sequence(image, placement, positions)
        assert torch.equal(
            sequence.patches[7], image[:, rows[7] : rows[7] + 16, columns[7] : columns[7] + 16].flatten()
        )


# ---- positions -------------------------------------------------------------------------------------------------------

SIZES = [(16, 16, 16), (40, 61, 64), (64, 64, 64), (17, 33, 96), (512, 300, 512), (33, 100, (50, 100))]


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p != "random"])
@pytest.mark.parametrize(("height", "width", "canvas"), SIZES)
def test_grid_patterns_see_every_pixel(pattern, height, width, canvas):
    placement = Placement.centred(height, width, canvas)
    cells = -(-height // 16) * -(-width // 16)
    positions = scan_positions(pattern, cells + 3, placement)
    assert information_ratio(positions, placement)[cells - 1] == 1
    assert np.array_equal(positions[cells:], np.resize(positions[:cells], (cells + 3, 2))[cells:])  # repeated
    assert np.array_equal(scan_positions(pattern, 2, placement), positions[:2])  # cut off
    low, high = np.array([placement.top, placement.left]), np.array([height, width]) - 16
    assert (positions >= low).all()
    assert (positions <= low + high).all()  # no glimpse leaves the image


def test_random_reaches_all_edges():
    placement = Placement.centred(30, 20, 30)
    positions = scan_positions("random", 500, placement, seed=1)
    assert positions.min(0).tolist() == [0, 5]
    assert positions.max(0).tolist() == [14, 9]
    assert information_ratio(positions, placement)[-1] == 1


@pytest.mark.parametrize("canvas", [512, 224])
def test_compat_reproduces_the_blind_edge(canvas):
    """The published evaluation never reads the last 15 rows and columns of an image that fills the canvas."""
    placement = Placement.centred(canvas, canvas, canvas)
    grid = scan_positions("column_major", 5000, placement, compat=True)
    assert information_ratio(grid, placement)[-1] == np.float32((canvas - 15) ** 2 / canvas**2)
    lines = np.unique(grid[:, 0])
    assert lines[-2:].tolist() == [canvas - 32, canvas - 31]
    assert len(lines) == canvas // 16
    positions = scan_positions("random", 20_000, placement, compat=True)
    assert positions.max() == canvas - 31
    assert positions.min() == 0
    # an image 15 pixels away from the edge is read as a whole
    inside = Placement.centred(150, 180, canvas)
    for pattern in GRID_ORDERS:
        if pattern not in LEGACY_PATTERNS:
            corrected = scan_positions(pattern, 300, inside)
            assert np.array_equal(scan_positions(pattern, 300, inside, compat=True), corrected)


def test_legacy_names_in_sequences():
    placement = Placement.centred(48, 48, 48)
    down = scan_positions("column_snake", 9, placement)
    assert down[:4].tolist() == [[0, 0], [16, 0], [32, 0], [32, 16]]
    assert np.array_equal(scan_positions("horizontal_snake", 9, placement), down)
    inside = Placement.centred(48, 48, 80)
    across = scan_positions("column_snake", 9, inside, compat=True) - 16
    assert across[:4].tolist() == [[0, 0], [0, 16], [0, 32], [16, 32]]


def test_region():
    placement = Placement.centred(60, 80, 100)  # at (20, 10)
    positions = scan_positions("row_raster", 6, placement, region=(30, 40, 30, 40))
    assert positions.tolist() == [[50, 50], [50, 66], [50, 74], [64, 50], [64, 66], [64, 74]]
    assert information_ratio(positions, placement)[-1] == pytest.approx(30 * 40 / (60 * 80))
    for region in ((0, 0, 61, 80), (-1, 0, 10, 10), (0, 0, 0, 5)):
        with pytest.raises(DataError, match=r"region must be .* inside the placed image of 60x80"):
            scan_positions("random", 5, placement, region=region)


def test_seeds():
    placement = Placement.centred(100, 100, 128)
    for pattern in ("random", "random_grid"):
        same = [scan_positions(pattern, 49, placement, seed=(3, 5)) for _ in range(2)]
        assert np.array_equal(*same)
        assert not np.array_equal(same[0], scan_positions(pattern, 49, placement, seed=(3, 6)))
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    before = scan_positions("random", 49, placement, seed=2)
    assert np.array_equal(scan_positions("random", 49, placement, seed=2), before)  # global generators play no part


def test_training_positions():
    placement = Placement.centred(40, 30, 100)  # at (30, 35)
    local = training_positions(4000, placement, seed=0, localised=1)
    assert local.min(0).tolist() == [30, 35]
    assert local.max(0).tolist() == [69, 64]  # over the bottom and right edge, never above or left
    everywhere = training_positions(20_000, placement, seed=0, localised=0)
    assert everywhere.min(0).tolist() == [0, 0]
    assert everywhere.max(0).tolist() == [84, 84]
    full = training_positions(20_000, Placement.centred(100, 100, 100), seed=0, localised=1)
    assert full.max(0).tolist() == [84, 84]
    spread = [training_positions(50, placement, seed=i).min() < 30 for i in range(200)]
    assert 0.35 < np.mean(spread) < 0.65
    with pytest.raises(DataError, match=r"localised must lie in \[0, 1\]"):
        training_positions(4, placement, localised=2)


def test_thin_images_stay_on_the_canvas():
    """Shrinking may leave fewer rows than a patch has; the glimpse then overlaps the padding."""
    canvas, placement = place_image(picture(20, 400), 40, "fit")
    assert (placement.height, placement.width) == (2, 40)
    for positions in (scan_positions("random", 50, placement), training_positions(50, placement, localised=1)):
        sequence = make_sequence(canvas, placement, positions)
        assert sequence.information_ratio[-1] > 0.4
    edge = Placement((16, 40), 14, 0, 2, 40)
    assert scan_positions("row_raster", 1, edge).tolist() == [[0, 0]]


def test_points():
    placement = Placement.centred(50, 100, 128, source=(100, 200))  # at (39, 14), half size
    assert point_positions([[50, 100]], placement).tolist() == [[64 - 8, 64 - 8]]
    assert point_positions([[10, 20]], placement, anchor="corner").tolist() == [[44, 24]]
    assert point_positions([[10, 20.6]], placement, anchor="corner", coordinates="canvas").tolist() == [[10, 21]]
    with pytest.raises(DataError, match=r"glimpse 1 is at \(-8, 56\)"):
        point_positions([[64, 64], [0, 64], [70, 70]], placement, coordinates="canvas")
    assert point_positions([[0, 127]], placement, coordinates="canvas", clamp=True).tolist() == [[0, 112]]
    for bad in ([1, 2], [[1, 2, 3]], [], [[float("nan"), 1]]):
        with pytest.raises(DataError, match="points must be finite"):
            point_positions(bad, placement)
    with pytest.raises(DataError, match="anchor must be one of centre, corner"):
        point_positions([[50, 50]], placement, anchor="middle")


def test_moves():
    positions = np.array([[5, 7], [5, 23], [0, 3]])
    assert moves_from_positions(positions).tolist() == [[0, 0], [0, 16], [-5, -20]]
    assert moves_from_positions(positions[1:], previous=(5, 7)).tolist() == [[0, 16], [-5, -20]]
    assert moves_from_positions(np.stack([positions] * 2)).shape == (2, 3, 2)


# ---- placing and reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "canvas", "mode", "placed", "corner"),
    [
        ((30, 41), 64, "none", (30, 41), (17, 11)),
        ((30, 41), None, "none", (30, 41), (5, 0)),
        ((100, 60), None, "none", (100, 60), (0, 20)),
        ((100, 60), 64, "none", (64, 38), (0, 13)),
        ((30, 41), 64, "fit", (46, 64), (9, 0)),
        ((500, 375), 512, "fit", (512, 384), (0, 64)),
        ((30, 41), 64, "full", (64, 64), (0, 0)),
        ((30, 41), (48, 96), "fit", (48, 65), (0, 15)),
        ((30, 120), (48, 96), "fit", (24, 96), (12, 0)),
        ((5, 7), 64, "fit", (45, 64), (9, 0)),
    ],
)
def test_resize_modes(size, canvas, mode, placed, corner):
    pixels, placement = place_image(picture(*size), canvas, mode)
    assert (placement.height, placement.width) == placed
    assert (placement.top, placement.left) == corner
    assert pixels.shape == (3, *placement.canvas)
    assert pixels.dtype == torch.uint8
    outside = torch.ones(placement.canvas, dtype=torch.bool)
    outside[corner[0] : corner[0] + placed[0], corner[1] : corner[1] + placed[1]] = False
    assert pixels[:, outside].sum() == 0


def test_inputs_of_every_kind_agree():
    array = picture(30, 41)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    pixels, placement = place_image(array, 64, "none")
    assert torch.equal(pixels[:, 17:47, 11:52], tensor)
    assert placement.source is None
    for same in (tensor, Image.fromarray(array)):
        assert torch.equal(place_image(same, 64, "none")[0], pixels)
    grey = Image.fromarray(array[:, :, 0])
    assert torch.equal(*(place_image(i, 64, "none")[0] for i in (grey, grey.convert("RGB"))))


def test_compat_resamples_twice():
    array = picture(200, 150)
    once, placement = place_image(array, 64, "full")
    twice, same = place_image(array, 64, "full", compat=True)
    assert placement == same
    expected = Image.fromarray(array).resize((48, 64), Image.Resampling.LANCZOS)
    expected = expected.resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(twice.permute(1, 2, 0), np.array(expected))
    assert not torch.equal(once, twice)
    small = picture(50, 40)
    assert torch.equal(place_image(small, 64, "fit")[0], place_image(small, 64, "fit", compat=True)[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_patches(dtype):
    canvas = (torch.rand(3, 50, 70) * 255).to(dtype)
    positions = scan_positions("random", 30, Placement((50, 70), 0, 0, 50, 70), patch_size=8)
    patches = extract_patches(canvas, positions, 8)
    assert patches.dtype == dtype
    for patch, (row, column) in zip(patches, positions.tolist(), strict=True):
        assert torch.equal(patch, canvas[:, row : row + 8, column : column + 8].reshape(-1))


def test_dataset_is_independent_of_order_and_workers():
    images = [(Image.fromarray(picture(40 + i, 60, i)), i % 3) for i in range(6)]
    options = GlimpseOptions(length=20, canvas_size=64, patch_size=8)
    data = pickle.loads(pickle.dumps(GlimpseDataset(images, options, seed=4)))
    whole, labels = next(iter(DataLoader(data, batch_size=6)))
    assert whole.patches.shape == (6, 20, 192)
    assert whole.moves.shape == whole.positions.shape == (6, 20, 2)
    assert whole.information_ratio.shape == (6, 20)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    for i in (5, 2):
        alone = data[i][0]
        assert all(torch.equal(a, b[i]) for a, b in zip(alone, whole, strict=True))
    assert not torch.equal(data[0][0].positions, data[1][0].positions)
    data.set_epoch(1)
    assert not torch.equal(data[0][0].positions, whole.positions[0])


def test_reading_on_demand_gives_the_same_sequences():
    options = GlimpseOptions(length=12, pattern="golden", canvas_size=None, resize_mode="none")
    images = [picture(50, 40), picture(33, 90)]  # two canvases of different size
    reader = ImageGlimpses.of_images(images, options, seeds=[1, 2])
    assert (len(reader), reader.length) == (2, 12)
    whole = [options.sequence(image, seed) for image, seed in zip(images, (1, 2), strict=True)]
    patches, moves, ratio = reader.read(torch.tensor([1, 0]), 5, 9)
    for k, i in enumerate((1, 0)):
        assert torch.equal(patches[k], whole[i].patches[5:9])
        assert torch.equal(moves[k], whole[i].moves[5:9])
        assert torch.equal(ratio[k], whole[i].information_ratio[5:9])


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: place_image(picture(12, 100), 128, "none"), r"12x100 pixels is smaller than a patch of 16x16"),
        (lambda: place_image(picture(5, 300), 128, "fit"), "smaller than a patch"),
        (lambda: place_image(picture(20, 20), 10), "canvas_size must be at least the patch size 16, got 10x10"),
        (lambda: place_image(picture(20, 20), None, "fit"), "canvas_size must be given"),
        (lambda: place_image(picture(20, 20), 0), "canvas_size must be a positive integer"),
        (lambda: place_image(picture(20, 20), 64, "crop"), "resize_mode must be one of none, fit, full, got 'crop'"),
        (lambda: place_image(torch.rand(3, 20, 20), 64), "image must be a PIL image"),
        (lambda: paste(torch.zeros(3, 20, 90), 64), "does not fit on a canvas of 64x64"),
        (lambda: scan_positions("random", 0, Placement.centred(20, 20, 20)), "length must be a positive integer"),
        (lambda: scan_positions("zigzag", 4, Placement.centred(20, 20, 20)), "pattern must be one of"),
        (lambda: scan_positions("random", 4, Placement.centred(20, 20, 20), patch_size=32), "at least the patch size"),
        (lambda: extract_patches(torch.zeros(3, 64, 64), [[0, 0], [49, 3]]), r"64x64 .*rows 0..48.* glimpse 1 is at"),
        (lambda: extract_patches(torch.zeros(3, 64, 64), [[0.5, 0]]), "positions must be whole"),
        (lambda: information_ratio([[-1, 0], [0, 99]], Placement.centred(20, 20, 64)), "and 1 more are outside"),
        (lambda: Coverage(Placement.centred(20, 20, 64)).add(60, 0), "glimpses must lie inside the canvas"),
        (lambda: GlimpseDataset([], seed=-1), "seed must not be negative"),
    ],
)  # fmt: skip
def test_bad_input_gives_one_clear_line(call, message):
    with pytest.raises(DataError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
