"""The ablations: figures that agree with the model, rows that are kept, verdicts that follow from the numbers."""

import csv
import itertools
from pathlib import Path

import pytest
import torch

from mambascope.commands import ablate as ablation_cli
from mambascope.compare import ablation
from mambascope.compare.ablation import (
    BUDGETS,
    Results,
    Row,
    Setting,
    Table,
    digits_loader,
    evaluate,
    improvements,
    summarise,
    tables,
)
from mambascope.models import MambaScope, ScopeConfig, load_model
from mambascope.models.checkpoint import save_safetensors
from mambascope.models.configs import with_overrides
from mambascope.models.cost import stage_macs
from tests.training.helpers import TINY, tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run on small digits."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = ScopeConfig(img_size=32, patch_size=4, embed_dim=16, depth=4, num_classes=10, alpha=0.5, threshold=0.11)
    model = MambaScope(config)
    with torch.no_grad():
        model.head.weight.mul_(20)
    model.threshold = 0.4
    save_safetensors(model, run / "model.safetensors")
    (run / "config.yaml").write_text(
        "data:\n  class_path: mambascope.data.digits_datamodule.ScopeDigitsDataModule\n"
        "  init_args: {val_length: 30, digits: {size: 32}, batch_size: 8}\n"
    )
    return run


def ablate(*argv):
    return ablation_cli.main([str(a) for a in argv])


@torch.no_grad()
def test_figures_equal_the_model_run_by_hand(run_folder):
    path = run_folder / "model.safetensors"
    model = load_model(path)
    before = model.config
    batches = list(digits_loader(model, path, 1, 40, batch_size=16))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert len(labels) == 40
    assert not torch.equal(images[:30], torch.cat([x for x, _ in digits_loader(model, path, 0, 30)]))
    for overrides in ({"score_metric": "l2"}, {"alpha": 0.25}, {"score_layers": 1}, {"beta": 0.0}):
        found = evaluate(model, batches, overrides)
        twin = MambaScope(with_overrides(before, overrides)).eval()
        twin.load_state_dict(model.state_dict())
        out, fine = twin.forward_scope(images, 0.4), twin.forward_both(images).fine
        assert found["top1_fine"] == pytest.approx(float((fine.argmax(1) == labels).float().mean()))
        assert found["top1_dynamic"] == pytest.approx(float((out.logits.argmax(1) == labels).float().mean()))
        assert found["share_refined"] == pytest.approx(float((~out.exited).float().mean()))
        assert found["gflops_fine"] == pytest.approx(stage_macs(twin.config, convention="both_directions").gflops())
    assert (model.config, model.alpha) == (before, 0.5)
    with pytest.raises(ValueError, match="selection must be one of importance, random, least"):
        evaluate(model, batches, {}, "best")


@torch.no_grad()
def test_controls_read_other_cells(run_folder):
    model, coarse = load_model(run_folder / "model.safetensors"), torch.rand(3, 16)
    generator = torch.Generator().manual_seed(0)
    chosen = {how: ablation._choose(coarse, how, generator) for how in ablation.SELECTIONS}
    assert torch.equal(chosen["importance"], coarse)
    assert torch.equal(chosen["least"].argmax(1), coarse.argmin(1))
    assert not torch.equal(chosen["random"].argsort(1), coarse.argsort(1))
    paper = {"importance", "alpha", "beta", "layers", "cls", "order", "reuse"}
    assert set(tables(model.config)) == paper | set(improvements())


