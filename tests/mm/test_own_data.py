"""Users' own classes, masks and annotation files: what would train on nothing is said in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS
from PIL import Image

from mambascope.data.errors import DataError
from mambascope.mm import ClassWeightedCrossEntropy, loading
from mambascope.mm.data_checks import check_data
from mambascope.mm.eval_cli import main as eval_dense
from mambascope.mm.eval_cli import parse_options
from tests.mm import common
from tests.mm.common import named_runner, runner

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
TRAIN = "annotations/instances_train2017.json"
VAL = "annotations/instances_val2017.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return {kind: common.make_data(kind, root / kind, train=4, val=3) for kind in ("seg", "det")}


@pytest.fixture
def seg(source, tmp_path):
    return shutil.copytree(source["seg"], tmp_path / "seg")


@pytest.fixture
def det(source, tmp_path):
    return shutil.copytree(source["det"], tmp_path / "det")


def everywhere(**options):
    return {f"{loader}.dataset.{k.replace('__', '.')}": v for loader in LOADERS for k, v in options.items()}


BINARY = {
    **everywhere(metainfo__classes=("background", "digit"), metainfo__palette=[], reduce_zero_label=False),
    **everywhere(pipeline__1__reduce_zero_label=False),
    "model.decode_head.num_classes": 2,
    "model.auxiliary_head.num_classes": 2,
    "model.decode_head.loss_decode.class_weight": [0.3, 1.0],
    "model.auxiliary_head.loss_decode.class_weight": [0.3, 1.0],
    "model.backbone.gate.num_classes": 2,
}


def binary_masks(root, value):
    for path in root.glob("annotations/*/*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(path)) > 1, value, 0).astype(np.uint8)).save(path)


def rewrite(root, change, names=(TRAIN, VAL)):
    for name in names:
        table = json.loads((root / name).read_text())
        change(table)
        (root / name).write_text(json.dumps(table))


def dense_command(cfg, tmp_path, capsys, checkpoint="none.pth"):
    """What ``eval_dense`` says about a config's data."""
    cfg.dump(tmp_path / "own.py")
    code = eval_dense([str(tmp_path / "own.py"), str(checkpoint), "--out", str(tmp_path / "out")])
    assert code == 2
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err


# ---- segmentation --------------------------------------------------------------------------------------------------


def test_binary_masks_of_0_and_255(seg, tmp_path, capsys):
    binary_masks(seg, 255)
    for action, folder, count in (("train", "training", 4), ("test", "validation", 3)):
        line = (
            rf"^'digit' is in none of the {count} masks of .*{folder}; they hold 255, which is ignored: save it as 1$"
        )
        with pytest.raises(DataError, match=line):
            getattr(runner("seg", seg, tmp_path / action, **BINARY), action)()
        assert not (tmp_path / action).exists()  # a run that could not start leaves nothing behind
    cfg = common.demo_config("seg", seg, **BINARY)
    torch.save({"state_dict": loading.build_model(cfg).state_dict()}, tmp_path / "seg.pth")
    text = dense_command(cfg, tmp_path, capsys, tmp_path / "seg.pth")
    assert text.startswith("error: 'digit' is in none of the 3 masks")
    assert text.count("\n") == 1


def test_a_config_in_the_runs_folder_stays(seg, tmp_path):
    binary_masks(seg, 255)
    folder = tmp_path / "run"
    folder.mkdir()
    cfg = common.demo_config("seg", seg, **BINARY)
    cfg.dump(folder / "own.py")
    cfg = Config.fromfile(folder / "own.py")
    cfg.merge_from_dict({"work_dir": str(folder), "launcher": "none"})
    with pytest.raises(DataError, match="'digit' is in none"):
        named_runner(cfg).train()
    assert [path.name for path in folder.iterdir()] == ["own.py"]


def test_binary_masks_of_0_and_1_train(seg, tmp_path):
    binary_masks(seg, 1)
    runner("seg", seg, tmp_path / "w", **BINARY).train()
    both = {**BINARY, **everywhere(reduce_zero_label=True, pipeline__1__reduce_zero_label=True)}
    with pytest.raises(
        DataError, match=r"^'digit' is in none.*hold 0, which is ignored: with reduce_zero_label=True cla"
    ):
        runner("seg", seg, tmp_path / "w", **both).train()


def test_masks_with_another_label_are_named_in_a_test(seg, tmp_path):
    path = sorted(seg.glob("annotations/validation/*.png"))[1]
    Image.fromarray(np.full((64, 64), 78, np.uint8)).save(path)
    with pytest.raises(DataError, match=rf"{path.name} holds label 77; accepted are 0\.\.10 and 255"):
        runner("seg", seg, tmp_path / "w").test()


