"""What docs/ shows runs as it is printed there, and what it says about files is true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(name: str, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall((DOCS / name).read_text(encoding="utf-8")) if kind == language]


def run(code: str, folder: Path) -> str:
    """What a program prints that is started in a folder."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def small(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB").resize((75, 45), Image.Resampling.BOX), dtype=float)


def test_the_method_in_thirty_lines_prints_and_draws_what_the_page_shows(tmp_path):
    (code,), (output,) = blocks("how_it_works.md", "python"), blocks("how_it_works.md", "")
    assert len(code.splitlines()) <= 30
    assert run(code, tmp_path) == output
    drawn, shown = small(tmp_path / "how_it_works.png"), small(DOCS / "how_it_works.png")
    assert np.abs(drawn - shown).mean() < 2  # of 255: fonts may differ


def test_files_to_read_have_the_lines_that_the_page_says():
    text = (DOCS / "how_it_works.md").read_text(encoding="utf-8")
    rows = {path: int(lines) for path, lines in re.findall(r"^\| `(mambascope/\S+)` \| (\d+) \|", text, re.M)}
    assert "mambascope/models/scope.py" in rows
    assert rows == {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in rows}


def test_recipes_are_short_and_run(tmp_path):
    recipes = blocks("extending.md", "python")
    assert len(recipes) == 7
    for code in recipes:
        assert len([line for line in code.splitlines() if line.strip()]) <= 15, code
    # each in a namespace of its own, all in one process; tests/mm has the one that needs the OpenMMLab stack
    plain = [code for code in recipes if "mmengine" not in code]
    assert len(plain) == 6
    run("\n".join(f"exec({code!r}, {{'__name__': 'recipe'}})" for code in plain), tmp_path)


def test_a_loss_and_data_of_ones_own_train_by_class_path(tmp_path):
    for name, mark in (("my_losses", "class SmallLogits"), ("my_data", "class Noise")):
        (code,) = (code for code in blocks("extending.md", "python") if mark in code)
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = ["--data", "my_data.Noise", "--model.loss", "my_losses.SmallLogits", "--trainer.max_steps", "2"]
    command = [sys.executable, str(ROOT / "tools/train_cls.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    (weights,) = tmp_path.glob("runs/*/model.safetensors")
    assert "SmallLogits" in (weights.parent / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target
