"""Checks of users' data before anything is built: where it lies, what its classes are called, what files hold."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from mambascope.data.errors import DataError
from mambascope.mm.transforms import NamedAnnotations, plain_datasets

_SHOWN = 8  # names in a message
_NEEDED = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
}


class MissingDataError(DataError, FileNotFoundError):
    """Data that are not where the config says."""


def plain_configs(dataset: Any, name: str = "dataset") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Configs of the data sets inside of wrappers, with their names in ``--cfg-options``."""
    if not isinstance(dataset, Mapping):
        return
    parts = list(dataset.get("datasets", ()))
    if "dataset" not in dataset and not parts:
        yield name, dataset
    if "dataset" in dataset:
        yield from plain_configs(dataset["dataset"], f"{name}.dataset")
    for i, part in enumerate(parts):
        yield from plain_configs(part, f"{name}.datasets.{i}")


def data_folders(dataset: Any) -> Iterator[Path]:
    """Files and folders that a data set's config needs, through any wrappers around it."""
    for _, plain in plain_configs(dataset):
        root = plain.get("data_root") or ""
        names = [plain.get("ann_file"), *(plain.get("data_prefix") or {}).values()]
        yield from (Path(root) / name for name in names if isinstance(name, str) and name)


def _scored_files(evaluator: Any) -> Iterator[Path]:
    """Annotation files that the metrics of a config read."""
    metrics = evaluator if isinstance(evaluator, Sequence) else [evaluator]
    yield from (Path(m["ann_file"]) for m in metrics if isinstance(m, Mapping) and isinstance(m.get("ann_file"), str))


def check_data(cfg: Mapping, loaders: tuple[str, ...]) -> None:
    """Checks that the data of some loaders is there and means what the config says, before anything is built.

    Args:
        cfg: The whole config; its ``data_help`` says what belongs where.
        loaders: Names such as ``train_dataloader``.

    Raises:
        MissingDataError: The message names what is missing and says what to put where.
        DataError: If class names are no list, other ones than the heads' or than those of an annotation file, or a file
            has no masks and the pipeline loads them. The message is one line.
    """
    missing: list[Path] = []
    for loader in loaders:
        section = cfg.get(loader)
        paths = [*data_folders(section.get("dataset"))] if isinstance(section, Mapping) else []
        if loader != "train_dataloader":
            paths += _scored_files(cfg.get(loader.replace("dataloader", "evaluator")))
        missing += [path for path in paths if not path.exists() or (path.is_dir() and not any(path.iterdir()))]
    if missing:
        what = "".join(f"\n  {path}" for path in dict.fromkeys(missing))
        raise MissingDataError(
            f"data is missing (looked from {os.getcwd()}):{what}\n{str(cfg.get('data_help') or '').strip()}"
        )
    tables: dict[Path, dict] = {}  # the same file may serve validation and test
    for loader in loaders:
        section = cfg.get(loader)
        for name, dataset in plain_configs(section.get("dataset") if isinstance(section, Mapping) else None):
            classes = _classes(cfg, f"{loader}.{name}", dataset)
            _check_endings(f"{loader}.{name}", dataset)
            file = Path(dataset.get("data_root") or "", dataset.get("ann_file") or "")
            if classes and _is_coco(dataset):
                table = tables[file] if file in tables else tables.setdefault(file, _read_table(file))
                _check_categories(file, table, classes, f"{loader}.{name}")
                if _with_masks(dataset):
                    _check_polygons(cfg, file, table, classes)
                if loader != "train_dataloader":
                    evaluator = loader.replace("dataloader", "evaluator")
                    for scored in _scored_files(cfg.get(evaluator)):
                        table = tables[scored] if scored in tables else tables.setdefault(scored, _read_table(scored))
                        _check_scored(file, tables[file], scored, table, evaluator)


