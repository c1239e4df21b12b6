"""Ablations: figures that agree with the model, rows that are kept, verdicts that follow from the numbers."""

import csv
import itertools
from pathlib import Path

import pytest
import torch
import yaml

from mambascope.commands.compare import main
from mambascope.compare.changes import reranked, with_control
from mambascope.compare.lists import CELLS, Comparison, Entry, Setting, read_list, shipped_lists
from mambascope.compare.sources import Point, make_source
from mambascope.compare.table import BUDGETS, Row, Spread, budget_name, make_rows
from mambascope.compare.verdicts import markdown
from mambascope.compare.work import Work
from mambascope.models import SCOPE_CONFIGS, MambaScope, ScopeConfig, load_model
from mambascope.models.checkpoint import save_safetensors
from mambascope.models.configs import with_overrides
from mambascope.models.cost import CONVENTIONS, stage_macs
from mambascope.models.losses import ScopeLoss
from mambascope.training.args import ModelArgs
from mambascope.training.module import build_model
from mambascope.utils import flat
from tests.compare.common import RECIPE

ROOT = Path(__file__).parents[2]
NET = {"embed_dim": 16, "depth": 2, "d_state": 4, "alpha": 0.5, "fine_cls": "middle"}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run on small digits."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = ScopeConfig(img_size=32, patch_size=4, embed_dim=16, depth=5, num_classes=10, alpha=0.5, threshold=0.4)
    model = MambaScope(config)
    with torch.no_grad():
        model.head.weight.mul_(20)
    save_safetensors(model, run / "model.safetensors")
    (run / "config.yaml").write_text(
        "data:\n  class_path: mambascope.data.digits_datamodule.ScopeDigitsDataModule\n"
        "  init_args: {val_length: 30, digits: {size: 32}, batch_size: 8}\n"
    )
    return run


def ablations(folder, images=20, **changes):
    """The shipped list with fewer images."""
    content = yaml.safe_load(shipped_lists()["ablations"].read_text())
    content["data"]["init_args"] = {"val_length": images, "val_batch_size": 16}
    path = folder / "ablations.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return path


def run(*argv):
    return main([str(a) for a in (*argv, "--device", "cpu")])


def work(run_folder, tmp_path, settings, images=40, table="best", seeds=(0, 1)):
    """An ablation of the run's model in code."""
    entries = {"model": Entry("a model", net={"checkpoint": str(run_folder)}, settings=settings, table=table)}
    data = {"init_args": {"val_length": images, "val_batch_size": 16}}
    plan = Comparison("t", entries, seeds=seeds, data=data, image_sets=True)
    return Work(plan, tmp_path, torch.device("cpu"))


def evaluated(work_):
    return {point: work_.evaluate(point) for point in work_.points()}


def images_of(work_, setting, seed):
    batches = list(work_.loader(Point("model", setting, seed)))
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def twin_of(run_folder, overrides):
    model = load_model(run_folder / "model.safetensors")
    twin = MambaScope(with_overrides(model.config, overrides)).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@torch.no_grad()
def test_figures_equal_the_model_run_by_hand(run_folder, tmp_path):
    changes = ({"score_metric": "l2"}, {"alpha": 0.25}, {"score_layers": 1}, {"beta": 0.0})
    work_ = work(run_folder, tmp_path, [Setting(model=overrides) for overrides in changes], seeds=(1,))
    rows = {(row.setting, row.point): row for row in make_rows(work_.plan, evaluated(work_))}
    images, labels = images_of(work_, Setting(), 1)
    assert len(labels) == 40
    assert not torch.equal(images, images_of(work_, Setting(), 0)[0])
    for overrides in changes:
        twin, label = twin_of(run_folder, overrides), Setting(model=overrides).label
        out, fine = twin.forward_scope(images, 0.4), twin.forward_both(images).fine
        refined, model = rows[label, "refined"], rows[label, "model"]
        assert refined.top1.mean == pytest.approx(float((fine.argmax(1) == labels).float().mean()))
        assert model.top1.mean == pytest.approx(float((out.logits.argmax(1) == labels).float().mean()))
        assert model.share_refined.mean == pytest.approx(float((~out.exited).float().mean()))
        for convention in CONVENTIONS:
            cost = stage_macs(twin.config, convention=convention)
            assert refined.gflops[convention].mean == pytest.approx(cost.gflops())


