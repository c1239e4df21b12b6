"""Training, validation and resuming inside one process, on good and on bad data."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from mmengine.registry import RUNNERS
from PIL import Image

from mambascope.data.errors import DataError
from mambascope.mm import loading
from mambascope.mm.data_checks import data_folders
from mambascope.mm.loading import plain_config, register
from mambascope.mm.runner import ScopeRunner, one_line
from tests.mm import common
from tests.mm.common import runner


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return {kind: common.make_data(kind, root / kind) for kind in ("seg", "det")}


def logged(work_dir):
    lines = [json.loads(line) for path in sorted(work_dir.glob("*/vis_data/scalars.json")) for line in path.open()]
    merged = {}
    for line in lines:
        merged.update(line)
    return merged


@pytest.mark.parametrize("kind", ["seg", "det"])
def test_demo_config_trains_and_resumes(kind, data, tmp_path):
    first = runner(kind, data[kind], tmp_path / "a")
    first.train()
    facts = logged(tmp_path / "a")
    assert np.isfinite(facts["loss_gate"])
    assert 0 <= facts["exit_share"] <= 1
    for name in ("gate/mAP", "gate/share_refined", "gate/backbone_gflops", "gate/backbone_gflops_one_direction"):
        assert np.isfinite(facts[name]), name
    assert ("mIoU" if kind == "seg" else "coco/bbox_mAP") in facts
    # a file of mmengine with its log buffers goes through torch.load as it is since PyTorch 2.6
    content = torch.load(tmp_path / "a" / "iter_2.pth", weights_only=True)
    assert content["meta"]["iter"] == 2
    again = runner(kind, data[kind], tmp_path / "a", **{"resume": True, "train_cfg.max_iters": 3})
    again.train()
    assert again.iter == 3
    assert (tmp_path / "a" / "iter_3.pth").is_file()


@pytest.mark.parametrize("plain", [False, True])
def test_a_detector_trains_in_bfloat16(plain, data, tmp_path):
    """mmcv's suppression of boxes and alignment of regions know no bfloat16 on a CPU."""
    cfg = common.demo_config("det", data["det"], tmp_path, **{"optim_wrapper.type": "AmpOptimWrapper"})
    if plain:
        cfg = loading.plain_config(cfg)
        cfg.val_evaluator = cfg.test_evaluator = cfg.val_evaluator[:1]  # without the gate's
    named = common.named_runner(cfg)
    seen = []
    heads = named.model.roi_head.bbox_head
    heads[0].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output[0].dtype)))
    named.train()
    assert (torch.float32, torch.bfloat16) in seen  # regions in float32, layers in bfloat16
    facts = logged(tmp_path)
    assert all(np.isfinite(facts[name]) for name in ("loss", "loss_rpn_bbox", "s2.loss_bbox", "loss_rpn_cls"))


def test_boxes_are_suppressed_in_float32_under_autocast():
    from mmcv.ops import batched_nms

    boxes = 1000 * torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    boxes[:, 2:] += boxes[:, :2]
    scores, groups = torch.linspace(0.1, 0.9, 50).bfloat16(), torch.arange(50) % 2
    expected, kept = batched_nms(boxes, scores.float(), groups, {"type": "nms", "iou_threshold": 0.3})
    with torch.autocast("cpu", torch.bfloat16):
        boxes_left, same = batched_nms(boxes, scores, groups, {"type": "nms", "iou_threshold": 0.3})
    assert torch.equal(kept, same)
    assert torch.equal(boxes_left[:, :4], expected[:, :4])


def test_threshold_decides_what_test_refines(data, tmp_path):
    shares = []
    for threshold in (0.0, 1.0):
        facts = runner("seg", data["seg"], tmp_path / str(threshold), **{"model.backbone.threshold": threshold}).test()
        shares.append(facts["gate/share_refined"])
    assert shares == [0, 100]


