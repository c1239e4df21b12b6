"""Public data sets of small images, whole in memory: Fashion-MNIST, CIFAR-10 and CIFAR-100.

Fashion-MNIST (arXiv 1708.07747) comes as IDX files, packed or not: as torchvision keeps them (``FashionMNIST/raw``), as
the Debian package ``dataset-fashion-mnist`` installs them, or straight in the folder. CIFAR (Krizhevsky, 2009) comes as
the binary version, or as torchvision's Python version, which is unpickled only after its checksum is right.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mambascope.data.errors import DataError

DEFAULT_ROOT = Path("data")
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
_LARGEST = 2**30  # bytes of an unpacked file
_FASHION_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
_CIFAR_FILES = {
    ("cifar10", "train"): tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    ("cifar10", "test"): ("test_batch.bin",),
    ("cifar100", "train"): ("train.bin",),
    ("cifar100", "test"): ("test.bin",),
}
_CIFAR_SIDE = 32

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


class SmallImages(NamedTuple):
    """A data set of small images.

    Attributes:
        read: From a folder and a split, ``train`` or ``test``, to images [N, H, W, C] and labels [N].
        torchvision: Name of torchvision's class, which downloads it.
        side: Height and width in pixels.
        class_names: One name per class, in the order of the labels.
        mean: Per channel, of the training images' values in 0–1.
        std: Per channel.
    """

    read: Callable[[Path, str], Arrays]
    torchvision: str
    side: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of bytes in an IDX file, which may be packed with gzip.

    Raises:
        DataError: The file is damaged or no IDX file of bytes.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_LARGEST)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise DataError(f"{path} is no IDX file of bytes")
    dims = content[3]
    shape = [int(n) for n in np.frombuffer(content, ">u4", dims, 4)]
    start, size = 4 + 4 * dims, int(np.prod(shape, dtype=object)) if shape else 1
    if len(content) - start != size:
        raise DataError(f"{path} is damaged: {size:,} values announced, {len(content) - start:,} there")
    return np.frombuffer(content, np.uint8, size, start).reshape(shape)


def _first_file(folders: Sequence[Path], name: str) -> Path | None:
    return next((f for folder in folders for f in (folder / name, folder / f"{name}.gz") if f.is_file()), None)


def read_fashion(root: Path, split: str) -> Arrays:
    """Fashion-MNIST's images [N, 28, 28, 1] and labels [N] of a split, ``train`` or ``test``.

    Raises:
        DataError: The files are missing, damaged or do not belong together.
    """
    folders = [root, root / "FashionMNIST" / "raw", root / "raw"]
    if root == DEFAULT_ROOT:
        folders.append(DEBIAN_FASHION)
    paths = [_first_file(folders, name) for name in _FASHION_FILES[split]]
    if None in paths:
        raise DataError(
            f"{root} holds no Fashion-MNIST ({_FASHION_FILES[split][paths.index(None)]}, or .gz): install Debian's "
            "dataset-fashion-mnist, or pass --data.download true"
        )
    images, labels = (read_idx(path) for path in paths if path is not None)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(f"{paths[0]} and {paths[1]} do not belong together: {images.shape} and {labels.shape}")
    return images[..., None], labels.astype(np.int64)


def _read_cifar(name: str) -> Callable[[Path, str], Arrays]:
    leading = 1 if name == "cifar10" else 2  # CIFAR-100 gives the coarse label first
    record = leading + 3 * _CIFAR_SIDE**2

    def read(root: Path, split: str) -> Arrays:
        first = _CIFAR_FILES[name, split][0]
        folder = next((f for f in (root / _CIFAR_FOLDERS[name], root) if (f / first).is_file()), None)
        if folder is None:
            return _read_pickled(root, name, split)
        parts = []
        for file in _CIFAR_FILES[name, split]:
            try:
                content = (folder / file).read_bytes()
            except OSError as error:
                raise DataError(f"{folder / file} cannot be read: {error.strerror or error}") from None
            if not content or len(content) % record:
                raise DataError(f"{folder / file} is damaged: {len(content):,} bytes are no records of {record:,}")
            parts.append(np.frombuffer(content, np.uint8).reshape(-1, record))
        rows = np.concatenate(parts)
        pixels = rows[:, leading:].reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(pixels), rows[:, leading - 1].astype(np.int64)

    return read


def _read_pickled(root: Path, name: str, split: str) -> Arrays:
    """The Python version, through torchvision, which compares checksums before anything is unpickled."""
    import torchvision

    try:
        data = getattr(torchvision.datasets, name.upper())(root, train=split == "train")
    except RuntimeError:
        raise DataError(
            f"{root} holds no {name} ({_CIFAR_FOLDERS[name]}, or torchvision's Python version, unchanged): pass "
            "--data.download true"
        ) from None
    return data.data, np.asarray(data.targets, dtype=np.int64)


def _cifar(name: str, classes: tuple[str, ...], mean: tuple[float, ...], std: tuple[float, ...]) -> SmallImages:
    return SmallImages(_read_cifar(name), name.upper(), _CIFAR_SIDE, classes, mean, std)


_FASHION_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100_CLASSES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest",
    "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard",
    "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
    "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine", "possum",
    "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper",
    "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone",
    "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf",
    "woman", "worm",
)  # fmt: skip

SMALL_IMAGES: dict[str, SmallImages] = {
    "fashion_mnist": SmallImages(read_fashion, "FashionMNIST", 28, _FASHION_CLASSES, (0.2860,), (0.3530,)),
    "cifar10": _cifar("cifar10", _CIFAR10_CLASSES, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _cifar("cifar100", _CIFAR100_CLASSES, (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def download(name: str, root: Path) -> None:
    """Fetches a data set into `root` with torchvision, unless it is there.

    Raises:
        DataError: It cannot be fetched.
    """
    import torchvision

    kind: Any = getattr(torchvision.datasets, SMALL_IMAGES[name].torchvision)
    try:
        for train in (True, False):
            kind(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name} cannot be downloaded into {root}: {error}") from None


def open_split(name: str, root: Path, split: str) -> Arrays:
    """Images [N, H, W, C] and labels [N] of a split, checked.

    Raises:
        DataError: They are missing, damaged, or not this data set.
    """
    kind = SMALL_IMAGES[name]
    images, labels = kind.read(root, split)
    if images.shape[1:] != (kind.side, kind.side, len(kind.mean)):
        raise DataError(f"{name} in {root} has images of {images.shape[1:]}, not {kind.side} pixels")
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(kind.class_names):
        last = len(kind.class_names) - 1
        raise DataError(f"{name} in {root}, {split}: labels must be 0..{last}, and there must be some")
    return images, labels
