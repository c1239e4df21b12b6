"""Test-time augmentation: what the gate decided for all views of an image."""

import copy
import importlib

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseTTAModel

from mambascope.mm import GateMetric
from tests.mm.test_padding import batch, images, model_of

# two views of one size each, as TestTimeAug and mmengine's collate hand them on
VIEWS = [(32, 32), (48, 48)]


def views(kind, count=2):
    """A batch of ``count`` images with two views."""
    batches = [batch(kind, images([size] * count)) for size in VIEWS]
    for single in batches:
        for sample in single["data_samples"]:
            sample.set_metainfo({"ori_shape": (32, 32), "flip": False, "flip_direction": None})
            sample.set_metainfo({"scale_factor": tuple(side / 32 for side in sample.img_shape)})
    return {name: [single[name] for single in batches] for name in ("inputs", "data_samples")}


def build(kind, type_):
    options = {"model.backbone.threshold": 1.0}
    if kind == "det":  # mmdet merges no masks
        options |= {"model.roi_head.mask_head": None, "model.roi_head.mask_roi_extractor": None}
    module = model_of(kind, **options)
    registry = importlib.import_module({"seg": "mmseg", "det": "mmdet"}[kind] + ".registry").MODELS
    nms = ConfigDict(nms={"type": "nms", "iou_threshold": 0.5}, max_per_img=10)
    single = {"tta_cfg": nms} if kind == "det" else {}
    return registry.build({"type": type_, "module": module, **single}).eval()


@pytest.mark.parametrize("kind", ["seg", "det"])
@torch.no_grad()
def test_the_cost_is_that_of_all_views(kind):
    model = build(kind, {"seg": "ScopeSegTTAModel", "det": "ScopeDetTTAModel"}[kind])
    assert isinstance(model, BaseTTAModel)
    data = views(kind)
    alone = [
        [model.module.test_step({k: [v[view][i]] for k, v in copy.deepcopy(data).items()})[0] for view in range(2)]
        for i in range(2)
    ]
    metric = GateMetric()
    merged = model.test_step(copy.deepcopy(data))
    metric.process(data, [sample.to_dict() for sample in merged])
    for sample, single in zip(merged, alone, strict=True):
        fact, facts = sample.metainfo["scope"], [s.metainfo["scope"] for s in single]
        assert fact["views"] == 2
        for name in ("gflops_both_directions", "gflops_one_direction"):
            assert fact[name] == pytest.approx(sum(f[name] for f in facts))
        np.testing.assert_allclose(fact["presence"], np.max([f["presence"] for f in facts], axis=0), rtol=1e-5)
        assert fact["confidence"] == pytest.approx(np.mean([f["confidence"] for f in facts]))
        assert fact["refined"] == 1
    cost = sum(model.module.backbone.cost(*size)[1] for size in VIEWS)
    assert metric.compute_metrics(metric.results)["backbone_gflops"] == pytest.approx(cost)


@pytest.mark.parametrize("kind", ["seg", "det"])
@torch.no_grad()
def test_one_view_is_left_out(kind, monkeypatch):
    model = build(kind, {"seg": "SegTTAModel", "det": "DetTTAModel"}[kind])
    data = views(kind)
    metric = GateMetric()
    metric.process(data, [sample.to_dict() for sample in model.test_step(copy.deepcopy(data))])
    messages = []
    monkeypatch.setattr("mambascope.mm.metrics.print_log", lambda text, **_: messages.append(text))
    assert metric.compute_metrics(metric.results) == {}
    assert messages == [
        "gate: left out, as the merged predictions have one view's decisions only; set tta_model.type to "
        "ScopeSegTTAModel or ScopeDetTTAModel"
    ]
