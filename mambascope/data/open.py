"""The data that ``tools/eval_cls.py`` evaluates on, from what its ``--data`` option says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule

from mambascope.data.datamodule import ResumableDataModule
from mambascope.data.digits_datamodule import ScopeDigitsDataModule
from mambascope.data.errors import DataError
from mambascope.data.modules import fit_data, is_module_name, named_module, run_config, run_module, trained_on
from mambascope.data.rows import open_rows, row_loader
from mambascope.data.scopedigits_config import ScopeDigitsConfig
from mambascope.models.vim import VisionMamba
from mambascope.models.weights import RUN_CONFIG

DIGITS = "scopedigits"


class EvalData(NamedTuple):
    """What a model is evaluated on.

    Attributes:
        loader: Of (images [B, C, H, W], labels [B]).
        name: What to call it.
        calibration: Loader of other images on which to choose a threshold; ``None`` where there are none to spare.
        object_masks: From places among the images to the pixels [K, H, W] of their objects, bool; ``None`` where nobody
            knows them.
    """

    loader: Iterable[Any]
    name: str
    calibration: Iterable[Any] | None = None
    object_masks: Callable[[Sequence[int]], Any] | None = None


def validation_loader(
    model: VisionMamba,
    checkpoint: Path,
    data: str | None,
    *,
    split: str = "validation",
    batch_size: int = 64,
    num_workers: int = 0,
    length: int = 1000,
    skip_bad_files: bool = False,
    input_key: str | None = None,
    target_key: str | None = None,
) -> EvalData:
    """The data that a command line names.

    Args:
        model: Gives image size, preprocessing and class names.
        checkpoint: Where the model came from.
        data: A folder (its `split`, or itself if it holds the class folders), a timm name (``hfds/…``, ``torch/…``),
            ``scopedigits``, a data module as for training (``ImageDataModule``, ``package.module.Class``; its
            arguments are the run's), or ``None``: the validation data of the checkpoint's run, else ScopeDigits if
            the model has its ten classes.
        split: Of a folder or a timm data set.
        batch_size: Images per batch.
        num_workers: Worker processes.
        length: Images of ScopeDigits, and as many others on which to choose a threshold.
        skip_bad_files: Leave unreadable files out instead of stopping.
        input_key: Column of the images in a data set of Hugging Face.
        target_key: Column of the labels.

    Raises:
        DataError: Data that are missing or do not fit the model.
    """
    if batch_size < 1:
        raise ValueError(f"batch-size must be at least 1, got {batch_size}")
    if data is None:
        config = run_config(checkpoint)
        if config is not None:
            name = f"validation data of {config.parent.name if config.name == RUN_CONFIG else config.stem}"
            return _module_data(run_module(config), model, name, str(config))
        if model.num_classes != 10:
            raise DataError("there is no run configuration beside the checkpoint: pass --data FOLDER")
        data = DIGITS
    if data == DIGITS:
        return _module_data(_digits(model, batch_size, length, run_config(checkpoint)), model, DIGITS)
    if is_module_name(data):
        return _module_data(named_module(data, run_config(checkpoint)), model, data)
    rows, where = open_rows(model, data, split, input_key, target_key)
    return EvalData(row_loader(rows, model, batch_size, num_workers, skip_bad_files), str(where))


def _digits(model: VisionMamba, batch_size: int, length: int, config: Path | None) -> ScopeDigitsDataModule:
    """As hard as those that the model was trained on, where its run says so."""
    height, width = model.config.image_hw
    if height != width:
        raise DataError(f"ScopeDigits are square, the model reads {height}x{width}: pass --img-size SIDE")
    if model.num_classes < ScopeDigitsDataModule.num_classes or model.in_chans != 3:
        raise DataError(
            f"ScopeDigits have {ScopeDigitsDataModule.num_classes} classes and 3 channels, the model has "
            f"{model.num_classes} and {model.in_chans}"
        )
    digits = ScopeDigitsConfig()
    if trained_on(config, ScopeDigitsDataModule):
        digits = getattr(named_module("ScopeDigitsDataModule", config), "digits", digits)
    digits = replace(digits, size=height)
    # as many others for the threshold: a promise may need more than a thousand
    return ScopeDigitsDataModule(1, length, digits, calibration_length=length, batch_size=1, val_batch_size=batch_size)


def _module_data(module: LightningDataModule, model: VisionMamba, name: str, where: str | None = None) -> EvalData:
    """The validation data of a module as training opens them."""
    fit_data(module, model, where or name)
    if not isinstance(module, ResumableDataModule):  # ours open what they need when it is needed
        module.prepare_data()
        module.setup("fit")
    calibration = getattr(module, "calibration_dataloader", None)
    masks = getattr(module, "object_masks", None)
    return EvalData(module.val_dataloader(), name, None if calibration is None else calibration(), masks)
