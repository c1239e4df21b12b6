"""An image's result depends on no other image of its batch and on no padding."""

import numpy as np
import pytest
import torch

from mambascope.mm.dense import image_sizes
from mambascope.mm.loading import plain_config
from mambascope.models.cells import num_selected
from tests.mm import common
from tests.mm.common import scope, vim
from tests.mm.test_configs import build, load

SIZES = [(64, 64), (64, 96), (70, 45), (64, 64), (17, 128), (96, 33)]
CANVAS = (112, 144)


def images(sizes, dtype=torch.float32):
    return [torch.randn(3, *size, dtype=dtype) for size in sizes]


def canvas(parts, size, value=3.0):
    """Images at the top left of one padded batch."""
    x = parts[0].new_full((len(parts), 3, *size), value)
    for i, part in enumerate(parts):
        x[i, :, : part.shape[1], : part.shape[2]] = part
    return x


def spread(model):
    """Weights that tell images apart."""
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def cells(selected, grid):
    """Rows and columns of re-read cells."""
    return [divmod(int(cell), grid[1]) for cell in selected if cell >= 0]


BACKBONES = [
    {},
    {"detail": True, "readout": True, "arch_options": {"stem_width": 12}},
    {"detail": True, "out_channels": 24, "coarse_resize": "learned"},
]


@pytest.mark.parametrize(
    ("make", "options", "threshold"),
    [
        *((scope, options, None) for options in BACKBONES),
        *((scope, BACKBONES[1], threshold) for threshold in (0.0, 1.0)),
        *((vim, options, None) for options in BACKBONES[:2]),
    ],
)
@torch.no_grad()
def test_maps_alone_in_a_batch_and_on_a_larger_canvas(make, options, threshold):
    torch.manual_seed(0)
    model = spread(make(**options)).double().eval()
    parts = images(SIZES, torch.float64)
    x = canvas(parts, CANVAS)
    if make is scope:
        model.threshold = 0.0
        sure = model.forward_scope(x, SIZES).confidence.sort().values
        model.threshold = float(sure[2:4].mean()) if threshold is None else threshold
    singles = [model(part[None]) for part in parts]
    for size in ((96, 128), CANVAS):
        together = model(x[..., : size[0], : size[1]], SIZES)
        for i, single in enumerate(singles):
            for alone, level in zip(single, together, strict=True):
                rows, cols = alone.shape[-2:]
                torch.testing.assert_close(level[i, :, :rows, :cols], alone[0], rtol=1e-9, atol=1e-9)
                level[i, :, :rows, :cols] = 0
        assert all(not level.any() for level in together)  # nothing but the images


@torch.no_grad()
def test_no_cell_of_padding_is_read_again_or_counted():
    torch.manual_seed(0)
    model = spread(scope()).double().eval()
    parts = images(SIZES, torch.float64)
    model.threshold = 0.0
    sure = model.forward_scope(canvas(parts, CANVAS), SIZES).confidence.sort().values
    model.threshold = float(sure[2:4].mean())
    result = model.forward_scope(canvas(parts, CANVAS), SIZES)
    assert 0 < int(result.exited.sum()) < len(parts)
    assert result.grid == (7, 9)
    costs = model.image_gflops(result)["both_directions"]
    for i, (part, size) in enumerate(zip(parts, SIZES, strict=True)):
        alone = model.forward_scope(part[None])
        assert bool(alone.exited) == bool(result.exited[i])
        assert cells(result.selected[i], result.grid) == cells(alone.selected[0], alone.grid)
        torch.testing.assert_close(result.confidence[i], alone.confidence[0])
        torch.testing.assert_close(result.gate_logits[i], alone.gate_logits[0])
        importance = result.importance[i].view(result.grid)[: alone.grid[0], : alone.grid[1]]
        torch.testing.assert_close(importance.flatten(), alone.importance[0])
        assert float(result.importance[i].sum()) == pytest.approx(float(alone.importance.sum()))
        assert costs[i] == model.cost(*size)[0 if result.exited[i] else 1]


@pytest.mark.parametrize("make", [scope, vim])
@pytest.mark.parametrize("options", [{}, {"norm_cfg": {"type": "BN"}, "norm_eval": True}])
def test_training_sees_what_testing_sees(make, options):
    """Gradients, too: padding has none, and every parameter has one whatever the grids."""
    torch.manual_seed(0)
    options = {**options, "drop_path_rate": 0.0}
    model = spread(make(**options, **({"exit_prob": 0.0} if make is scope else {}))).double().train()
    parts = images(SIZES[:3], torch.float64)
    grads = []
    for alone in (True, False):
        model.zero_grad()
        if alone:
            result = [model(part[None]) for part in parts]
        else:
            x = canvas(parts, CANVAS).requires_grad_()
            result = [model(x, SIZES[:3])]
        sum(level.square().sum() for levels in result for level in levels).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for i, (rows, cols) in enumerate(SIZES[:3]):
        assert x.grad[i, :, :rows, :cols].any()
        x.grad[i, :, :rows, :cols] = 0
    assert not x.grad.any()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("make", [scope, vim])
