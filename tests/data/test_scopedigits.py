"""The built-in digits: which scans appear where, repeatable images, targets that fit the pixels."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from mambascope.data.digits_datamodule import ScopeDigitsDataModule
from mambascope.data.glyphs import enlarge, load_scans, resize_matrix, split_rows
from mambascope.data.scopedigits import ScopeDigits
from mambascope.data.scopedigits_config import ScopeDigitsConfig


def test_scans_are_split_once_for_all():
    train, val = split_rows("train"), split_rows("val")
    assert len(train) == 1347
    assert len(val) == 450
    assert sorted([*train, *val]) == list(range(1797))
    for split, share in (("train", 1347 / 1797), ("val", 450 / 1797)):
        counts = np.bincount(load_scans(split).labels)
        np.testing.assert_allclose(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180] * np.array(share), atol=1)
    digest = hashlib.sha256(val.astype("<i8").tobytes()).hexdigest()[:16]
    assert digest == "43f0b38a1c652935", "another division would put known test scans into training"


@pytest.mark.parametrize("split", ["train", "val"])
def test_only_scans_of_the_split_are_used(split):
    data = ScopeDigits(split=split, length=300)
    allowed = set(split_rows(split).tolist())
    metas = [data.meta(i) for i in range(300)]
    assert {m["source"] for m in metas} <= allowed
    for m in metas:
        assert load_scans(split).labels[m["row"]] == m["target"]


def test_clutter_and_scenes_take_scans_of_their_split(monkeypatch):
    """Every scan the painter enlarges is one of the split, whole or in part."""
    import mambascope.data.canvas as canvas
    import mambascope.data.scenes as scenes
    import mambascope.data.scopedigits as scopedigits

    seen = []

    def spy(scan, height, width):
        seen.append(scan)
        return enlarge(scan, height, width)

    for module in (canvas, scenes, scopedigits):
        monkeypatch.setattr(module, "enlarge", spy)
    val = load_scans("val").images
    for task in ("cls", "seg"):
        data = ScopeDigits(task, "val", length=5)
        for i in range(5):
            data[i]
    assert len(seen) > 20
    assert all(np.shares_memory(scan, val) for scan in seen)


def test_same_key_same_image_in_any_order():
    a, b = ScopeDigits(length=50, seed=3), ScopeDigits(length=80, seed=3)
    images = [a[i][0] for i in range(20)]
    for i in reversed(range(20)):
        np.testing.assert_array_equal(b[i][0], images[i])
    assert not np.array_equal(ScopeDigits(seed=4)[0][0], images[0])
    assert not np.array_equal(ScopeDigits(split="val", seed=3)[0][0], images[0])
    np.testing.assert_array_equal(a.sample(60)[0], b[60][0])  # beyond the length: more of the same stream


@pytest.mark.parametrize("size", [32, 50, 64, 112, 224])
def test_any_size(size):
    image, target = ScopeDigits(size=size, split="val")[7]
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert target == 7


def test_shares_and_sizes():
    config = ScopeDigitsConfig(easy_share=0.7)
    data = ScopeDigits(config=config, length=1000)
    metas = [data.meta(i) for i in range(1000)]
    hard = np.array([m["is_hard"] for m in metas])
    assert abs(hard.mean() - 0.3) < 0.05
    np.testing.assert_array_equal(hard[:100], ScopeDigits(config=config, length=100).is_hard())
    sides = np.array([m["side"] for m in metas])
    assert (sides[hard].min(), sides[hard].max()) == (10, 15)
    assert (sides[~hard].min(), sides[~hard].max()) == (26, 53)
    boxes = np.array([m["box"] for m in metas])
    assert boxes.min() >= 0
    assert boxes.max() <= 64
    centred = ScopeDigits(jitter=0.0, length=20)
    for m in (centred.meta(i) for i in range(20)):
        assert abs(m["box"][0] + m["box"][2] - 64) <= 1
    np.testing.assert_array_equal(np.bincount(data.targets()), [100] * 10)
    assert [data[i][1] for i in range(12)] == data.targets()[:12].tolist()


def test_hard_digits_keep_their_pixels_at_any_image_size():
    assert ScopeDigitsConfig(size=224).pixels("hard") == (10, 15)
    assert ScopeDigitsConfig(size=224, hard_size=(0.1, 0.2)).pixels("hard") == (22, 45)


def nearest_scan_accuracy(data, halve, count=100):
    """How often the nearest training scan, enlarged to the true box, names the hard digit."""
    train = load_scans("train")
    hits = total = 0
    for i in range(1000):
        meta = data.meta(i)
        if not meta["is_hard"]:
            continue
        x0, y0, x1, _ = meta["box"]
        picture = Image.fromarray(data.image(i)).convert("L")
        crop = picture.resize((32, 32), Image.Resampling.BOX, None) if halve else picture
        scale = 0.5 if halve else 1.0
        side = round((x1 - x0) * scale)
        patch = np.asarray(crop, np.float32)[round(y0 * scale) :, round(x0 * scale) :][:side, :side]
        bank = np.einsum("ij,njk,lk->nil", resize_matrix(8, side), train.images, resize_matrix(8, side)).reshape(
            -1, side**2
        )
        bank = bank - bank.mean(1, keepdims=True)
        bank /= np.linalg.norm(bank, axis=1, keepdims=True)
        best = int((bank @ (patch - patch.mean()).reshape(-1)).argmax())
        hits += train.labels[best] == meta["target"]
        total += 1
        if total == count:
            break
    return hits / total


def test_hard_digits_are_readable_at_full_size_and_lose_by_halving():
    data = ScopeDigits(split="val", length=1000, hard_size=(0.15, 0.17), clutter=(0, 0))
    full, half = nearest_scan_accuracy(data, False), nearest_scan_accuracy(data, True)
    assert full > 0.85
    assert half < full - 0.1
    outlined = ScopeDigits(split="val", length=1000, hard_size=(0.15, 0.17), clutter=(0, 0), hard_outline=0.9)
    assert nearest_scan_accuracy(outlined, True) < half


def test_batch_and_cache_agree_with_single_images():
    data = ScopeDigits(length=30)
    images, targets = data.batch([3, 29, 3])
    np.testing.assert_array_equal(images[1], data[29][0])
    np.testing.assert_array_equal(images[0], images[2])
    assert targets.tolist() == [3, 9, 3]
    cached = ScopeDigits(length=30, cache=True)
    np.testing.assert_array_equal(cached[29][0], data[29][0])
    np.testing.assert_array_equal(cached.preload(), data.batch(range(30))[0])
    np.testing.assert_array_equal(cached.batch([5, 6])[0], data.batch([5, 6])[0])
    np.testing.assert_array_equal(cached.sample(31)[0], data.sample(31)[0])


def test_transform_gets_a_picture():
    image, target = ScopeDigits(transform=lambda picture: picture.size)[5]
    assert (image, target) == ((64, 64), 5)
    size, mask = ScopeDigits("seg", size=96, transform=lambda picture, target: (picture.size, target.shape))[0]
    assert (size, mask) == ((96, 96), (96, 96))


def test_scenes_have_consistent_targets():
    data = ScopeDigits("det", "val", size=128, length=40)
    segmentation = ScopeDigits("seg", "val", size=128, length=40)
    easy, counts, overlapping = [], [], 0
    for i in range(40):
        image, target = data[i]
        boxes, labels, masks = target["boxes"], target["labels"], target["masks"]
        assert image.shape == (128, 128, 3)
        assert len(boxes) == len(labels) == len(masks) >= 1
        assert masks.sum(0).max() == 1
        for box, mask in zip(boxes.astype(int), masks, strict=True):
            x0, y0, x1, y1 = box
            assert mask.any()
            assert not mask[:y0].any()
            assert not mask[y1:].any()
            assert not mask[:, :x0].any()
            assert not mask[:, x1:].any()
            for line in (mask[y0], mask[y1 - 1], mask[:, x0], mask[:, x1 - 1]):
                assert line.any()
        expected = np.zeros((128, 128), np.uint8)
        for label, mask in zip(labels, masks, strict=True):
            expected[mask] = label + 1
        same_image, class_mask = segmentation[i]
        np.testing.assert_array_equal(same_image, image)
        np.testing.assert_array_equal(class_mask, expected)
        ink = image[masks.any(0)].mean()
        assert ink > image[~masks.any(0)].mean() + 20
        meta = data.meta(i)
        easy.append(not meta["is_hard"])
        counts.append(meta["count"])
        scene = data.scene(i)
        assert scene.is_hard == scene.small.any()
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        for a in range(len(boxes)):
            for b in range(a):
                w, h = np.clip(np.minimum(boxes[a, 2:], boxes[b, 2:]) - np.maximum(boxes[a, :2], boxes[b, :2]), 0, None)
                overlapping += w * h > 0.25 * min(area[a], area[b])
    assert 10 < sum(easy) < 35
    assert max(counts) >= 4
    assert overlapping == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "size must be an integer of at least 32"),
        ({"easy_share": 1.2}, r"easy_share must be in \[0, 1\]"),
        ({"jitter": -0.1}, "jitter"),
        ({"easy_size": (0.5, 0.4)}, "easy_size must be"),
        ({"clutter": (3, 1)}, "clutter must be"),
        ({"seed": -1}, "seed must not be negative"),
        ({"length": 0}, "length must be at least 1"),
        ({"task": "pose"}, "task must be one of cls, seg, det"),
        ({"split": "test"}, "split must be 'train' or 'val'"),
        ({"colour": 1}, "unknown option colour"),
        ({"task": "seg", "cache": True}, "cache is for task 'cls'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ScopeDigits(**options)


def test_index_out_of_range_ends_iteration():
    data = ScopeDigits(length=3)
    with pytest.raises(IndexError):
        data[3]
    with pytest.raises(IndexError):
        data[-1]


def test_calibration_images_are_further_images_of_the_validation_scans():
    module = ScopeDigitsDataModule(
        8, 12, ScopeDigitsConfig(size=32), calibration_length=7, batch_size=4, val_batch_size=5
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (module.mean, module.std))

    def pixels(loader):
        images = torch.cat([x for x, _ in loader])
        return ((images * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    expected = ScopeDigits("cls", "val", 19, size=32)
    assert np.array_equal(pixels(module.val_dataloader()), [expected.image(i) for i in range(12)])
    assert np.array_equal(pixels(module.calibration_dataloader()), [expected.image(i) for i in range(12, 19)])
    labels = torch.cat([y for _, y in module.calibration_dataloader()])
    assert labels.tolist() == [i % 10 for i in range(12, 19)]
