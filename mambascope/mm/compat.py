"""What current PyTorch and CPUs need to work with mmengine 0.10, mmcv 2.1 and mmdet 3.3."""

from __future__ import annotations

import importlib
from functools import partial
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer


def _numpy_classes() -> list[Any]:
    dtypes = [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1", "?")]
    multiarray: Any = importlib.import_module(
        "numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray"
    )
    functions = [multiarray._reconstruct, multiarray.scalar]
    # files written with numpy 1 name the same functions by their old place
    old = [(f, f"numpy.core.multiarray.{f.__name__}") for f in functions]
    return [np.ndarray, np.dtype, *dtypes, *functions, *old]


def _statistic(owner: Any, name: str) -> Any:
    """Stands for ``getattr`` in a checkpoint, which names the buffer's statistics that way, and gives nothing else."""
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise UnpicklingError(f"getattr({owner!r}, {name!r}) is not allowed in a checkpoint")
    return getattr(owner, name)


def allow_checkpoint_types() -> None:
    """Lets ``torch.load`` with ``weights_only=True``, the default since PyTorch 2.6, read mmengine's checkpoints.

    They hold the logged scalars beside the weights: a :class:`HistoryBuffer` of numpy arrays. These types only hold
    numbers; nothing else is allowed, so a checkpoint that would run code is still refused.
    """
    torch.serialization.add_safe_globals([HistoryBuffer, (_statistic, "builtins.getattr"), *_numpy_classes()])


def float32_box_operators() -> None:
    """Computes mmcv's operators on boxes in float32 under autocast on a CPU, where they know no bfloat16.

    Boxes need it, too: bfloat16 has eight bits, so that coordinates beyond 256 would be whole even numbers.
    """
    from mmcv.ops.nms import NMSop
    from mmdet.models.roi_heads.roi_extractors import GenericRoIExtractor, SingleRoIExtractor

    in_float32 = partial(torch.amp.custom_fwd, device_type="cpu", cast_inputs=torch.float32)
    NMSop.forward = staticmethod(in_float32(NMSop.forward))
    for extractor in (SingleRoIExtractor, GenericRoIExtractor):
        extractor.forward = in_float32(extractor.forward)
