"""The house: which room may use which, what is imported where, and how large things may be.

A room is a folder of the package; ``utils``, ``_names`` and ``_version`` are what every room may use. A wing
(``peers``, ``eye``, ``mm``) registers itself by name: without its folder and its line in ``mambascope/__init__.py``
the others work as before.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mambascope"
COMMON = {"utils", "_names", "_version"}
WINGS = {"peers", "eye", "mm"}
CORE = {"ops", "layers", "models", "data", "training", "evaluation", "plotting", "compare"}
ALLOWED = {
    "ops": set(),
    "layers": {"ops"},
    "models": {"ops", "layers"},
    "data": {"models"},
    "training": {"ops", "layers", "models", "data"},
    "plotting": set(),
    "evaluation": {"ops", "models", "data", "plotting"},
    "compare": {"models", "data", "training", "evaluation", "plotting"},
    "commands": CORE,
    **dict.fromkeys(WINGS, CORE),
}
LIBRARIES = {
    "lightning": {"training", "data", "commands", "eye", "peers"},
    "matplotlib": {"plotting", "eye", "mm"},
    "argparse": {"commands", "eye", "mm"},
    **{library: {"mm"} for library in ("mmengine", "mmseg", "mmdet", "mmcv")},
}
PRONOUNS = {"own", "found", "known", "given", "told", "wanted", "said", "theirs", "ours"}
MODEL_CLASSES = {"VisionMamba", "MambaScope", "MambaEye", "ReducedVim"}

LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS = {
    "mambascope/ops/selective_scan/api.py:selective_scan": "the public operator: its arguments and their checks",
    "mambascope/ops/selective_scan/chunked.py:scan_backward": "one formula, step by step",
    "mambascope/ops/ssd/chunked.py:_chunked_backward": "one formula, step by step",
    "mambascope/ops/native/scan.py:bidirectional_backward": "one call of C with its buffers",
    "mambascope/ops/triton/backward_kernels.py:scan_backward_kernel": "a GPU kernel is one function",
    "mambascope/ops/triton/conv_kernels.py:conv_backward_kernel": "a GPU kernel is one function",
    "mambascope/ops/triton/forward_kernels.py:scan_forward_kernel": "a GPU kernel is one function",
    "mambascope/ops/triton/forward_kernels.py:segment_state_kernel": "a GPU kernel is one function",
    "mambascope/ops/triton/scan.py:run_backward": "one launch with its buffers",
}
MANY_PARAMETERS = {
    "mambascope/ops/": "kernels take flat tensors and sizes",
    "mambascope/data/image_datamodule.py:__init__": "options of the command line",
    "mambascope/data/small_datamodule.py:__init__": "options of the command line",
    "mambascope/eye/datamodules.py:__init__": "options of the command line",
    "mambascope/mm/backbone.py:__init__": "options of a config",
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(path: Path) -> frozenset[str]:
    """Full names of all that a file imports, also within functions; of our own files the file that it comes from."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports name the whole path"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                names.add(name if name in FILES else str(node.module))
    return frozenset(names)


