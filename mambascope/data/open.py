"""The data that ``tools/eval_cls.py`` evaluates on, from what its ``--data`` option says."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mambascope._names import class_name
from mambascope.data.class_folders import some, unsorted
from mambascope.data.datamodule import ResumableDataModule
from mambascope.data.digits_datamodule import ScopeDigitsDataModule
from mambascope.data.errors import DataError
from mambascope.data.files import is_hidden
from mambascope.data.readers import adopt_classes, find_split, is_stream, named_classes, open_folder, open_named
from mambascope.data.scopedigits_config import ScopeDigitsConfig
from mambascope.models.description import plain_values, shortened
from mambascope.models.preprocessing import make_transform, stored_value_range
from mambascope.models.vim import VisionMamba
from mambascope.models.weights import SHIPPED

DIGITS = "scopedigits"
TIMM_READERS = ("hfds", "hfids", "tfds", "torch", "wds")
RUN_CONFIG = "config.yaml"
CONFIGS = Path(__file__).parent.parent / "configs"


class EvalData(NamedTuple):
    """What a model is evaluated on.

    Attributes:
        loader: Of (images [B, C, H, W], labels [B]).
        name: What to call it.
        calibration: Loader of other images on which to choose a threshold; ``None`` where there are none to spare.
    """

    loader: Iterable[Any]
    name: str
    calibration: Iterable[Any] | None = None


def run_config(checkpoint: Path) -> Path | None:
    """The configuration of the run that a checkpoint lies in, beside it or one folder up, or a shipped model's."""
    for name, path in SHIPPED.items():
        if checkpoint == path:
            return CONFIGS / f"{name}.yaml"
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / RUN_CONFIG).is_file():
            return folder / RUN_CONFIG
    return None


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
            ``scopedigits``, or ``None``: the validation data of the checkpoint's run, else ScopeDigits if the model
            has its ten classes.
        split: Of a folder or a timm data set.
        batch_size: Images per batch.
        num_workers: Worker processes.
        length: Images of ScopeDigits.
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
            module = run_data(config, model)
            name = f"validation data of {config.parent.name if config.name == RUN_CONFIG else config.stem}"
            return EvalData(module.val_dataloader(), name, module.calibration_dataloader())
        if model.num_classes != 10:
            raise DataError("there is no run configuration beside the checkpoint: pass --data FOLDER")
        data = DIGITS
    if data == DIGITS:
        module = _digits(model, batch_size, length)
        return EvalData(module.val_dataloader(), DIGITS, module.calibration_dataloader())
    transform = make_transform(model)
    rows, where = open_rows(model, data, split, input_key, target_key)
    return EvalData(_row_loader(rows, model, transform, batch_size, num_workers, skip_bad_files), str(where))


def open_rows(
    model: Any, data: str, split: str, input_key: str | None = None, target_key: str | None = None
) -> tuple[Any, Path]:
    """The rows of a folder or of a timm data set with the model's class numbers, and the place they were read from.

    Raises:
        DataError: Data that are missing or do not fit the model.
    """
    rows: Any
    if data.partition("/")[0] in TIMM_READERS and not Path(data).exists():
        if is_stream(data):
            raise DataError(f"data set {data} is a stream; evaluate on a folder, hfds/… or torch/…")
        rows = open_named(data, None, split, False, 1, 0, input_key=input_key, target_key=target_key)
        classes, where = named_classes(rows), Path(data)
    else:
        where = _folder(Path(data), split)
        rows, classes = open_folder(where)
    _match_classes(model, rows, classes, where)
    return rows, where


def _folder(root: Path, split: str) -> Path:
    """The split's folder, or the root itself if it has none but class folders."""
    try:
        return find_split(root, split)
    except DataError:
        inside = [p for p in root.iterdir() if p.is_dir() and not is_hidden(p.name)] if root.is_dir() else []
        if inside and not any(root.glob("train*")):
            return root
        raise


def _match_classes(model: Any, rows: Any, classes: dict[str, int], where: Path) -> None:
    """Gives the data the model's class numbers: by name where both have names, else alphabetically."""
    if not classes:
        return
    numbers = {class_name(str(label)): number for number, label in enumerate(model.labels or [])}
    unknown = sorted(set(classes) - set(numbers))
    if not unknown:
        adopt_classes(rows, classes, numbers, where)
    elif len(classes) == 1 < model.num_classes and where.is_dir():
        raise DataError(unsorted(where, *classes))
    elif len(classes) > model.num_classes:
        raise DataError(f"the data in {where} have {len(classes)} classes, the model has {model.num_classes}")
    elif len(unknown) < len(classes):
        raise DataError(f"classes in {where} that the model does not have: {some(unknown)}")


