"""Random glimpse sequences for training, and the data modules that hand them out."""

import numpy as np
import pytest
import torch
from PIL import Image

from mambascope.data import GlimpseDigitsDataModule, GlimpseImageDataModule
from mambascope.data.errors import DataError
from mambascope.data.scopedigits_config import ScopeDigitsConfig
from mambascope.eye.augment import GlimpseAugment, TrainGlimpses, _perspective
from mambascope.eye.dataset import GlimpseOptions
from mambascope.eye.glimpses import make_sequence

NOTHING = {
    "hflip": 0, "color_jitter_prob": 0, "grayscale": 0, "blur": 0, "perspective": 0, "crop": 0, "stretch": False,
    "erase": 0,
}  # fmt: skip


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(30, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(60, 90), (17, 300), (300, 17), (16, 16), (1, 1), (500, 400)])
def test_every_image_becomes_a_sequence(size):
    """Also thin and tiny ones, whose crop the public code cannot draw; pixels stay on the canvas."""
    augment = GlimpseAugment(canvas_size=(48, 96))
    sides, places = set(), set()
    for seed in range(20):
        canvas, placement = augment(picture(*size), np.random.default_rng(seed), 16)
        assert canvas.dtype == torch.uint8
        assert canvas.shape == (3, *placement.canvas)
        assert 48 <= placement.canvas[0] == placement.canvas[1] <= 96
        assert min(placement.height, placement.width) >= 1
        outside = canvas.clone()
        outside[:, placement.top :, placement.left :][:, : placement.height, : placement.width] = 0
        assert outside.max() == 0
        sides.add(placement.canvas[0])
        places.add((placement.height, placement.width))
    assert len(sides) > 10
    assert len(places) > 15
    sequence = TrainGlimpses(augment, 30).sequence(picture(*size), np.random.default_rng(0))
    assert sequence.patches.shape == (30, 768)
    assert (sequence.information_ratio.diff() >= 0).all()
    assert 0 <= sequence.information_ratio[-1] <= 1


def test_without_augmentation_only_the_size_changes():
    augment = GlimpseAugment(canvas_size=(40, 40), **NOTHING)
    canvas, placement = augment(picture(80, 40), np.random.default_rng(0), 16)
    assert (placement.height, placement.width, placement.left) == (40, 20, 10)
    expected = np.array(picture(80, 40).resize((20, 40), Image.Resampling.BICUBIC))
    assert np.array_equal(canvas[:, :, 10:30].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"hflip": 1}, lambda a, b: torch.equal(a, b.flip(2))),
        ({"erase": 1}, lambda a, b: 0.015 < (a != b).float().mean() < 0.4 and (a[a != b] == 0).all()),
        ({"grayscale": 1}, lambda a, b: torch.equal(a[0], a[1]) and torch.equal(a[0], a[2])),
        ({"blur": 1}, lambda a, b: a.float().std() < 0.8 * b.float().std()),
        ({"color_jitter_prob": 1}, lambda a, b: (a.float().mean((1, 2)) - b.float().mean((1, 2))).abs().max() > 2),
    ],
)
def test_each_change_does_what_it_says(change, check):
    plain, _ = GlimpseAugment(canvas_size=(64, 64), **NOTHING)(picture(64, 64), np.random.default_rng(3), 16)
    changed, _ = GlimpseAugment(canvas_size=(64, 64), **{**NOTHING, **change})(
        picture(64, 64), np.random.default_rng(3), 16
    )
    assert check(changed, plain)


def test_perspective_moves_corners_to_where_they_belong():
    """Coloured corners arrive at the edges of the new box; without shift nothing changes."""
    image = picture(40, 60)
    same = _perspective([image], np.random.default_rng(0), 0.0)[0]
    assert np.abs(np.array(same).astype(int) - np.array(image)).max() <= 1
    sizes = {_perspective([image], np.random.default_rng(i), 0.25)[0].size for i in range(10)}
    assert len(sizes) > 5
    assert all(60 - 20 <= w <= 60 + 21 and 40 - 20 <= h <= 40 + 21 for w, h in sizes)
    white = Image.new("RGB", (60, 40), (255, 255, 255))
    views = [_perspective([white], np.random.default_rng(i), 0.25)[0] for i in range(10)]
    share = np.mean([np.mean(np.array(view) > 0) for view in views])
    assert 0.6 < share < 0.95  # black outside the image


