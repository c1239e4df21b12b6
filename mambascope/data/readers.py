"""Finds and opens the user's data through timm's readers, and says clearly what is missing."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from timm.data.dataset import ImageDataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from mambascope.data.errors import DataError

_SYNONYMS = (("train", "training"), ("validation", "val", "valid", "validating", "eval", "evaluation", "test"))
_STREAMS = ("wds", "tfds", "hfids")
_LISTED = 8  # names shown in a message


def is_stream(dataset: str) -> bool:
    """Whether the reader hands samples over in its own order (WebDataset, TFDS, HF streaming)."""
    return dataset.partition("/")[0].lower() in _STREAMS


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def find_split(root: Path, split: str) -> Path:
    """Folder or .tar file of a split: ``root/split``, a synonym of it (train/training, validation/val/…), or a tar.

    Raises:
        DataError: when the root or the split is missing.
    """
    if not root.exists():
        raise DataError(f"data folder {root} does not exist")
    if not root.is_dir():
        raise DataError(f"data folder {root} is a file; give the folder that holds the splits")
    names = [split] + [name for group in _SYNONYMS if split in group for name in group if name != split]
    for name in names:
        for path in (root / name, root / f"{name}.tar"):
            if path.exists():
                return path
    found = sorted(p.name for p in root.iterdir() if not p.name.startswith("."))
    content = f"it holds {_some(found)}" if found else "it is empty"
    raise DataError(f"data folder {root} has no {' or '.join(names)}; {content}")


def _check_class_folders(folder: Path, samples: Any) -> None:
    """Every class folder must hold an image: otherwise class numbers would shift between the splits."""
    used = {os.path.relpath(sample[0], folder).split(os.sep)[0] for sample in samples}
    empty = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in used)
    if empty:
        raise DataError(f"class folders without images in {folder}: {_some(empty)}; add images or remove the folders")
    if loose := sorted(name for name in used if not (folder / name).is_dir()):
        raise DataError(f"images in {folder} must lie in one folder per class, found {_some(loose)} beside them")


ClassMap = str | dict[str, int] | None


def _check_class_map(folder: Path, classes: dict[str, int]) -> None:
    """timm leaves out folders that the map does not name; that must not go unseen."""
    names = [p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    if unknown := sorted(set(names) - set(classes)):
        raise DataError(f"class folders in {folder} that class_map does not name: {_some(unknown)}")


def open_folder(path: Path, class_map: ClassMap = None) -> tuple[Any, dict[str, int]]:
    """Opens an ImageFolder, a .tar file or a folder of .tar files.

    Args:
        path: result of :func:`find_split`.
        class_map: text file with one class name per line, or the number of each name, for another order than the
            alphabetical one.

    Returns:
        timm's ``ImageDataset`` and the class number of each class name.

    Raises:
        DataError: when there are no images, or class folders are empty.
    """
    tars = path.is_dir() and any(path.glob("*.tar")) and not any(p.is_dir() for p in path.iterdir())
    try:
        if tars:
            data = ImageDataset(str(path), reader=ReaderImageInTar(str(path), class_map=class_map or ""))
        else:
            data = create_dataset("", root=str(path), search_split=False, class_map=class_map)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, AssertionError, OSError, tarfile.TarError) as error:
        if "Found 0 images" in str(error) or "not enough values to unpack" in str(error):
            if path.is_dir() and (folders := sorted(p.name for p in path.iterdir() if p.is_dir())):
                raise DataError(f"no images in {path}: its class folders ({_some(folders)}) hold none") from None
            raise DataError(f"no images in {path}; it must hold one folder of images per class") from None
        raise DataError(f"cannot read {path}: {' '.join(str(error).split()) or type(error).__name__}") from error
    reader = data.reader
    classes = dict(getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", {}))
    if path.is_dir() and not tars:
        if class_map is not None:
            _check_class_map(path, classes)
        _check_class_folders(path, reader.samples)
    return data, classes


def adopt_classes(data: Any, own: dict[str, int], reference: dict[str, int], path: Path) -> None:
    """Renumbers the classes of a split as in the training split, by name.

    Raises:
        DataError: when the split has classes that the training split has not.
    """
    if unknown := sorted(set(own) - set(reference)):
        raise DataError(f"classes in {path} that the training data do not have: {_some(unknown)}")
    reader = data.reader
    number = {old: reference[name] for name, old in own.items()}
    if all(old == new for old, new in number.items()):
        return
    if hasattr(reader, "targets"):  # tar reader: names and targets in two arrays
        reader.targets = [number[int(target)] for target in reader.targets]
    else:
        reader.samples = [(path, number[target]) for path, target in reader.samples]


def open_named(
    dataset: str,
    root: str | None,
    split: str,
    is_training: bool,
    batch_size: int,
    seed: int,
    num_samples: int | None = None,
    class_map: ClassMap = None,
    download: bool = False,
) -> Any:
    """Opens ``hfds/…``, ``wds/…``, ``tfds/…``, ``hfids/…`` or ``torch/…`` through timm.

    Raises:
        DataError: when the reader refuses, with its reason in one line.
    """
    try:
        return create_dataset(
            dataset,
            root=root,
            split=split,
            is_training=is_training,
            batch_size=batch_size,
            seed=seed,
            num_samples=num_samples,
            class_map=class_map,  # type: ignore[arg-type]
            download=download,
        )
    except ImportError as error:
        raise DataError(f"data set {dataset} needs a package that is not installed: {error}") from error
    except Exception as error:  # every reader has its own errors
        raise DataError(f"cannot open data set {dataset}: {' '.join(str(error).split())}") from error
