"""The images install what constraints.txt pins, as a plain user, without leftovers; no engine is needed to check it."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {canonical(re.match(r"[\w.-]+", line)[0]): line for line in lines if line}


def instructions(path):
    """(keyword, argument) of a Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", path.read_text()))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def installs(path):
    """The words of every pip install."""
    for keyword, argument in instructions(path):
        if keyword == "RUN":
            for command in argument.split("&&"):
                if "pip install" in command:
                    yield command.split("pip install", 1)[1].split()


def test_there_are_three_images():
    assert [p.stem for p in FILES] == ["cpu", "cuda", "mm"]
    readme = (ROOT / "docker" / "README.md").read_text()
    for path in FILES:
        assert f"docker build -f docker/{path.name} " in readme


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_versions_come_from_the_constraints(path):
    pinned, seen = pins(), set()
    for words in installs(path):
        assert words[:2] == ["--constraint", "constraints.txt"], words
        for word in words[2:]:
            word = word.strip('"')
            if word.startswith(("--", "${")):
                continue
            if word.startswith("."):
                extras = re.findall(r"[\w-]+", word[1:])
                requirements = [r for extra in extras for r in PROJECT["optional-dependencies"][extra]]
                names = [canonical(re.match(r"[\w-]+", r)[0]) for r in [*PROJECT["dependencies"], *requirements]]
                loose = {"ftfy", "regex"}
                assert set(names) - loose <= set(pinned), set(names) - set(pinned)
                continue
            name = canonical(re.match(r"[\w.-]+", word)[0])
            seen.add(name)
            if re.search(r"[<>=]", word):
                assert word == pinned[name], f"{word} in {path.name}, {pinned[name]} in constraints.txt"
            elif name not in {"wheel", "ninja", "psutil", "packaging"}:  # tools of the build only
                assert "==" in pinned[name], name
    assert {"torch", "torchvision"} <= seen
    assert seen >= {"cuda": {"causal-conv1d", "mamba-ssm"}, "mm": {"mmcv"}}.get(path.stem, set())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_small_layers_and_a_plain_user(path):
    steps = instructions(path)
    assert [a for k, a in steps if k == "USER"] == ["user"]
    assert [k for k, _ in steps].index("USER") > max(i for i, (k, _) in enumerate(steps) if k in ("RUN", "COPY"))
    assert sum(k == "FROM" for k, _ in steps) == 2  # what builds is left behind
    assert any("PIP_NO_CACHE_DIR=1" in a for k, a in steps if k == "ENV")
    for keyword, argument in steps:
        if keyword == "RUN" and "apt-get install" in argument:
            assert "--no-install-recommends" in argument
            assert "rm -rf /var/lib/apt/lists/*" in argument
        if keyword == "COPY" and "--from" not in argument:
            for source in [w for w in argument.split() if not w.startswith("--")][:-1]:
                assert (ROOT / source).exists(), source
    assert "://" not in path.read_text()


def test_the_cuda_image_builds_the_scan_for_the_cuda_of_torch():
    text = (ROOT / "docker" / "cuda.Dockerfile").read_text()
    for setting in ("MAMBA_KEEP_CUDA_BUILD=TRUE", "MAMBA_FORCE_BUILD=TRUE", "CAUSAL_CONV1D_FORCE_BUILD=TRUE"):
        assert setting in text
    assert "import torch, causal_conv1d_cuda, selective_scan_cuda" in text
    version = re.search(r"ARG CUDA=([\d.]+)", text)[1]
    if torch.version.cuda is None or torch.__version__.split("+")[0] != pins()["torch"].split("==")[1]:
        pytest.skip("needs the pinned torch in its CUDA build, to ask it")
    assert version.rsplit(".", 1)[0] == torch.version.cuda
