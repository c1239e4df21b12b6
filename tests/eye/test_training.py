"""MambaEye from the same command line: configs, losses, metrics, exact resume, weights, mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import mambascope
from mambascope.commands.train import TrainCLI, complete_args, main
from mambascope.eye import MambaEye
from mambascope.eye.loss import GlimpseLoss
from mambascope.eye.module import EyeModule
from mambascope.models.architectures import import_object
from mambascope.training.module import ClassifierModule
from mambascope.training.runs import shipped_configs
from mambascope.training.scope_module import ScopeModule
from tests.training.helpers import train

CONFIGS = shipped_configs()
TINY = {
    "data.train_length": 32,
    "data.val_length": 12,
    "data.calibration_length": 8,
    "data.batch_size": 4,
    "data.val_batch_size": 8,
    "data.length": 9,
    "data.glimpses.length": 10,
    "model.net.args.embed_dim": 16,
    "model.net.args.depth": 2,
    "model.net.args.d_state": 4,
    "model.net.args.head_dim": 8,
    "model.net.args.move_dim": 8,
    "model.net.args.drop_path_rate": 0.2,
    "model.schedule.warmup_epochs": 0.5,
    "model.report_at": "[4]",
    "trainer.max_epochs": 2,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.log_every_n_steps": 3,
    "checkpoint.every_steps": 5,
    "run.report": "false",
}


def tiny(**changes):
    options = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
    return ["--config", "scopedigits_mambaeye", *(f"--{key}={value}" for key, value in options.items())]


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "validation"):
        for i, name in enumerate(("cat", "dog")):
            for k in range(4):
                path = tmp_path / "images" / split / name / f"{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (60 + k, 40), (90 * i, 20 * k, 30)).save(path)
    return tmp_path / "images"


def cli(*args):
    return TrainCLI(complete_args([*args, "--trainer.accelerator=cpu", "--trainer.devices=1"]))


# ---- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_recipe_is_the_papers(size, here, folder):
    built = cli("--config", f"mambaeye_{size}_imagenet", "--data.root", str(folder), "--model.net.args.depth=1")
    net, data, trainer = built.model, built.datamodule, built.trainer
    assert isinstance(net, EyeModule)
    assert net.net.name == f"mambaeye_{size}"
    assert (trainer.max_epochs, trainer.gradient_clip_val, trainer.precision) == (300, 1.0, "32-true")
    assert data.batch_size * trainer.accumulate_grad_batches == 1024
    options = net.optimizer_args
    assert (options.lr, options.lr_batch, options.weight_decay, options.betas) == (1e-3, 1024, 0.05, (0.9, 0.999))
    schedule = net.schedule_args
    assert (schedule.name, schedule.warmup_epochs, schedule.warmup_lr, schedule.min_lr) == ("cosine", 20, 0, 0)
    assert (net.criterion.plain_ce, net.matmul_precision, built.config_init.ema.decay) == (False, "high", 0)
    assert (data.length, data.patch_size, net.model.config.patch_size) == (1024, 16, 16)
    augment = data.augment
    assert augment.canvas_size == (256, 1024)
    assert (augment.hflip, augment.color_jitter_prob, augment.grayscale, augment.blur) == (0.5, 0.4, 0.2, 0.2)
    assert (augment.perspective, augment.crop, augment.erase, augment.localised) == (0.3, 0.8, 0.4, 0.5)
    assert (augment.color_jitter, augment.perspective_shift, augment.min_share) == ((0.4, 0.4, 0.4, 0.1), 0.25, 0.3)
    assert (data.glimpses.length, data.glimpses.canvas_size, data.glimpses.pattern) == (4096, 512, "random")
    assert net.report_at == [256, 512, 1024, 2048, 4096]
    assert (net.model.num_classes, data.num_classes) == (2, 2)


def test_both_models_of_the_comparison_see_the_same_digits():
    eye, vim = (yaml.safe_load(CONFIGS[f"scopedigits_{n}"].read_text()) for n in ("mambaeye", "vim"))
    shared = ("train_length", "val_length", "calibration_length", "batch_size", "digits")
    for name in shared:
        assert eye["data"]["init_args"][name] == vim["data"]["init_args"][name]
    assert eye["trainer"] == vim["trainer"]


def module_of(args):
    return import_object(complete_args(args).architecture.module)


def test_the_module_follows_the_name(here):
    (here / "a.yaml").write_text("model: {net: {name: mambaeye_small}}\n")
    (here / "b.yaml").write_text("trainer: {max_epochs: 1}\n")
    assert module_of([]) is ScopeModule
    assert module_of(["--config", "a.yaml", "--config", "b.yaml"]) is EyeModule
    assert module_of(["--config=a.yaml", "--model.net.name", "vim_tiny_patch16_224"]) is ClassifierModule
    assert module_of(["--config", "b.yaml", "--model.net.name=mambaeye_base"]) is EyeModule
    for path in CONFIGS.values():
        name = module_of(["--config", str(path)]).__name__
        reduced = any(peer in path.stem for peer in ("dyvm", "r_meeto", "hidden_align"))
        one_stage = any(model in path.stem for model in ("vim", "deit"))
        expected = "ReducedModule" if reduced else "ClassifierModule" if one_stage else "ScopeModule"
        assert name == ("EyeModule" if "mambaeye" in path.stem else expected)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.net.name", "mambascope_nano_patch8_64"], "model.report_at"),
        (["--model.mix.mixup", "1"], "--model.mix.mixup"),
        (["--model.net.args.patch_size", "8"], "patch_size must be the same for the data and the model"),
        (["--model.net.args.img_size", "64"], "unknown model argument img_size"),
        (["--model.report_at", "[0]"], "report_at must be numbers of glimpses"),
        (["--data.augment.hflip", "2"], "augment.hflip must lie in [0, 1]"),
        (["--data.augment.flip", "0.5"], "augment.flip"),
        (["--data.length", "0"], "length must be at least 1"),
        (["--data.glimpses.pattern", "zigzag"], "pattern must be one of random"),
        (["--data.glimpses.canvas_size", "10"], "canvas_size must be at least the patch size 16"),
        (["--data", "mambascope.data.ScopeDigitsDataModule"], "mambaeye_nano_patch16 reads glimpses, but"),
    ],
)
def test_mistakes_are_named_in_one_line(args, message, here, capsys):
    try:
        status = main([*tiny(), *args, "--run.loggers=[]", "--trainer.enable_progress_bar=false"])
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status in (1, 2)
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
def test_steps_and_metrics_are_the_models_own(plain, here):
    """Loss of a step and accuracy of the validation, computed by hand with the trained weights."""
    built = cli(*tiny(model__loss__plain_ce=str(plain).lower(), ema__decay=0, run__loggers="[]"))
    module, data = built.model, built.datamodule
    built.trainer.fit(module, data)
    metrics = built.trainer.callback_metrics
    model = module.model.eval()
    hits, losses, at_4 = [], [], []
    for glimpses, y in data.val_dataloader():
        with torch.no_grad():
            logits = model(glimpses.patches, glimpses.moves)
        ratio = torch.ones_like(glimpses.information_ratio) if plain else glimpses.information_ratio
        target = (1 - ratio)[..., None] / 10 + ratio[..., None] * torch.nn.functional.one_hot(y, 10)[:, None]
        losses += (-(target * logits.log_softmax(-1)).sum(-1)).mean(1).tolist()
        hits += (logits[:, -1].argmax(-1) == y).float().tolist()
        at_4 += (logits[:, 3].argmax(-1) == y).float().tolist()
    assert len(hits) == 12
    assert float(metrics["val/loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(metrics["val/top1"]) == pytest.approx(np.mean(hits))
    assert float(metrics["val/top1_at_4"]) == pytest.approx(np.mean(at_4))
    assert isinstance(module.criterion, GlimpseLoss)
    assert module.criterion.plain_ce is plain


def test_training_lowers_the_loss_on_its_own_samples(here):
    built = cli(
        *tiny(data__train_length=16, data__batch_size=16, trainer__max_epochs=120, ema__decay=0, run__loggers="[]"),
        "--model.net.args.drop_path_rate=0",
        "--data.fresh_each_epoch=false",
        "--model.optimizer.lr_batch=16",
    )
    module, data = built.model, built.datamodule
    data.prepare_data()
    data.setup("fit")
    glimpses, y = next(iter(data.train_dataloader()))

    def excess():
        module.model.eval()
        with torch.no_grad():
            parts = module.criterion(module.model(glimpses.patches, glimpses.moves), y, glimpses.information_ratio)
        return float(parts["loss"] - parts["floor"])

    before = excess()
    built.trainer.limit_val_batches = 0
    built.trainer.fit(module, data)
    assert excess() < before - 0.05


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run of the real command, with its report."""
    cwd = tmp_path_factory.mktemp("eye")
    done = train(*tiny(run__name="whole", run__report="true"), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "runs" / "whole", done.stdout


def test_a_run_leaves_a_ready_model_and_a_report(whole):
    run, out = whole
    model = mambascope.load(run / "model.safetensors")
    assert isinstance(model, MambaEye)
    assert model.labels == [str(i) for i in range(10)]
    assert model.description["glimpses"]["length"] == 10
    assert model.description["model"] == "mambaeye_nano_patch16"
    assert "GFLOPs" in out
    assert (run / "report" / "accuracy.png").stat().st_size > 10_000
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["images"] == 12
    assert model.description["report"]["table"]
    log = (run / "logs" / "metrics.csv").read_text().splitlines()[0]
    for name in ("train/loss", "train/excess_loss", "train/lr", "val/top1", "val/top1_at_4", "val/floor"):
        assert name in log
    # finetuning starts from the file
    state = load_file(run / "model.safetensors")
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("signum", "step"), [(9, 7), (15, 11)])
def test_stopped_and_resumed_ends_as_the_whole(whole, tmp_path, signum, step):
    callback = ["--trainer.callbacks+=tests.training.helpers.SignalAt", f"--trainer.callbacks.signum={signum}"]
    done = train(*tiny(run__name="stopped"), *callback, f"--trainer.callbacks.step={step}", cwd=tmp_path)
    assert done.returncode not in (0, 1, 2)
    run = tmp_path / "runs" / "stopped"
    left = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert left == (5 if signum == 9 else 11)
    again = train("--ckpt_path", "last", "--trainer.callbacks=null", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        a, b = (torch.load(Path(r) / "checkpoints" / "last.ckpt", weights_only=True)[key] for r in (whole[0], run))
        assert str(a) == str(b)
    a, b = (load_file(r / "model.safetensors") for r in (whole[0], run))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_images_train_too_and_start_from_weights(whole, here, folder):
    """ImageNet's config on a folder: one epoch, from the digits' weights, with worker processes."""
    net = {k: v for k, v in TINY.items() if k.startswith("model.net.args") and "drop" not in k}
    args = [f"--{k}={v}" for k, v in net.items()]
    checkpoint = ["--model.net.checkpoint", str(whole[0] / "model.safetensors"), "--model.net.strict=false"]
    options = {
        "data.num_workers": 1, "data.batch_size": 4, "data.length": 12, "data.glimpses.length": 8,
        "data.augment.canvas_size": "[32,48]", "data.glimpses.canvas_size": 48, "trainer.accelerator": "cpu",
        "trainer.devices": 1, "trainer.max_epochs": 1, "trainer.accumulate_grad_batches": 1, "run.loggers": "[]",
        "trainer.enable_progress_bar": "false", "run.name": "photos", "data.root": folder,
    }  # fmt: skip
    args += [f"--{k}={v}" for k, v in options.items()]
    status = main(["--config", "mambaeye_tiny_imagenet", *args, *checkpoint])
    assert status == 0
    model = mambascope.load("runs/photos/model.safetensors")
    assert model.labels == ["cat", "dog"]
    assert model.description["glimpses"]["canvas_size"] == 48