def test_finished_rows_are_kept_and_the_rest_is_done(run_folder, tmp_path, capsys):
    argv = [run_folder, "--seeds", 0, 1, "--out", tmp_path, "--images", 20, "--tables", "beta", "layers"]
    assert ablate(*argv) == 0
    printed = capsys.readouterr().out
    assert "### Momentum of the average over layers (Table 6)" in printed
    lines = (tmp_path / "ablations.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * (5 + 3)
    document = (tmp_path / "ablations.md").read_text()
    assert "published, not\nreproduced here" in document
    assert document.count("| last ") == 3

    # as after an interruption: two rows are missing, and one that is there must not be computed again
    kept = [line.replace(lines[1].split(",")[5], "0.125") if i == 1 else line for i, line in enumerate(lines)]
    (tmp_path / "ablations.csv").write_text("\n".join(kept[:-2]) + "\n")
    assert ablate(*argv) == 0
    assert capsys.readouterr().out.count("seed ") == 2
    with (tmp_path / "ablations.csv").open() as file:
        again = list(csv.DictReader(file))
    assert len(again) == 16
    assert again[0]["top1_fine"] == "0.125"

    few = [run_folder, "--seeds", 0, "--out", tmp_path / "few", "--images", 20, "--tables", "beta"]
    assert ablate(*few, "--rows", "0.5") == 0
    assert "Too few rows to compare." in capsys.readouterr().out  # without the best one of the paper
    assert ablate(*few[:-2], "--rows", "0.99") == 0  # the table follows from it
    with (tmp_path / "few" / "ablations.csv").open() as file:
        assert [row["setting"] for row in csv.DictReader(file)] == ["0.0", "0.5", "0.99"]

    assert ablate(*argv[:-4], 21, "--tables", "layers") == 0  # other images: made anew, in their place
    assert len((tmp_path / "ablations.csv").read_text().splitlines()) == 17


def test_trained_tables_train_once_per_model_and_resume(run_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    options = [o for o in tiny(trainer__max_epochs=1) if not o.startswith(("--run.report", "--trainer.max_epochs"))]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    argv = [run_folder, "--images", 20, "--seeds", 0, "--out", tmp_path / "out", "--epochs", 1]
    argv += ["--tables", "order", "--train-args", *options]
    assert ablate(*argv) == 0
    names = sorted(p.name for p in (tmp_path / "runs" / "ablations").iterdir())
    assert names == [f"scopedigits-1_first_important_{x}_mlp_false_seed0" for x in ("first", "last")]
    trained = load_model(tmp_path / "runs" / "ablations" / names[1] / "model.safetensors")
    assert (trained.config.fine_order, trained.config.depth) == ("important_last", TINY["model.net.args.depth"])
    assert capfd.readouterr().out.count("training scopedigits-1") == 2
    # other tables share a training that means the same model
    (tmp_path / "runs" / "ablations" / names[1] / "model.safetensors").unlink()
    (tmp_path / "out" / "ablations.csv").unlink()
    assert ablate(*argv) == 0
    out = capfd.readouterr().out
    assert out.count("training scopedigits-1") == 1  # the one without weights is resumed
    assert "| important_last |" in out


def test_mistakes_end_with_one_line(run_folder, tmp_path, capsys):
    lonely = tmp_path / "lonely.safetensors"
    lonely.write_bytes((run_folder / "model.safetensors").read_bytes())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "ablations.csv").write_text("a,b\n1,2\n")
    cases = [
        ([lonely, "--out", tmp_path / "o"], "does not lie in a run"),
        ([run_folder, "--images", 0], "images must be at least 1"),
        ([run_folder, "--tables", "beta", "--rows", "0.7"], "rows must be of 0.0, 0.5, 0.9, 0.99, 0.999; got 0.7"),
        ([run_folder, "--rows", "coarse CE 1"], "got coarse CE 1; coarse CE 1 is a row of --tables coarse_loss"),
        ([run_folder, "--out", tmp_path / "bad"], "is no table of ablations"),
        ([run_folder, "--out", "/proc/nowhere"], "/proc/nowhere"),
        ([tmp_path / "none.safetensors"], "does not exist"),
    ]
    for argv, word in cases:
        assert ablate(*argv) in (1, 2)
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert word in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("here", "word"),
    [
        ({"a": 0.90, "b": 0.80, "c": 0.70}, "**Holds**: a is best here too, 20.00 points above c"),
        ({"a": 0.70, "b": 0.90, "c": 0.60}, "**Does not hold here**: b is 20.00 points above a"),
        ({"a": 0.795, "b": 0.80, "c": 0.60}, "**Agrees within noise**: a is 0.50 points below b"),
        ({"a": 0.80, "b": 0.801, "c": 0.799}, "**No difference beyond noise**: best and worst are 0.20 points apart"),
    ],
)
def test_verdicts(here, word):
    settings = tuple(Setting(k, {}, published) for k, published in (("a", 88.0), ("b", 87.0), ("c", 86.0)))
    rows = [Row("t", k, 0, "x", 2000, v, 0.5, v, 0.5, 0.1) for k, v in here.items()]
    text = summarise(rows, {"t": Table("Title", settings)})
    assert word in text
    assert f"| a | {100 * here['a']:.2f} ± " in text


