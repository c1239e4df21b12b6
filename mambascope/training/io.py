"""Checkpoint files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from mambascope.models.checkpoint import CheckpointError
from mambascope.utils import atomic_path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file beside the target, then renames it; reads tensors and plain values only.

    A write that fails (disk full, process killed) leaves the previous checkpoint untouched.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Saves to a local path.

        Raises:
            CheckpointError: If the file cannot be written; what was there before is still there.
        """
        try:
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())  # else a power cut may keep the name and lose the content
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint {path} could not be written: {_first_line(error)}") from error

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Loads with ``weights_only=True``, whatever is asked for.

        Raises:
            CheckpointError: If there is no such file, or it is damaged or no training checkpoint.
        """
        return read_training_checkpoint(path, map_location)


def read_training_checkpoint(path: Any, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint that a run can be resumed from.

    Args:
        path: The ``.ckpt`` file.
        map_location: As in ``torch.load``.
        mmap: Leave the tensors on disk: quick where only the numbers are wanted.

    Raises:
        CheckpointError: If there is no such file, or it is damaged or no training checkpoint.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if Path(path).suffix == ".safetensors":
        raise CheckpointError(
            f"checkpoint {path} holds weights only, no training state to resume from; "
            "to start from its weights use --model.net.checkpoint"
        )
    try:
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {_first_line(error)}") from None
    missing = (
        [key for key in ("loops", "optimizer_states", "state_dict") if key not in content]
        if isinstance(content, Mapping)
        else ["everything"]
    )
    if missing:
        raise CheckpointError(
            f"checkpoint {path} holds no training state to resume from ({', '.join(missing)} missing); "
            "to start from its weights use --model.net.checkpoint"
        )
    return dict(content)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