def test_images_of_the_first_seed_are_the_runs_own(run_folder, tmp_path):
    work_ = work(run_folder, tmp_path, [Setting()])
    work_.plan.data.clear()
    images, _ = images_of(work_, Setting(), 0)
    assert torch.equal(images, torch.cat([x for x, _ in work_.data(Point("model", Setting(), 0)).val_dataloader()]))
    assert [len(images_of(work_, Setting(), seed)[1]) for seed in (0, 1)] == [30, 30]


@torch.no_grad()
def test_controls_read_other_cells(run_folder):
    importance = torch.rand(3, 16)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(reranked(importance, "least", generator, (4, 4)).argmax(1), importance.argmin(1))
    assert not torch.equal(reranked(importance, "random", generator, (4, 4)).argsort(1), importance.argsort(1))
    model, image = load_model(run_folder / "model.safetensors"), torch.randn(1, 3, 32, 32)
    cells = {how: with_control(load_model(run_folder / "model.safetensors"), how, 0) for how in CELLS}
    selected = {how: set(m.forward_scope(image, 1.0).selected[0].tolist()) for how, m in cells.items()}
    assert selected["important"] == set(model.forward_scope(image, 1.0).selected[0].tolist())
    assert selected["least"] == set(range(16)) - selected["important"]  # half of the cells
    assert selected["random"] not in (selected["least"], selected["important"])
    assert {5, 6, 9, 10} <= selected["central"]
    middle = reranked(torch.zeros(2, 15), "central", generator, (3, 5))
    assert middle[0].argmax() == middle[1].argmax() == 7


def test_every_table_of_the_paper_is_in_a_list():
    inference, trained = (read_list(name).entries for name in ("ablations", "trained_ablations"))
    assert {"importance", "alpha", "beta", "layers"} <= set(inference)
    assert {"cls", "order", "reuse"} <= set(trained)
    for entry in (*inference.values(), *trained.values()):
        if entry.table == "gain":
            assert not entry.settings[0].model
            assert not entry.settings[0].training


