"""What segmentors and detectors on our backbones have in common: images without their padding, and the gate."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from mambascope.mm.backbone import EncoderBackbone
from mambascope.mm.canvas import Size, by_value
from mambascope.mm.scope_backbone import ScopeBackbone, ScopeFeatures, check_gate


def image_sizes(inputs: Tensor, data_samples: Any) -> list[Size] | None:
    """Height and width of each image of a batch without its padding, as its metainfo tells; ``None`` without samples.

    Args:
        inputs: [B, C, H, W], images at the top left.
        data_samples: Of mmdet's or mmseg's data preprocessor, or ``None``.

    Raises:
        ValueError: If there is padding on the left or at the top.
    """
    if data_samples is None:
        return None
    height, width = inputs.shape[-2:]
    sizes = []
    for sample in data_samples:
        meta = sample.metainfo
        # mmseg's names, of testing and of training
        left, _, top, _ = meta.get("img_padding_size", meta.get("padding_size", (0, 0, 0, 0)))
        if left or top:
            sides = f"{left} pixels on the left and {top} at the top"
            raise ValueError(f"images must be padded on the right and at the bottom only, got {sides}")
        shape = meta.get("img_shape", (height, width))
        sizes.append((min(int(shape[0]), height), min(int(shape[1]), width)))
    return sizes


def crop_sample(sample: Any, size: Size) -> None:
    """Tells a data sample that its image has no padding any more."""
    facts: dict[str, Any] = dict.fromkeys(("img_shape", "pad_shape", "batch_input_shape"), size)
    facts |= {name: [0] * 4 for name in ("padding_size", "img_padding_size") if name in sample.metainfo}
    sample.set_metainfo(facts)


@dataclass
class _Call:
    """One call of a base model's method.

    Attributes:
        model: Whose.
        sizes: Of the images without padding, for ``extract_feat``; ``None`` if there is none.
        features: What a :class:`ScopeBackbone` returned, in ``extract_feat``.
    """

    model: Any
    sizes: list[Size] | None
    features: list[ScopeFeatures] = field(default_factory=list)


# of the thread, not of the model: a model serves several threads
_CALL: ContextVar[_Call | None] = ContextVar("mambascope.mm.dense", default=None)


class UnpaddedMixin:
    """Lets a model of mmseg or mmdet read images without their padding; comes before it among the base classes.

    In testing the whole model sees each image as it is, those of one size together, so that a result depends on no
    other image of the batch. In training, where heads need one canvas, the backbone is told the images' sizes.

    Raises:
        ValueError: If the backbone is none of ours.
    """

    backbone: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.backbone, EncoderBackbone):
            raise ValueError(
                f"backbone must be a VimBackbone or ScopeBackbone in a {type(self).__name__}, "
                f"got {type(self.backbone).__name__}; others belong in mmseg's or mmdet's own models"
            )

    def _run(
        self, method: str, inputs: Tensor, data_samples: Any, sizes: list[Size] | None, **kwargs: Any
    ) -> tuple[Any, list[ScopeFeatures]]:
        """What the base model's ``method`` returns, and the features of a :class:`ScopeBackbone` on the way."""
        call = _Call(self, sizes)
        token = _CALL.set(call)
        try:
            return getattr(super(), method)(inputs, data_samples, **kwargs), call.features
        finally:
            _CALL.reset(token)

    def extract_feat(self, inputs: Tensor) -> Any:
        """Features of a batch [B, 3, H, W]: the backbone's maps, through the neck if there is one."""
        call = _CALL.get()
        current = call if call is not None and call.model is self else _Call(self, None)
        maps = self._maps(inputs, current)
        return self.neck(maps) if self.with_neck else maps  # type: ignore[attr-defined]

    def _maps(self, inputs: Tensor, call: _Call) -> tuple[Tensor, ...]:
        return self.backbone(inputs, call.sizes)

    def loss(self, inputs: Tensor, data_samples: Any) -> dict:
        """The base model's losses."""
        return self._run("loss", inputs, data_samples, image_sizes(inputs, data_samples))[0]

    def _forward(self, inputs: Tensor, data_samples: Any = None) -> Any:
        """The base model's outputs without post-processing."""
        return self._run("_forward", inputs, data_samples, image_sizes(inputs, data_samples))[0]

    def predict(self, inputs: Tensor, data_samples: Any = None, **kwargs: Any) -> Any:
        """The base model's predictions; samples with padding are told that there is none any more."""
        sizes = image_sizes(inputs, data_samples)
        if sizes is None or all(size == tuple(inputs.shape[-2:]) for size in sizes):
            return self._predict(inputs, data_samples, **kwargs)
        results: list[Any] = [None] * len(sizes)
        for size, rows in by_value(sizes).items():
            samples = [data_samples[i] for i in rows]
            for sample in samples:
                crop_sample(sample, size)
            predictions = self._predict(inputs[rows, :, : size[0], : size[1]], samples, **kwargs)
            for i, prediction in zip(rows, predictions, strict=True):
                results[i] = prediction
        return results

    def _predict(self, inputs: Tensor, data_samples: Any, **kwargs: Any) -> Any:
        """Predictions of images without padding."""
        return self._run("predict", inputs, data_samples, None, **kwargs)[0]


