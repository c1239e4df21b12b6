"""The data that ``tools/eval_cls.py`` evaluates on, from what its ``--data`` option says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mambascope.data.datamodule import ResumableDataModule
from mambascope.data.digits_datamodule import ScopeDigitsDataModule
from mambascope.data.errors import DataError
from mambascope.data.readers import adopt_classes, find_split, is_stream, open_folder, open_named
from mambascope.data.scopedigits import ScopeDigitsConfig
from mambascope.evaluation.inference import make_transform
from mambascope.models.vim import VisionMamba
from mambascope.models.weights import SHIPPED

DIGITS = "scopedigits"
TIMM_READERS = ("hfds", "hfids", "tfds", "torch", "wds")
RUN_CONFIG = "config.yaml"
CONFIGS = Path(__file__).parent.parent / "configs"


class EvalData(NamedTuple):
    """What a model is evaluated on.

    Attributes:
        loader: of (images [B, C, H, W], labels [B]).
        name: what to call it.
        calibration: loader of other images on which to choose a threshold; ``None`` where there are none to spare.
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
) -> EvalData:
    """The data that a command line names.

    Args:
        model: gives image size, preprocessing and class names.
        checkpoint: where the model came from.
        data: a folder (its `split`, or itself if it holds the class folders), a timm name (``hfds/…``, ``torch/…``),
            ``scopedigits``, or ``None``: the validation data of the checkpoint's run, else ScopeDigits if the model
            has its ten classes.
        split: of a folder or a timm data set.
        batch_size: images per batch.
        num_workers: worker processes.
        length: images of ScopeDigits.
        skip_bad_files: leave unreadable files out instead of stopping.

    Raises:
        DataError: data that are missing or do not fit the model.
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
    if data.partition("/")[0] in TIMM_READERS and not Path(data).exists():
        if is_stream(data):
            raise DataError(f"data set {data} is a stream; evaluate on a folder, hfds/… or torch/…")
        rows: Any = open_named(data, None, split, False, batch_size, 0)
        classes = dict(getattr(getattr(rows, "reader", rows), "class_to_idx", None) or {})
        where = Path(data)
    else:
        where = _folder(Path(data), split)
        rows, classes = open_folder(where)
    _match_classes(model, rows, classes, where)
    return EvalData(_row_loader(rows, model, transform, batch_size, num_workers, skip_bad_files), str(where))


def _folder(root: Path, split: str) -> Path:
    """The split's folder, or the root itself if it has none but class folders."""
    try:
        return find_split(root, split)
    except DataError:
        if root.is_dir() and any(p.is_dir() for p in root.iterdir()) and not any(root.glob("train*")):
            return root
        raise


def _match_classes(model: VisionMamba, rows: Any, classes: dict[str, int], where: Path) -> None:
    """Gives the data the model's class numbers: by name where both have names, else alphabetically."""
    if not classes:
        return
    labels = model.labels
    if labels and set(classes) <= set(labels):
        adopt_classes(rows, classes, {name: i for i, name in enumerate(labels)}, where)
    elif len(classes) > model.num_classes:
        raise DataError(f"the data in {where} have {len(classes)} classes, the model has {model.num_classes}")
    elif labels and set(classes) & set(labels):
        unknown = sorted(set(classes) - set(labels))
        raise DataError(f"classes in {where} that the model does not have: {', '.join(unknown[:8])}")


def _row_loader(
    rows: Any, model: VisionMamba, transform: Any, batch_size: int, num_workers: int, skip_bad_files: bool
) -> Iterable[Any]:
    from mambascope.data.loader import ResumableLoader
    from mambascope.data.sampling import EpochBatchSampler
    from mambascope.data.sources import ImageSource, KeyedImages

    source = ImageSource(rows, model.num_classes)
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
    try:
        module = open_data((yaml.safe_load(config.read_text()) or {}).get("data"), str(config))
    except DataError as error:
        raise DataError(f"{error}; pass --data") from None
    if module.num_classes != model.num_classes:
        raise DataError(f"the data of {config} have {module.num_classes} classes, the model has {model.num_classes}")
    return module


def open_data(section: Any, where: str) -> ResumableDataModule:
    """The data module that a ``data`` section of a training config describes.

    Args:
        section: with ``class_path`` and ``init_args``.
        where: what to call the place it stands in.

    Raises:
        DataError: the section is wrong, or the data cannot be opened.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ResumableDataModule, "data")
    try:
        return parser.instantiate_classes(parser.parse_object({"data": section})).data
    except (ArgumentError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"the data of {where} cannot be opened: {reason[:200]}") from None
