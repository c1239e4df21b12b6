"""What segmentors and detectors with a gate have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambascope.mm.backbone import ScopeBackbone, ScopeFeatures, check_gate


class ScopeMixin:
    """Adds the gate to a model of mmseg or mmdet; comes before it among the base classes.

    The base model calls ``extract_feat`` somewhere inside ``loss`` and ``predict``. What the backbone decided there is
    kept until that call is done: the gate's loss needs its graph, and each prediction gets its image's facts.
    """

    backbone: Any
    _seen: list[tuple[ScopeFeatures, tuple[int, int]]] | None = None

    def _check_gate(self, num_classes: int) -> None:
        check_gate(self.backbone, num_classes)

    def extract_feat(self, inputs: Tensor) -> Any:
        """Features of a batch [B, 3, H, W]: the backbone's maps, through the neck if there is one."""
        backbone: ScopeBackbone = self.backbone
        features = backbone.forward_scope(inputs)
        if self._seen is not None:
            self._seen.append((features, (inputs.shape[-2], inputs.shape[-1])))
        return self.neck(features.maps) if self.with_neck else features.maps  # type: ignore[attr-defined]

    def presence(self, data_samples: Any) -> tuple[Tensor, Tensor | None]:
        """Classes present in each image [B, C], and of which images this is known [B]; all if ``None``."""
        raise NotImplementedError

    def loss(self, inputs: Tensor, data_samples: Any) -> dict:
        """The base model's losses and ``loss_gate``."""
        # before the heads, which would fail on a label out of range with an index error or a CUDA assertion
        presence, known = self.presence(data_samples)
        self._seen = []
        try:
            losses = super().loss(inputs, data_samples)  # type: ignore[misc]
            [(features, _)] = self._seen
        finally:
            self._seen = None
        losses["loss_gate"] = self.backbone.gate.loss(features.gate_logits, presence.to(inputs.device), known)
        losses["exit_share"] = features.exited.float().mean()
        return losses

    def predict(self, inputs: Tensor, data_samples: Any = None, **kwargs: Any) -> Any:
        """The base model's predictions; each sample's metainfo gets ``scope``, see :meth:`_facts`."""
        self._seen = []
        try:
            results = super().predict(inputs, data_samples, **kwargs)  # type: ignore[misc]
            facts = self._facts(self._seen)
        finally:
            self._seen = None
        for sample, fact in zip(results, facts, strict=True):
            sample.set_metainfo({"scope": fact})
        return results

    def _facts(self, seen: list[tuple[ScopeFeatures, tuple[int, int]]]) -> list[dict[str, Any]]:
        """Per image: what was decided; over sliding windows the mean, and for the gate the largest probability.

        ``refined`` share 0 to 1; ``gflops_both_directions`` and ``gflops_one_direction`` of the backbone, the sum over
        the windows; ``confidence``; ``presence`` [C] the gate's probabilities; ``importance`` [rows, cols] and
        ``selected`` of the last window; ``grid``.
        """
        costs = [self.backbone.image_gflops(f, *size) for f, size in seen]
        logits: list[Any] = [f.gate_logits for f, _ in seen]
        presence = torch.stack([own.float().sigmoid() for own in logits]).amax(0).cpu().numpy()
        confidence = torch.stack([c for f, _ in seen if (c := f.confidence) is not None]).double().mean(0).tolist()
        refined = torch.stack([~f.exited for f, _ in seen]).double().mean(0).tolist()
        last, size = seen[-1]
        importance = last.importance.float().cpu().numpy()
        selected = last.selected.cpu().numpy()
        return [
            {
                "refined": refined[i],
                "confidence": confidence[i],
                "presence": presence[i],
                "importance": importance[i].reshape(last.grid),
                "selected": selected[i],
                "grid": last.grid,
                "size": size,
                **{f"gflops_{c}": sum(cost[c][i] for cost in costs) for c in costs[0]},
            }
            for i in range(len(refined))
        ]


def sample_names(data_samples: Any, *keys: str) -> list[str]:
    """What to call each image in an error: the first of its metainfo's ``keys`` that is there."""
    names = []
    for i, sample in enumerate(data_samples):
        found = [str(sample.metainfo[k]) for k in keys if sample.metainfo.get(k)]
        names.append(found[0] if found else f"image {i} of the batch")
    return names