@cache
def only_names_namespaces(path: Path) -> bool:
    """Whether a file needs ``argparse`` for nothing but the class of its results: weights' files may hold one."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "argparse":
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module == "argparse":
            names |= {alias.name for alias in node.names}
    return names == {"Namespace"}


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("name", [name for name in FILES if room(name) not in COMMON | {""}])
def test_rooms_use_what_they_may(name):
    here = room(name)
    for imported in imports(FILES[name]):
        top = imported.split(".")[0]
        assert top not in ("tools", "tests", "benchmarks"), f"{name} imports {imported}"
        if top != "argparse" or not only_names_namespaces(FILES[name]):
            assert here in LIBRARIES.get(top, {here}), f"{name} imports {imported}"
        if top != "mambascope" or room(imported) in COMMON | {here}:
            continue
        if imported == "mambascope.commands.options" and here in WINGS:
            continue  # the arguments that commands of wings share with the others
        assert room(imported) in ALLOWED[here], f"{name} imports {imported}"


def test_what_every_room_uses_uses_no_room():
    for name in FILES:
        if room(name) in COMMON:
            assert {room(i) for i in imports(FILES[name]) if i.startswith("mambascope")} <= COMMON, name


def test_ops_need_torch_only():
    for name in FILES:
        if room(name) == "ops":
            top = {i.split(".")[0] for i in imports(FILES[name])} - set(sys.stdlib_module_names)
            assert top <= {"mambascope", "torch", "triton", "mamba_ssm", "causal_conv1d", "selective_scan_cuda"}, name


def test_no_file_circle():
    graph = {name: imports(path) & FILES.keys() - {name} for name, path in FILES.items()}
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in finished:
            for imported in sorted(graph[name]):
                visit(imported, (*path, name))
            finished.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_wings_are_one_line_each():
    lines = [
        line for line in (PACKAGE / "__init__.py").read_text().splitlines() if any(w in line for w in ("eye", "peers"))
    ]
    assert len([line for line in lines if "import" in line]) == 2, lines


@pytest.mark.parametrize("name", [name for name in FILES if room(name) not in WINGS | {"models"}])
def test_types_of_models_are_asked_for_in_models_and_wings_only(name):
    for node in ast.walk(tree(FILES[name])):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            classes = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            assert not classes & MODEL_CLASSES, f"{name}:{node.lineno} asks for {classes & MODEL_CLASSES}"


def test_the_method_is_short():
    from dataclasses import fields

    from mambascope import ScopeConfig, VimConfig

    assert len((PACKAGE / "models" / "scope.py").read_text().splitlines()) <= 250
    assert len({f.name for f in fields(ScopeConfig)} - {f.name for f in fields(VimConfig)}) <= 16


SIZED = [p for folder in ("mambascope", "tests", "benchmarks", "tools") for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SIZED, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path):
    name = str(path.relative_to(ROOT))
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400 or name in LONG_FILES, f"{name} has {lines} lines"
    for node in ast.walk(tree(path)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        length = node.end_lineno - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1
        args = node.args
        count = len([a for a in (*args.posonlyargs, *args.args, *args.kwonlyargs) if a.arg not in ("self", "cls")])
        key = f"{name}:{node.name}"
        constructor = node.name == "__init__" and any(key.startswith(k) for k in MANY_PARAMETERS)
        assert length <= 60 or key in LONG_FUNCTIONS or constructor, f"{key} has {length} lines"
        assert count <= 12 or any(key.startswith(k) for k in MANY_PARAMETERS), f"{key} has {count} parameters"


@pytest.mark.parametrize("path", SIZED, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_are_nouns(path):
    for node in ast.walk(tree(path)):
        name = ""
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            name = node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = node.name
        assert name.strip("_") not in PRONOUNS, f"line {node.lineno}: {name} says nothing of what it is"


def test_exceptions_are_needed():
    for key in (*LONG_FILES, *LONG_FUNCTIONS, *MANY_PARAMETERS):
        file, _, function = key.partition(":")
        assert (ROOT / file).exists(), key
        assert not function or f"def {function}(" in (ROOT / file).read_text(), key


def test_importing_the_package_is_light():
    """It loads no package beside those of torch and timm, with which it costs their import and a few hundredths."""
    code = (
        "import sys, torch, timm; "
        "before = {m.split('.')[0] for m in sys.modules}; "
        "import mambascope; "
        "heavy = [m for m in ('lightning', 'mmengine', 'matplotlib', 'sklearn', 'mamba_ssm') if m in sys.modules]; "
        "assert not heavy, heavy; "
        "new = {m.split('.')[0] for m in sys.modules} - before - set(sys.stdlib_module_names); "
        "assert new <= {'mambascope', 'packaging'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tools_are_thin():
    for path in (ROOT / "tools").glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path