def test_finished_rows_are_kept_and_the_rest_is_done(run_folder, tmp_path, capsys):
    argv = [ablations(tmp_path), "--weights", run_folder, "--seeds", 0, 1, "--runs", tmp_path / "runs"]
    assert run(*argv, "--out", tmp_path, "--entries", "beta", "layers") == 0
    assert "### Momentum of the average over layers (Table 6)" in capsys.readouterr().out
    document = (tmp_path / "tables.md").read_text()
    assert "published, not\nreproduced here" in document
    assert document.count("| last ") == 3
    with (tmp_path / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (5 + 3) * 3
    assert {(row["seeds"], row["images"]) for row in rows} == {("2", "20")}

    # as after an interruption: two results are missing, and those that are there must not be computed again
    results = sorted((tmp_path / "runs" / "results").iterdir())
    assert len(results) == 2 * (5 + 3)
    before = {path: path.stat().st_mtime_ns for path in results[2:]}
    for path in results[:2]:
        path.unlink()
    assert run(*argv, "--out", tmp_path, "--entries", "beta", "layers") == 0
    assert sorted((tmp_path / "runs" / "results").iterdir()) == results
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (tmp_path / "tables.md").read_text() == document
    capsys.readouterr()

    few = [*argv, "--entries", "beta", "--seeds", 0, "--out", tmp_path / "few"]
    assert run(*few, "--rows", "0.5") == 0
    assert "Too few rows to compare." in capsys.readouterr().out  # without the best one of the paper
    assert run(*few, "--rows", "0.99") == 0
    with (tmp_path / "few" / "comparison.csv").open() as file:
        assert list(dict.fromkeys(row["setting"] for row in csv.DictReader(file))) == ["0.0", "0.99"]

    ablations(tmp_path, 21)  # other images: made anew
    assert run(*argv, "--out", tmp_path, "--entries", "layers", "--seeds", 0) == 0
    with (tmp_path / "comparison.csv").open() as file:
        assert {row["images"] for row in csv.DictReader(file)} == {"21"}


def test_trained_rows_train_once_per_model_and_resume(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    recipe = {**RECIPE, "model": {**RECIPE["model"], "net": {"name": "mambascope_nano_patch8_64", "args": NET}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    changes = [{}, {"model": {"net": {"args": {"fine_order": "important_last"}}}}]
    labels = ["important_first", "important_last"]
    settings = [{"label": label, "training": c} for label, c in zip(labels, changes, strict=True)]
    order = {"label": "order", "config": "recipe.yaml", "settings": settings, "table": "gain"}
    again = {**order, "label": "the same models", "settings": [{"training": changes[1]}], "table": "best"}
    plan = {"title": "t", "seeds": [0], "entries": {"order": order, "again": again}}
    plan["options"] = {"trainer": {"max_epochs": 1}}
    (tmp_path / "trained.yaml").write_text(yaml.safe_dump(plan))
    argv = ["trained.yaml", "--out", tmp_path / "out", "--jobs", 2]
    assert run(*argv) == 0
    runs = tmp_path / "runs" / "compare" / "trained" / "trainings"
    names = sorted(p.name for p in runs.iterdir())
    assert [name.partition("-")[0] for name in names] == ["order", "order"]
    trained = {load_model(runs / name / "model.safetensors").config.fine_order: name for name in names}
    assert set(trained) == set(labels)
    out = capfd.readouterr().out
    assert out.count("] training order") == 2  # other rows share a training that means the same model
    assert "| important_last |" in out
    (runs / trained["important_last"] / "model.safetensors").unlink()
    assert run(*argv, "--entries", "again") == 0
    out = capfd.readouterr().out
    assert out.count("] training ") == 1  # the one without weights is resumed, whatever row asks for it
    assert sorted(p.name for p in runs.iterdir()) == names


def test_mistakes_end_with_one_line(run_folder, tmp_path, capsys):
    lonely = tmp_path / "lonely.safetensors"
    lonely.write_bytes((run_folder / "model.safetensors").read_bytes())
    path = ablations(tmp_path)
    beta = [path, "--weights", run_folder, "--entries", "beta", "--seeds", 0]
    cases = [
        ([path, "--weights", lonely, "--entries", "beta"], "does not lie in a run"),
        ([*beta, "--rows", "0.7"], "a row must be one of 0.0, 0.5, 0.9, 0.99, 0.999, got '0.7'"),
        ([path, "--weights", "demo2=a"], "does not exist"),
        ([ablations(tmp_path), "--entries", "demos"], "an entry must be one of demo, importance, alpha, beta"),
        ([*beta, "--runs", tmp_path / "r", "--out", "/proc/nowhere"], "/proc/nowhere"),
        ([path, "--weights", tmp_path / "none.safetensors"], "does not exist"),
        (["scopedigits", "--weights", run_folder], "weights must be of one of no entry, got"),
    ]
    for argv, word in cases:
        assert run(*argv, *([] if "--runs" in argv else ["--runs", tmp_path / "runs"])) in (1, 2)
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert word in err
        assert err.count("\n") == 1


def rows_of(setting, values, points=("refined", "model"), images=2000, entry="t"):
    """The rows of a setting whose seeds have these top-1 at every operating point."""
    top1, half = Spread(tuple(values)), Spread((0.5,) * len(values))
    gflops = dict.fromkeys(CONVENTIONS, Spread((0.1,) * len(values)))
    return [
        Row(entry, "Title", setting, point, None, len(values), images, 1, None, top1, top1, half, gflops)
        for point in points
    ]


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
    published = (("a", 88.0), ("b", 87.0), ("c", 86.0))
    settings = tuple(Setting(label, published=top1) for label, top1 in published)
    plan = Comparison("t", {"t": Entry("Title", net={"checkpoint": "x"}, settings=settings, table="best")})
    text = markdown(plan, [row for label, top1 in here.items() for row in rows_of(label, [top1])])
    assert word in text
    assert f"| a | {100 * here['a']:.2f} ± " in text


def test_the_results_in_the_repository_are_whole():
    folder = ROOT / "benchmarks" / "results" / "ablations"
    with (folder / "ablations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    inference = {row["table"] for row in rows} & {"importance", "alpha", "beta", "layers"}
    assert len(inference) == 4
    text = (folder / "ablations.md").read_text()
    for row in rows:
        assert f"| {row['setting']} |" in text


def test_removed_options_keep_their_rows():
    """Every row of theirs names the commit that had the option, and none is left among the rest."""
    folder = ROOT / "benchmarks" / "results" / "ablations"
    with (folder / "removed.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    text = (folder / "removed.md").read_text()
    assert len(rows) >= 34
    for row in rows:
        assert row["commit"] == "ed6fe22"
        assert f"| {row['setting']} |" in text
    removed = {(row["table"], row["setting"]) for row in rows if row["option"] == "removed"}
    with (folder / "ablations.csv").open(newline="", encoding="utf-8") as file:
        assert not removed & {(row["table"], row["setting"]) for row in csv.DictReader(file)}


@torch.no_grad()
def test_equal_cost_is_what_running_at_that_threshold_costs(run_folder, tmp_path):
    changes = ({}, {"alpha": 0.9, "score_metric": "clip"}, {"alpha": 0.25})
    work_ = work(run_folder, tmp_path, [Setting(model=o) for o in changes], 60, table="gain", seeds=(0,))
    rows = {(row.setting, row.point): row for row in make_rows(work_.plan, evaluated(work_))}
    images, labels = images_of(work_, Setting(), 0)
    reference = stage_macs(twin_of(run_folder, {}).config, convention="both_directions")
    for overrides in changes:
        twin = twin_of(run_folder, overrides)
        cost = stage_macs(twin.config, convention="both_directions")
        ranked = twin.forward_scope(images, 0.0).confidence.sort().values.tolist()
        etas = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(ranked)), 1.0]
        for share in BUDGETS:
            best = None
            for eta in etas:  # the highest threshold that the budget allows
                out = twin.forward_scope(images, eta)
                if cost.gflops(float((~out.exited).double().mean())) <= reference.gflops(share) * (1 + 1e-9):
                    best = float((out.logits.argmax(1) == labels).double().mean())
            row = rows[Setting(model=overrides).label, budget_name(share)]
            assert row.top1.mean == pytest.approx(best), (overrides, share)


def test_gains_are_paired_by_seed():
    settings = tuple(Setting(label) for label in ("base", "new", "other"))
    plan = Comparison("t", {"t": Entry("Title", net={"checkpoint": "x"}, settings=settings, table="gain")})
    budgets = [budget_name(share) for share in BUDGETS]
    rows = []
    for label, top1 in (("base", (0.70, 0.80)), ("new", (0.72, 0.83)), ("other", (0.69, 0.79))):
        rows += [*rows_of(label, top1, budgets), *rows_of(label, (0.5, 0.5), ["coarse"])]
        rows += rows_of(label, (0.8, 0.8), ["refined"])
    text = markdown(plan, rows)
    assert "| base | 50.00 | 80.00 | 0.1000 | 75.00 | 75.00 | 75.00 |  | 2 |" in text
    assert "| new | 50.00 | 80.00 | 0.1000 | 77.50 | 77.50 | 77.50 | +2.50 ± 0.50 | 2 |" in text
    assert "| other | 50.00 | 80.00 | 0.1000 | 74.00 | 74.00 | 74.00 | -1.00 ± 0.00 | 2 |" in text


@pytest.mark.parametrize("name", shipped_lists())
def test_every_training_of_a_list_has_a_network(name):
    """Also where an entry has another network than the config that it takes the rest from."""
    plan = read_list(name)
    for entry_name, entry in plan.entries.items():
        for setting in entry.settings or (Setting(),):
            source = make_source(plan, entry_name, setting)
            if source.trained:
                net = {**source.config["model"]["net"], "checkpoint": None}
                with torch.device("meta"):
                    build_model(ModelArgs(**net), verbose=False)


def test_no_arguments_in_a_file_are_none():
    assert ModelArgs(args=None).args == {}


@pytest.mark.parametrize("name", ["ablations", "trained_ablations", "selection"])
def test_every_row_is_a_model_and_a_training(name):
    """The options exist under the names that the lists use."""
    plan = read_list(name)
    for entry_name, entry in plan.entries.items():
        for setting in entry.settings:
            source = make_source(plan, entry_name, setting)
            config = SCOPE_CONFIGS["mambascope_nano_patch8_64"]
            if source.trained:
                net = source.config["model"]["net"]
                config = with_overrides(SCOPE_CONFIGS[net["name"]], net["args"])
                ScopeLoss(**source.config["model"]["loss"])
                base = flat(make_source(plan, entry_name, entry.settings[0]).config)
                changed = {key for key, value in flat(source.config).items() if base.get(key) != value}
                assert changed <= set(flat(setting.training))  # nothing else differs from the first row
            MambaScope(with_overrides(config, setting.model))
