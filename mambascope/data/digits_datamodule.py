"""ScopeDigits for training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mambascope.data.datamodule import ResumableDataModule, masks_at
from mambascope.data.loader import ResumableLoader
from mambascope.data.scopedigits import CLASS_NAMES, ScopeDigits
from mambascope.data.scopedigits_config import ScopeDigitsConfig
from mambascope.data.sources import KeyedDigits

_DIGITS = ScopeDigitsConfig()


class ScopeDigitsDataModule(ResumableDataModule):
    """The built-in handwritten digits: nothing to download.

    Args:
        train_length: Training images per epoch.
        val_length: Validation images; they are drawn once and kept.
        digits: Appearance and size of the images.
        fresh_each_epoch: Draw new training images in every epoch (from the same 1,347 scans) instead of repeating the
            first epoch's.
        calibration_length: Images on which the exit threshold is chosen; further ones of the validation scans.
        batch_size: Images per step and process.
        val_batch_size: Images per validation step and process; by default ``batch_size``.
        num_workers: Worker processes; drawing takes about 0.2 ms per 64-pixel image, so 0 is usually best.
        pin_memory: Copy batches to page-locked memory; by default when there is a GPU.
        drop_last: Leave out the training images that fill no whole batch.
        seed: Order of the training images (their content depends on ``digits.seed``).
        img_size: Side in pixels to which the drawn images are resized, e.g. to train a model at a lower resolution on
            the same images; by default they stay as they are drawn.

    Raises:
        ValueError: For an argument out of range.
    """

    num_classes = len(CLASS_NAMES)
    in_chans = 3
    mean = IMAGENET_DEFAULT_MEAN
    std = IMAGENET_DEFAULT_STD

    def __init__(
        self,
        train_length: int = 6000,
        val_length: int = 1000,
        digits: ScopeDigitsConfig = _DIGITS,
        fresh_each_epoch: bool = True,
        calibration_length: int = 1000,
        batch_size: int = 64,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        drop_last: bool = True,
        seed: int = 0,
        img_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, val_batch_size, num_workers, pin_memory, drop_last, seed)
        if calibration_length < 1:
            raise ValueError(f"calibration_length must be at least 1, got {calibration_length}")
        if img_size is not None and img_size < 1:
            raise ValueError(f"img_size must be at least 1, got {img_size}")
        self.digits = digits
        self.calibration_length = calibration_length
        self.fresh_each_epoch = fresh_each_epoch
        self.class_names = list(CLASS_NAMES)
        side = img_size or self.digits.size
        self.img_size = (side, side)
        self.train_digits = ScopeDigits("cls", "train", train_length, self.digits)
        self.val_digits = ScopeDigits("cls", "val", val_length, self.digits)

    def _make_train_loader(self) -> ResumableLoader:
        if not self.fresh_each_epoch:
            self.train_digits.preload()
        images = KeyedDigits(self.train_digits, self.mean, self.std, self.fresh_each_epoch, size=self.img_size[0])
        return self._packet_loader(images, len(self.train_digits), training=True)

    def _make_val_loader(self) -> ResumableLoader:
        self.val_digits.preload()
        return self._eval_loader(len(self.val_digits))

    def calibration_dataloader(self) -> ResumableLoader:
        """Loader of the images that follow the validation images."""
        return self._eval_loader(self.calibration_length, start=len(self.val_digits))

    def object_masks(self, rows: Sequence[int]) -> NDArray[np.bool_]:
        """Which pixels [K, H, W] of validation images belong to the object that is to be recognised."""
        return masks_at(np.stack([self.val_digits.object_mask(int(row)) for row in rows]), self.img_size)

    def _eval_loader(self, length: int, start: int = 0) -> ResumableLoader:
        images = KeyedDigits(self.val_digits, self.mean, self.std, start=start, size=self.img_size[0])
        return self._packet_loader(images, length, training=False)
