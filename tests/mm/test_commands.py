"""The literal commands: mim train and mim test, the sweep and the pictures."""

import csv
import json
import subprocess
import sys

import pytest

from tests.mm import common

SEG, DET = (common.CONFIGS / f"{name}_scope_demo.py" for name in ("upernet", "cascade"))
SMALL = ["model.backbone.arch_options.depth=4", "model.backbone.arch_options.embed_dim=32"]
SHORT = [
    *SMALL,
    "model.backbone.init_cfg.checkpoint=",
    "train_dataloader.batch_size=4",
    "default_hooks.checkpoint.interval=2",
    "default_hooks.logger.interval=1",
    "train_cfg.val_interval=100",
]

NO_WORKERS = [
    f"{loader}_dataloader.{option}"
    for loader in ("train", "val")
    for option in ("num_workers=0", "persistent_workers=False")
]


def here(kind):
    """Options that put the demo's data into the working directory."""
    root = f"data/{kind}"
    options = [f"{loader}_dataloader.dataset.data_root={root}" for loader in ("train", "val", "test")]
    if kind == "det":
        file = f"{root}/annotations/instances_val2017.json"
        options += [f"{e}_evaluator.0.ann_file={file}" for e in ("val", "test")]
    return options


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with data in the real layout and real class ids, and with the demo's."""
    root = tmp_path_factory.mktemp("place")
    common.make_data("seg", root / "data/ade/ADEChallengeData2016", train=4, val=2, mapped_ids=True)
    common.make_data("det", root / "data/coco", train=4, val=2, mapped_ids=True)
    for kind in ("seg", "det"):
        common.make_data(kind, root / "data" / kind)
    return root


def test_literal_segmentation_command(place):
    code, text = common.mim(
        "train",
        "mmseg",
        common.CONFIGS / "upernet_scope_ti.py",
        "--cfg-options",
        "train_cfg.max_iters=1",
        "default_hooks.logger.interval=1",
        *NO_WORKERS,
        "train_dataloader.dataset.pipeline.2.scale=(256,64)",
        "val_dataloader.dataset.pipeline.1.scale=(256,64)",
        "train_dataloader.dataset.pipeline.3.crop_size=(96,96)",
        "model.data_preprocessor.size=(96,96)",
        cwd=place,
    )
    assert code == 0, text[-3000:]
    assert "loss_gate" in text
    assert "starts from random weights" in text


def test_literal_detection_command(place):
    code, text = common.mim(
        "train",
        "mmdet",
        common.CONFIGS / "cascade_scope_ti.py",
        "--cfg-options",
        "train_cfg.max_iters=1",
        "default_hooks.logger.interval=1",
        *NO_WORKERS,
        "val_dataloader.dataset.pipeline.1.scale=(96,96)",
        "train_dataloader.batch_size=2",
        "train_dataloader.dataset.pipeline.3.scale=(96,96)",
        "train_dataloader.dataset.pipeline.3.ratio_range=(1.0,1.0)",
        "train_dataloader.dataset.pipeline.4.crop_size=(96,96)",
        "train_dataloader.dataset.pipeline.6.size=(96,96)",
        cwd=place,
    )
    assert code == 0, text[-3000:]
    assert "loss_gate" in text


def test_missing_data_message(tmp_path):
    code, text = common.mim("train", "mmseg", common.CONFIGS / "upernet_scope_ti.py", cwd=tmp_path)
    assert code != 0
    assert "data is missing" in text
    assert "ADE20K belongs at data/ade/ADEChallengeData2016" in text


# ---- one small run through everything a user does with it ------------------------------------------------------------


