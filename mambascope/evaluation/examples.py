"""From the model's tensors to examples that can be drawn. Imports matplotlib through ``mambascope.plotting``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mambascope.models.engine import ScopePredictor
from mambascope.models.gate import confidence
from mambascope.models.preprocessing import preprocessing
from mambascope.models.scope import MambaScope
from mambascope.models.states import ScopeOutput
from mambascope.plotting import Example
from mambascope.utils import model_device


def to_rgb(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undoes the normalisation of an image [C, H, W]; returns RGB [H, W, 3], 0 to 1. Grey becomes three channels."""
    channels = image.shape[0]
    picture = image.detach().float().cpu()
    if len(mean) == channels == len(std):
        picture = picture * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    if channels < 3:
        picture = picture[:1].expand(3, -1, -1)
    return picture[:3].clamp(0, 1).permute(1, 2, 0).numpy()


def class_name(index: int, names: Sequence[str] | None) -> str:
    """The name of a class, or its number."""
    return str(names[index]) if names is not None and index < len(names) else str(index)


def make_examples(
    model: MambaScope,
    images: Tensor,
    output: ScopeOutput,
    *,
    labels: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
) -> list[Example]:
    """One drawable example per image.

    Args:
        model: Gives the patch size and, unless given, the normalisation.
        images: [B, C, H, W] as the model took them.
        output: What it made of them.
        labels: Right answers [B], if known.
        class_names: Names of the classes.
        mean, std: Normalisation of `images`; default: the model's.
        names: File names.
    """
    facts = preprocessing(model)
    mean, std = mean or facts["mean"], std or facts["std"]
    final = confidence(output.logits).tolist()
    predicted, coarse = output.logits.argmax(1).tolist(), output.coarse_logits.argmax(1).tolist()
    examples = []
    for i, (exited, cells) in enumerate(zip(output.exited.tolist(), output.selected, strict=True)):
        examples.append(
            Example(
                image=to_rgb(images[i], mean, std),
                importance=output.importance[i].float().cpu().numpy().reshape(output.grid),
                selected=cells[cells >= 0].cpu().numpy(),
                exited=exited,
                predicted=class_name(predicted[i], class_names),
                coarse_predicted=class_name(coarse[i], class_names),
                confidence=float(output.confidence[i]),
                fine_confidence=None if exited else final[i],
                true=None if labels is None else class_name(int(labels[i]), class_names),
                tokens=int(output.tokens[i]),
                cell=2 * model.config.patch_size,
                name=names[i] if names else None,
            )
        )
    return examples


def run_scope(model: MambaScope, images: Tensor, threshold: float, batch_size: int = 64) -> ScopeOutput:
    """Dynamic inference on images [B, C, H, W] of any device, `batch_size` at a time through the coarse stage."""
    return ScopePredictor(model, threshold=threshold)(images.to(model_device(model)), batch_size)