def test_sizes_that_do_not_lie_on_the_canvas(make):
    x = torch.zeros(2, 3, 32, 48)
    for sizes in ([(32, 48)], [(32, 48), (33, 48)], [(32, 48), (0, 48)], [(32, 48)] * 3):
        with pytest.raises(ValueError, match=r"sizes must be 2 heights and widths of 1 to 32 x 48 pixels, got \[\("):
            make()(x, sizes)


# ---- whole models --------------------------------------------------------------------------------------------------


def model_of(kind, plain=False, **options):
    """The demo's segmentor or detector with a small encoder, in evaluation mode."""
    torch.manual_seed(0)
    cfg = common.demo_config(kind, **{"model.backbone.arch_options.embed_dim": 16, **options})
    return spread(build(plain_config(cfg) if plain else cfg)).eval()


def batch(kind, parts, size=None):
    """Images as ``test_step`` takes them, or (with ``size``) as ``predict`` takes them, on a canvas of that size."""
    if kind == "seg":
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmdet.structures import DetDataSample as Sample
    samples = []
    for part in parts:
        shape = tuple(part.shape[-2:])
        facts = {"ori_shape": shape, "img_shape": shape, "scale_factor": (1.0, 1.0), "img_path": "x.png"}
        if size is not None:
            right, below = size[1] - shape[1], size[0] - shape[0]
            meta = {"padding_size": (0, right, 0, below)} if kind == "seg" else {"batch_input_shape": size}
            facts |= {"pad_shape": size, **meta}
        samples.append(Sample(metainfo=facts))
    if size is None:
        return {"inputs": [part.mul(40).add(120).clamp(0, 255).byte() for part in parts], "data_samples": samples}
    return canvas(parts, size), samples


