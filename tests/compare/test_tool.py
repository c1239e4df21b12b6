"""The real command from trainings to the picture, and what it does after it was interrupted or killed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import mambascope
from mambascope.commands.compare import main
from mambascope.compare.lists import Setting, read_list
from mambascope.compare.sources import Point
from mambascope.compare.work import Work
from mambascope.evaluation.collect import collect
from mambascope.models.cost import stage_macs
from tests.compare.common import TOOL, comparison, environment, run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process groups")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder in which the whole comparison was made."""
    folder = tmp_path_factory.mktemp("compare")
    ended = run(comparison(folder), "--out", "out", "--device", "cpu", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("] training ") == 4
    assert "[1/4] training vim, seed 0" in ended.stdout
    return folder


@pytest.fixture
def here(done, monkeypatch):
    monkeypatch.chdir(done)
    return done


def again(here, *options):
    """The command in this process, with the threads of the first one: times belong to a number of threads."""
    before = torch.get_num_threads()
    machine = json.loads((here / "runs" / "compare" / "tiny" / "timings.json").read_text())["machine"]
    torch.set_num_threads(machine["threads"])
    try:
        return main([str(here / "tiny.yaml"), "--out", str(here / "out"), "--device", "cpu", *options])
    finally:
        torch.set_num_threads(before)


def table(here):
    with (here / "out" / "comparison.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def files(here):
    return {
        p: p.stat().st_mtime_ns for p in (here / "runs").rglob("*") if p.suffix in (".npz", ".json", ".safetensors")
    }


def work(here):
    return Work(read_list(str(here / "tiny.yaml")), here / "runs" / "compare" / "tiny", torch.device("cpu"))


def test_table_has_every_point(here):
    rows = table(here)
    plain = [(r["entry"], r["setting"]) for r in rows if r["entry"] != "scope"]
    assert plain == [("vim", "as trained"), ("vim", "img_size 16"), ("longer", "as trained"), ("deit", "as trained")]
    curve = [r for r in rows if r["entry"] == "scope"]
    assert [float(r["threshold"]) for r in curve if r["ms_batch_16_mean"]] == [0.0, 0.13, 0.16, 1.0]
    assert len(curve) == 21 + 2
    assert {r["images"] for r in rows} == {"40"}
    assert [r["epochs"] for r in rows if r["entry"] in ("vim", "longer")] == ["2", "2", "3"]
    for row in rows:
        if row["ms_batch_16_mean"]:
            assert all(float(row[f"ms_batch_{size}_{name}"]) > 0 for size in (16, 1) for name in ("mean", "min", "max"))
    assert [float(rows[0][f"ratio_batch_{size}_mean"]) for size in (16, 1)] == [1.0, 1.0]


def test_figures_are_those_of_the_model_run_by_hand(here):
    rows = {(r["entry"], r["setting"], r["threshold"]): r for r in table(here)}
    work_ = work(here)
    for point in work_.points():
        data = work_.data(point)
        model = work_.model(point, data)
        record = collect(model, data.val_dataloader(), progress=False).record
        threshold = "1" if point.entry == "scope" else ""
        row = rows[point.entry, point.setting.label, threshold]
        assert float(row["top1_mean"]) == pytest.approx(record.fine_correct.mean())
        if point.entry == "vim":
            size = data.img_size
            assert size == ((16, 16) if point.setting.data else (32, 32))
            for convention in ("one_direction", "both_directions"):
                expected = stage_macs(model.config, size, convention=convention).gflops()
                assert float(row[f"gflops_{convention}_mean"]) == pytest.approx(expected, rel=1e-5)
        if point.entry == "deit":  # another model family: nothing runs in two directions
            assert row["gflops_one_direction_mean"] == row["gflops_both_directions_mean"]


def test_an_entry_starts_from_the_other_ones_weights(here):
    work_ = work(here)
    longer = next(training for training in work_.trainings if training.source.name == "longer")
    config = (work_.trainings.run_dir(longer) / "config.yaml").read_text()
    assert f"checkpoint: {work_.trainings.weights(longer.source.start, 0).relative_to(here)}" in config


def test_pictures_and_comparison_are_written(here):
    with Image.open(here / "out" / "comparison.png") as picture:
        assert picture.size[0] > 1000
    text = (here / "out" / "comparison.txt").read_text()
    assert text.startswith("MambaScope against the others.")
    assert [line.split()[0] for line in text.splitlines()[-4:]] == ["Vim", "Vim", "longer", "DeiT"]


def test_nothing_is_made_twice(here, capsys):
    before, csv_before = files(here), (here / "out" / "comparison.csv").read_bytes()
    assert again(here) == 0
    assert "] training " not in capsys.readouterr().out
    assert files(here) == before
    assert (here / "out" / "comparison.csv").read_bytes() == csv_before


def test_only_what_is_missing_or_new_is_made(here, capsys):
    before = files(here)
    lost = next(p for p in before if p.suffix == ".npz" and p.stem.startswith("deit"))
    lost.unlink()
    path = here / "tiny.yaml"
    original = path.read_text()
    path.write_text(original.replace("- 0.16", "- 0.17"))
    try:
        assert again(here, "--dry-run") == 0
        assert capsys.readouterr().out.count("trained ") == 4
        assert again(here) == 0
    finally:
        path.write_text(original)
    changed = {p.name for p, at in files(here).items() if before.get(p) != at}
    assert changed == {lost.name, "timings.json"}  # another threshold is timed beside all others
    assert "0.17" in {r["threshold"] for r in table(here)}


def test_another_recipe_is_another_training(here, capsys):
    path = here / "tiny.yaml"
    original = path.read_text()
    path.write_text(original + "options: {model: {optimizer: {lr: 0.002}}}\n")
    try:
        assert again(here, "--dry-run", "--entries", "deit") == 0
    finally:
        path.write_text(original)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["to", "to"]  # the baseline is needed for the ratios


def test_timings_of_another_comparison_are_not_used(here):
    path = here / "runs" / "compare" / "tiny" / "timings.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "key": "other"}))
    assert again(here) == 0
    assert json.loads(path.read_text())["key"] != "other"


def test_a_model_that_is_not_trained_here(here, capsys):
    weights = work(here).weights(Point("vim", Setting(), 0))
    data = {
        "class_path": "mambascope.data.ScopeDigitsDataModule",
        "init_args": {"val_length": 40, "val_batch_size": 16, "digits": {"size": 32}},
    }
    net = {"checkpoint": str(weights).replace("seed0", "seed{seed}")}
    entries = {
        "vim": {"label": "Vim", "net": net},
        "small": {"label": "half", "start": "vim", "settings": [{"data": {"img_size": 16}}]},
        "resnet": {"label": "R", "net": {"name": "resnet18", "args": {"channels": [4, 4, 8, 8]}}},
    }
    options = {"entries": entries, "data": data, "baseline": "vim", "curve": None}
    (here / "given").mkdir()
    path = comparison(here / "given", **options)
    assert main([str(path), "--runs", "given/runs", "--device", "cpu"]) == 0
    with (here / "given" / "runs" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    top1 = {(r["entry"], r["setting"]): r["top1_mean"] for r in table(here)}
    assert rows[0]["top1_mean"] == top1["vim", "as trained"]
    assert rows[1]["top1_mean"] == top1["vim", "img_size 16"]
    assert [r["epochs"] for r in rows] == ["2", "2", ""]
    assert not (here / "given" / "runs" / "comparison.txt").exists()

    entries["vim"]["settings"] = [{"model": {"depth": 3}}]
    assert main([str(comparison(here / "given", **options)), "--runs", "given/runs", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "entries.vim, setting 'depth 3': the weights do not fit the model with {'depth': 3}" in error
    assert error.count("\n") == 1

    entries["vim"]["settings"] = [{"model": {"cls_position": "last"}}]  # same shapes, other answers
    assert main([str(comparison(here / "given", **options)), "--runs", "given/runs", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "the weights were trained with cls_position='middle', got 'last'" in error
    assert error.count("\n") == 1


def test_a_training_that_fails_ends_with_one_line(here, capsys):
    (here / "wrong").mkdir()
    entries = read_list(str(here / "tiny.yaml")).entries
    wrong = {"label": "a", "config": entries["vim"].config, "options": {"model": {"net": {"args": {"width": 3}}}}}
    path = comparison(here / "wrong", entries={"vim": wrong}, curve=None)
    assert main([str(path), "--runs", "wrong/runs", "--jobs", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: training in wrong/runs/trainings/vim-")
    assert "unknown model argument width" in error
    assert error.count("\n") == 1


def here_and_now(folder, monkeypatch, *argv):
    """The command in this process; the trainings that it starts are processes as always."""
    monkeypatch.chdir(folder)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return main([*map(str, argv), "--device", "cpu"])


def test_several_trainings_at_a_time_give_the_same(here, tmp_path, monkeypatch, capfd):
    assert here_and_now(tmp_path, monkeypatch, here / "tiny.yaml", "--jobs", 3, "--out", "out") == 0
    output = capfd.readouterr()
    assert output.out.count("] training ") == 4
    assert "vim, seed 0: vim_nano_patch8_64" in output.err
    figures = [[(r["entry"], r["setting"], r["top1_mean"]) for r in table(folder)] for folder in (here, tmp_path)]
    assert figures[0] == figures[1]


def test_a_failing_training_stops_the_others_and_is_named(here, tmp_path, monkeypatch, capfd):
    entries = read_list(str(here / "tiny.yaml")).entries
    config = entries["vim"].config
    wrong = {"label": "a", "config": config, "start": "short", "options": {"model": {"net": {"args": {"width": 3}}}}}
    long = {"label": "b", "config": config, "options": {"trainer": {"max_epochs": 100000}}}
    short = {"label": "c", "config": config, "options": {"trainer": {"max_epochs": 20}}}
    path = comparison(tmp_path, entries={"long": long, "short": short, "wrong": wrong}, baseline="long", curve=None)
    capfd.readouterr()
    assert here_and_now(tmp_path, monkeypatch, path, "--jobs", 2) == 1
    error = capfd.readouterr().err
    assert "trainings/wrong-" in error.splitlines()[-1]
    assert "unknown model argument width" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert list(tmp_path.glob("runs/compare/tiny/trainings/long-*/checkpoints/last.ckpt"))  # it had saved its state


def test_jobs_must_be_positive(here, capsys):
    assert main([str(here / "tiny.yaml"), "--jobs", "0"]) == 2
    assert capsys.readouterr().err == "error: jobs must be at least 1, got 0\n"


def interrupted(path, jobs, signum, steps, cwd):
    """Runs the command, ends it by a signal once every training has saved so many steps; returns what all saved."""
    command = [sys.executable, str(TOOL), str(path), "--entries", "vim", "--jobs", str(jobs)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=cwd, env=environment(), **pipes)
    end = time.monotonic() + 200
    while len(saved := saved_steps(cwd)) < jobs or min(saved) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.2)
    os.kill(process.pid, signum)
    _, err = process.communicate(timeout=200)
    before = []
    while before != (saved := saved_steps(cwd)):  # trainings whose parent was killed save their state and end
        before = saved
        time.sleep(0.5)
    if signum == signal.SIGINT:
        assert process.returncode == 130, err
        assert "Traceback" not in err
        assert err.endswith("interrupted\n")
    runs = sorted(cwd.glob("runs/compare/tiny/trainings/*"))
    assert len(runs) == jobs
    assert not any((run_dir / "model.safetensors").exists() for run_dir in runs)
    return saved


def saved_steps(cwd):
    paths = sorted(cwd.glob("runs/compare/tiny/trainings/*/checkpoints/last.ckpt"))
    return [torch.load(path, weights_only=True)["global_step"] for path in paths]


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_and_interrupted_trainings_go_on(jobs, tmp_path, monkeypatch, capfd):
    options = {"trainer": {"max_epochs": 40, "check_val_every_n_epoch": 40}}
    path = comparison(tmp_path, options=options, curve=None, seeds=list(range(jobs)))
    killed = interrupted(path, jobs, signal.SIGKILL, 1, tmp_path)
    stopped = interrupted(path, jobs, signal.SIGINT, max(killed) + 1, tmp_path)
    assert all(0 < a < b for a, b in zip(killed, stopped, strict=True))
    capfd.readouterr()
    assert here_and_now(tmp_path, monkeypatch, path, "--entries", "vim", "--jobs", 1) == 0
    assert capfd.readouterr().out.count("resumed from") == jobs
    for steps, run_dir in zip(stopped, sorted(tmp_path.glob("runs/compare/tiny/trainings/*")), strict=True):
        assert steps < mambascope.load(run_dir / "model.safetensors").description["steps"] == 160