@pytest.mark.parametrize("type_", ["EncoderDecoder", "VimEncoderDecoder"])
def test_models_that_read_padding_are_named(type_, data, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("mambascope.mm.runner.print_log", lambda text, **_: messages.append(text))
    cfg = plain_config(common.demo_config("seg", data["seg"], tmp_path / "w"))
    cfg.model.type = type_
    RUNNERS.build(cfg)
    assert [text.split(":")[0] for text in messages] == [
        f"{type_} takes padding for a part of the image" for _ in range(type_ == "EncoderDecoder")
    ]


def test_checkpoint_of_another_arch(data, tmp_path):
    first = runner("seg", data["seg"], tmp_path / "a")
    torch.save({"state_dict": first.model.state_dict(), "meta": {}}, tmp_path / "x.pth")
    other = {"model.backbone.arch_options.embed_dim": 48, "load_from": str(tmp_path / "x.pth")}
    with pytest.raises(ValueError, match=r"x\.pth belongs to another model than this config's.*size mismatch"):
        runner("seg", data["seg"], tmp_path / "b", **other).test()
    with pytest.raises(ValueError, match=r"none\.pth does not exist"):
        runner("seg", data["seg"], tmp_path / "c", load_from=str(tmp_path / "none.pth")).test()


@pytest.mark.parametrize("kind", ["seg", "det"])
def test_missing_data_says_what_belongs_where(kind, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        runner(kind, tmp_path / "nowhere", tmp_path / "w").train()
    text = str(error.value)
    assert str(tmp_path / "nowhere" / ("images/training" if kind == "seg" else "train2017")) in text
    assert f"make_scopedigits.py --task {kind}" in text or "mambascope.mm.demo_data" in text
    empty = tmp_path / "empty" / "images" / "training"
    empty.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="empty"):
        runner(kind, tmp_path / "empty", tmp_path / "w").train()


def test_data_folders_look_through_wrappers():
    dataset = {"type": "RepeatDataset", "dataset": {"data_root": "a", "ann_file": "b", "data_prefix": {"img": "c"}}}
    assert [p.as_posix() for p in data_folders(dataset)] == ["a/b", "a/c"]
    both = {"type": "ConcatDataset", "datasets": [dataset, {"data_prefix": {"img_path": "d"}}]}
    assert [p.as_posix() for p in data_folders(both)] == ["a/b", "a/c", "d"]


# ---- bad and odd data ----------------------------------------------------------------------------------------------


def rewrite_masks(root, change):
    for path in sorted((root / "annotations" / "training").glob("*.png")):
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path)


def rewrite_boxes(root, change):
    path = root / "annotations" / "instances_train2017.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


@pytest.fixture(scope="module")
def models():
    """The segmentor and the detector, for tests that read them only."""
    return {kind: loading.build_model(common.demo_config(kind)) for kind in ("seg", "det")}


@pytest.fixture
def one_batch(models):
    """Gives the losses of the first training batch of a folder, and the batch."""

    def losses_of(kind, root):
        register(f"mm{kind}")
        model = models[kind].train()
        batch = next(iter(ScopeRunner.build_dataloader(common.demo_config(kind, root).train_dataloader)))
        batch = model.data_preprocessor(batch, True)
        return model(**batch, mode="loss"), batch

    return losses_of


def test_mask_with_a_label_out_of_range(data, tmp_path, one_batch):
    root = tmp_path / "seg"
    shutil.copytree(data["seg"], root)
    rewrite_masks(root, lambda mask: np.where(mask == 1, 77, mask).astype(np.uint8))
    with pytest.raises(ValueError, match=r"ADE_train_\d+\.png holds label 76; accepted are 0\.\.10 and 255"):
        one_batch("seg", root)


def test_masks_without_any_label(data, tmp_path, one_batch):
    root = tmp_path / "seg"
    shutil.copytree(data["seg"], root)
    rewrite_masks(root, np.zeros_like)
    losses, _ = one_batch("seg", root)
    assert losses["loss_gate"].item() == 0
    assert losses["decode.loss_ce"].item() == 0