class ScopeMixin(UnpaddedMixin):
    """Adds the gate to a model of mmseg or mmdet; comes before it among the base classes.

    The base model calls ``extract_feat`` somewhere inside ``loss`` and ``predict``. The gate's loss needs the graph of
    what the backbone decided there, and each prediction gets its image's facts.
    """

    def _check_gate(self, num_classes: int) -> None:
        check_gate(self.backbone, num_classes)

    def _maps(self, inputs: Tensor, call: _Call) -> tuple[Tensor, ...]:
        backbone: ScopeBackbone = self.backbone
        features = backbone.forward_scope(inputs, call.sizes)
        call.features.append(features)
        return features.maps

    def presence(self, data_samples: Any) -> tuple[Tensor, Tensor | None]:
        """Classes present in each image [B, C], and which images are labelled [B]; all if ``None``."""
        raise NotImplementedError

    def cell_presence(self, data_samples: Any, features: ScopeFeatures) -> tuple[Tensor, Tensor]:
        """Classes present in each cell [B, M, C], and which cells are labelled [B, M]."""
        raise NotImplementedError

    def loss(self, inputs: Tensor, data_samples: Any) -> dict:
        """The base model's losses and ``loss_gate``; ``loss_cells`` where the gate is asked about cells."""
        # before the heads, which would fail on a label out of range with an index error or a CUDA assertion
        presence, labelled = self.presence(data_samples)
        losses, [features] = self._run("loss", inputs, data_samples, image_sizes(inputs, data_samples))
        losses["loss_gate"] = self.backbone.gate.loss(features.gate_logits, presence.to(inputs.device), labelled)
        if features.cell_logits is not None:
            cells, labelled_cells = self.cell_presence(data_samples, features)
            losses["loss_cells"] = self.backbone.gate.cell_loss(features.cell_logits, cells, labelled_cells)
        losses["exit_share"] = features.exited.float().mean()
        return losses

    def _predict(self, inputs: Tensor, data_samples: Any, **kwargs: Any) -> Any:
        """Predictions whose metainfo has ``scope``, see :meth:`_facts`; of sliding windows :func:`merge_facts`."""
        results, windows = self._run("predict", inputs, data_samples, None, **kwargs)
        decisions = zip(*(self._facts(features) for features in windows), strict=True)
        for sample, facts in zip(results, decisions, strict=True):
            sample.set_metainfo({"scope": merge_facts(facts)})
        return results

    def _facts(self, features: ScopeFeatures) -> list[dict[str, Any]]:
        """What was decided for each image, without padding.

        ``refined`` 0 or 1; ``confidence`` of the gate; ``presence`` [C] its probabilities; ``importance`` [rows, cols]
        of the cells; ``selected`` ones; ``grid``; ``size`` in pixels; ``gflops_both_directions`` and
        ``gflops_one_direction`` of the backbone.
        """
        logits, confidence = features.gate_logits, features.confidence
        assert logits is not None
        assert confidence is not None
        columns: dict[str, Any] = {
            "refined": (~features.exited).double().tolist(),
            "confidence": confidence.double().tolist(),
            "presence": logits.detach().float().sigmoid().cpu().numpy(),
            "importance": features.importance.float().unflatten(1, features.grid).cpu().numpy(),
            "selected": features.selected.cpu().numpy(),
            "size": features.sizes,
            **{f"gflops_{c}": cost for c, cost in self.backbone.image_gflops(features).items()},
        }
        rows = zip(*columns.values(), strict=True)
        return [{**dict(zip(columns, row, strict=True)), "grid": features.grid} for row in rows]


def merge_facts(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was decided for an image that was looked at several times, in windows or in views.

    Costs are added; ``refined`` and ``confidence`` are means, ``presence`` the largest probability; ``importance``,
    ``selected``, ``grid`` and ``size`` are those of the last look.
    """
    return {
        **facts[-1],
        **{name: sum(fact[name] for fact in facts) for name in facts[-1] if name.startswith("gflops_")},
        **{name: float(np.mean([fact[name] for fact in facts])) for name in ("refined", "confidence")},
        "presence": np.max([fact["presence"] for fact in facts], axis=0),
    }


class ScopeTTAMixin:
    """Keeps what was decided for every view of an image; comes before a model of mmseg or mmdet that merges views."""

    def merge_preds(self, data_samples_list: Any) -> Any:
        """The base model's merged predictions, with the facts of all views (:func:`merge_facts`) and their number."""
        facts = [merge_facts([sample.metainfo["scope"] for sample in views]) for views in data_samples_list]
        merged = super().merge_preds(data_samples_list)  # type: ignore[misc]
        for sample, fact in zip(merged, facts, strict=True):
            sample.set_metainfo({"scope": {**fact, "views": len(data_samples_list[0])}})
        return merged


def sample_names(data_samples: Any, *keys: str) -> list[str]:
    """What to call each image in an error: the first of its metainfo's ``keys`` that is there."""
    names = []
    for i, sample in enumerate(data_samples):
        values = [str(sample.metainfo[k]) for k in keys if sample.metainfo.get(k)]
        names.append(values[0] if values else f"image {i} of the batch")
    return names