def _check_endings(name: str, dataset: Mapping[str, Any]) -> None:
    """mmseg looks for one ending of images; another one would make an empty data set."""
    kind = _kind(dataset)
    defaults = inspect.signature(kind).parameters if kind else {}
    if "img_suffix" not in defaults or dataset.get("ann_file"):
        return
    suffix = dataset.get("img_suffix", defaults["img_suffix"].default)
    folder = Path(dataset.get("data_root") or "", (dataset.get("data_prefix") or {}).get("img_path") or "")
    endings = set()
    for path in folder.rglob("*"):
        if path.name.endswith(suffix):
            return
        endings |= {path.suffix} if path.is_file() and path.suffix else set()
    raise DataError(
        f"folder {folder} has no image that ends in {suffix}; it holds {_some(sorted(endings))}: set {name}.img_suffix"
    )


def _kind(dataset: Mapping[str, Any]) -> Any:
    """Class of a data set; ``None`` if there is none of that name, which building it will say."""
    with DATASETS.switch_scope_and_registry(None) as registry:
        return registry.get(dataset["type"]) if isinstance(dataset["type"], str) else dataset["type"]


def _is_coco(dataset: Mapping[str, Any]) -> bool:
    """Whether a data set reads its annotations as mmdet's ``CocoDataset`` does; some of its kind have other entries."""
    kind = _kind(dataset)
    methods = [getattr(getattr(kind, name, None), "__qualname__", "") for name in ("load_data_list", "parse_data_info")]
    return methods == ["CocoDataset.load_data_list", "CocoDataset.parse_data_info"]


def _some(names: Sequence[Any]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:_SHOWN]) + more


# ---- names of classes -----------------------------------------------------------------------------------------------


def _classes(cfg: Mapping, name: str, dataset: Mapping[str, Any]) -> list[str]:
    """Class names of a data set's config or of its type; empty if neither says them."""
    names = (dataset.get("metainfo") or {}).get("classes")
    if isinstance(names, str):
        if not Path(names).is_file():
            raise DataError(
                f"{name}.metainfo.classes is the text '{names}', which would be {len(names)} classes; write "
                f"classes=('{names}',), on the command line {name}.metainfo.classes=\"({names},)\""
            )
        names = Path(names).read_text().splitlines()
    if names is None:
        names = getattr(_kind(dataset), "METAINFO", {}).get("classes", ())
    classes = [str(c) for c in names]
    if twice := [c for c, count in Counter(classes).items() if count > 1]:
        raise DataError(f"{name}.metainfo.classes names {_some(twice)} more than once")
    palette = (dataset.get("metainfo") or {}).get("palette")
    if cfg.get("default_scope") == "mmseg" and palette and len(palette) != len(classes):
        raise DataError(
            f"{name}.metainfo has {len(classes)} classes and {len(palette)} colours: give as many, or none with "
            f"{name}.metainfo.palette=[]"
        )
    model = cfg.get("model") or {}
    if classes and (wrong := [(k, v) for k, v in _head_classes(model, "model") if v != len(classes)]):
        settings = [f"{k}={len(classes)}" for k, v in _all_num_classes(model, "model") if v != len(classes)]
        raise DataError(
            f"{name} has {len(classes)} classes ({_some(classes)}) and {wrong[0][0]} is {wrong[0][1]}: set "
            f"{' '.join(settings)}, or metainfo=dict(classes=(...)) of the data set"
        )
    return classes


def _all_num_classes(part: Any, name: str) -> Iterator[tuple[str, int]]:
    """Every ``num_classes`` in a model's config but that of proposals, with its name in ``--cfg-options``."""
    items = part.items() if isinstance(part, Mapping) else enumerate(part) if isinstance(part, (list, tuple)) else ()
    for key, value in items:
        if key == "num_classes" and isinstance(value, int):
            yield f"{name}.{key}", value
        elif key != "rpn_head":
            yield from _all_num_classes(value, f"{name}.{key}")


