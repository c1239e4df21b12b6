"""mmseg's encoder-decoder on our backbones, plain or with confidence-gated early exit."""

from __future__ import annotations

from typing import Any

from mmseg.models.segmentors import EncoderDecoder, SegTTAModel
from mmseg.registry import MODELS
from torch import Tensor

from mambascope.mm.cell_labels import cells_from_masks
from mambascope.mm.dense import ScopeMixin, ScopeTTAMixin, UnpaddedMixin, sample_names
from mambascope.mm.gate import presence_from_masks
from mambascope.mm.scope_backbone import ScopeFeatures


@MODELS.register_module()
class VimEncoderDecoder(UnpaddedMixin, EncoderDecoder):
    """``EncoderDecoder`` on a :class:`~mambascope.mm.backbone.VimBackbone`, which reads images without their padding.

    Takes the arguments of mmseg's ``EncoderDecoder``.

    Raises:
        ValueError: If the backbone is another.
    """


@MODELS.register_module()
class ScopeEncoderDecoder(ScopeMixin, EncoderDecoder):
    """``EncoderDecoder`` on a :class:`~mambascope.mm.scope_backbone.ScopeBackbone`: the gate's loss and its decisions.

    Takes the arguments of mmseg's ``EncoderDecoder``; the backbone's gate needs as many classes as the decode head.

    Raises:
        ValueError: If the backbone has no such gate; in training, if a mask holds a label that is no class.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_gate(self.num_classes)

    def presence(self, data_samples: Any) -> tuple[Tensor, Tensor | None]:
        """Classes in the masks, the ignored label left out; images without a labelled pixel are not known."""
        masks = [sample.gt_sem_seg.data for sample in data_samples]
        names = sample_names(data_samples, "seg_map_path", "img_path")
        return presence_from_masks(masks, self.num_classes, self.decode_head.ignore_index, names)

    def cell_presence(self, data_samples: Any, features: ScopeFeatures) -> tuple[Tensor, Tensor]:
        """Classes in the cells of the masks; cells without a labelled pixel are not known."""
        masks = [sample.gt_sem_seg.data for sample in data_samples]
        cell = self.backbone.cell
        return cells_from_masks(masks, self.num_classes, cell, features.grid, self.decode_head.ignore_index)


@MODELS.register_module()
class ScopeSegTTAModel(ScopeTTAMixin, SegTTAModel):
    """``SegTTAModel`` of a :class:`ScopeEncoderDecoder`: the gate's decisions and costs of all views."""
