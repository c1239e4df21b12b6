"""Rows of a folder or of a timm data set, with the class numbers of a model that was trained on others."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mambascope._names import class_name
from mambascope.data.class_folders import some, unsorted
from mambascope.data.errors import DataError
from mambascope.data.files import is_hidden
from mambascope.data.loader import ResumableLoader
from mambascope.data.readers import adopt_classes, find_split, is_stream, named_classes, open_folder, open_named
from mambascope.data.sampling import EpochBatchSampler
from mambascope.data.sources import ImageSource, KeyedImages
from mambascope.models.preprocessing import make_transform, stored_value_range

TIMM_READERS = ("hfds", "hfids", "tfds", "torch", "wds")


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


def row_loader(rows: Any, model: Any, batch_size: int, num_workers: int, skip_bad_files: bool) -> Iterable[Any]:
    """Loader of rows in order, prepared as a model's weights say: (images [B, C, H, W], labels [B])."""
    source = ImageSource(rows, model.num_classes, model.in_chans, stored_value_range(model))
    source.survey()
    sampler = EpochBatchSampler(len(source), batch_size, shuffle=False, drop_last=False, even=False)
    images = KeyedImages(source, make_transform(model), 0, skip_bad_files)
    return ResumableLoader(images, sampler, num_workers=num_workers)
