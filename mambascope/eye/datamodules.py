"""Data modules whose batches are glimpse sequences: ScopeDigits, and everything that timm reads.

Sequences are functions of (seed, epoch, position in the epoch); validation uses the same ones in every epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from mambascope.data.digits_datamodule import ScopeDigitsDataModule
from mambascope.data.errors import DataError
from mambascope.data.image_datamodule import ImageDataModule
from mambascope.data.loader import Item, Packet, ResumableLoader
from mambascope.data.sampling import SampleKey
from mambascope.data.scopedigits import ScopeDigits
from mambascope.data.scopedigits_config import ScopeDigitsConfig
from mambascope.data.sources import ImageSource, KeyedImages
from mambascope.eye.augment import GlimpseAugment, TrainGlimpses
from mambascope.eye.dataset import GlimpseOptions
from mambascope.eye.glimpses import GlimpseSequence

_PLAIN = GlimpseAugment(
    canvas_size=(64, 64),
    hflip=0.0,
    color_jitter_prob=0.0,
    grayscale=0.0,
    blur=0.0,
    perspective=0.0,
    crop=0.0,
    stretch=False,
    erase=0.0,
)


def _checked(length: int, patch_size: int, glimpses: GlimpseOptions) -> GlimpseOptions:
    """The validation's options with the patch size of the training."""
    for name, value in (("length", length), ("patch_size", patch_size), ("glimpses.length", glimpses.length)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return replace(glimpses, patch_size=patch_size)


class EvalGlimpses:
    """A picture as the sequence of some options; its seed comes from PyTorch's generator, which the loaders seed."""

    def __init__(self, options: GlimpseOptions) -> None:
        self.options = options

    def __call__(self, picture: Any) -> GlimpseSequence:
        """The sequence."""
        return self.options.sequence(picture, int(torch.randint(2**62, ()).item()))


class KeyedGlimpses(KeyedImages):
    """Glimpse sequences of images; pictures that cannot become one end the run with their name.

    Args:
        *args: As for :class:`~mambascope.data.sources.KeyedImages`.
        **kwargs: The same.
        same_each_epoch: Leave the epoch out of the key.
    """

    def __init__(self, *args: Any, same_each_epoch: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.same_each_epoch = same_each_epoch

    def __getitem__(self, key: SampleKey) -> Item:
        try:
            return super().__getitem__(key._replace(epoch=0) if self.same_each_epoch else key)
        except DataError as error:  # raised in a worker it would arrive with a traceback
            return Item(None, failure=f"{self.source.name(key.row)}: {error}")


class GlimpseImageDataModule(ImageDataModule):
    """Images from folders, tar files, WebDataset or Hugging Face data sets as glimpse sequences.

    Args:
        root: folder with one sub-folder (or .tar file) per split; for ``hfds/`` the cache folder.
        dataset: "folder", or a timm name; see :class:`~mambascope.data.image_datamodule.ImageDataModule`.
        train_split: name of the training split.
        val_split: name of the validation split.
        num_classes: number of classes of the model; by default as many as the data have.
        class_map: class folder names in the order of the labels, or a text file with one per line.
        length: glimpses per training image.
        patch_size: side of a glimpse in pixels; also the model's, unless ``net.args`` says otherwise.
        augment: what happens to a training image.
        glimpses: validation: glimpses per image, scan pattern, canvas.
        batch_size: images per step and process.
        val_batch_size: images per validation step and process; by default ``batch_size``.
        num_workers: worker processes for each of the loaders.
        pin_memory: copy batches to page-locked memory; by default when there is a GPU.
        drop_last: leave out the training images that fill no whole batch.
        value_range: values of the files that become 0 and 255; see
            :class:`~mambascope.data.image_datamodule.ImageDataModule`.
        skip_bad_files: leave unreadable files out, with a count, instead of stopping at the first.
        num_samples: training images of a WebDataset that has no index file.
        download: fetch the data set if its reader can.
        input_key: column of the images in a data set of Hugging Face.
        target_key: column of the labels.
        seed: order, augmentation and glimpses.

    Raises:
        ValueError: for an argument out of range.
        DataError: when the data are missing or do not fit (raised as soon as they are looked at).
    """

    inputs = "glimpses"

    def __init__(
        self,
        root: str,
        dataset: str = "folder",
        train_split: str = "train",
        val_split: str = "validation",
        num_classes: int | None = None,
        class_map: str | list[str] | None = None,
        length: int = 1024,
        patch_size: int = 16,
        augment: GlimpseAugment = GlimpseAugment(),  # noqa: B008 (frozen)
        glimpses: GlimpseOptions = GlimpseOptions(),  # noqa: B008
        batch_size: int = 64,
        val_batch_size: int | None = None,
        num_workers: int = 4,
        pin_memory: bool | None = None,
        drop_last: bool = True,
        value_range: tuple[float, float] | str | None = None,
        skip_bad_files: bool = False,
        num_samples: int | None = None,
        download: bool = False,
        input_key: str | None = None,
        target_key: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root,
            dataset,
            train_split,
            val_split,
            num_classes,
            class_map,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            drop_last=drop_last,
            mean=(0.0,),
            std=(1.0,),
            value_range=value_range,
            skip_bad_files=skip_bad_files,
            num_samples=num_samples,
            download=download,
            input_key=input_key,
            target_key=target_key,
            seed=seed,
        )
        self.patch_size, self.augment = patch_size, augment
        self.length, self.glimpses = length, _checked(length, patch_size, glimpses)

    def train_transform(self) -> Callable[[Any], Any]:
        """Random augmentation and glimpses: picture to sequence."""
        return TrainGlimpses(self.augment, self.length, self.patch_size)

    def val_transform(self) -> Callable[[Any], Any]:
        """Resizing and glimpses: picture to sequence."""
        return EvalGlimpses(self.glimpses)

    def _keyed(self, source: ImageSource, transform: Callable[[Any], Any], training: bool) -> KeyedImages:
        return KeyedGlimpses(
            source, transform, self.seed, self.skip_bad_files, replace=training, same_each_epoch=not training
        )

    def val_images(self) -> ImageSource:
        """The validation images themselves: call it with a number for the picture and its label."""
        return self._source("val")

    def describe(self) -> dict[str, Any]:
        """What a model must know to be used without this module."""
        return {**super().describe(), "glimpses": asdict(self.glimpses)}


class KeyedGlimpseDigits(Dataset):
    """ScopeDigits as glimpse sequences, whole batches at a time.

    Args:
        digits: the images (task "cls").
        make: picture and key to sequence.
        fresh: draw new images in every epoch instead of repeating those of the first.
    """

    def __init__(
        self, digits: ScopeDigits, make: Callable[[Image.Image, SampleKey], GlimpseSequence], fresh: bool = False
    ) -> None:
        self.digits, self.make, self.fresh = digits, make, fresh

    def __getitems__(self, keys: Sequence[SampleKey]) -> Packet:
        length = len(self.digits)
        images, targets = self.digits.batch([k.row + (k.epoch * length if self.fresh else 0) for k in keys])
        try:
            sequences = [self.make(Image.fromarray(image), key) for image, key in zip(images, keys, strict=True)]
        except DataError as error:  # raised in a worker it would arrive with a traceback
            return Packet(None, failure=str(error))
        return Packet((default_collate(sequences), torch.from_numpy(targets)))


class DigitPictures:
    """ScopeDigits as pictures: call it with a number for the RGB picture and its label.

    Args:
        digits: the images (task "cls").
        length: how many.
        start: index of the first; beyond the data set's length come further images of the same kind.
    """

    def __init__(self, digits: ScopeDigits, length: int, start: int = 0) -> None:
        self.digits, self.length, self.start = digits, length, start

    def __len__(self) -> int:
        return self.length

    def __call__(self, index: int) -> tuple[Image.Image, int]:
        """Picture and label."""
        image, label = self.digits.sample(self.start + index)
        return Image.fromarray(image), label


class GlimpseDigitsDataModule(ScopeDigitsDataModule):
    """The built-in handwritten digits as glimpse sequences: nothing to download.

    Args:
        train_length: training images per epoch.
        val_length: validation images.
        digits: appearance and size of the images.
        fresh_each_epoch: draw new training images in every epoch instead of repeating the first epoch's.
        calibration_length: images on which a stopping threshold is chosen; further ones of the validation scans.
        length: glimpses per training image.
        patch_size: side of a glimpse in pixels; also the model's, unless ``net.args`` says otherwise.
        augment: what happens to a training image.
        glimpses: validation: glimpses per image, scan pattern, canvas.
        batch_size: images per step and process.
        val_batch_size: images per validation step and process; by default ``batch_size``.
        num_workers: worker processes.
        pin_memory: copy batches to page-locked memory; by default when there is a GPU.
        drop_last: leave out the training images that fill no whole batch.
        seed: order of the images and glimpses (the content of the images depends on ``digits.seed``).

    Raises:
        ValueError: for an argument out of range.
    """

    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)
    inputs = "glimpses"

    def __init__(
        self,
        train_length: int = 6000,
        val_length: int = 1000,
        digits: ScopeDigitsConfig = ScopeDigitsConfig(),  # noqa: B008 (frozen)
        fresh_each_epoch: bool = True,
        calibration_length: int = 1000,
        length: int = 64,
        patch_size: int = 16,
        augment: GlimpseAugment = _PLAIN,
        glimpses: GlimpseOptions = GlimpseOptions(length=64, canvas_size=64),  # noqa: B008
        batch_size: int = 64,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        drop_last: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train_length,
            val_length,
            digits,
            fresh_each_epoch,
            calibration_length,
            batch_size,
            val_batch_size,
            num_workers,
            pin_memory,
            drop_last,
            seed,
        )
        self.patch_size, self.augment = patch_size, augment
        self.length, self.glimpses = length, _checked(length, patch_size, glimpses)

    def _train_sequence(self, picture: Image.Image, key: SampleKey) -> GlimpseSequence:
        make = TrainGlimpses(self.augment, self.length, self.patch_size)
        return make.sequence(picture, np.random.default_rng((self.seed, key.epoch, key.position)))

    def _val_sequence(self, picture: Image.Image, key: SampleKey) -> GlimpseSequence:
        return self.glimpses.sequence(picture, (self.seed, key.row))

    def _loader(self, training: bool) -> ResumableLoader:
        digits = self.train_digits if training else self.val_digits
        if not training or not self.fresh_each_epoch:
            digits.preload()
        sequence = self._train_sequence if training else self._val_sequence
        images = KeyedGlimpseDigits(digits, sequence, fresh=training and self.fresh_each_epoch)
        return self._packet_loader(images, len(digits), training=training)

    def _make_train_loader(self) -> ResumableLoader:
        return self._loader(True)

    def _make_val_loader(self) -> ResumableLoader:
        return self._loader(False)

    def val_images(self) -> DigitPictures:
        """The validation images themselves."""
        return DigitPictures(self.val_digits, len(self.val_digits))

    def calibration_images(self) -> DigitPictures:
        """Images on which a stopping threshold may be chosen; they follow the validation images."""
        return DigitPictures(self.val_digits, self.calibration_length, start=len(self.val_digits))

    def describe(self) -> dict[str, Any]:
        """What a model must know to be used without this module."""
        return {**super().describe(), "glimpses": asdict(self.glimpses)}
