"""What the two data modules share: processes, positions in the epoch, loaders."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import Dataset

from mambascope.data.errors import DataError
from mambascope.data.loader import ResumableLoader, StreamLoader
from mambascope.data.sampling import EpochBatchSampler
from mambascope.data.seeding import check_seed
from mambascope.data.sources import first

Loader = ResumableLoader | StreamLoader


class ResumableDataModule(LightningDataModule):
    """A data module whose training loader continues where a run stopped.

    Attributes:
        num_classes: Number of classes.
        in_chans: Image channels.
        img_size: Image height and width in pixels.
        class_names: One name per class, in the order of the labels.
        mean: Per channel, of values in 0–1; subtracted from the images.
        std: Per channel; the images are divided by it.
    """

    num_classes: int
    in_chans: int
    img_size: tuple[int, int]
    class_names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        batch_size: int,
        val_batch_size: int | None,
        num_workers: int,
        pin_memory: bool | None,
        drop_last: bool,
        seed: int,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("val_batch_size", val_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.num_workers, self.drop_last, self.seed = num_workers, drop_last, check_seed(seed)
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        # weak: a cycle would leave the end of the worker processes to the garbage collector, which takes 5 s for each
        self._train_loader: weakref.ref[Loader] | None = None
        self._start_at: tuple[int, int] | None = None

    def _processes(self) -> tuple[int, int]:
        """This process's number and the number of processes."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return 0, 1

    def _batches_trained(self) -> int | None:
        """Batches of this epoch that the trainer has finished; None when no trainer is at work."""
        if self.trainer is None or not self.trainer.training:
            return None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.processed)  # type: ignore[attr-defined]

    def _packet_loader(self, images: Dataset, length: int, *, training: bool) -> ResumableLoader:
        """Loader of a data set that answers with whole batches (packets), of its first `length` rows."""
        rank, world_size = self._processes()
        sampler = EpochBatchSampler(
            length,
            self.batch_size if training else self.val_batch_size,
            self.seed,
            shuffle=training,
            drop_last=training and self.drop_last,
            rank=rank,
            world_size=world_size,
            even=training,
        )
        return ResumableLoader(
            images,
            sampler,
            num_workers=self.num_workers if training else 0,
            pin_memory=self.pin_memory,
            collate=first,
            progress=self._batches_trained if training else None,
        )

    def _make_train_loader(self) -> Loader:
        raise NotImplementedError

    def _make_val_loader(self) -> Loader:
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Looks at the data, so that errors come before training starts."""

    def train_dataloader(self) -> Loader:
        """Loader of (images [B, C, H, W] float32, labels [B] int64).

        It has ``state_dict`` and ``load_state_dict``, which Lightning calls, and ``set_epoch`` through its sampler.
        """
        loader = self._make_train_loader()
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            loader.repeat_first_epoch()
        if self._start_at is not None:
            loader.set_position(*self._start_at)
        self._train_loader = weakref.ref(loader)
        return loader

    def val_dataloader(self) -> Loader:
        """Loader of the validation images, in order; every image is seen once over all processes."""
        return self._make_val_loader()

    def test_dataloader(self) -> Loader:
        """The validation images."""
        return self._make_val_loader()

    def calibration_dataloader(self) -> Loader | None:
        """Loader of the images on which an exit threshold may be chosen; ``None`` where there are none to spare."""
        return None

    def set_position(self, epoch: int, batches_done: int) -> None:
        """Makes training continue after ``batches_done`` batches of an epoch, in this order and with these keys.

        Lightning's own resume needs no call; this is for loops that keep their position elsewhere.
        """
        self._start_at = (epoch, batches_done)
        loader = self._train_loader() if self._train_loader is not None else None
        if loader is not None:
            loader.set_position(epoch, batches_done)

    def fit_channels(self, in_chans: int) -> None:
        """Makes the images fit a model with so many channels.

        Raises:
            DataError: Where they cannot.
        """
        if in_chans != self.in_chans:
            raise DataError(
                f"the images of {type(self).__name__} have {self.in_chans} channels, the model takes {in_chans}: "
                f"set --model.net.args.in_chans {self.in_chans}"
            )

    def describe(self) -> dict[str, Any]:
        """What a model must know to be used without this module."""
        return {
            "num_classes": self.num_classes,
            "class_names": self.class_names,
            "img_size": list(self.img_size),
            "in_chans": self.in_chans,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def masks_at(masks: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Masks [K, H, W] at the size of resized images: a pixel that holds some of an object is the object's."""
    if masks.shape[1:] == tuple(size):
        return masks
    return F.interpolate(torch.from_numpy(masks)[None].float(), size, mode="area")[0].numpy() > 0