def test_images_without_any_object(data, tmp_path, one_batch):
    root = tmp_path / "det"
    shutil.copytree(data["det"], root)
    rewrite_boxes(root, lambda table: table.update(annotations=[]))
    losses, batch = one_batch("det", root)
    assert all(len(s.gt_instances) == 0 for s in batch["data_samples"])
    total = sum(v.sum() if torch.is_tensor(v) else sum(x.sum() for x in v) for k, v in losses.items() if "loss" in k)
    assert torch.isfinite(total)
    assert losses["loss_gate"].item() > 0  # they teach the gate that nothing is there


def test_boxes_outside_the_image_do_not_count(data, tmp_path, one_batch):
    root = tmp_path / "det"
    shutil.copytree(data["det"], root)

    def change(table):
        kept = []
        for annotation in table["annotations"]:
            x, y, w, h = annotation["bbox"]
            kind = annotation["image_id"] % 3  # as it was, wholly outside, or reaching out on the right
            kept.append({**annotation, "bbox": [x + 1000 * (kind == 1), y, w + 1000 * (kind == 2), h]})
        table["annotations"] = kept

    rewrite_boxes(root, change)
    losses, batch = one_batch("det", root)
    for sample in batch["data_samples"]:
        outside = sample.img_id % 3 == 1
        assert (len(sample.gt_instances) == 0) == outside
        boxes = sample.gt_instances.bboxes
        assert bool((boxes <= 64).all())
        if sample.img_id % 3 == 2:
            assert bool((boxes[:, 2] == 64).all())
    assert torch.isfinite(losses["loss_gate"])


def test_boxes_of_an_unknown_class(data, models, one_batch):
    _, batch = one_batch("det", data["det"])
    batch["data_samples"][1].gt_instances.labels[:] = 12
    with pytest.raises(ValueError, match=r"\.jpg has a box of class 12; accepted are 0\.\.9"):
        models["det"](**batch, mode="loss")


@pytest.mark.parametrize("kind", ["seg", "det"])
@pytest.mark.parametrize("threshold", [0.0, None, 1.0])
def test_batch_predictions_equal_single_ones(kind, threshold, data, models):
    """All images of a batch exit, some do, none does: the predictions are those of single images."""
    register(f"mm{kind}")
    cfg = common.demo_config(kind, data[kind], **{"val_dataloader.batch_size": 6})
    dtype = torch.float64 if kind == "seg" else torch.float32  # mmcv's suppression of boxes knows no float64
    model = copy.deepcopy(models[kind]).to(dtype).eval()
    [batch] = list(ScopeRunner.build_dataloader(cfg.val_dataloader))
    batch = model.data_preprocessor(batch, False)
    inputs = batch["inputs"].to(dtype)
    with torch.no_grad():
        if threshold is None:
            confidence = model.backbone.forward_scope(inputs).confidence
            threshold = float(confidence.sort().values[2:4].mean())
        model.backbone.threshold = threshold
        together = [s.clone() for s in model.predict(inputs, batch["data_samples"])]
        shares = {s.metainfo["scope"]["refined"] for s in together}
        for i, sample in enumerate(together):
            [alone] = model.predict(inputs[i : i + 1], batch["data_samples"][i : i + 1])
            assert alone.metainfo["scope"]["refined"] == sample.metainfo["scope"]["refined"]
            if kind == "seg":
                torch.testing.assert_close(alone.seg_logits.data, sample.seg_logits.data, rtol=1e-8, atol=1e-8)
            else:
                a, b = alone.pred_instances, sample.pred_instances
                torch.testing.assert_close(a.bboxes, b.bboxes, rtol=1e-4, atol=1e-3)
                torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)
    assert len(shares) == (1 if threshold in (0.0, 1.0) else 2)


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are "
            "out of shared memory. Please try to raise your shared memory limit.",
            r"^the loader's workers hand images over in shared memory .*--shm-size=2g\), or set fewer num_workers",
        ),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", r"^DataLoader worker \(pid\(s\) 7\) exited unexpectedly"),
    ],
)
def test_workers_that_die_end_in_one_line(messages, line):
    with pytest.raises(DataError, match=line), one_line():
        raise RuntimeError(messages)