def _head_classes(model: Mapping, name: str) -> list[tuple[str, int]]:
    """Those of the heads that predict the data set's classes."""
    return [
        (key, value)
        for key, value in _all_num_classes(model, name)
        if {"decode_head", "bbox_head"} & set(key.split("."))
    ]


# ---- COCO's annotation files ---------------------------------------------------------------------------------------


def _read_table(file: Path) -> dict:
    """An annotation file of COCO's kind.

    Raises:
        DataError: If it is none.
    """
    try:
        table = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"annotations {file} cannot be read: {error}") from None
    lists = ("images", "annotations", "categories")
    if isinstance(table, dict):
        table.setdefault("annotations", [])  # files of images to be tested have none
    if not isinstance(table, dict) or any(not isinstance(table.get(name), list) for name in lists):
        raise DataError(
            f"annotations {file} must be COCO's: lists 'images', 'annotations' and 'categories' in one object"
        )
    for kind, needed in _NEEDED.items():
        for i, entry in enumerate(table[kind]):
            if lacking := [key for key in needed if key not in entry]:
                raise DataError(f"entry {i} of '{kind}' in {file} has no {_some(lacking)}")
    if twice := [n for n, count in Counter(a["id"] for a in table["annotations"]).items() if count > 1]:
        raise DataError(f"annotations {file} must have an id of their own each; {_some(twice)} has several")
    sizes = {image["id"]: [image["height"], image["width"]] for image in table["images"]}
    for i, entry in enumerate(table["annotations"]):
        box, mask = entry["bbox"], entry.get("segmentation")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
            raise DataError(f"bbox of entry {i} of 'annotations' in {file} must be four numbers, got {box!r}")
        size, image_size = list(mask.get("size", ())) if isinstance(mask, dict) else None, sizes.get(entry["image_id"])
        if size and image_size and size != image_size:
            raise DataError(
                f"mask of entry {i} of 'annotations' in {file} is of size {size} and its image of {image_size}"
            )
    return table


def _check_categories(file: Path, table: Mapping[str, Any], classes: Sequence[str], name: str) -> None:
    """Boxes of categories that the config does not name are left out: some with a word, all with an error."""
    names = {c["id"]: str(c["name"]) for c in table["categories"]}
    if twice := [n for n, count in Counter(names.values()).items() if count > 1]:
        raise DataError(f"annotations {file} name the category {_some(twice)} more than once")
    boxes = Counter(a["category_id"] for a in table["annotations"])
    unknown = [n for i, n in names.items() if n not in classes]
    if table["annotations"] and not any(names.get(i) in classes for i in boxes):
        held = [n for i, n in names.items() if boxes[i]]
        raise DataError(
            f"no box of annotations {file} has a class of the config: the file names {_some(held)}, the config "
            f"{_some(list(classes))}; set metainfo=dict(classes=(...)) of the data set ({name}.metainfo.classes) and "
            "num_classes of the heads and the gate"
        )
    if table["annotations"] and not any(
        names.get(a["category_id"]) in classes and a["area"] > 0 and min(a["bbox"][2:4]) >= 1
        for a in table["annotations"]
    ):
        raise DataError(
            f"all {len(table['annotations'])} boxes of annotations {file} are smaller than a pixel: bbox must be "
            "[x, y, width, height] in pixels, and area its size"
        )
    if left_out := sum(boxes[i] for i, n in names.items() if n not in classes):
        print_log(
            f"{left_out} of {boxes.total()} boxes of {file} are left out: the config has no class {_some(unknown)}",
            logger="current",
            level=logging.WARNING,
        )


def _check_scored(
    file: Path, table: Mapping[str, Any], scored_file: Path, scored_table: Mapping[str, Any], name: str
) -> None:
    """COCO's metric finds images by their numbers."""
    if {i["id"] for i in table["images"]} - {i["id"] for i in scored_table["images"]}:
        raise DataError(f"{name} scores against {scored_file}, which lacks images of {file}: set ann_file of both")


