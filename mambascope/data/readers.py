"""Finds and opens the user's data through timm's readers, and says clearly what is missing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from timm.data import create_dataset
from timm.data.dataset import ImageDataset

from mambascope._names import class_name
from mambascope.data.class_folders import ClassMap, FolderReader, TarReader, read_class_map, some, unsorted
from mambascope.data.columns import find_columns
from mambascope.data.errors import DataError
from mambascope.data.files import LeftOut, is_hidden

_SYNONYMS = (("train", "training"), ("validation", "val", "valid", "validating", "eval", "evaluation", "test"))
_STREAMS = ("wds", "tfds", "hfids")
_log = logging.getLogger("mambascope.data")


def is_stream(dataset: str) -> bool:
    """Whether the reader hands samples over in its own order (WebDataset, TFDS, HF streaming)."""
    return dataset.partition("/")[0].lower() in _STREAMS


def find_split(root: Path, split: str) -> Path:
    """Folder or .tar file of a split: ``root/split``, a synonym of it (train/training, validation/val/…), or a tar.

    Raises:
        DataError: When the root or the split is missing.
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
    visible = sorted(p.name for p in root.iterdir() if not is_hidden(p.name))
    content = f"it holds {some(visible)}" if visible else "it is empty"
    raise DataError(f"data folder {root} has no {' or '.join(names)}; {content}")


def open_folder(path: Path, class_map: ClassMap = None) -> tuple[ImageDataset, dict[str, int]]:
    """Opens a folder of class folders, a .tar file or a folder of .tar files; names in one line what is left out.

    Args:
        path: Result of :func:`find_split`.
        class_map: Text file with one class name per line, or the names in order, for another order than the
            alphabetical one.

    Returns:
        timm's ``ImageDataset`` and the class number of each class name.

    Raises:
        DataError: When there are no images, or they do not lie in class folders.
    """
    numbers, left_out = read_class_map(class_map, path), LeftOut()
    inside = [p for p in path.iterdir() if not is_hidden(p.name)] if path.is_dir() else [path]
    if any(p.suffix == ".tar" for p in inside) and not any(p.is_dir() for p in inside):
        reader: TarReader | FolderReader = TarReader(path, numbers, left_out)
    else:
        reader = FolderReader(path, numbers, left_out)
    if left_out:
        _tell("left out of %s: %s", path, left_out)
    return ImageDataset(str(path), reader=reader), dict(reader.class_to_idx)


def check_several_classes(data: ImageDataset, classes: dict[str, int], path: Path) -> None:
    """Refuses training images that are all in one class folder: a model would learn to say nothing else.

    Raises:
        DataError: Naming the folder.
    """
    reader: Any = data.reader
    used = set(reader.targets.tolist()) if hasattr(reader, "targets") else {label for _, label in reader.samples}
    if len(used) == 1:
        raise DataError(unsorted(path, next(name for name, number in classes.items() if number in used)))


def named_classes(data: Any) -> dict[str, int]:
    """The class number of each class name of what :func:`open_named` opened; empty where it has no names."""
    numbers = getattr(getattr(data, "reader", data), "class_to_idx", None) or {}
    return {class_name(str(name)): number for name, number in numbers.items()}


@rank_zero_only
def _tell(message: str, *facts: object) -> None:
    _log.warning(message, *facts)


def adopt_classes(data: Any, class_numbers: dict[str, int], reference: dict[str, int], path: Path) -> None:
    """Renumbers the classes of a split as in the training split, by name.

    Raises:
        DataError: When the split has classes that the training split has not.
    """
    if unknown := sorted(set(class_numbers) - set(reference)):
        if len(class_numbers) == 1 < len(reference) and path.is_dir():
            raise DataError(unsorted(path, *unknown))
        raise DataError(f"classes in {path} that the training data do not have: {some(unknown)}")
    number = {old: reference[name] for name, old in class_numbers.items()}
    if all(old == new for old, new in number.items()):
        return
    reader = getattr(data, "reader", None)
    if reader is None:  # of torchvision
        data.target_transform = number.__getitem__
    elif hasattr(reader, "targets"):  # tar reader: names and targets in two arrays
        reader.targets = [number[int(target)] for target in reader.targets]
    elif hasattr(reader, "samples"):
        reader.samples = [(path, number[target]) for path, target in reader.samples]
    else:  # of Hugging Face: labels are looked up as they are read
        reader.class_to_idx, reader.remap_class = number, True


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
    input_key: str | None = None,
    target_key: str | None = None,
) -> Any:
    """Opens ``hfds/…``, ``wds/…``, ``tfds/…``, ``hfids/…`` or ``torch/…`` through timm.

    Raises:
        DataError: When the reader refuses, with its reason in one line.
    """
    numbers = read_class_map(class_map, Path(root or ""))
    try:
        return create_dataset(
            dataset,
            root=root,
            split=split,
            is_training=is_training,
            batch_size=batch_size,
            seed=seed,
            num_samples=num_samples,
            class_map=numbers,  # type: ignore[arg-type]
            download=download,
            **find_columns(dataset, root, split, input_key, target_key, numbers is not None),
            # timm decodes streams; 16 bits and transparency are left to our own rules, where its reader can do that
            input_img_mode="" if dataset.lower().startswith(("wds", "hfids")) else "RGB",
        )
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"data set {dataset} needs a package that is not installed: {error}") from error
    except Exception as error:  # every reader has its own errors
        raise DataError(f"cannot open data set {dataset}: {' '.join(str(error).split())}") from error
