"""The final weights as a file of their own."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, Trainer

from mambascope.models.checkpoint import save_safetensors
from mambascope.training.base import TrainModule
from mambascope.training.limits import whole_epochs


class ExportWeights(Callback):
    """Writes the final weights (the average, where there is one) with the model's config when training has ended.

    Args:
        path: The ``.safetensors`` file; ``mambascope.load_model(path)`` rebuilds the model from it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_end(self, trainer: Trainer, pl_module: TrainModule) -> None:  # type: ignore[override]
        """Writes the file."""
        if not trainer.is_global_zero:
            return
        pl_module.end_phase()
        pl_module.model.description.update(epochs=whole_epochs(trainer), steps=trainer.global_step)
        self.write(pl_module)

    def write(self, pl_module: TrainModule) -> None:
        """Writes the model as it is now."""
        save_safetensors(pl_module.model, self.path)