def test_the_results_in_the_repository_are_whole():
    folder = ROOT / "benchmarks" / "results" / "ablations"
    results = Results(folder / "ablations.csv")
    inference = {r.table for r in results.rows} & {"importance", "alpha", "beta", "layers"}
    assert len(inference) == 4
    text = (folder / "ablations.md").read_text()
    for row in results.rows:
        assert f"| {row.setting} |" in text


@torch.no_grad()
def test_equal_cost_is_what_running_at_that_threshold_costs(run_folder):
    path = run_folder / "model.safetensors"
    model = load_model(path)
    batches = list(digits_loader(model, path, 0, 60, batch_size=20))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    reference = stage_macs(model.config, convention="both_directions")
    for overrides in (
        {},
        {"alpha": 0.9, "score_metric": "clip"},
    ):
        found = evaluate(model, batches, overrides, reference=reference)
        twin = MambaScope(with_overrides(model.config, overrides)).eval()
        twin.load_state_dict(model.state_dict())
        own = stage_macs(twin.config, convention="both_directions")
        ranked = twin.forward_scope(images, 0.0).confidence.sort().values.tolist()
        etas = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(ranked)), 1.0]
        for share in BUDGETS:
            best = None
            for eta in etas:  # the highest threshold that the budget allows
                out = twin.forward_scope(images, eta)
                if own.gflops(float((~out.exited).double().mean())) <= reference.gflops(share) * (1 + 1e-9):
                    best = float((out.logits.argmax(1) == labels).double().mean())
            assert found[f"top1_cost{100 * share:.0f}"] == pytest.approx(best), (overrides, share)


def test_gains_are_paired_by_seed():
    table = Table("Title", (Setting("base", {}), Setting("new", {}), Setting("other", {})), equal_cost=True)
    rows = [Row("t", "base", s, "x", 100, 0.8, 0.5, 0.7, 0.5, 0.1, v, v, v) for s, v in ((0, 0.70), (1, 0.80))]
    rows += [Row("t", "new", s, "x", 100, 0.8, 0.5, 0.7, 0.5, 0.1, v, v, v) for s, v in ((0, 0.72), (1, 0.83))]
    rows += [Row("t", "other", 1, "x", 100, 0.8, 0.5, 0.7, 0.5, 0.1, 0.79, 0.79, 0.79)]
    text = summarise(rows, {"t": table})
    assert "| base | 50.00 | 80.00 | 0.1000 | 75.00 | 75.00 | 75.00 |  | 2 |" in text
    assert "| new | 50.00 | 80.00 | 0.1000 | 77.50 | 77.50 | 77.50 | +2.50 ± 0.50 | 2 |" in text
    assert "| other | 50.00 | 80.00 | 0.1000 | 79.00 | 79.00 | 79.00 | -1.00 | 1 |" in text


def test_every_improvement_is_a_model_and_a_training(tmp_path):
    """The options exist under the names that the tables use."""
    from mambascope.models.losses import ScopeLoss

    config = ScopeConfig(img_size=32, patch_size=8, embed_dim=16, depth=6, num_classes=10)
    defaults = {"kl_weight": 0.5, "coarse_ce_weight": 0.3}
    for table in improvements().values():
        assert table.settings[0].overrides == {}
        for setting in table.settings:
            MambaScope(with_overrides(config, setting.overrides))
            assert table.trained or not setting.training
            ScopeLoss(**defaults | {k.removeprefix("model.loss."): v for k, v in setting.training.items()})


def test_removed_options_keep_their_rows():
    """Every row of theirs names the commit that had the option, and none is left among the others."""
    folder = ROOT / "benchmarks" / "results" / "ablations"
    with (folder / "removed.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    text = (folder / "removed.md").read_text()
    assert len(rows) >= 34
    for row in rows:
        assert row["commit"] == "ed6fe22"
        assert f"| {row['setting']} |" in text
    removed = {(row["table"], row["setting"]) for row in rows if row["option"] == "removed"}
    assert not removed & {(row.table, row.setting) for row in Results(folder / "ablations.csv").rows}
