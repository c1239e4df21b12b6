"""Weights that a backbone starts from: files, names of shipped weights and URLs, whole models or parts of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_dist_info
from torch import Tensor

from mambascope.models.checkpoint import CheckpointError, LoadReport, load_weights
from mambascope.models.reading import ENCODER, encoder_weights, read_tensors, strip_wrappers
from mambascope.models.weights import find_weights

_OPTIONS = {"type", "checkpoint", "prefix", "map_location", "strict"}


@dataclass
class Weights:
    """What a checkpoint holds.

    Attributes:
        name: What it was called.
        tensors: With the names they have in a backbone or in an encoder.
        description: What the file says about itself, see :func:`~mambascope.models.checkpoint.read_state_dict`.
    """

    name: str
    tensors: dict[str, Tensor]
    description: dict[str, Any]


def pretrained_options(init_cfg: Any) -> Mapping[str, Any]:
    """The one ``dict(type='Pretrained', ...)`` of an ``init_cfg``.

    Raises:
        ValueError: If it is something else.
    """
    single = init_cfg[0] if isinstance(init_cfg, Sequence) and len(init_cfg) == 1 else init_cfg
    kind = single.get("type") if isinstance(single, Mapping) else None
    if getattr(kind, "__name__", kind) not in ("Pretrained", "PretrainedInit") or set(single) - _OPTIONS:
        raise ValueError(
            "init_cfg must be dict(type='Pretrained', checkpoint=FILE, prefix=None, strict=True) or None, "
            f"got {init_cfg!r}"
        )
    return single


def local_file(checkpoint: str | os.PathLike[str]) -> Path:
    """The file meant by a path, a name of shipped weights, or an ``http`` or ``https`` URL, which is downloaded once.

    As by mmengine's loader into torch's cache, by the first process; but that would unpickle the file without limits.

    Raises:
        CheckpointError: If a URL cannot be downloaded or is of another kind.
    """
    url = str(checkpoint)
    if "://" not in url:
        return find_weights(os.path.expanduser(checkpoint))
    if not url.startswith(("http://", "https://")):
        raise CheckpointError(f"checkpoint {url} must be a file or an http(s) URL: download it first")
    # files of many repositories have the same name
    folder = Path(torch.hub.get_dir(), "checkpoints", hashlib.sha256(url.encode()).hexdigest()[:12])
    path = folder / (Path(urlparse(url).path).name or "checkpoint")
    if get_dist_info()[0] == 0:
        _download(url, path)
    barrier()
    _download(url, path)  # on other machines
    return path


def _download(url: str, path: Path) -> None:
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=os.isatty(2))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {url} cannot be downloaded: {error}") from None


def read_weights(checkpoint: str | os.PathLike[str], prefix: str | None = None) -> Weights:
    """Reads a checkpoint for a backbone, without running any code from it.

    Args:
        checkpoint: See :func:`local_file`.
        prefix: Start of the names of the wanted tensors, which is cut off; ``None`` if only wrappers that are known
            (``backbone.`` and ``module.`` among them) stand before them.

    Raises:
        CheckpointError: If it cannot be read or no name has the prefix.
    """
    path = local_file(checkpoint)
    tensors, description = read_tensors(path)
    if prefix:
        start = prefix if prefix.endswith(".") else f"{prefix}."
        matches = {k.partition(start)[2]: v for k, v in tensors.items() if k.removeprefix("module.").startswith(start)}
        if not matches:
            first = dict.fromkeys(f"{k.partition('.')[0]}." for k in tensors if "." in k)
            raise CheckpointError(
                f"checkpoint {checkpoint} has no tensor whose name begins with {start!r}; its names begin with "
                f"{', '.join(list(first)[:8])}"
            )
        tensors = matches
    return Weights(str(checkpoint), strip_wrappers(tensors, description), description)


def start_backbone(backbone: Any, source: Weights, strict: bool = True) -> str:
    """Loads what fits a backbone: the encoder's weights strictly if asked for, of the other parts what is there.

    Returns:
        A report for people: what became of every tensor, and of each part.

    Raises:
        CheckpointError: If ``strict`` and the encoder's weights do not fit. Nothing is changed then.
    """
    encoder, description = encoder_weights(source.tensors, source.description)
    report = load_weights(backbone.encoder, encoder, description, f"checkpoint {source.name}", strict, backbone.ignored)
    parts = [f"encoder: {len(report.matched) + len(report.resampled)} of {len(backbone.encoder.state_dict())}"]
    if description.get("part") != "backbone":
        return f"{report}\n{parts[0]} tensors from the file; everything else of the backbone starts anew"
    for child in (name for name, _ in backbone.named_children() if f"{name}." != ENCODER):
        parts.append(_start_part(child, backbone, source.tensors, report))
    prefixes = (ENCODER, *(f"{name}." for name, _ in backbone.named_children()))
    report.unused += [name for name in source.tensors if not name.startswith(prefixes)]
    return f"{report}\ntensors from the file: {', '.join(parts)}"


def _start_part(child: str, backbone: Any, tensors: Mapping[str, Tensor], report: LoadReport) -> str:
    """Loads what fits of one part beside the encoder and adds it to the report."""
    part_weights = {name: value for name, value in backbone.state_dict().items() if name.startswith(f"{child}.")}
    count = 0
    misfit = ""
    with torch.no_grad():
        for name, value in part_weights.items():
            tensor = tensors.get(name)
            if tensor is not None and tensor.shape == value.shape:
                value.copy_(tensor)
                report.matched.append(name)
                count += 1
                continue
            report.new.append(name)
            if tensor is not None:
                report.unused.append(name)
                misfit = misfit or f" ({name} is {list(tensor.shape)} in the file and {list(value.shape)} here)"
    report.unused += [name for name in tensors if name.startswith(f"{child}.") and name not in part_weights]
    return f"{child}: {count} of {len(part_weights)}{misfit}"
