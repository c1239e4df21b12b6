"""Writes ScopeDigits to disk in the layouts of ImageNet (ImageFolder), ADE20K and COCO.

The folder appears in one step when it is complete: images are written to a hidden folder beside it first.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from mambascope.data.coco_categories import COCO_CATEGORIES
from mambascope.data.errors import DataError
from mambascope.data.glyphs import NUM_CLASSES
from mambascope.data.scopedigits import CLASS_NAMES, ScopeDigits, Task
from mambascope.data.scopedigits_config import ScopeDigitsConfig

MARKER = "scopedigits.json"
_ADE_BACKGROUND = 1  # "wall", the first of the 150 classes
_ADE_DIGITS = tuple(15 * (digit + 1) for digit in range(NUM_CLASSES))  # 15 … 150: both halves of the range and its end
_COCO_IDS = tuple(sorted(COCO_CATEGORIES))
_COCO_DIGITS = tuple(_COCO_IDS[(8 * digit + 7)] for digit in range(NUM_CLASSES))
_DEFAULTS = {"cls": (64, 6000, 1000), "seg": (128, 1000, 200), "det": (128, 1000, 200)}
_README = {
    "cls": "ImageFolder layout: train/CLASS/*.png and val/CLASS/*.png; the class is the digit.\n",
    "seg": "ADE20K layout: images/{training,validation}/*.jpg, annotations/{training,validation}/*.png.\n"
    "Label files follow ADE20K: 0 means not labelled, classes count from 1; load them with reduce_zero_label=True.\n",
    "det": "COCO layout: train2017/*.jpg, val2017/*.jpg, annotations/instances_{train,val}2017.json.\n"
    "Masks are uncompressed run lengths, as pycocotools reads them.\n",
}


def ade_values(ade_ids: bool) -> NDArray[np.uint8]:
    """Label-file value [11] of background and of the digits 0–9.

    ADE20K's files keep 0 for "not labelled", and ``reduce_zero_label=True`` subtracts one from the rest. Plain files
    hold 1 for background and d + 2 for digit d (11 classes); with ``ade_ids`` the classes lie among ADE20K's 150.
    """
    if ade_ids:
        return np.array([_ADE_BACKGROUND, *_ADE_DIGITS], np.uint8)
    return np.arange(1, NUM_CLASSES + 2, dtype=np.uint8)


def coco_categories(coco_ids: bool) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """COCO's ``categories`` list, and the category id of each digit.

    Plain files have ten categories with ids 1–10 named "0"–"9"; with ``coco_ids`` all 80 COCO categories are listed
    and ten of them stand for the digits.
    """
    if coco_ids:
        names, ids = COCO_CATEGORIES, _COCO_DIGITS
    else:
        names, ids = {digit + 1: name for digit, name in enumerate(CLASS_NAMES)}, tuple(range(1, NUM_CLASSES + 1))
    return [{"id": i, "name": names[i], "supercategory": "digit"} for i in sorted(names)], ids


def rle_encode(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Uncompressed COCO run lengths of a mask [H, W]: column by column, starting with the number of zeros."""
    flat = np.concatenate([[False], mask.T.reshape(-1)])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return {"counts": counts.tolist(), "size": list(mask.shape)}


def _progress(data: ScopeDigits, label: str, quiet: bool) -> Iterator[int]:
    return iter(tqdm(range(len(data)), desc=label, unit="img", disable=quiet))


def _save_jpeg(image: NDArray[np.uint8], path: Path) -> None:
    Image.fromarray(image).save(path, quality=95, subsampling=0)


def _write_cls(root: Path, data: ScopeDigits, quiet: bool, mapped: bool) -> None:
    for name in CLASS_NAMES[: len(data)]:
        (root / data.split / name).mkdir(parents=True)
    for index in _progress(data, f"{data.split} images", quiet):
        image, target = data[index]
        Image.fromarray(image).save(root / data.split / CLASS_NAMES[target] / f"{index:06d}.png")


def _write_seg(root: Path, data: ScopeDigits, quiet: bool, mapped: bool) -> None:
    folder = "training" if data.split == "train" else "validation"
    values = ade_values(mapped)
    for kind in ("images", "annotations"):
        (root / kind / folder).mkdir(parents=True)
    for index in _progress(data, f"{folder} images", quiet):
        image, mask = data[index]
        _save_jpeg(image, root / "images" / folder / f"ADE_{data.split}_{index + 1:08d}.jpg")
        Image.fromarray(values[mask]).save(root / "annotations" / folder / f"ADE_{data.split}_{index + 1:08d}.png")


