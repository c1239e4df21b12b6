"""OpenMMLab adapters: the encoders as backbones of segmentors and detectors, with confidence-gated early exit.

Configs use them through ``custom_imports = dict(imports=['mambascope.mm', 'mambascope.mm.segmentor'])`` (or
``.detector``). This package needs mmengine and mmcv; only ``segmentor`` imports mmseg and only ``detector`` mmdet.
"""

try:
    import mmengine  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"mambascope.mm needs the OpenMMLab stack: run 'make mm' in the source folder ({error})"
    ) from error

from mambascope.mm.backbone import VimBackbone
from mambascope.mm.compat import allow_checkpoint_types
from mambascope.mm.gate import DenseGate, GateHead, gate_confidence, presence_from_labels, presence_from_masks
from mambascope.mm.loss import ClassWeightedCrossEntropy
from mambascope.mm.metrics import GateMetric
from mambascope.mm.optim import CpuAmpOptimWrapper, LayerDecayConstructor
from mambascope.mm.pyramid import SimplePyramid
from mambascope.mm.runner import ScopeRunner
from mambascope.mm.scope_backbone import ScopeBackbone, ScopeFeatures
from mambascope.mm.transforms import LoadAnyImage

allow_checkpoint_types()

__all__ = [
    "ClassWeightedCrossEntropy",
    "CpuAmpOptimWrapper",
    "DenseGate",
    "GateHead",
    "GateMetric",
    "LayerDecayConstructor",
    "LoadAnyImage",
    "ScopeBackbone",
    "ScopeFeatures",
    "ScopeRunner",
    "SimplePyramid",
    "VimBackbone",
    "gate_confidence",
    "presence_from_labels",
    "presence_from_masks",
]
