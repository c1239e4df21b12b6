"""mmdet's Cascade R-CNN (with or without masks) on our backbones, plain or with confidence-gated early exit."""

from __future__ import annotations

from typing import Any

from mmdet.datasets.transforms import Pad
from mmdet.models.detectors import CascadeRCNN
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from mambascope.mm.cell_labels import cells_from_boxes
from mambascope.mm.coco import number_by_name
from mambascope.mm.compat import float32_box_operators
from mambascope.mm.dense import ScopeMixin, ScopeTTAMixin, UnpaddedMixin, sample_names
from mambascope.mm.gate import presence_from_labels
from mambascope.mm.scope_backbone import ScopeFeatures

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

    def cell_presence(self, data_samples: Any, features: ScopeFeatures) -> tuple[Tensor, Tensor]:
        """Classes of the boxes that reach into each cell; cells of crowd regions are not known."""
        objects = [sample.gt_instances for sample in data_samples]
        crowds = [sample.ignored_instances for sample in data_samples]
        return cells_from_boxes(
            [get_box_tensor(instances.bboxes) for instances in objects],
            [instances.labels for instances in objects],
            [get_box_tensor(instances.bboxes) for instances in crowds],
            features.sizes,
            self.num_classes,
            self.backbone.cell,
            features.grid,
        )


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