def test_crop_and_stretch_stay_in_their_ranges():
    augment = GlimpseAugment(canvas_size=(100, 100), **{**NOTHING, "crop": 1, "stretch": True})
    sizes = np.array(
        [(p.height, p.width) for i in range(200) for _, p in [augment(picture(100, 100), np.random.default_rng(i), 16)]]
    )
    assert sizes.min() >= 30  # 0.3 of the shorter side
    assert sizes.max() <= 100
    assert sizes.min(0).max() < 34
    assert sizes.max(0).min() > 96
    assert abs(np.corrcoef(sizes.T)[0, 1]) < 0.2  # the aspect ratio is not kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"canvas_size": (90, 50)}, r"augment\.canvas_size must be \(smallest, largest\)"),
        ({"hflip": 1.5}, r"augment\.hflip must lie in \[0, 1\]"),
        ({"color_jitter": (0.4, 0.4, 0.4, 0.9)}, r"augment\.color_jitter"),
        ({"min_share": 0.7}, r"augment\.min_share must lie in \[0, 0\.5\)"),
    ],
)
def test_bad_options_are_named(change, message):
    with pytest.raises(DataError, match=message):
        GlimpseAugment(**change)


# ---- data modules ----------------------------------------------------------------------------------------------------


def digits(**options):
    return GlimpseDigitsDataModule(
        **{
            "train_length": 40, "val_length": 12, "calibration_length": 8, "batch_size": 8, "length": 10,
            "patch_size": 8,
            "digits": ScopeDigitsConfig(size=32), "augment": GlimpseAugment(canvas_size=(24, 48), **NOTHING),
            "glimpses": GlimpseOptions(length=9, canvas_size=32), **options,
        }
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 5), ("val", 3)):
        for i in range(count):
            for name in ("cat", "dog"):
                path = tmp_path / "images" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(40 + 3 * i, 60, i).save(path)
    return tmp_path / "images"


def images(root, **options):
    return GlimpseImageDataModule(
        str(root),
        **{
            "length": 10, "patch_size": 8, "batch_size": 4, "num_workers": 0,
            "augment": GlimpseAugment(canvas_size=(24, 48)),
            "glimpses": GlimpseOptions(length=9, canvas_size=32), **options,
        },
    )  # fmt: skip


def epoch(loader, number=0):
    loader.set_epoch(number)
    return list(loader)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip([*a[0], a[1]], [*b[0], b[1]], strict=True))


@pytest.mark.parametrize("kind", ["digits", "images"])
def test_sequences_depend_on_the_key_alone(kind, folder):
    make = (lambda **o: digits(**o)) if kind == "digits" else (lambda **o: images(folder, **o))
    first, again = epoch(make().train_dataloader()), epoch(make(num_workers=1).train_dataloader())
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    glimpses, labels = first[0]
    batch = len(labels)
    assert glimpses.patches.shape == (batch, 10, 192)
    assert glimpses.patches.dtype == torch.uint8
    assert glimpses.moves.shape == (batch, 10, 2)
    assert (glimpses.information_ratio.diff(dim=1) >= 0).all()
    assert glimpses.information_ratio[:, 0].max() > 0
    assert not equal(first[0], epoch(make().train_dataloader(), 1)[0])
    assert not equal(first[0], epoch(make(seed=1).train_dataloader())[0])
    # entered in the middle, the epoch goes on as it would have
    loader = make().train_dataloader()
    loader.set_position(0, 1)
    assert equal(next(iter(loader)), first[1])


@pytest.mark.parametrize("kind", ["digits", "images"])
def test_validation_is_the_same_in_every_epoch(kind, folder):
    data = digits() if kind == "digits" else images(folder)
    loader = data.val_dataloader()
    first = epoch(loader)
    assert all(equal(a, b) for a, b in zip(first, epoch(loader, 3), strict=True))
    assert first[0][0].patches.shape[1] == 9
    # the same images as they are given out one by one
    pictures = data.val_images()
    assert len(pictures) == sum(len(labels) for _, labels in first)
    canvas, placement = data.glimpses.place(pictures(1)[0])
    expected = make_sequence(canvas, placement, first[0][0].positions[1].numpy(), 8)
    assert torch.equal(expected.patches, first[0][0].patches[1])
    assert pictures(1)[1] == first[0][1][1]
    assert data.describe()["glimpses"]["length"] == 9
    assert (data.describe()["mean"], data.patch_size) == ([0, 0, 0], 8)


def test_calibration_digits_are_other_images():
    data = digits()
    first, other = data.val_images(), data.calibration_images()
    assert (len(first), len(other)) == (12, 8)
    assert other(0)[1] == 12 % 10
    assert not np.array_equal(np.array(first(2)[0]), np.array(other(0)[0]))


def test_images_too_small_for_a_glimpse_are_named(folder):
    picture(5, 200).save(folder / "val" / "dog" / "thin.png")
    with pytest.raises(DataError, match=r"thin\.png: an image of 5x200 pixels is smaller than a patch of 8x8"):
        epoch(images(folder, num_workers=1).val_dataloader())


@pytest.mark.parametrize("option", ["length", "patch_size"])
def test_lengths_must_be_positive(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        digits(**{option: 0})
