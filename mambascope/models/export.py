"""The stages of a model as programs of their own: for ``torch.export``, ONNX and ``torch.compile``.

Early exit depends on the data, so it stays outside: the coarse stage and the fine stage are two programs, and whoever
runs them decides in between. The two-stage program has a fixed cost instead: both stages for every image.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mambascope.models.gate import check_threshold
from mambascope.models.scope import MambaScope
from mambascope.models.states import CoarseState
from mambascope.models.vim import VisionMamba
from mambascope.ops.portable import decompositions
from mambascope.utils import share

MAX_BATCH = 2**16


class CoarseStage(nn.Module):
    """First look: images to logits and to what the fine stage needs."""

    outputs = ("logits", "confidence", "importance", "features", "tokens", "cls")

    def __init__(self, model: MambaScope) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images [B, C, H, W] to logits [B, classes], confidence [B], importance [B, M], features and tokens [B, M, d]
        and the CLS output [B, d]."""
        coarse = self.model.forward_coarse(images)
        return coarse.logits, self.model.gate(coarse), coarse.importance, coarse.features, coarse.tokens, coarse.cls


class FineStage(nn.Module):
    """Second look: the same images with what the coarse stage said about them.

    With a ``coarse_weight`` the coarse logits are an input too: both looks answer.

    Args:
        model: A MambaScope.
        alpha: Share of cells to re-read, fixed from here on.
    """

    outputs = ("logits", "selected")

    def __init__(self, model: MambaScope, alpha: float | None = None) -> None:
        super().__init__()
        self.model = model
        self.alpha = share("alpha", model.alpha if alpha is None else alpha)

    def forward(
        self,
        images: Tensor,
        importance: Tensor,
        features: Tensor,
        tokens: Tensor,
        cls: Tensor,
        coarse_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] and outputs of the coarse stage to logits [B, classes] and cells [B, k]."""
        patch = 2 * self.model.config.patch_size
        grid = (-(-images.shape[2] // patch), -(-images.shape[3] // patch))
        logits = cls if coarse_logits is None else coarse_logits  # without a weight they are not looked at
        coarse = CoarseState(logits, cls, features, tokens, importance, grid)
        fine = self.model.forward_fine(images, coarse, self.alpha)
        return fine.logits, fine.selected


class TwoStages(nn.Module):
    """Both stages for every image, and the answer that the threshold picks: a graph of fixed shape and cost.

    Args:
        model: A MambaScope.
        alpha: Share of cells to re-read, fixed from here on.
        threshold: Confidence at which the coarse answer is taken, fixed from here on.
    """

    outputs = ("logits", "confidence", "exited", "coarse_logits", "selected")

    def __init__(self, model: MambaScope, alpha: float | None = None, threshold: float | None = None) -> None:
        super().__init__()
        self.model = model
        self.alpha = share("alpha", model.alpha if alpha is None else alpha)
        self.threshold = check_threshold(model.threshold if threshold is None else threshold)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images [B, C, H, W] to logits [B, classes], confidence [B], exited [B], coarse logits and cells [B, k]."""
        coarse = self.model.forward_coarse(images)
        fine = self.model.forward_fine(images, coarse, self.alpha)
        conf, exited = self.model.decide(coarse, self.threshold, self.alpha)
        logits = torch.where(exited.unsqueeze(1), coarse.logits, fine.logits)
        return logits, conf, exited, coarse.logits, fine.selected


class OneStage(nn.Module):
    """A Vision Mamba."""

    outputs = ("logits",)

    def __init__(self, model: VisionMamba) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to logits [B, classes]."""
        return self.model(images)


def has_stages(model: nn.Module) -> bool:
    """Whether :func:`stages` takes a model."""
    return isinstance(model, VisionMamba)


def stages(
    model: VisionMamba, images: Tensor, alpha: float | None = None, threshold: float | None = None
) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """The programs of a model by name, each with its inputs for `images` [B, C, H, W].

    Raises:
        ValueError: If the model cannot be exported: no classifier, or nothing to refine.
    """
    if not isinstance(model, VisionMamba):
        raise ValueError(f"model must be a VisionMamba or a MambaScope, got {type(model).__name__}")
    if not model.num_classes or not model.global_pool:
        raise ValueError("the model has no classifier to export")
    if not isinstance(model, MambaScope):
        return {"model": (OneStage(model).eval(), (images,))}
    fine = FineStage(model, alpha)
    if fine.alpha == 0:
        raise ValueError("alpha must be larger than 0 to export a fine stage, got 0")
    coarse = CoarseStage(model).eval()
    with torch.no_grad():
        logits, _, *state = coarse(images)
    if model.coarse_weight:
        state.append(logits)
    return {
        "coarse": (coarse, (images,)),
        "fine": (fine.eval(), (images, *state)),
        "two_stage": (TwoStages(model, alpha, threshold).eval(), (images,)),
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Without gradients, and without what PyTorch's exporter says about its own insides."""
    loggers = [logging.getLogger(name) for name in ("torch._dynamo.utils", "torch._export.serde.serialize")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():  # with gradients a scan is partitioned for a backward pass
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", message=".*not writable.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def export_program(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """One of the :func:`stages` as a ``torch.export`` program for any batch size and images of this size.

    It keeps our operators, so that it runs with the fastest backend where it is loaded: ``import mambascope`` first.
    """
    batch = Dim("batch", min=1, max=MAX_BATCH)
    # an example of one image would fix the batch at one
    wide = tuple(t if t.shape[0] > 1 else t.expand(2, *t.shape[1:]).contiguous() for t in inputs)
    with quiet():
        return torch.export.export(module, wide, dynamic_shapes=tuple({0: batch} for _ in wide))


def portable(program: ExportedProgram) -> ExportedProgram:
    """The same program made of PyTorch's own operators: needs neither this package nor a compiler where it runs."""
    with quiet():
        return program.run_decompositions({**torch.export.default_decompositions(), **decompositions()})


def _stable_sort(
    x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """ONNX has no stable sort; its TopK, which this becomes, gives the lower index first among equals."""
    values, indices = torch.topk(x, x.shape[dim], dim, largest=descending)
    return values, indices


def to_onnx(program: ExportedProgram, outputs: tuple[str, ...], metadata: dict[str, str] | None = None) -> Any:
    """A program as ``torch.onnx.ONNXProgram``.

    Args:
        program: From :func:`export_program`.
        outputs: Names of its results.
        metadata: Text to store in the file.

    Raises:
        ImportError: If onnx or onnxscript is missing (``pip install mambascope[export]``).
    """
    with quiet():
        plain = program.run_decompositions({**decompositions(), torch.ops.aten.sort.stable: _stable_sort})
        onnx = torch.onnx.export(plain, dynamo=True, verbose=False, output_names=list(outputs))
    assert onnx is not None
    from onnxscript import ir

    graph = onnx.model.graph
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        if not isinstance(value.shape[0], int):
            value.shape = ir.Shape(["batch", *list(value.shape)[1:]])
    inner = (value for node in graph.all_nodes() for value in node.outputs if not value.is_graph_output())
    for value in (*inner, *graph.initializers.values()):
        # what the file said of them would have to fit what tools make of the graph: quantize_dynamic refuses it
        value.shape = value.type = None
        value.metadata_props.clear()
    onnx.model.metadata_props.update(metadata or {})
    return onnx
