"""The columns of a Hugging Face data set that hold the images and the labels."""

from __future__ import annotations

from typing import Any

from mambascope.data.errors import DataError

_READERS = ("hfds", "hfids")


def find_columns(
    dataset: str, root: str | None, split: str, input_key: str | None, target_key: str | None, named: bool
) -> dict[str, Any]:
    """Arguments that make timm's reader read the right columns.

    Where they are not given they are ``image`` and ``label`` or, in a data set of Hugging Face without columns of these
    names, the only column of images and the only one of class labels.

    Args:
        dataset: The data set's name in timm.
        root: Cache folder.
        split: Of the data set.
        input_key: Column of the images, if given.
        target_key: Column of the labels, if given.
        named: Whether a class map turns names into numbers.

    Raises:
        DataError: When there is no such column, or several that it could be; the line lists all columns.
    """
    choices = {"input_key": input_key, "target_key": target_key}
    reader, _, name = dataset.partition("/")
    if reader.lower() not in _READERS:
        return {option: key for option, key in choices.items() if key is not None}
    import datasets

    opened = datasets.load_dataset(name, split=split, cache_dir=root, streaming=reader.lower() == "hfids")
    features: dict[str, Any] = opened.features or opened._resolve_features().features
    columns = ", ".join(f"{key} ({_kind(feature)})" for key, feature in features.items())
    roles: dict[str, Any] = {}
    for option, usual, kind in (("input_key", "image", datasets.Image), ("target_key", "label", datasets.ClassLabel)):
        fitting = [key for key, feature in features.items() if isinstance(feature, kind)]
        key = choices[option] or (usual if usual in features or len(fitting) != 1 else fitting[0])
        if key.partition(".")[0] not in features:
            what = f"{key!r} is none of them" if choices[option] else f"which of them is the {usual}? Pass {option}"
            raise DataError(f"data set {dataset} has the columns {columns}; {what}")
        roles[option] = key
    target = features.get(roles["target_key"])
    if getattr(target, "dtype", None) == "string" and not named:
        raise DataError(f"column {roles['target_key']} of data set {dataset} holds names: pass class_map, all in order")
    return roles


def _kind(feature: Any) -> str:
    classes = getattr(feature, "num_classes", None)
    if classes is not None:
        return f"{classes} classes"
    kind = type(feature).__name__
    return feature.dtype if kind == "Value" else kind
