"""Pipeline steps: images read as everywhere in this package, and annotations whose errors name their files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import mmengine.fileio as fileio
import numpy as np
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine.dist import is_main_process
from mmengine.registry import TRANSFORMS
from PIL import Image

from mambascope.data.errors import DataError
from mambascope.data.image_io import LOOKED_AT, open_image, read_reason, survey
from mambascope.mm.gate import check_labels
from mambascope.models.pictures import ValueRange, check_value_range


@TRANSFORMS.register_module()
class LoadAnyImage(LoadImageFromFile):
    """Reads an image as the classifiers' commands do, see :func:`~mambascope.data.image_io.open_image`.

    mmcv's ``LoadImageFromFile`` shows what lies behind transparent pixels. The result is the same kind of array,
    [H, W, 3] with blue first, turned as EXIF says. Images are never shrunk: annotations are in their pixels.

    Args:
        to_float32: Whether to convert from uint8.
        ignore_empty: Whether another image takes the place of one that cannot be read.
        value_range: The files' values that become 0 to 255, as ``--data.value_range`` of the classifiers.
        backend_args: Where files lie, see ``mmengine.fileio``.

    Raises:
        ValueError: If ``value_range`` is none.
        DataError: If the file cannot be read as an image.
    """

    def __init__(
        self,
        to_float32: bool = False,
        ignore_empty: bool = False,
        value_range: ValueRange = None,
        *,
        backend_args: dict | None = None,
    ) -> None:
        super().__init__(to_float32=to_float32, ignore_empty=ignore_empty, backend_args=backend_args)
        self.value_range = check_value_range(value_range)

    def transform(self, results: dict) -> dict | None:
        """Adds ``img``, ``img_shape`` and ``ori_shape`` to what has ``img_path``."""
        name = str(results["img_path"])
        try:
            with fileio.get_local_path(name, backend_args=self.backend_args) as path:
                picture = open_image(path, name=name, value_range=self.value_range, whole=True)
        except (OSError, DataError) as error:
            if self.ignore_empty:
                return None
            if isinstance(error, DataError):
                raise
            raise DataError(f"cannot read image {name}: {read_reason(error)}") from None
        image = np.ascontiguousarray(np.asarray(picture)[..., ::-1])
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results


class NamedAnnotations:
    """A config's ``LoadAnnotations``, whatever package it is of, with errors that name the image and the annotations.

    Args:
        load: The step itself.
        annotations: Name of the file that boxes come from; masks have files of their own.
        num_classes: Of masks; ``None`` if the data set does not say it.
        ignore_index: Label of pixels of masks that say nothing.
    """

    def __init__(
        self, load: LoadAnnotations, annotations: str = "", num_classes: int | None = None, ignore_index: int = 255
    ) -> None:
        self.load = load
        self.annotations = annotations
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def __call__(self, results: dict) -> dict:
        """Loads and checks the annotations of one image.

        Raises:
            DataError: If they are of another size than the image, or masks hold no classes.
        """
        image, mask = results["img_path"], results.get("seg_map_path") or ""
        with_mask = bool(mask) and self.load.with_seg
        try:
            if with_mask and os.path.isfile(mask):
                self._check_kind(image, mask)
            self._check_boxes(results)
            results = self.load(results)
        except (OSError, Image.UnidentifiedImageError) as error:
            what = f"mask {mask}" if with_mask else f"annotations {self.annotations}"
            raise DataError(f"cannot read {what} of image {image}: {read_reason(error)}") from None
        if with_mask:
            self._check_mask(results)
        return results

    def _check_kind(self, image: str, mask: str) -> None:
        """Refuses what the loader would turn into other labels without a word."""
        with Image.open(mask) as file:
            if file.format == "JPEG":
                raise DataError(f"mask {mask} of image {image} is a JPEG, which changes labels: save masks as PNG")
            mode, bands = file.mode, len(file.getbands())
            top = 0.0 if mode in ("L", "P", "1") or bands > 1 else float(np.max(np.asarray(file), initial=0))
        if bands > 1:
            raise DataError(
                f"mask {mask} of image {image} is {mode}: a mask must hold one number for each pixel, its class; save "
                "it as grey values or with a palette"
            )
        if top > 255:
            raise DataError(f"mask {mask} of image {image} holds label {top:g}; labels above 255 cannot be read")

    def stored_labels(self, mask: str) -> set[int]:
        """What a mask's file holds, before the loader changes it."""
        with fileio.get_local_path(mask, backend_args=self.load.backend_args) as path, Image.open(path) as file:
            return {int(v) for v in np.unique(np.asarray(file))}

    def _check_boxes(self, results: Mapping[str, Any]) -> None:
        """Boxes and polygons are in pixels of an image of the size that the file says."""
        size = results.get("height"), results.get("width")
        if self.load.with_seg or None in size or "ori_shape" not in results:
            return
        if tuple(results["ori_shape"][:2]) != size:
            raise DataError(
                f"image {results['img_path']} is {_size(results['ori_shape'])} pixels{_turned(results)} and "
                f"annotations {self.annotations} say {_size(size)}: boxes would not fit"
            )

    def _check_mask(self, results: Mapping[str, Any]) -> None:
        image, mask, labels = results["img_path"], results["seg_map_path"], results["gt_seg_map"]
        if "ori_shape" in results and labels.shape != tuple(results["ori_shape"][:2]):
            raise DataError(
                f"image {image} is {_size(results['ori_shape'])} pixels{_turned(results)} and its mask {mask} is "
                f"{_size(labels.shape)}: they must be of one size"
            )
        if self.num_classes:
            classes = np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
            check_labels(classes.tolist(), self.num_classes, self.ignore_index, mask)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.load!r})"


