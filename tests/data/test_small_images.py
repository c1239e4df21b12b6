"""Fashion-MNIST and CIFAR: their files, damaged ones, and what training gets of them."""

import gzip
import struct

import numpy as np
import pytest
import torch

from mambascope.data import DataError, SmallImageDataModule
from mambascope.data.small_images import DEBIAN_FASHION, read_idx

RNG = np.random.default_rng(0)
NAMES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", 60),
         "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", 20)}  # fmt: skip


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, (images_name, labels_name, count) in NAMES.items():
        images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in ((images_name, images), (labels_name, labels)):
            content = idx(array)
            (folder / f"{name}{'.gz' if packed else ''}").write_bytes(gzip.compress(content) if packed else content)
        written[split] = images, labels
    return written


def write_cifar(folder, name):
    rows = {}
    folder = folder / ("cifar-10-batches-bin" if name == "cifar10" else "cifar-100-binary")
    folder.mkdir(parents=True)
    files = (
        [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
        if name == "cifar10"
        else ["train.bin", "test.bin"]
    )
    for file in files:
        head = RNG.integers(0, 10, (20, 1 if name == "cifar10" else 2), dtype=np.uint8)
        rows[file] = np.concatenate([head, RNG.integers(0, 256, (20, 3072), dtype=np.uint8)], axis=1)
        (folder / file).write_bytes(rows[file].tobytes())
    return rows


@pytest.mark.parametrize("where", [".", "FashionMNIST/raw", "raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_fashion_is_read_from_every_layout(tmp_path, where, packed):
    written = write_fashion(tmp_path / where, packed)
    data = SmallImageDataModule(root=str(tmp_path), calibration_length=10, batch_size=5, shift=0, hflip=0.0)
    data.setup()
    assert (data.num_classes, data.in_chans, data.img_size) == (10, 1, (28, 28))
    images, labels = map(torch.cat, zip(*data.val_dataloader(), strict=True))
    assert images.shape == (20, 1, 28, 28)
    assert labels.tolist() == written["test"][1].tolist()
    restored = (images * 0.3530 + 0.2860) * 255
    np.testing.assert_allclose(restored[:, 0].numpy(), written["test"][0], atol=1e-2)
    kept = torch.cat([x for x, _ in data.calibration_dataloader()])
    trained = torch.cat([x for x, _ in data.train_dataloader()])
    assert (len(kept), len(trained)) == (10, 50)
    together = {row.numpy().tobytes() for row in torch.cat([kept, trained])}
    assert len(together) == 60  # none of them twice: the threshold is chosen on images that nothing was trained on


def test_articles_on_black_are_their_own_masks(tmp_path):
    written = write_fashion(tmp_path)["test"][0]
    data = SmallImageDataModule(root=str(tmp_path), calibration_length=10)
    np.testing.assert_array_equal(data.object_masks([7, 2]), written[[7, 2]] >= 16)
    halved = SmallImageDataModule(root=str(tmp_path), calibration_length=10, img_size=14).object_masks(range(20))
    np.testing.assert_array_equal(halved, (written >= 16).reshape(20, 14, 2, 14, 2).any((2, 4)))
    assert SmallImageDataModule("cifar10").object_masks is None


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_from_its_binary_version(tmp_path, name, classes):
    rows = write_cifar(tmp_path, name)
    data = SmallImageDataModule(name, root=str(tmp_path), calibration_length=4, batch_size=4)
    data.setup()
    assert (data.num_classes, data.in_chans, len(data.class_names)) == (classes, 3, classes)
    images, labels = map(torch.cat, zip(*data.val_dataloader(), strict=True))
    test = rows["test_batch.bin" if name == "cifar10" else "test.bin"]
    leading = 1 if name == "cifar10" else 2
    assert labels.tolist() == test[:, leading - 1].tolist()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    pixels = ((images * std + mean) * 255).round().numpy().astype(np.uint8)
    assert np.array_equal(pixels.reshape(20, -1), test[:, leading:])


def test_augmentation_is_a_function_of_seed_epoch_and_place(tmp_path):
    write_fashion(tmp_path)
    options = {"root": str(tmp_path), "calibration_length": 10, "batch_size": 5}

    def epoch(number, start=0, **more):
        data = SmallImageDataModule(**{**options, **more})
        data.setup()
        loader = data.train_dataloader()
        loader.set_position(number, start)
        return torch.cat([x for x, _ in loader])

    assert torch.equal(epoch(1), epoch(1))
    assert torch.equal(epoch(1, batch_size=10), epoch(1))
    assert torch.equal(epoch(1, start=4), epoch(1)[20:])
    assert not torch.equal(epoch(1), epoch(2))
    assert not torch.equal(epoch(1, seed=1), epoch(1))


def test_moves_and_flips_keep_what_stays_in_the_picture(tmp_path):
    written = write_fashion(tmp_path)
    data = SmallImageDataModule(root=str(tmp_path), calibration_length=10, batch_size=50, shift=2, hflip=0.5)
    data.setup()
    images, _ = next(iter(data.train_dataloader()))
    pixels = ((images[:, 0] * 0.3530 + 0.2860) * 255).round().numpy().astype(np.uint8)
    originals = written["train"][0]
    seen = set()
    for picture in pixels:
        moves = [
            (down, right, flip)
            for down in range(-2, 3) for right in range(-2, 3) for flip in (False, True)
            if any(_is_moved(picture, o[:, ::-1] if flip else o, down, right) for o in originals)
        ]  # fmt: skip
        assert len(moves) == 1
        seen.add(moves[0])
    assert len(seen) > 20


def _is_moved(picture, original, down, right):
    padded = np.pad(original, 2)
    return np.array_equal(picture, padded[2 + down : 30 + down, 2 + right : 30 + right])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no IDX file of bytes"),
        (b"\0\0\x0d\x01\0\0\0\x01" + bytes(4), "is no IDX file of bytes"),
        (b"\0\0\x08\x03\0\0", "is no IDX file of bytes"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], "is damaged: 6 values announced, 5 there"),
        (b"\0\0\x08\x04" + b"\xff" * 16, "values announced, 0 there"),
    ],
)
def test_damaged_idx_files_are_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_data_are_named(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"abc")[:-4])
    with pytest.raises(DataError, match=r"x\.gz cannot be read"):
        read_idx(tmp_path / "x.gz")
    with pytest.raises(DataError, match=r"holds no Fashion-MNIST .*download true"):
        SmallImageDataModule(root=str(tmp_path)).setup()
    with pytest.raises(DataError, match=r"holds no cifar10 .*download true"):
        SmallImageDataModule("cifar10", root=str(tmp_path)).setup()
    write_cifar(tmp_path, "cifar100")
    (tmp_path / "cifar-100-binary" / "train.bin").write_bytes(bytes(3073))
    with pytest.raises(DataError, match=r"train\.bin is damaged: 3,073 bytes are no records of 3,074"):
        SmallImageDataModule("cifar100", root=str(tmp_path)).setup()
    write_fashion(tmp_path)
    with pytest.raises(DataError, match="calibration_length must be below the 60 training images, got 60"):
        SmallImageDataModule(root=str(tmp_path), calibration_length=60).setup()
    (tmp_path / NAMES["test"][1]).write_bytes(idx(np.full(20, 11, np.uint8)))
    with pytest.raises(DataError, match=r"labels must be 0\.\.9"):
        SmallImageDataModule(root=str(tmp_path), calibration_length=10).setup()
    with pytest.raises(ValueError, match="dataset must be one of 'fashion_mnist', 'cifar10', 'cifar100'"):
        SmallImageDataModule("mnist")


@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_debians_files_are_found():
    data = SmallImageDataModule()
    data.setup()
    images, labels = data._part("train")
    assert len(images) == 55_000
    assert np.bincount(labels).min() > 5_000
    assert abs(images.mean() / 255 - 0.2860) < 2e-3
    assert abs(images.std() / 255 - 0.3530) < 2e-3
