"""The command line: configs, run directories, mistakes."""

import json
import os

import pytest
import timm
import yaml
from PIL import Image

import mambascope
from mambascope.commands.cost import model_config
from mambascope.commands.train import TrainCLI, complete_args, main
from mambascope.models.cost import count_parameters
from mambascope.models.losses import ScopeLoss
from mambascope.training.runs import find_checkpoint, find_config, leave_runs, new_run, run_of, shipped_configs
from tests.data.test_small_images import write_cifar, write_fashion
from tests.training.helpers import tiny, train
from tests.training.test_module import HingeLoss

CONFIGS = shipped_configs()


@pytest.fixture
def folder(tmp_path):
    """An ImageNet-like folder of two classes."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 30), (90 * i, 20, 30)).save(tmp_path / "images" / split / name / f"{i}.jpg")
    return tmp_path / "images"


def cli(*args):
    return TrainCLI(complete_args([*args, "--trainer.accelerator=cpu", "--trainer.devices=1"]))


def test_all_configs_ship():
    expected = {f"{kind}_{size}_imagenet" for kind in ("vim", "mambascope") for size in ("tiny", "small", "base")}
    expected |= {f"{peer}_small_imagenet" for peer in ("hidden_align", "r_meeto", "dyvm")}
    expected |= {f"scopedigits{peer}" for peer in ("", "_dense", "_vim64", "_hidden_align", "_r_meeto", "_dyvm")}
    assert CONFIGS.keys() >= expected


@pytest.mark.parametrize(("name", "width", "side"), [("scopedigits_deit", 96, 64), ("fashion_deit", 64, 28)])
def test_the_recipe_of_timms_deit_builds(here, folder, name, width, side):
    write_fashion(folder)
    fashion = ["--data.root", str(folder), "--data.calibration_length", "10"] if name.startswith("fashion") else []
    built = cli("--config", name, *fashion)
    assert (built.model.model.num_classes, built.model.model.embed_dim) == (10, width)
    assert built.datamodule.img_size == (side, side)


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.endswith("_deit") and "mambaeye" not in name])
def test_config_parses_and_builds(name, here, folder):
    root = [] if name.startswith("scopedigits") else ["--data.root", str(folder)]
    if name.startswith("fashion"):
        write_fashion(folder)
    elif name.startswith("cifar"):
        write_cifar(folder, name.partition("_")[0])
    if name.startswith(("fashion", "cifar")):
        root += ["--data.calibration_length", "10"]
    classes_here = 2 if name.endswith(("imagenet", "384", "evidence")) else 100 if name.startswith("cifar100") else 10
    net = yaml.safe_load(CONFIGS[name].read_text())["model"]["net"]
    if "reduction" in net.get("args", {}):  # it is retrained from a Vim, which may also be its teacher
        classes = {"num_classes": classes_here}
        classes |= {key: net["args"][key] for key in ("stem_width", "in_chans") if key in net["args"]}
        mambascope.models.save_safetensors(timm.create_model(net["name"], depth=4, **classes), here / "vim.safetensors")
        root += ["--model.net.checkpoint", str(here / "vim.safetensors")]
    elif net.get("checkpoint"):  # of all blocks
        root += ["--model.net.checkpoint", "null"]
    # four of the blocks are enough to build, and the whole model's size is checked in closed form
    built = cli("--config", name, *root, "--model.net.args.depth=4")
    model = built.model.model
    config = yaml.safe_load(CONFIGS[name].read_text())["model"]["net"]
    args = {**config.get("args", {}), "img_size": model.config.img_size, "num_classes": model.num_classes, "depth": 4}
    assert sum(p.numel() for p in model.parameters()) == count_parameters(model_config(config["name"], **args))
    assert model.num_classes == classes_here
    size = built.datamodule.img_size
    assert model.config.image_hw == tuple(size)
    assert built.run_dir.name == name
    written = yaml.safe_load((built.run_dir / "config.yaml").read_text())
    assert written["run"]["name"] is None
    assert written["ckpt_path"] is None


@pytest.mark.parametrize(("size", "rate"), [("tiny", 0.0), ("small", 0.05), ("base", 0.3)])
@pytest.mark.parametrize("kind", ["mambascope", "vim"])
def test_recipe_is_the_papers(kind, size, rate, here, folder):
    built = cli("--config", f"{kind}_{size}_imagenet", "--data.root", str(folder), "--model.net.args.depth=1")
    net, data = built.model, built.datamodule
    assert (built.trainer.max_epochs, data.batch_size, data.img_size) == (300, 256, (224, 224))
    assert (net.optimizer_args.lr, net.optimizer_args.lr_batch, net.optimizer_args.weight_decay) == (5e-4, 512, 0.05)
    assert (net.schedule_args.name, net.schedule_args.warmup_epochs) == ("cosine", 5)
    assert (net.mix_args.mixup, net.mix_args.cutmix, net.criterion.label_smoothing) == (0.8, 1.0, 0.1)
    assert net.model.config.drop_path_rate == rate
    assert built.config_init.ema.decay == 0.9999
    assert built.config.data.init_args.auto_augment.startswith("rand-m9")
    assert built.config.data.init_args.re_prob == 0.25
    if kind == "mambascope":
        assert (net.full_refine_epochs, net.model.alpha) == (200, 0.7)


def test_runs_without_arguments_on_the_builtin_data(here):
    assert complete_args([]).args == ["--config", str(CONFIGS["scopedigits"])]
    built = cli()
    assert built.model.net.name == "mambascope_nano_patch8_64"
    assert type(built.datamodule).__name__ == "ScopeDigitsDataModule"
    assert built.run_dir.parts == ("runs", "scopedigits")


def test_losses_are_named_by_class_path_or_by_the_options_of_the_default(here):
    short = cli("--model.loss.coarse_ce_weight=0.5", "--model.loss.label_smoothing", "0.1").model.criterion
    assert type(short) is ScopeLoss
    assert (short.kl_weight, short.coarse_ce_weight, short.label_smoothing) == (0.5, 0.5, 0.1)  # the config has 0.5
    path = "mambascope.models.losses.ScopeLoss"
    (here / "path.yaml").write_text(f"model: {{loss: {{class_path: {path}, init_args: {{kl_weight: 0.25}}}}}}")
    built = cli("--config", "scopedigits", "--config", "path.yaml")
    assert (type(built.model.criterion), built.model.criterion.kl_weight) == (ScopeLoss, 0.25)
    named = cli("--model.loss", "tests.training.test_module.HingeLoss", "--model.loss.margin=0.5")
    assert (type(named.model.criterion), named.model.criterion.margin) == (HingeLoss, 0.5)
    written = yaml.safe_load((named.run_dir / "config.yaml").read_text())["model"]["loss"]
    assert written == {"class_path": "tests.training.test_module.HingeLoss", "init_args": {"margin": 0.5}}


def test_overrides_and_seed(here):
    built = cli("--model.net.args.alpha=0.25", "--data.batch_size=7", "--seed_everything=5", "--ema.decay=0")
    assert (built.model.model.alpha, built.datamodule.batch_size) == (0.25, 7)
    assert (built.model.seed, built.datamodule.seed) == (5, 5)
    assert not any(type(callback).__name__ == "EmaWeights" for callback in built.trainer.callbacks)


def test_print_config_is_a_config(here, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--model.net.args.alpha=0.25", "--print_config"])
    assert ended.value.code == 0
    (here / "mine.yaml").write_text(capsys.readouterr().out)
    built = cli("--config", "mine.yaml")
    assert built.model.model.alpha == 0.25
    assert built.run_dir.name == "mine"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--config", "nothing.yaml"],
            "config 'nothing.yaml' does not exist; the package has cifar100_mambascope, ",
        ),
        (["--config", "vim_tiny_imagenet"], "required: --data.root"),
        (["--config", "vim_tiny_imagenet", "--data.root", "/nowhere"], "data folder /nowhere does not exist"),
        (["--model.optimizer.learning_rate", "1"], "--model.optimizer.learning_rate"),
        (["--data.batchsize", "1"], "Option 'batchsize' is not accepted"),
        (["--model.net.args.alhpa", "0.5"], "unknown model argument alhpa"),
        (["--model.optimizer.lr", "fast"], "model.optimizer.lr"),
        (["--model.net.name", "resnet51"], "net.name must be one of mambaeye_base, mambaeye_nano_patch16"),
        (
            ["--model.net.name", "resnet18", "--model.net.args.depth=3"],
            "Option 'kl_weight' is not accepted",
        ),
        (["--model.net.checkpoint", "no.pth"], "checkpoint no.pth does not exist"),
        (["--trainer.max_epoch", "3"], "--trainer.max_epoch"),
        (["--ckpt_path", "last"], "ckpt_path 'last': no run below runs/ has a last.ckpt"),
        (["--ckpt_path", "no.ckpt"], "ckpt_path 'no.ckpt' does not exist"),
        (["--run.loggers", "[csvv]"], "csvv"),
        (["--run.name", "a/b"], "run.name must be a plain directory name"),
    ],
)
def test_mistakes_are_named_in_one_line(args, message, here, capsys):
    try:
        status = main(args)
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_wrong_key_in_a_config_is_named(here, capsys):
    (here / "bad.yaml").write_text("model:\n  net:\n    nmae: vim_tiny_patch16_224\n")
    with pytest.raises(SystemExit) as ended:
        main(["--config", "bad.yaml"])
    assert ended.value.code == 2
    assert "net.nmae" in capsys.readouterr().err


def test_diverging_run_ends_in_one_line(here, capsys):
    changes = {"model__optimizer__lr": 1e30, "model__schedule__warmup_epochs": 0, "trainer__accelerator": "cpu"}
    assert main(tiny(**changes)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "not finite at step" in error


def test_run_directories(tmp_path):
    root = str(tmp_path / "runs")
    assert new_run(root, None, ["a/scopedigits.yaml"]).name == "scopedigits"
    assert new_run(root, None, ["runs/scopedigits/config.yaml"]).name == "scopedigits-2"
    with pytest.raises(ValueError, match=r"scopedigits is being trained by another process"):
        new_run(root, "scopedigits", [])
    checkpoint = tmp_path / "runs" / "scopedigits" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_text("")
    leave_runs()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["scopedigits"]  # the other had no checkpoint
    with pytest.raises(ValueError, match=r"scopedigits exists; choose another --run\.name"):
        new_run(root, "scopedigits", [])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run\.root .*file' cannot be used"):
        new_run(str(tmp_path / "file"), None, [])


def test_last_is_the_newest_run(tmp_path):
    for age, name in enumerate(("new", "old")):
        path = tmp_path / name / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.write_text("")
        (tmp_path / name / "config.yaml").write_text("")
        os.utime(path, (1e9 - age, 1e9 - age))
    assert run_of(find_checkpoint("last", str(tmp_path), None)) == tmp_path / "new"
    assert run_of(find_checkpoint("last", str(tmp_path), "old")) == tmp_path / "old"
    assert run_of(tmp_path / "elsewhere.ckpt") is None
    args = complete_args(["--run.root", str(tmp_path), "--ckpt_path", "last"]).args
    assert complete_args(args).args == args  # as the processes get it that Lightning starts
    assert args[:2] == ["--config", str(tmp_path / "new" / "config.yaml")]
    assert str(tmp_path / "new" / "checkpoints" / "last.ckpt") in args


@pytest.mark.parametrize(
    ("name", "settings", "rates", "epochs", "teacher"),
    [
        ("hidden_align_small", {"keep": 0.8}, (5e-6, 1e-6, 1e-8), 30, (0, 0)),
        ("r_meeto_tiny", {"r": 5}, (2e-5, 1e-6, 0.0), 30, (0.5, 0)),
        ("r_meeto_small", {"r": 11}, (2e-5, 1e-6, 0.0), 15, (0.5, 0)),
        ("r_meeto_base", {"r": 11}, (2e-5, 1e-6, 0.0), 15, (0.5, 0)),
        ("dyvm_tiny", {"keep": 0.9, "block_ratio": 0.8}, (3e-5, 1e-6, 1e-8), 30, (0.5, 0.5)),
        ("dyvm_small", {"keep": 0.7, "block_ratio": 0.8}, (5e-5, 1e-6, 1e-8), 30, (0.5, 0.5)),
    ],
)
def test_retraining_recipes_are_the_published_ones(name, settings, rates, epochs, teacher):
    config = yaml.safe_load(CONFIGS[f"{name}_imagenet"].read_text())
    net, model = config["model"]["net"], config["model"]
    reduction = {key: value for key, value in net["args"]["reduction"].items() if key not in ("name", "ratio_weight")}
    assert net["name"] == f"vim_{name.rsplit('_', 1)[1]}_patch16_224"
    assert reduction == settings
    assert net["args"]["reduction"].get("ratio_weight", 10) == 10
    published = (model["optimizer"]["lr"], model["schedule"]["min_lr"], model["optimizer"]["weight_decay"])
    assert published == pytest.approx(rates)
    assert config["trainer"]["max_epochs"] == epochs
    weights = model.get("teacher", {})
    assert (weights.get("kl_weight", 0), weights.get("token_weight", 0)) == teacher


def test_shipped_configs_by_name_and_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in ("vim_tiny_imagenet", "vim_tiny_imagenet.yaml", "mambascope/configs/vim_tiny_imagenet.yaml"):
        assert find_config(value) == str(CONFIGS["vim_tiny_imagenet"])
    with pytest.raises(ValueError, match="does not exist"):
        find_config("other/vim_tiny_imagenet.yaml")


def test_a_whole_run_with_its_report(tmp_path):
    """The real command: it leaves what the README names, and the threshold it chose is in the weights."""
    done = train(*tiny(run__report="true", trainer__max_epochs=1), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    run = tmp_path / "runs" / "scopedigits"
    for name in ("config.yaml", "logs/metrics.csv", "checkpoints/last.ckpt", "checkpoints/best.ckpt"):
        assert (run / name).is_file(), name
    assert list((run / "logs").glob("events.out.tfevents*"))
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["images"] == 24
    for column in ("coarse only", "refine everything", "dynamic", "top-1", "refined", "GFLOPs", "ms/image"):
        assert column in done.stdout
    model = mambascope.load_model(run / "model.safetensors")
    assert model.threshold == report["threshold"]
    assert model.labels == [str(i) for i in range(10)]
    assert model.description["transform"]["mean"] == pytest.approx([0.485, 0.456, 0.406])


def test_training_on_a_folder(here, folder, train_here):
    """Images from disk at another size than the model's, without the report."""
    args = ["--data", "ImageDataModule", f"--data.root={folder}", "--data.img_size=32", "--data.batch_size=2"]
    options = [a for a in tiny(trainer__max_epochs=1) if not a.startswith("--data.")]
    done = train_here("--config", CONFIGS["scopedigits"], *args, "--data.num_workers=0", *options)
    assert done.returncode == 0, done.stderr
    model = mambascope.load_model(here / "runs" / "scopedigits" / "model.safetensors")
    assert (model.num_classes, model.labels, model.config.image_hw) == (2, ["cat", "dog"], (32, 32))
    assert model.description["transform"]["crop_pct"] == 0.875
    assert model.description["transform"]["interpolation"] == "bicubic"


def test_a_failed_start_leaves_its_name_free(here, capsys):
    """What is wrong with the data shows up after the run directory was made."""
    wrong = [*tiny(run__name="mine", data__batch_size=64)]
    assert main(wrong) == 1
    assert "fewer than one batch" in capsys.readouterr().err
    assert not (here / "runs" / "mine").exists()