def _with_masks(dataset: Mapping[str, Any]) -> bool:
    return any(isinstance(step, Mapping) and step.get("with_mask") for step in dataset.get("pipeline") or ())


def _check_polygons(cfg: Mapping, file: Path, table: Mapping[str, Any], classes: Sequence[str]) -> None:
    numbers = {c["id"] for c in table["categories"] if c["name"] in classes}
    boxes = [a for a in table["annotations"] if a["category_id"] in numbers]
    without = sum(not a.get("segmentation") for a in boxes)
    if without:
        raise DataError(
            f"{without} of {len(boxes)} boxes of annotations {file} have no mask ('segmentation'); for boxes only, set "
            f"{' '.join(_box_only(cfg))}"
        )


def _box_only(cfg: Mapping) -> list[str]:
    """What to add to ``--cfg-options`` so that a detector needs no masks."""
    settings = [f"model.roi_head.{name}=None" for name in ("mask_roi_extractor", "mask_head")]
    for kind in ("train", "val", "test"):
        section = cfg.get(f"{kind}_dataloader")
        for name, dataset in plain_configs(section.get("dataset") if isinstance(section, Mapping) else None):
            settings += [
                f"{kind}_dataloader.{name}.pipeline.{i}.with_mask=False"
                for i, step in enumerate(dataset.get("pipeline") or ())
                if isinstance(step, Mapping) and step.get("with_mask")
            ]
        metrics = cfg.get(f"{kind}_evaluator") or ()
        for i, metric in enumerate(metrics if isinstance(metrics, Sequence) else ()):
            if "segm" in (metric.get("metric") or ()):
                settings.append(f"{kind}_evaluator.{i}.metric=bbox")
    return settings


# ---- masks ---------------------------------------------------------------------------------------------------------


def check_masks(dataset: Any) -> None:
    """Checks that masks hold more than one class where further labels of theirs are ignored.

    Reads masks until two classes are there: one or a few in most data sets, all where something is wrong.

    Args:
        dataset: As built, with :class:`~mambascope.mm.transforms.NamedAnnotations` in its pipeline.

    Raises:
        DataError: If what could be the other classes is ignored.
    """
    for plain in plain_datasets(dataset):
        classes = list(getattr(plain, "metainfo", {}).get("classes") or ())
        steps = getattr(getattr(plain, "pipeline", None), "transforms", [])
        loads = [s for s in steps if isinstance(s, NamedAnnotations) and s.load.with_seg]
        if len(classes) < 2 or not loads or not len(plain):
            continue
        present: set[int] = set()
        stored: set[int] = set()
        for i in range(len(plain)):
            info = plain.get_data_info(i)
            if not info.get("seg_map_path"):
                break
            labels = loads[0](info)["gt_seg_map"]
            present |= {int(v) for v in np.unique(labels)} - {plain.ignore_index}
            if len(present) > 1:
                break
            stored |= loads[0].stored_labels(info["seg_map_path"])
        else:
            _check_present(plain, classes, present, stored)


def _check_present(dataset: Any, classes: Sequence[str], present: set[int], stored: set[int]) -> None:
    zero = bool(getattr(dataset, "reduce_zero_label", False))
    ignored = sorted(stored & {255, *((0,) if zero and present else ())})
    absent = [name for i, name in enumerate(classes) if i not in present]
    if not ignored or not absent:
        return
    way_out = f"save it as {classes.index(absent[0])}"
    if zero:
        way_out = (
            f"with reduce_zero_label=True classes are saved as 1..{len(classes)}; set it to False in the data set and "
            f"its pipeline to save them as 0..{len(classes) - 1}"
        )
    folder = dataset.data_prefix.get("seg_map_path")
    raise DataError(
        f"{_some(absent)} {'is' if len(absent) == 1 else 'are'} in none of the {len(dataset)} masks of {folder}; they "
        f"hold {' and '.join(map(str, ignored))}, which is ignored: {way_out}"
    )