def test_one_image_per_batch(seg, tmp_path):
    with pytest.raises(DataError, match=r"two images per process are needed, train_dataloader\.batch_size=2"):
        runner("seg", seg, tmp_path / "w", **{"train_dataloader.batch_size": 1}).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            everywhere(metainfo__classes="cat"),
            r"train_dataloader\.dataset\.metainfo\.classes is the text 'cat', which ",
        ),
        (everywhere(metainfo__classes=("a", "b")), r"has 2 classes and 11 colours: .*dataset\.metainfo\.palette=\[\]$"),
        (
            everywhere(metainfo__classes=("a", "b"), metainfo__palette=[]),
            r"has 2 classes \('a', 'b'\) and model\.decode_head\.num_classes is 11: set model\.decode_head\."
            r"num_classes=2 model\.auxiliary_head\.num_classes=2 model\.backbone\.gate\.num_classes=2, or",
        ),
        (everywhere(metainfo__classes=("a",) * 11), r"names 'a' more than once"),
    ],
)
def test_names_of_classes(options, message, source):
    with pytest.raises(DataError, match=message) as error:
        check_data(common.demo_config("seg", source["seg"], **options), LOADERS)
    assert "\n" not in str(error.value)


def test_weights_of_other_classes_are_named():
    with pytest.raises(ValueError, match="one weight for each of the 2 classes, got 3"):
        ClassWeightedCrossEntropy([1.0, 2.0, 3.0])(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))


# ---- detection -----------------------------------------------------------------------------------------------------


def rename(table):
    for category in table["categories"]:
        category["name"] = f"digit {category['name']}"


def test_categories_that_the_config_does_not_know(det, tmp_path, capsys):
    rewrite(det, rename)
    message = (
        r"no box of annotations .*instances_{}2017\.json has a class of the config: the file names 'digit .*, the "
    )
    message += r"config '0', '1', .*; set metainfo=dict\(classes=\(\.\.\.\)\).* num_classes of the heads"
    with pytest.raises(DataError, match=message.format("train")):
        runner("det", det, tmp_path / "a").train()
    with pytest.raises(DataError, match=message.format("val")):
        runner("det", det, tmp_path / "b").test()
    assert "has a class of the config" in dense_command(common.demo_config("det", det), tmp_path, capsys)


def test_classes_of_coco_itself_are_known(det):
    cfg = Config.fromfile(common.CONFIGS / "cascade_scope_ti.py")
    loading.register(cfg.default_scope)
    cfg.train_dataloader.dataset.data_root = str(det)
    with pytest.raises(DataError, match=r"the file names '0', .*, the config 'person', 'bicycle', "):
        check_data(cfg, LOADERS[:1])


def test_a_text_is_no_list_of_classes(det):
    options = parse_options(["train_dataloader.dataset.metainfo.classes=cat"])
    with pytest.raises(
        DataError, match=r"is the text 'cat', which would be 3 classes; write classes=\('cat',\)"
    ) as error:
        check_data(common.demo_config("det", det, **options), LOADERS)
    option = str(error.value).rpartition("command line ")[2].replace('"', "")
    assert parse_options([option]) == {"train_dataloader.dataset.metainfo.classes": ("cat",)}


@pytest.mark.parametrize("kept", [("7", "3"), ("9", "8", "7", "6", "5", "4", "3", "2", "1", "0"), ("x", "3", "7")])
def test_labels_follow_names_whatever_categories_a_file_has(kept, det, tmp_path):
    """A file with some of the classes, in any order: labels are the config's, and the truth has an AP of 1."""

    def change(table):
        names = {c["id"]: c["name"] for c in table["categories"]}
        numbers = {name: 100 + i for i, name in enumerate(kept)}
        table["categories"] = [{"id": i, "name": name} for name, i in numbers.items()]
        table["annotations"] = [
            {**a, "category_id": numbers.get(names[a["category_id"]], numbers.get("x"))}
            for a in table["annotations"]
            if names[a["category_id"]] in kept or "x" in kept
        ]

    rewrite(det, change)
    table = json.loads((det / VAL).read_text())
    names = {c["id"]: c["name"] for c in table["categories"]}
    cfg = common.demo_config("det", det, tmp_path)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    [metric] = [METRICS.build({**m, "classwise": True}) for m in cfg.test_evaluator if m.type == "CocoMetric"]
    metric.dataset_meta = dataset.metainfo
    total = 0
    for sample in (dataset[i]["data_samples"] for i in range(len(dataset))):
        objects = [a for a in table["annotations"] if a["image_id"] == sample.img_id and names[a["category_id"]] != "x"]
        labels = sample.gt_instances.labels
        assert [dataset.metainfo["classes"][i] for i in labels] == [names[a["category_id"]] for a in objects]
        total += len(objects)
        truth = sample.gt_instances
        prediction = {
            "bboxes": truth.bboxes.tensor,
            "scores": torch.ones(len(labels)),
            "labels": labels,
            "masks": torch.from_numpy(truth.masks.to_ndarray()).bool(),
        }
        metric.process({}, [{"pred_instances": prediction, "img_id": sample.img_id, "ori_shape": sample.ori_shape}])
    assert total > 3
    figures = metric.compute_metrics(metric.results)
    assert figures["bbox_mAP"] == pytest.approx(1, abs=0.02)
    assert figures["segm_mAP"] == pytest.approx(1, abs=0.02)


