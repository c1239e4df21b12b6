"""mmdet's Cascade R-CNN (with or without masks) on our backbones, plain or with confidence-gated early exit."""

from __future__ import annotations

from typing import Any

from mmdet.datasets.transforms import Pad
from mmdet.models.detectors import CascadeRCNN
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.registry import MODELS, TRANSFORMS
from torch import Tensor, nn

from mambascope.mm.coco import number_by_name
from mambascope.mm.compat import float32_box_operators
from mambascope.mm.dense import ScopeMixin, ScopeTTAMixin, UnpaddedMixin, sample_names
from mambascope.mm.gate import presence_from_labels

float32_box_operators()
number_by_name()


@MODELS.register_module()
class VimCascadeRCNN(UnpaddedMixin, CascadeRCNN):
    """``CascadeRCNN`` on a :class:`~mambascope.mm.backbone.VimBackbone`, which reads images without their padding.

    Takes the arguments of mmdet's ``CascadeRCNN``.

    Raises:
        ValueError: If the backbone is another.
    """


@MODELS.register_module()
class ScopeCascadeRCNN(ScopeMixin, CascadeRCNN):
    """``CascadeRCNN`` on a :class:`~mambascope.mm.scope_backbone.ScopeBackbone`: the gate's loss and its decisions.

    Takes the arguments of mmdet's ``CascadeRCNN``; the backbone's gate needs as many classes as the box heads.

    Raises:
        ValueError: If the backbone has no such gate; in training, if a box has a label that is no class.
    """

    num_classes: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        heads: Any = self.roi_head.bbox_head
        last: Any = heads[-1] if isinstance(heads, nn.ModuleList) else heads
        self.num_classes = last.num_classes
        self._check_gate(self.num_classes)

    def presence(self, data_samples: Any) -> tuple[Tensor, Tensor | None]:
        """Classes among the boxes; crowd regions do not count, and an image without boxes has none."""
        labels = [sample.gt_instances.labels for sample in data_samples]
        return presence_from_labels(labels, self.num_classes, sample_names(data_samples, "img_path")), None


@MODELS.register_module()
class ScopeDetTTAModel(ScopeTTAMixin, DetTTAModel):
    """``DetTTAModel`` of a :class:`ScopeCascadeRCNN` without masks: the gate's decisions and costs of all views."""


@TRANSFORMS.register_module()
class PadCanvas(Pad):
    """mmdet's ``Pad``, but ``img_shape`` stays the image's own: what is padded is a canvas around it.

    Takes the arguments of mmdet's ``Pad``.
    """

    def transform(self, results: dict) -> dict:
        """Pads the image, its masks and its segmentation map."""
        shape = results["img"].shape[:2]
        return {**super().transform(results), "img_shape": shape}