def _write_det(root: Path, data: ScopeDigits, quiet: bool, mapped: bool) -> None:
    folder = f"{data.split}2017"
    (root / folder).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    categories, ids = coco_categories(mapped)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in _progress(data, f"{folder} images", quiet):
        image, target = data[index]
        name = f"{index + 1:012d}.jpg"
        _save_jpeg(image, root / folder / name)
        images.append({"id": index + 1, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
        for box, label, mask in zip(target["boxes"].tolist(), target["labels"], target["masks"], strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": ids[label],
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": float(mask.sum()),
                    "segmentation": rle_encode(mask),
                    "iscrowd": 0,
                }
            )
    info = {"description": "ScopeDigits", "version": "1.0"}
    table = {"info": info, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{folder}.json").write_text(json.dumps(table))


WRITERS: dict[str, Callable[[Path, ScopeDigits, bool, bool], None]] = {
    "cls": _write_cls,
    "seg": _write_seg,
    "det": _write_det,
}


def _check_target(out: Path, overwrite: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"--out {out} exists and is not a folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise DataError(f"--out {out} is not empty; choose another folder or pass --overwrite")
        if not (out / MARKER).is_file():
            raise DataError(f"--out {out} was not written by this tool (no {MARKER} in it); delete it yourself first")


def _replace(finished: Path, out: Path) -> None:
    """Puts the finished folder in the place of ``out``, which is missing, empty or an earlier result."""
    if out.is_dir() and any(out.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent)) / out.name
        os.rename(out, old)
        os.rename(finished, out)
        shutil.rmtree(old.parent)
    else:
        os.rename(finished, out)


def export(
    task: Task,
    out: str | Path,
    size: int | None = None,
    train: int | None = None,
    val: int | None = None,
    mapped_ids: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Path:
    """Writes both splits of ScopeDigits and returns the folder.

    Args:
        task: "cls" (ImageFolder), "seg" (ADE20K) or "det" (COCO).
        out: Folder to make; it appears complete or not at all.
        size: Image side in pixels (default 64 for cls, 128 otherwise).
        train: Number of training images (default 6,000 for cls, 1,000 otherwise).
        val: Number of validation images (default 1,000 for cls, 200 otherwise).
        mapped_ids: Use class ids of ADE20K's 150 or COCO's 80 classes.
        overwrite: Replace an earlier result of this function.
        quiet: No progress bar.
        **options: Further fields of :class:`ScopeDigitsConfig`, e.g. ``seed`` or ``easy_share``.

    Raises:
        DataError: When ``out`` cannot be written.
        ValueError: For an option out of range.
    """
    if task not in WRITERS:
        raise ValueError(f"task must be one of {', '.join(WRITERS)}, got {task!r}")
    if mapped_ids and task == "cls":
        raise ValueError("mapped ids exist for the tasks 'seg' and 'det' only")
    defaults = _DEFAULTS[task]
    config = ScopeDigitsConfig(size=defaults[0] if size is None else size, **options)
    lengths = {"train": defaults[1] if train is None else train, "val": defaults[2] if val is None else val}
    for split, length in lengths.items():
        if length < 1 or (task == "cls" and length < NUM_CLASSES):
            raise ValueError(f"{split} must be at least {NUM_CLASSES if task == 'cls' else 1} images, got {length}")
    out = Path(os.path.abspath(out))
    _check_target(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
    except OSError as error:
        raise DataError(f"cannot write to {out.parent}: {error.strerror or error}") from error
    try:
        work.chmod(0o755)  # mkdtemp makes it private
        for split, length in lengths.items():
            WRITERS[task](work, ScopeDigits(task, split, length, config), quiet, mapped_ids)
        facts = {"task": task, "mapped_ids": mapped_ids, "images": lengths, "config": dataclasses.asdict(config)}
        (work / MARKER).write_text(json.dumps(facts, indent=2) + "\n")
        (work / "README.txt").write_text("ScopeDigits, made by tools/make_scopedigits.py\n" + _README[task])
        _replace(work, out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out