def same_facts(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_allclose(b[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def same_result(kind, a, b):
    assert ("scope" in a.metainfo) == ("scope" in b.metainfo)
    if "scope" in a.metainfo:
        same_facts(a.metainfo["scope"], b.metainfo["scope"])
    if kind == "seg":
        torch.testing.assert_close(b.seg_logits.data, a.seg_logits.data, rtol=1e-3, atol=1e-4)
        return
    a, b = a.pred_instances, b.pred_instances
    assert len(a) > 3
    torch.testing.assert_close(b.bboxes, a.bboxes, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(b.scores, a.scores, rtol=1e-4, atol=1e-5)
    assert (np.asarray(a.masks) != np.asarray(b.masks)).mean() < 1e-3


@pytest.mark.parametrize("plain", [False, True], ids=["scope", "vim"])
@pytest.mark.parametrize("kind", ["seg", "det"])
@torch.no_grad()
def test_predictions_alone_in_a_batch_and_on_a_larger_canvas(kind, plain):
    model = model_of(kind, plain)
    if not plain:
        model.backbone.threshold = 1.0
    parts = images(SIZES[:4])
    alone = [model.predict(*batch(kind, [part], tuple(part.shape[-2:])))[0] for part in parts]
    for size in ((70, 96), (96, 160)):
        inputs, samples = batch(kind, parts, size)
        for _ in range(2):  # the samples can be used again
            together = model.predict(inputs, samples)
            assert all(a is b for a, b in zip(together, samples, strict=True))
            for a, b in zip(alone, together, strict=True):
                same_result(kind, a, b)
    for fact in (s.metainfo["scope"] for s in together if not plain):
        assert fact["importance"].shape == fact["grid"] == tuple(-(-side // 16) for side in fact["size"])
        count = num_selected(model.backbone.encoder.alpha, int(np.prod(fact["grid"])))
        assert len(cells(fact["selected"], fact["grid"])) == count


@pytest.mark.parametrize("plain", [False, True], ids=["scope", "vim"])
@torch.no_grad()
def test_mmdets_preprocessor_pads_without_effect(plain):
    model = model_of("det", plain)
    parts = images(SIZES[:3])
    alone = [model.test_step(batch("det", [part]))[0] for part in parts]
    for divisor, value in ((16, 0), (128, 5)):
        model.data_preprocessor.pad_size_divisor, model.data_preprocessor.pad_value = divisor, value
        for a, b in zip(alone, model.test_step(batch("det", parts)), strict=True):
            same_result("det", a, b)


@pytest.mark.parametrize("plain", [False, True], ids=["scope", "vim"])
@pytest.mark.parametrize("mode", ["whole", "slide"])
@torch.no_grad()
def test_mmsegs_preprocessor_pads_without_effect(plain, mode):
    windows = {"crop_size": (48, 48), "stride": (32, 32)} if mode == "slide" else {}
    model = model_of("seg", plain, **{"model.test_cfg": {"mode": mode, **windows}})
    parts = images([(70, 45)] * 2)
    alone = model.test_step(batch("seg", parts))
    for test_cfg in ({"size_divisor": 32}, {"size": (96, 128)}):
        model.data_preprocessor.test_cfg, model.data_preprocessor.pad_val = test_cfg, 7
        for a, b in zip(alone, model.test_step(batch("seg", parts)), strict=True):
            same_result("seg", a, b)
            assert a.pred_sem_seg.shape == (70, 45)


@pytest.mark.parametrize("plain", [False, True], ids=["scope", "vim"])
@pytest.mark.parametrize("kind", ["seg", "det"])
def test_training_pads_without_effect_on_the_backbone(kind, plain, tmp_path):
    """Mixed sizes on two canvases: the same maps, and the same loss of the gate."""
    model = model_of(kind, plain, **({} if plain else {"model.backbone.exit_prob": 0.0})).train()
    seen = []
    if plain:
        model.backbone.register_forward_hook(lambda module, args, out: seen.append(out))
    else:
        forward = model.backbone.forward_scope
        model.backbone.forward_scope = lambda *args: seen.append(forward(*args)) or seen[-1]
    losses = []
    for size in ((96, 96), (128, 144)):
        torch.manual_seed(1)
        parts = images([(64, 64), (64, 96), (70, 45)])
        data = batch(kind, parts)
        for sample in data["data_samples"]:
            annotate(kind, sample)
        if kind == "seg":
            model.data_preprocessor.size, model.data_preprocessor.size_divisor = size, None
        else:
            model.data_preprocessor.pad_size_divisor = size[1] if size[1] > 96 else 96
        losses.append(model(**model.data_preprocessor(data, True), mode="loss"))
    first, second = (result if plain else result.maps for result in seen)
    assert first[0].shape != second[0].shape
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b[..., : a.shape[-2], : a.shape[-1]], a, rtol=1e-4, atol=1e-4)
        assert float(b.abs().sum()) == pytest.approx(float(a.abs().sum()), rel=1e-4)
    if not plain:
        torch.testing.assert_close(losses[0]["loss_gate"], losses[1]["loss_gate"])
        assert seen[0].exited.logical_not().all()


def annotate(kind, sample):
    """A mask of two classes, or two boxes with masks."""
    height, width = sample.img_shape
    mask = torch.zeros(height, width, dtype=torch.long)
    mask[8:30, 8:30] = 3
    if kind == "seg":
        from mmengine.structures import PixelData

        sample.gt_sem_seg = PixelData(data=mask[None])
        return
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    boxes = torch.tensor([[8.0, 8, 30, 30], [2, 2, 20, 12]])
    masks = BitmapMasks(np.stack([mask.numpy() > 0] * 2).astype(np.uint8), height, width)
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([3, 5]), masks=masks)
    sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=torch.zeros(0, dtype=torch.long))


def test_large_scale_jitter_keeps_the_images_own_shape(tmp_path):
    """As in testing: 1024 pixels of canvas are no part of an image."""
    from mmdet.registry import DATASETS

    data = common.make_data("det", tmp_path / "det", train=2, val=1, mapped_ids=True)
    cfg = load("cascade_scope_ti.py")
    options = cfg.train_dataloader.dataset
    options.data_root = str(data)
    for step in options.pipeline:
        if step["type"] == "RandomResize":
            step["ratio_range"] = (0.25, 0.25)
    result = DATASETS.build(options)[0]
    sample = result["data_samples"]
    assert tuple(result["inputs"].shape[-2:]) == (1024, 1024)
    assert sample.img_shape == (256, 256)
    assert sample.gt_instances.masks.masks.shape[1:] == (1024, 1024)
    assert image_sizes(result["inputs"][None], [sample]) == [(256, 256)]


@torch.no_grad()
def test_padding_on_the_left_is_named():
    model = model_of("seg")
    inputs, samples = batch("seg", images([(64, 64)]), (80, 80))
    samples[0].set_metainfo({"padding_size": (16, 0, 16, 0)})
    with pytest.raises(ValueError, match="at the bottom only, got 16 pixels on the left and 16 at the top"):
        model.predict(inputs, samples)


def test_another_backbone_is_refused():
    cfg = load("upernet_vim_demo.py")
    cfg.model.backbone = {"type": "mmseg.MobileNetV2"}
    with pytest.raises(ValueError, match="must be a VimBackbone or ScopeBackbone in a VimEncoderDecoder, got Mobile"):
        build(cfg)