def no_masks(table):
    for annotation in table["annotations"]:
        del annotation["segmentation"]


def test_boxes_without_masks(det, tmp_path, capsys):
    rewrite(det, no_masks)
    with pytest.raises(
        DataError, match=r"^(\d+) of \1 boxes of annotations .* have no mask.*; for boxes only, set "
    ) as e:
        runner("det", det, tmp_path / "a").train()
    assert "\n" not in str(e.value)
    options = parse_options(str(e.value).partition("for boxes only, set ")[2].split())
    assert options["test_evaluator.0.metric"] == "bbox"
    training = runner("det", det, tmp_path / "b", **options)
    training.train()
    assert "have no mask" in dense_command(common.demo_config("det", det), tmp_path, capsys)
    cfg = common.demo_config("det", det, **options)
    cfg.dump(tmp_path / "own.py")
    checkpoint = str(tmp_path / "b" / "iter_2.pth")
    few = ["--timing-images", "1", "--rounds", "1", "--points", "2", "--sizes", "64", "--no-figures"]
    assert eval_dense([str(tmp_path / "own.py"), checkpoint, *few, "--max-drop", "100"]) == 0
    assert "box AP" in (text := capsys.readouterr().out)
    assert "mask AP" not in text
    assert "chosen on the 3 images reported here: its figures are slightly optimistic" in text
    assert eval_dense([str(tmp_path / "own.py"), checkpoint, *few, "--threshold", "0.5"]) == 0
    assert "* the threshold was given\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [a.pop("area") for a in t["annotations"]], r"entry 0 of 'annotations' in .* has no 'area'"),
        (lambda t: [i.pop("height") for i in t["images"]], r"entry 0 of 'images' in .* has no 'height'"),
        (lambda t: [a.update(bbox=["1", "1", "9", "9"]) for a in t["annotations"]], r"bbox of entry 0 .* four numbers"),
        (
            lambda t: [a.update(segmentation={"size": [9, 9], "counts": [0, 81]}) for a in t["annotations"]],
            r"mask of entry 0 of 'annotations' in .* is of size \[9, 9\] and its image of \[64, 64\]",
        ),
        (lambda t: [a.update(id=1) for a in t["annotations"]], r"must have an id of their own each; '1' has several"),
        (lambda t: t.pop("categories"), r"must be COCO's: lists 'images', 'annotations' and 'categories'"),
        (
            lambda t: [a.update(bbox=[0.1, 0.1, 0.5, 0.5]) for a in t["annotations"]],
            r"are smaller than a pixel: bbox must",
        ),
        (lambda t: [c.update(name="1") for c in t["categories"]], r"name the category '1' more than once"),
    ],
)
def test_files_of_another_kind(change, message, det):
    rewrite(det, change, [TRAIN])
    with pytest.raises(DataError, match=message) as error:
        check_data(common.demo_config("det", det), LOADERS)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_json_or_missing(det):
    (det / VAL).write_text("{")
    with pytest.raises(DataError, match=r"instances_val2017\.json cannot be read"):
        check_data(common.demo_config("det", det), LOADERS)
    cfg = common.demo_config("det", det, **{"val_evaluator.0.ann_file": str(det / "none.json")})
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        check_data(cfg, LOADERS)


def test_a_metric_that_scores_other_images(det):
    def change(table):
        for image in table["images"]:
            image["id"] += 1000
        for annotation in table["annotations"]:
            annotation["image_id"] += 1000

    rewrite(det, change, [VAL])
    cfg = common.demo_config("det", det, **{"val_evaluator.0.ann_file": str(det / TRAIN)})
    with pytest.raises(
        DataError, match=rf"val_evaluator scores against {det / TRAIN}, which lacks images of {det / VAL}"
    ):
        check_data(cfg, LOADERS)


def test_no_image_is_left(det, tmp_path):
    small = {"train_dataloader.dataset.filter_cfg.min_size": 100}
    with pytest.raises(
        DataError, match=r"no image of .*instances_train2017\.json is left after filter_cfg=.*'min_size': 100"
    ):
        runner("det", det, tmp_path / "w", **small).train()


def test_images_of_another_ending(seg):
    for path in seg.glob("images/training/*.jpg"):
        path.rename(path.with_suffix(".png"))
    message = r"training has no image that ends in \.jpg; it holds '\.png': set train_dataloader\.dataset\.img_suffix$"
    with pytest.raises(DataError, match=message):
        check_data(common.demo_config("seg", seg), LOADERS)
    check_data(common.demo_config("seg", seg, **{"train_dataloader.dataset.img_suffix": ".png"}), LOADERS)


def test_boxes_that_are_left_out_are_counted(det, mm_log):
    def change(table):
        table["categories"].append({"id": 99, "name": "cat"})
        for annotation in table["annotations"][:2]:
            annotation["category_id"] = 99

    rewrite(det, change, [TRAIN])
    check_data(common.demo_config("det", det), LOADERS)
    assert any(line.startswith("2 of ") and line.endswith("the config has no class 'cat'") for line in mm_log.messages)
