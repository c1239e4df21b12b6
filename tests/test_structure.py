"""Imports point one way.

ops <- layers <- reduction <- models <- losses, evaluation, plotting <- training; data beside models.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mambascope"
ALLOWED = {
    "ops": set(),
    "layers": {"ops"},
    "reduction": {"ops", "layers"},
    "models": {"ops", "layers", "reduction"},
    "losses": {"models", "reduction"},
    "data": {"models"},
    "plotting": {"models", "evaluation"},  # draws what evaluation measured; evaluation.report calls it
    "evaluation": {"ops", "reduction", "models", "data", "plotting", "losses"},
    "frontier": {"models", "data", "evaluation", "plotting", "training"},
    "training": {"ops", "layers", "reduction", "models", "data", "plotting", "evaluation", "losses"},
    "mm": {"ops", "layers", "models", "losses", "data", "evaluation", "plotting"},
}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem == "losses")


def imported(path: Path) -> list[tuple[str, bool]]:
    """Full names this file imports, and whether at module level."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append((node.module, id(node) in top))
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    area = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name, _ in imported(path):
        parts = name.split(".")
        if parts[0] == "mambascope" and len(parts) > 1 and not parts[1].startswith("_"):
            assert parts[1] == area or parts[1] in ALLOWED[area], f"{path} imports {name}"
        assert parts[0] not in ("tools", "tests"), f"{path} imports {name}"
        if parts[0] in ("lightning", "pytorch_lightning"):
            assert area in ("training", "data"), f"{path} imports {name}"
        if parts[0] == "matplotlib":
            assert area == "plotting", f"{path} imports {name}"
        if parts[0] in ("mmengine", "mmseg", "mmdet", "mmcv"):
            assert area == "mm", f"{path} imports {name}"


def test_importing_the_package_is_light():
    code = (
        "import sys, mambascope; "
        "bad = [m for m in ('lightning', 'mmengine', 'matplotlib', 'sklearn', 'mamba_ssm') if m in sys.modules]; "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tools_are_thin():
    for path in (PACKAGE.parent / "tools").glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path
