"""Runs that are older than an option's removal: resumed, evaluated, and refused in one line where they used it."""

import pytest
import yaml

from mambascope.commands import evaluate
from mambascope.commands.train import main
from mambascope.models.retired import RETIRED, without_other_kinds
from tests.training.helpers import tiny

OLD_LOSS = {
    "kl_weight": 1.0,
    "temperature": 1.0,
    "coarse_ce_weight": 0.3,
    "label_smoothing": 0.0,
    "coarse_label_smoothing": None,
    "focal_gamma": 0.0,
}
"""The section of the loss that all runs of that time have."""


OLD_TEACHER = {"checkpoint": None, "kl_weight": 0.0, "token_weight": 0.0}
"""The section of the teacher, which was there for every kind of model."""


def test_runs_of_every_kind_had_the_options_of_all():
    kept = {"net": {"name": "vim_nano_patch8_64"}, "loss": {"label_smoothing": 0.1}, "mix": {"mixup": 0.8}}
    loss = {**dict(list(OLD_LOSS.items())[:2]), "coarse_ce_weight": 0.0, "label_smoothing": 0.1}
    older = {"model": {**kept, "loss": loss, "teacher": OLD_TEACHER, "full_refine_epochs": 0}}
    text = yaml.safe_dump(older, sort_keys=False)
    assert yaml.safe_load(without_other_kinds(text)) == {"model": kept}
    taught = text.replace("token_weight: 0.0", "token_weight: 0.5")
    assert yaml.safe_load(without_other_kinds(taught))["model"].keys() == {*kept, "teacher"}
    today = yaml.safe_dump({"model": {"full_refine_epochs": 0}})
    assert without_other_kinds(today) == today


@pytest.fixture
def run(here):
    """A finished epoch whose config names everything that was removed."""
    assert main(tiny(run__name="old", trainer__max_epochs=1)) == 0
    path = here / "runs" / "old" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["loss"] = OLD_LOSS
    config["model"]["teacher"] = OLD_TEACHER
    config["model"]["net"]["args"] |= RETIRED
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path.parent


def test_a_run_goes_on_and_is_evaluated(run, capsys):
    assert main(["--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--trainer.max_epochs=2"]) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert not {"focal_gamma", "coarse_label_smoothing"} & config["model"]["loss"].keys()
    argv = [run, "--no-figures", "--timing-images", 4, "--rounds", 1, "--max-seconds", 1]
    assert evaluate.main([str(arg) for arg in argv]) == 0
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--model.loss.focal_gamma=2"], "focal_gamma was removed; commit ed6fe22 is the last one that has it"),
        (["--config", "loss.yaml"], "coarse_label_smoothing=0.1 is of an option that was removed; commit ed6fe22"),
        (["--config", "net.yaml"], "fine_depth=4 is of an option that was removed; commit ed6fe22"),
        (["--model.net.args.alpha_rule=mass"], "alpha_rule='mass' is of an option that was removed"),
    ],
)
def test_one_line_says_so(argv, word, here, capsys):
    (here / "loss.yaml").write_text("model:\n  loss:\n    coarse_label_smoothing: 0.1\n    kl_weight: 2\n")
    (here / "net.yaml").write_text("model: {net: {args: {fine_depth: 4}}}\n")
    try:
        status = main(["--config", "scopedigits", *argv, *tiny()])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    err = capsys.readouterr().err
    assert word in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (here / "runs").exists()
