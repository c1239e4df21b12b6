"""What the README tells people to type is there: options exist, configurations parse, the first example runs."""

import csv
import importlib
import re
import shlex
from pathlib import Path

import pytest

from mambascope.evaluation.published import DYNAMIC_SYSTEMS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TEXT = " ".join(README.split())


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """Lines of the shell blocks, without comments, continuation lines joined."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in (re.sub(r"\s#.*", "", line) for line in lines) if line.strip()]


def of_tool(name):
    arguments = [shlex.split(line)[2:] for line in commands() if line.startswith(f"python tools/{name}.py")]
    return arguments or [[]]


TOOLS = sorted({line.split()[1] for line in commands() if line.startswith("python tools/")})


def test_there_is_something_to_check():
    assert "tools/train_cls.py" in TOOLS
    assert {"make demo", "make test"} <= set(commands())


@pytest.mark.parametrize("tool", TOOLS)
def test_options_of_tools_exist(tool, capsys):
    source = (ROOT / tool).read_text()
    name = re.search(r"from (mambascope\.\S+) import main", source)[1]
    if ".mm." in name:
        pytest.importorskip("mmengine")
    main = importlib.import_module(name).main
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    help_text = capsys.readouterr().out
    for args in of_tool(Path(tool).stem):
        for option in (a.split("=")[0] for a in args if a.startswith("--")):
            if tool != "tools/train_cls.py":  # its parser is asked below
                assert option in help_text, f"{tool} has no {option}"


@pytest.mark.parametrize("args", of_tool("train_cls"), ids=" ".join)
def test_training_commands_parse(args, capsys):
    from mambascope.commands.train import main

    if "--ckpt_path" in args:
        pytest.skip("needs a run")
    with pytest.raises(SystemExit) as ended:
        main([*args, "--print_config"])
    assert ended.value.code == 0
    assert "seed_everything" in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("make ")])
def test_make_targets_exist(line):
    target = line.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8, 1.0])
def test_the_method_in_ten_lines_is_what_the_model_does(threshold):
    import torch

    import mambascope
    from mambascope.data import ScopeDigits

    model = mambascope.load("scopedigits")
    digits = ScopeDigits("cls", "val", 64)
    images = torch.stack([model.transform()(digits[row][0]) for row in range(64)])
    code = blocks("python")[0]
    assert len(code.splitlines()) <= 10
    names = {"model": model, "images": images, "threshold": threshold}
    with torch.inference_mode():
        exec(compile(code, "README.md", "exec"), names)
        output = model.forward_scope(images, threshold, alpha=0.7)
    torch.testing.assert_close(names["logits"], output.logits)
    assert len(names["unsure"]) == output.exited.logical_not().sum()
    assert 0 < len(names["unsure"]) < 64 or threshold in (0.0, 1.0)


def test_the_first_example_runs(capsys):
    exec(compile(blocks("python")[1], "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def result(name):
    with (ROOT / "benchmarks" / "results" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_precision_and_onnx_are_as_measured():
    """The figures of these sentences come from files that benchmarks/demo_model.py writes."""
    changes = [abs(float(row["change_points"])) for row in result("demo_precision.csv")]
    claim = re.search(
        r"`model\.bfloat16\(\)` moved the accuracies of the demo's table by at most ([\d.]+) points", TEXT
    )
    assert float(claim[1]) == round(max(changes), 2)
    ratios = {}
    for row in result("demo_onnx.csv"):
        if row["runtime"] == "onnxruntime":
            ratios.setdefault(row["batch"], []).append(float(row["times_the_package"]))
    claim = re.search(r"takes ([\d.]+) times as long as the package at batch 64 and ([\d.]+) to ([\d.]+) times", TEXT)
    measured = [max(ratios["64"]), min(ratios["1"]), max(ratios["1"])]
    assert [float(v) for v in claim.groups()] == [round(v, 1) for v in measured]


def test_the_number_of_cells_of_an_image_is_worth_what_its_rows_say():
    table = (ROOT / "benchmarks/results/ablations/removed.md").read_text()
    gain = {
        name: float(re.search(rf"\| {name} \|.*\| ([-+][\d.]+) ±", table)[1]) for name in ("mass 0.98", "mass 0.95")
    }
    claim = re.search(r"([\d.]+) ± 0\.2 at a mass of 0\.98 and at 15 of 16 cells, (-[\d.]+) ± 0\.2 at 0\.95", TEXT)
    assert [float(v) for v in claim.groups()] == [round(v, 1) for v in gain.values()]


def test_the_published_systems_are_those_of_the_package():
    rows = [
        f"| {s.label} | {s.backbone} | {s.top1:g} | {s.gflops:g} | {s.means} | {s.source} |" for s in DYNAMIC_SYSTEMS
    ]
    assert "\n".join(rows) in README


def test_the_frozen_form_is_as_fast_as_its_rows_say():
    times = {
        (folder, level): {
            (row["model"], row["form"], int(row["batch"])): float(row["ms_per_image"])
            for row in result(f"{folder}_{level}/benchmark.csv")
        }
        for folder in ("forms", "models")
        for level in ("v3", "v4")
    }
    models = {
        "demo, coarse look": ("forms", "scopedigits, 0% refined"),
        "demo, everything refined": ("forms", "scopedigits, 100% refined"),
        "Vim-T": ("models", "vim_tiny_patch16_224"),
        "MambaScope-T, half refined": ("models", "mambascope_tiny_patch16_224, 50% refined"),
    }
    rows = re.findall(r"^\| (.+), batch (\d+) \| (.+ → .+)\|$", README, re.M)
    assert len(rows) == 8
    for label, batch, rest in rows:
        folder, model = models[label]
        cells = [cell.strip() for cell in rest.split("|")]
        for level, (pair, ratio) in zip(("v3", "v4"), (cells[:2], cells[2:]), strict=True):
            measured = times[folder, level]
            eager, frozen = (measured[model, form, int(batch)] for form in ("eager", "frozen"))
            assert pair == f"{eager:.3g} → {frozen:.3g}"
            if folder == "models":
                assert ratio == f"{frozen / measured['deit_tiny_patch16_224', 'eager', int(batch)]:.2f}"
    for level in ("v3", "v4"):
        at = {name: v for (name, form, batch), v in times["models", level].items() if batch == 8 and form == "eager"}
        vim = times["models", level]["vim_tiny_patch16_224", "frozen", 8]
        assert all(0.25 <= at[name] / vim <= 0.35 for name in ("levit_128s", "efficientvim_m2"))
        forms = times["forms", level]
        slower = {
            (form, batch)
            for (model, form, batch), v in forms.items()
            if form != "eager" and v < forms[model, "frozen", batch]
        }
        assert slower <= {("bf16", 64)}
