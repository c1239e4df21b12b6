"""ImageNet and other image data sets on disk, through timm's readers and transforms."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.rank_zero import rank_zero_only
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mambascope.data.datamodule import Loader, ResumableDataModule
from mambascope.data.errors import DataError
from mambascope.data.loader import ResumableLoader, StreamLoader
from mambascope.data.readers import (
    adopt_classes,
    check_several_classes,
    find_split,
    is_stream,
    named_classes,
    open_folder,
    open_named,
)
from mambascope.data.sampling import EpochBatchSampler
from mambascope.data.sources import ImageSource, KeyedImages, KeyedStream
from mambascope.data.transforms import make_transform
from mambascope.models.pictures import check_value_range
from mambascope.models.preprocessing import average, per_channel


class ImageDataModule(ResumableDataModule):
    """Images from folders, tar files, WebDataset or Hugging Face data sets, with timm's augmentation.

    Order and augmentation of map-style data are functions of (seed, epoch, position): they depend neither on the number
    of workers nor on what ran before. Streams (``wds/``, ``tfds/``, ``hfids/``) repeat exactly with the same number of
    workers; an interrupted epoch reads and drops what it had seen.

    Args:
        root: Folder with one sub-folder (or .tar file) per split; for ``hfds/`` the cache folder.
        dataset: "folder" (a sub-folder per class, which all images below belong to; a .tar file of it; or a folder of
            .tar files), or a timm name such as "hfds/imagenet-1k", "wds/imagenet", "tfds/…", "torch/cifar10".
        train_split: Name of the training split; "training" is tried as well.
        val_split: Name of the validation split; "val", "valid", "eval" and "test" are tried as well.
        num_classes: Number of classes of the model; by default as many as the data have.
        class_map: Class folder names in the order of the labels, as a list or as a text file with one per line, when
            the order is not alphabetical (or when there are only validation images, which may lack some classes).
        img_size: Image side in pixels that the model sees, or (height, width).
        batch_size: Images per step and process.
        val_batch_size: Images per validation step and process; by default ``batch_size``.
        num_workers: Worker processes for each of the loaders.
        pin_memory: Copy batches to page-locked memory; by default when there is a GPU.
        drop_last: Leave out the training images that fill no whole batch.
        num_aug_repeats: Repeated augmentation: how often an image appears in a row of an epoch; 0 or 1 turns it off.
        scale: Range of the cropped share of the area.
        ratio: Range of the crop's aspect ratio.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of colour jitter; ignored by timm when ``auto_augment`` is set.
        auto_augment: RandAugment or AutoAugment policy; null turns it off.
        re_prob: Probability of random erasing.
        re_mode: What erased rectangles are filled with.
        re_count: Most rectangles per image.
        no_aug: Resize and crop only, without any random augmentation.
        interpolation: Of the validation images.
        train_interpolation: Of the training crops.
        crop_pct: Share of the resized validation image that the centre crop keeps.
        mean: Per channel, or one for all, of values in 0–1; by default ImageNet's, and for other than three channels
            their average.
        std: The same.
        value_range: Values of the files that become 0 and 255: (low, high), values beyond are cut; "file": the smallest
            and the largest of each file; "percentile": its 2nd and 98th percentile. By default all that such files can
            hold. Kept in the weights.
        skip_bad_files: Leave unreadable files out, with a count, instead of stopping at the first.
        num_samples: Training images of a WebDataset that has no index file.
        download: Fetch the data set if its reader can.
        input_key: Column of the images in a data set of Hugging Face ("hfds/…", "hfids/…"; ending of the images in a
            WebDataset); by default "image", or the only column of images.
        target_key: Column of the labels; by default "label", or the only column of class labels.
        seed: Order and augmentation.

    Raises:
        ValueError: For an argument out of range.
        DataError: When the data are missing or do not fit (raised as soon as they are looked at).
    """

    def __init__(
        self,
        root: str,
        dataset: str = "folder",
        train_split: str = "train",
        val_split: str = "validation",
        num_classes: int | None = None,
        class_map: str | list[str] | None = None,
        img_size: int | tuple[int, int] = 224,
        batch_size: int = 128,
        val_batch_size: int | None = None,
        num_workers: int = 4,
        pin_memory: bool | None = None,
        drop_last: bool = True,
        num_aug_repeats: int = 0,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        vflip: float = 0.0,
        color_jitter: float = 0.3,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        re_prob: float = 0.25,
        re_mode: Literal["pixel", "rand", "const"] = "pixel",
        re_count: int = 1,
        no_aug: bool = False,
        interpolation: str = "bicubic",
        train_interpolation: str = "bicubic",
        crop_pct: float = 0.875,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        value_range: tuple[float, float] | str | None = None,
        skip_bad_files: bool = False,
        num_samples: int | None = None,
        download: bool = False,
        input_key: str | None = None,
        target_key: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, val_batch_size, num_workers, pin_memory, drop_last, seed)
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if num_aug_repeats < 0:
            raise ValueError(f"num_aug_repeats must not be negative, got {num_aug_repeats}")
        for name, value in (("hflip", hflip), ("vflip", vflip), ("re_prob", re_prob)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if (input_key or target_key) and dataset.partition("/")[0].lower() in ("folder", "torch"):
            raise ValueError(f"input_key and target_key name columns; data set {dataset!r} has none")
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct must be in (0, 1], got {crop_pct}")
        self.root, self.dataset, self.train_split, self.val_split = root, dataset, train_split, val_split
        self.class_map, self.num_samples, self.download = class_map, num_samples, download
        self.input_key, self.target_key = input_key, target_key
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        if min(self.img_size) < 1:
            raise ValueError(f"img_size must be positive, got {img_size}")
        self.value_range, self._mean, self._std = check_value_range(value_range), mean, std
        self.in_chans = 3
        self.repeats = max(1, num_aug_repeats)
        self.skip_bad_files = skip_bad_files
        self._wanted_classes = num_classes
        self._augmentation: dict[str, Any] = {
            "scale": scale,
            "ratio": ratio,
            "hflip": hflip,
            "vflip": vflip,
            "color_jitter": color_jitter,
            "auto_augment": auto_augment,
            "re_prob": re_prob,
            "re_mode": re_mode,
            "re_count": re_count,
            "no_aug": no_aug,
            "interpolation": train_interpolation,
        }
        self._eval_options: dict[str, Any] = {"interpolation": interpolation, "crop_pct": crop_pct}
        self._opened: dict[str, Any] = {}
        self._surveyed: set[str] = set()
        self._classes: dict[str, int] = {}

    @property
    def mean(self) -> tuple[float, ...]:  # type: ignore[override]
        """Per channel, of values in 0–1; subtracted from the images."""
        return self._normalisation("mean", self._mean, IMAGENET_DEFAULT_MEAN)

    @property
    def std(self) -> tuple[float, ...]:  # type: ignore[override]
        """Per channel; the images are divided by it."""
        return self._normalisation("std", self._std, IMAGENET_DEFAULT_STD)

    def _normalisation(
        self, name: str, statistics: tuple[float, ...] | None, colours: tuple[float, ...]
    ) -> tuple[float, ...]:
        return average(colours, self.in_chans) if statistics is None else per_channel(name, statistics, self.in_chans)

    def fit_channels(self, in_chans: int) -> None:
        """Makes the images fit a model with so many channels: colours become grey for one; others are in the files.

        Raises:
            ValueError: When ``mean`` or ``std`` hold other numbers of values.
        """
        self.in_chans = in_chans
        self.describe()

    @property
    def streams(self) -> bool:
        """Whether the data come as a stream."""
        return is_stream(self.dataset)

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of classes: as asked for, or as many as the data have."""
        if self._wanted_classes is not None:
            return self._wanted_classes
        self._open_any()
        if not self._classes:
            raise DataError(f"data set {self.dataset} does not say how many classes it has: pass num_classes")
        return max(self._classes.values()) + 1

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """One name per class; numbers where the data have no names."""
        self._open_any()
        names = [str(number) for number in range(self.num_classes)]
        for name, number in self._classes.items():
            if number < len(names):
                names[number] = name
        return names

    def prepare_data(self) -> None:
        """Downloads what is to be downloaded, in one process."""
        if self.download and self.dataset != "folder":
            self._open_named(self.train_split, True, 0)

    def setup(self, stage: str | None = None) -> None:
        """Opens the splits and checks them against each other and against ``num_classes``.

        Validation and tests alone need no training images; labels are then numbered by ``class_map`` or, without it, by
        the validation folders.
        """
        if stage in (None, "fit"):
            self._open("train")
        self._open("val")
        which: Literal["train", "val"] = "train" if stage in (None, "fit") else "val"
        if not self.streams and which not in self._surveyed:
            self._surveyed.add(which)
            self._source(which).survey(warn=getattr(rank_zero_only, "rank", 0) == 0)

    def _open_named(self, split: str, is_training: bool, epoch: int) -> Any:
        return open_named(
            self.dataset,
            self.root,
            split,
            is_training,
            self.batch_size if is_training else self.val_batch_size,
            # other orders in other epochs, also where a reader ignores set_epoch
            self.seed + 1_000_003 * epoch,
            self.num_samples if is_training else None,
            self.class_map,
            self.download,
            self.input_key,
            self.target_key,
        )

    def _open(self, which: Literal["train", "val"]) -> Any:
        """The rows of a split (streams are opened once here for their size and class names)."""
        if which in self._opened:
            return self._opened[which]
        split = self.train_split if which == "train" else self.val_split
        if self.dataset == "folder":
            path = find_split(Path(self.root), split)
            rows, classes = open_folder(path, self.class_map)
            if which == "train":
                check_several_classes(rows, classes, path)
            if which == "val" and self._has_training_images():
                self._open("train")
                adopt_classes(rows, classes, self._classes, path)
        else:
            rows = self._open_named(split, which == "train", 0)
            classes = named_classes(rows)
        if which == "train" or not self._classes:
            self._check_classes(classes)
            self._classes = classes
        self._opened[which] = rows
        return rows

    def _has_training_images(self) -> bool:
        try:
            find_split(Path(self.root), self.train_split)
        except DataError:
            return False
        return True

    def _open_any(self) -> None:
        """Opens the split that numbers the classes."""
        alone = self.dataset == "folder" and "val" in self._opened and not self._has_training_images()
        self._open("val" if alone else "train")

    def _check_classes(self, classes: dict[str, int]) -> None:
        if self._wanted_classes is None or not classes:
            return
        count = max(classes.values()) + 1
        if count > self._wanted_classes:
            extra = sorted(name for name, number in classes.items() if number >= self._wanted_classes)
            raise DataError(
                f"the data in {self.root} have {count} classes, but num_classes is {self._wanted_classes} "
                f"(the first class too many is {extra[0]!r})"
            )

    def describe(self) -> dict[str, Any]:
        """What a model must know to be used without this module; here also how images are resized and cropped."""
        return {**super().describe(), **self._eval_options, "value_range": self.value_range}

    @property
    def _input_size(self) -> tuple[int, int, int]:
        return (self.in_chans, *self.img_size)

    def _source(self, which: Literal["train", "val"]) -> ImageSource:
        return ImageSource(self._open(which), self.num_classes, self.in_chans, self.value_range)

    def train_transform(self) -> Callable[[Any], Any]:
        """Random augmentation: picture as ``open_image`` gives it to tensor [C, H, W]."""
        return make_transform(self._input_size, is_training=True, mean=self.mean, std=self.std, **self._augmentation)

    def val_transform(self) -> Callable[[Any], Any]:
        """Resize and centre crop: picture as ``open_image`` gives it to tensor [C, H, W]."""
        return make_transform(self._input_size, mean=self.mean, std=self.std, **self._eval_options)

    def _make_train_loader(self) -> Loader:
        return self._stream_loader(True) if self.streams else self._row_loader(True)

    def _make_val_loader(self) -> Loader:
        return self._stream_loader(False) if self.streams else self._row_loader(False)

    def _row_loader(self, training: bool) -> ResumableLoader:
        rank, world_size = self._processes()
        source = self._source("train" if training else "val")
        transform = self.train_transform() if training else self.val_transform()
        sampler = EpochBatchSampler(
            len(source),
            self.batch_size if training else self.val_batch_size,
            self.seed,
            shuffle=training,
            drop_last=training and self.drop_last,
            repeats=self.repeats if training else 1,
            rank=rank,
            world_size=world_size,
            even=training,
        )
        return ResumableLoader(
            self._keyed(source, transform, training),
            sampler,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            progress=self._batches_trained if training else None,
        )

    def _keyed(self, source: ImageSource, transform: Callable[[Any], Any], training: bool) -> KeyedImages:
        return KeyedImages(source, transform, self.seed, self.skip_bad_files, replace=training)

    def _stream_loader(self, training: bool) -> StreamLoader:
        rank, _ = self._processes()
        transform = self.train_transform() if training else self.val_transform()
        split = self.train_split if training else self.val_split

        def opened(epoch: int) -> Any:
            stream = self._open_named(split, training, epoch if training else 0)
            stream.set_loader_cfg(num_workers=self.num_workers)
            stream.set_epoch(epoch if training else 0)
            return stream

        def factory(epoch: int) -> KeyedStream:
            stream = opened(epoch)
            return KeyedStream(
                stream, transform, self.num_classes, self.seed, epoch, rank, self.in_chans, self.value_range
            )

        batch_size = self.batch_size if training else self.val_batch_size
        batches = math.ceil(len(opened(0)) / batch_size)
        if not training and self.num_workers > 1:
            batches += self.num_workers  # each worker may end with a smaller batch
        return StreamLoader(
            factory,
            max(1, batches),
            batch_size,
            self.seed,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            drop_last=training and self.drop_last,
            progress=self._batches_trained if training else None,
        )