def tool(name, *args, cwd):
    """Runs one of our commands as a user would."""
    command = [sys.executable, str(common.ROOT / "tools" / name), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def training(place):
    """A training of two steps in mixed precision, resumed for a third: its folder, and what each command printed."""
    work = place / "work"
    options = ["--work-dir", str(work), "--cfg-options", *here("seg"), *SHORT]
    texts = []
    for mode, steps in (("--amp", 2), ("--resume", 3)):
        code, text = common.mim("train", "mmseg", SEG, mode, *options, f"train_cfg.max_iters={steps}", cwd=place)
        assert code == 0, text[-3000:]
        texts.append(text)
    return work, texts


@pytest.fixture
def work(training):
    return training[0]


def test_training_in_mixed_precision_and_resuming(training):
    mixed, resumed = training[1]
    assert "mixed precision on CPU: bfloat16" in mixed
    assert "resumed epoch: 0, iter: 2" in resumed


SWEEP = ["--sizes", "48", "64", "--rounds", "2", "--timing-images", "2", "--points", "4"]


def test_a_trained_segmentor_is_tested_at_another_threshold(work, place):
    options = ["--cfg-options", *here("seg"), *SMALL, "model.backbone.threshold=0"]
    code, text = common.mim(
        "test", "mmseg", SEG, "--checkpoint", work / "iter_3.pth", "--work-dir", work / "t", *options, cwd=place
    )
    assert code == 0, text[-3000:]
    assert "0.0 % of 6 images refined" in text
    assert "gate: mAP" in text


def test_a_sweep_with_a_plain_vim_that_is_not_there(work, place, capsys, monkeypatch):
    from mambascope.mm.eval_cli import main

    monkeypatch.chdir(place)
    arguments = [str(SEG), str(work / "iter_3.pth"), *SWEEP, "--vim", "none.pth", "--cfg-options", *here("seg"), *SMALL]
    assert main(arguments) == 2
    assert "error: checkpoint none.pth does not exist" in capsys.readouterr().err


def test_a_trained_segmentor_is_swept_and_timed(work, place):
    done = tool("eval_dense.py", SEG, work / "iter_3.pth", *SWEEP, "--cfg-options", *here("seg"), *SMALL, cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = list(csv.DictReader((work / "eval" / "sweep.csv").open()))
    assert float(rows[0]["share_refined"]) == 0
    assert float(rows[-1]["share_refined"]) == 1
    choice = "the config's threshold: 6 images are too few to choose one, 299 can"
    assert choice in done.stdout
    assert choice in json.loads((work / "eval" / "results.json").read_text())["choice"]
    assert all("mIoU" in row for row in rows)
    timings = list(csv.DictReader((work / "eval" / "timings.csv").open()))
    assert {row["side"] for row in timings} == {"48", "64"}
    assert {row["mode"] for row in timings} == {"plain Vim", "all exit", "dynamic", "refine all"}
    assert (work / "eval" / "dense.png").stat().st_size > 10_000
    assert json.loads((work / "eval" / "results.json").read_text())["images"] == 6


def test_a_trained_segmentor_draws_pictures(work, place):
    image = next((place / "data/seg/images/validation").glob("*.jpg"))
    options = ["--out", "pictures", "--threshold", "1", "--sheet", "--cfg-options", *SMALL]
    done = tool("predict_dense.py", SEG, work / "iter_3.pth", image, *options, cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "refined (confidence" in done.stdout
    assert (place / "pictures" / f"{image.stem}.png").stat().st_size > 10_000
    assert (place / "pictures" / "sheet.png").is_file()


def test_two_processes(place):
    work = place / "two"
    code, text = common.mim(
        "train",
        "mmdet",
        DET,
        "--launcher",
        "pytorch",
        "--gpus",
        "2",
        "--work-dir",
        work,
        "--cfg-options",
        *here("det"),
        *SHORT,
        "train_cfg.max_iters=2",
        cwd=place,
    )
    assert code == 0, text[-3000:]
    assert (work / "iter_2.pth").is_file()


def test_predicting_boxes(place):
    """A detector without training: the picture of whatever it finds."""
    import torch

    from mambascope.mm import loading
    from mambascope.mm.predict_cli import main

    cfg = common.demo_config("det")
    torch.save({"state_dict": loading.build_model(cfg).state_dict(), "meta": {}}, place / "det.pth")
    image = next((place / "data/det/val2017").glob("*.jpg"))
    arguments = [str(DET), str(place / "det.pth"), str(image), "--out", str(place / "boxes"), "--score", "0.0"]
    assert main([*arguments, "--cfg-options", *SMALL]) == 0
    assert (place / "boxes" / f"{image.stem}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.py", "x.pth", "a.png"], "a.png does not exist"),
        (["none.py", "x.pth", "{image}"], "config none.py does not exist"),
        (["{seg}", "x.pth", "{image}"], "checkpoint x.pth does not exist"),
        (["{seg}", "{image}", "{image}"], "cannot be read"),
    ],
)
def test_predict_bad_input(arguments, message, place, capsys, monkeypatch):
    from mambascope.mm.predict_cli import main

    monkeypatch.chdir(place)
    image = next((place / "data/seg/images/validation").glob("*.jpg"))
    assert main([a.format(seg=SEG, image=image) for a in arguments]) == 2
    assert message in capsys.readouterr().err


def test_broken_image(place, capsys, tmp_path):
    import torch

    from mambascope.mm import loading
    from mambascope.mm.predict_cli import main

    torch.save({"state_dict": loading.build_model(common.demo_config("seg")).state_dict()}, tmp_path / "seg.pth")
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert main([str(SEG), str(tmp_path / "seg.pth"), str(tmp_path / "broken.png"), "--cfg-options", *SMALL]) == 2
    assert "broken.png: not an image" in capsys.readouterr().err
