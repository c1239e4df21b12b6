"""Fashion-MNIST and CIFAR for training: whole data sets in memory, augmented a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.rank_zero import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mambascope.data.datamodule import ResumableDataModule, masks_at
from mambascope.data.errors import DataError
from mambascope.data.loader import Item, Packet, ResumableLoader
from mambascope.data.sampling import SampleKey
from mambascope.data.small_images import DEFAULT_ROOT, SMALL_IMAGES, Arrays, download, open_split
from mambascope.utils import check_choice


@lru_cache(maxsize=2)
def _draws(seed: int, epoch: int, length: int) -> NDArray[np.float32]:
    """Three uniform numbers per place of an epoch [length, 3]: shifts down and to the right, and the flip."""
    return np.random.default_rng((seed, epoch)).random((length, 3), np.float32)


class KeyedArrays(Dataset):
    """Images in memory as normalised tensors, whole batches at a time.

    Args:
        arrays: Images [N, H, W, C] uint8 and labels [N].
        mean: Per channel, of values in 0–1.
        std: Per channel.
        seed: With epoch and position it decides the augmentation.
        shift: Pixels by which an image is moved at most in each direction; what enters is black. 0 for none.
        hflip: Probability of a horizontal flip.
        size: Side in pixels to which the images are resized.
    """

    def __init__(
        self,
        arrays: Arrays,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        shift: int = 0,
        hflip: float = 0.0,
        size: int | None = None,
    ) -> None:
        images, labels = arrays
        # contiguous here: an array that was read from a file may be read-only
        self.images = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2)))
        self.labels = torch.from_numpy(np.array(labels))
        self.seed, self.shift, self.hflip = seed, shift, hflip
        self.size = size or self.images.shape[-1]
        channels = self.images.shape[1]
        self.scale = 1.0 / (255.0 * torch.tensor(std, dtype=torch.float32).view(1, channels, 1, 1))
        self.offset = torch.tensor(mean, dtype=torch.float32).view(1, channels, 1, 1) * 255.0 * self.scale

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey) -> Item:
        images, labels = self.__getitems__([key]).batch
        return Item((images[0], int(labels[0])))

    def __getitems__(self, keys: Sequence[SampleKey]) -> Packet:
        rows = torch.tensor([key.row for key in keys])
        images = self.images[rows]
        if self.shift or self.hflip:
            places = [(key.epoch, key.position) for key in keys]
            images = self._augmented(images, np.stack([_draws(self.seed, e, len(self))[p] for e, p in places]))
        pixels = images.float()
        if self.size != images.shape[-1]:
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        return Packet((pixels.mul_(self.scale).sub_(self.offset), self.labels[rows]))

    def _augmented(self, images: Tensor, draws: NDArray[np.float32]) -> Tensor:
        """Moved and flipped images [B, C, H, W]."""
        batch, _, height, width = images.shape
        moves = torch.from_numpy((draws[:, :2] * (2 * self.shift + 1)).astype(np.int64))
        columns = torch.arange(width).expand(batch, width)
        flipped = torch.from_numpy(draws[:, 2] < self.hflip).unsqueeze(1)
        columns = torch.where(flipped, width - 1 - columns, columns) + moves[:, 1:]
        rows = torch.arange(height) + moves[:, :1]
        padded = F.pad(images, (self.shift,) * 4)
        at = torch.arange(batch).view(-1, 1, 1)
        return padded.permute(0, 2, 3, 1)[at, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


class SmallImageDataModule(ResumableDataModule):
    """Fashion-MNIST, CIFAR-10 or CIFAR-100 with its official split; the validation images are the test images.

    Args:
        dataset: ``fashion_mnist``, ``cifar10`` or ``cifar100``.
        root: Folder of the files; by default ``data``, and for Fashion-MNIST also where Debian's package puts it.
        download: Fetch the files into the folder with torchvision if they are not there.
        calibration_length: Training images that are kept for choosing the exit threshold; none of them is trained on.
        train_length: Training images, of the others; by default all.
        val_length: Test images; by default all.
        shift: Pixels by which a training image is moved at most in each direction.
        hflip: Probability of a horizontal flip in training.
        batch_size: Images per step and process.
        val_batch_size: Images per validation step and process; by default ``batch_size``.
        num_workers: Worker processes; the images lie in memory, so 0 is usually best.
        pin_memory: Copy batches to page-locked memory; by default when there is a GPU.
        drop_last: Leave out the training images that fill no whole batch.
        seed: Order and augmentation.
        img_size: Side in pixels to which the images are resized; by default they stay as they are.

    Raises:
        ValueError: For an argument out of range.
        DataError: When the data are missing or do not fit (raised as soon as they are looked at).
    """

    def __init__(
        self,
        dataset: str = "fashion_mnist",
        root: str | None = None,
        download: bool = False,
        calibration_length: int = 5000,
        train_length: int | None = None,
        val_length: int | None = None,
        shift: int = 2,
        hflip: float = 0.5,
        batch_size: int = 64,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        drop_last: bool = True,
        seed: int = 0,
        img_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, val_batch_size, num_workers, pin_memory, drop_last, seed)
        check_choice("dataset", dataset, tuple(SMALL_IMAGES))
        lengths = {"calibration_length": calibration_length, "train_length": train_length, "val_length": val_length}
        for name, value in {**lengths, "img_size": img_size}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if shift < 0:
            raise ValueError(f"shift must not be negative, got {shift}")
        if not 0 <= hflip <= 1:
            raise ValueError(f"hflip must be in [0, 1], got {hflip}")
        self.dataset, self.root, self.download = dataset, Path(root) if root is not None else DEFAULT_ROOT, download
        self.lengths, self.shift, self.hflip = lengths, shift, hflip
        kind = SMALL_IMAGES[dataset]
        self.class_names, self.mean, self.std = list(kind.class_names), kind.mean, kind.std
        self.num_classes, self.in_chans = len(kind.class_names), len(kind.mean)
        side = img_size or kind.side
        self.img_size = (side, side)
        self._arrays: dict[str, Arrays] = {}

    @rank_zero_only
    def prepare_data(self) -> None:
        """Fetches the files if that was asked for."""
        if self.download:
            download(self.dataset, self.root)

    def setup(self, stage: str | None = None) -> None:
        """Reads the files, so that errors come before training starts."""
        self._part("train")
        self._part("test")

    def _part(self, part: str) -> Arrays:
        """Images and labels of ``train``, ``calibration`` (the rest of the training images) or ``test``."""
        if part not in self._arrays:
            if part == "test":
                images, labels = open_split(self.dataset, self.root, "test")
                self._arrays[part] = (images[: self.lengths["val_length"]], labels[: self.lengths["val_length"]])
                return self._arrays[part]
            images, labels = open_split(self.dataset, self.root, "train")
            kept = self.lengths["calibration_length"] or 0
            if kept >= len(labels):
                raise DataError(f"calibration_length must be below the {len(labels):,} training images, got {kept:,}")
            order = np.random.default_rng(0).permutation(len(labels))  # the same images whatever the seed
            for name, rows in (("calibration", order[:kept]), ("train", order[kept:][: self.lengths["train_length"]])):
                self._arrays[name] = images[rows], labels[rows]
        return self._arrays[part]

    def _keyed(self, part: str, augmented: bool = False) -> KeyedArrays:
        shift, hflip = (self.shift, self.hflip) if augmented else (0, 0.0)
        return KeyedArrays(self._part(part), self.mean, self.std, self.seed, shift, hflip, self.img_size[0])

    def _make_train_loader(self) -> ResumableLoader:
        images = self._keyed("train", augmented=True)
        return self._packet_loader(images, len(images), training=True)

    def _make_val_loader(self) -> ResumableLoader:
        return self._eval_loader("test")

    def calibration_dataloader(self) -> ResumableLoader:
        """Loader of the training images that are kept for the threshold."""
        return self._eval_loader("calibration")

    @property
    def object_masks(self) -> Callable[[Sequence[int]], NDArray[np.bool_]] | None:
        """From places among the test images to the pixels [K, H, W] of their objects; ``None`` where nobody knows them.

        Fashion-MNIST shows articles on black: what is brighter than a sixteenth of white belongs to one.
        """
        return self._bright_pixels if self.dataset == "fashion_mnist" else None

    def _bright_pixels(self, rows: Sequence[int]) -> NDArray[np.bool_]:
        return masks_at(np.any(self._part("test")[0][list(rows)] >= 16, axis=3), self.img_size)

    def _eval_loader(self, part: str) -> ResumableLoader:
        images = self._keyed(part)
        return self._packet_loader(images, len(images), training=False)