def _size(shape: Any) -> str:
    """Height and width as people write them."""
    return f"{shape[1]}×{shape[0]}"


def _turned(results: Mapping[str, Any]) -> str:
    """Says so if the file's pixels lie otherwise than its EXIF data show them."""
    path = results["img_path"]
    if not os.path.isfile(path):
        return ""
    with Image.open(path) as file:
        stored = file.size[::-1]
    return (
        f" ({_size(stored)} before the turn that its EXIF data ask for)" if stored != results["ori_shape"][:2] else ""
    )


def plain_datasets(dataset: Any) -> Iterator[Any]:
    """The data sets inside of wrappers."""
    inner = [*getattr(dataset, "datasets", ()), *([dataset.dataset] if hasattr(dataset, "dataset") else ())]
    if not inner:
        yield dataset
    for part in inner:
        yield from plain_datasets(part)


def name_annotations(dataset: Any) -> None:
    """Puts a :class:`NamedAnnotations` around every step of a data set's pipeline that loads annotations."""
    for plain in plain_datasets(dataset):
        for steps in _steps(getattr(plain, "pipeline", None)):
            for i, step in enumerate(steps):
                if isinstance(step, LoadAnnotations):
                    classes = getattr(plain, "metainfo", {}).get("classes")
                    ignored = getattr(plain, "ignore_index", 255)
                    steps[i] = NamedAnnotations(step, getattr(plain, "ann_file", ""), classes and len(classes), ignored)


def survey_images(dataset: Any) -> None:
    """Warns when images use a small part of their values, see :func:`~mambascope.data.image_io.survey`."""
    for plain in plain_datasets(dataset):
        loads = [s for steps in _steps(getattr(plain, "pipeline", None)) for s in steps if isinstance(s, LoadAnyImage)]
        if loads:
            paths = [str(plain.get_data_info(i)["img_path"]) for i in range(min(len(plain), LOOKED_AT))]
            local = [(path, path) for path in paths if os.path.isfile(path)]
            survey(local, 3, loads[0].value_range, warn=is_main_process())


def _steps(pipeline: Any) -> Iterator[list[Any]]:
    """The lists of steps of a pipeline, also of those inside of steps such as ``TestTimeAug``."""
    steps = getattr(pipeline, "transforms", None)
    if isinstance(steps, list):
        yield steps
    for inner in (*(steps or ()), *getattr(pipeline, "subroutines", ())):
        yield from _steps(inner)