def _row_loader(
    rows: Any, model: VisionMamba, transform: Any, batch_size: int, num_workers: int, skip_bad_files: bool
) -> Iterable[Any]:
    from mambascope.data.loader import ResumableLoader
    from mambascope.data.sampling import EpochBatchSampler
    from mambascope.data.sources import ImageSource, KeyedImages

    source = ImageSource(rows, model.num_classes, model.in_chans, stored_value_range(model))
    source.survey()
    sampler = EpochBatchSampler(len(source), batch_size, shuffle=False, drop_last=False, even=False)
    return ResumableLoader(KeyedImages(source, transform, 0, skip_bad_files), sampler, num_workers=num_workers)


def _digits(model: VisionMamba, batch_size: int, length: int) -> ScopeDigitsDataModule:
    height, width = model.config.image_hw
    if height != width:
        raise DataError(f"ScopeDigits are square, the model reads {height}x{width}: pass --img-size SIDE")
    if model.num_classes < ScopeDigitsDataModule.num_classes or model.in_chans != 3:
        raise DataError(
            f"ScopeDigits have {ScopeDigitsDataModule.num_classes} classes and 3 channels, the model has "
            f"{model.num_classes} and {model.in_chans}"
        )
    digits = ScopeDigitsConfig(size=height)
    return ScopeDigitsDataModule(1, length, digits=digits, batch_size=1, val_batch_size=batch_size)


def run_data(config: Path, model: VisionMamba) -> ResumableDataModule:
    """The data that a run was trained with."""
    module = run_module(config)
    if module.num_classes != model.num_classes:
        raise DataError(f"the data of {config} have {module.num_classes} classes, the model has {model.num_classes}")
    module.fit_channels(model.in_chans)
    return module


def run_module(config: Path) -> ResumableDataModule:
    """The data module of a run's configuration.

    The file may have come with weights from elsewhere: only classes of this package, or ones that are imported already,
    are made from it.

    Raises:
        DataError: The configuration is damaged, names another class, or its data cannot be opened.
    """
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
        section = plain_values(content.get("data") if isinstance(content, Mapping) else None)
        if foreign := _foreign(section):
            raise DataError(f"the data of {config} cannot be opened: {foreign} is none of this package's data modules")
        return open_data(section, str(config))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        whole = reason if str(config) in reason else f"the data of {config} cannot be opened: {reason[:200]}"
        raise DataError(f"{whole}; pass --data") from None


def _foreign(section: Any) -> str:
    """What a ``data`` section names that is not of this package, and would be imported; empty if nothing."""
    path = section.get("class_path") if isinstance(section, Mapping) else section
    module, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    module = module or "mambascope.data"
    if module not in sys.modules and not module.startswith("mambascope.data."):
        return shortened(path)
    try:
        accepted = getattr(importlib.import_module(module), name, None)
    except ImportError:
        accepted = None
    if not (isinstance(accepted, type) and issubclass(accepted, ResumableDataModule) and isinstance(section, Mapping)):
        return shortened(path)
    arguments = section.get("init_args") or {}
    for key, parameter in inspect.signature(accepted).parameters.items() if isinstance(arguments, Mapping) else ():
        value = arguments.get(key)
        fields = isinstance(value, Mapping) and "class_path" not in value
        if is_dataclass(parameter.default) and value is not None and not fields:
            return f"{key} {shortened(value)}"  # a text or a class_path would be imported, too
    return ""


def open_data(section: Any, where: str) -> ResumableDataModule:
    """The data module that a ``data`` section of a training config describes.

    Args:
        section: With ``class_path`` and ``init_args``.
        where: What to call the place it stands in.

    Raises:
        DataError: The section is wrong, or the data cannot be opened.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ResumableDataModule, "data")
    try:
        return parser.instantiate_classes(parser.parse_object({"data": section})).data
    except (ArgumentError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"the data of {where} cannot be opened: {reason[:200]}") from None
