"""Weights files from strangers: they run no code, fetch nothing, and cost no more than they hold."""

import inspect
import json
import resource
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

import mambascope
from mambascope import MambaEye, MambaScope, VisionMamba, load_checkpoint
from mambascope.commands import evaluate as eval_cli
from mambascope.data.errors import DataError
from mambascope.data.modules import run_module
from mambascope.evaluation.choice import stored_rule
from mambascope.models.checkpoint import CheckpointError, describe, save_safetensors
from mambascope.models.ready import ready_model
from mambascope.peers import ReducedVim
from mambascope.peers.timm_classifier import TimmConfig, create_timm_classifier
from tests.hostile import RunsCode

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "d_state": 4, "num_classes": 3}
DEIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 3}
RESNET = {"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 8], "stem_width": 8, "img_size": 32, "num_classes": 3}
SWIN = {"embed_dim": 12, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 2, 4], "img_size": 224, "num_classes": 3}
MAKE = {
    "vim": lambda: VisionMamba(**SMALL),
    "reduced": lambda: ReducedVim(**SMALL, reduction={"name": "dyvm"}),
    "scope": lambda: MambaScope(**SMALL),
    "eye": lambda: MambaEye(patch_size=8, embed_dim=16, depth=2, d_state=4, head_dim=8, move_dim=8, num_classes=3),
    "deit": lambda: create_timm_classifier(TimmConfig.of("deit_tiny_patch16_224", DEIT)),
    "resnet": lambda: create_timm_classifier(TimmConfig.of("resnet50", RESNET)),
    "swin": lambda: create_timm_classifier(TimmConfig.of("swin_tiny_patch4_window7_224", SWIN)),
}
BILLION = 10**9


def refused(load, *words):
    """`load` ends at once, in one line with these words, and takes no memory to speak of."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        load()
    took, grown = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert took < 5  # it is far below a second, but the machine may be busy
    assert grown < 300_000  # KiB
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 800
    assert all(word in message for word in words), message


def changed(description, where, value):
    """A copy of a description with one value changed at a path of keys."""
    copy = json.loads(json.dumps(description))
    *parents, last = where
    section = copy
    for key in parents:
        section = section.setdefault(key, {})
    section[last] = value
    return copy


def stored(path, state, description):
    """A file of these tensors with this description: ``.safetensors``, or as Lightning writes it."""
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path, {"mambascope": json.dumps(description)})
    else:
        torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}, "mambascope": description}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "where", "values"),
    [
        ("vim", "config.depth", [BILLION, 10**30, -1, 0, 2.5, "2", None, True, [2], {"a": 1}, 1]),
        ("vim", "config.embed_dim", [BILLION, 10**18, -16, float("nan"), [16], 32]),
        ("vim", "config.img_size", [10**6, [10**6, 10**6], [32], "32", 0, [[32]], 64]),
        ("vim", "config.d_state", [BILLION, 8]),
        ("vim", "config.stem_width", [BILLION, 8]),
        ("vim", "config.num_classes", [BILLION, -1, "3", 4]),
        ("vim", "config.norm_eps", ["1e-5", float("inf"), float("nan"), 0]),
        (
            "vim",
            "config.reduction",
            [[1], "tome", {"name": ["tome"]}, {"name": "tome", "r": BILLION}, {"name": "dyvm"}],
        ),
        ("vim", "config.checkpoint_path", ["/etc/passwd"]),
        ("reduced", "config.reduction.stages", [list(range(1000)), "all", [[1]], BILLION]),
        ("scope", "config.reuse_ratio", [1e12, -4, [4]]),
        ("scope", "config.alpha", [2, "x", float("nan"), [0.7]]),
        ("scope", "config.fine_cls", [["first"], 5]),
        ("scope", "config.reuse_cls", ["yes", 10**9]),
        ("eye", "config.depth", [BILLION, True, "2"]),
        ("eye", "config.head_dim", [BILLION, 4]),
        ("eye", "config.drop_rate", ["x", [0]]),
        ("eye", "config.scan_backend", ["evil", ["torch"]]),
        ("eye", "glimpses", [{"length": 10**12}, {"canvas_size": 10**6}, {"pattern": ["x"]}, [1], {"compat": 5}]),
        ("deit", "config.args.depth", [BILLION, [BILLION], "x", 3.5]),
        ("deit", "config.args.embed_dim", [BILLION, "16", [16]]),
        ("deit", "config.img_size", [10**6, 4000, "x"]),
        ("deit", "config.args", ["x", [1], 5]),
        ("resnet", "config.args.layers", [[BILLION] * 4, BILLION, [[1]] * 4, [1] * 100_000]),
        ("resnet", "config.img_size", [10**6, [1, 2, 3]]),
        ("swin", "config.img_size", [4032]),  # gigabytes of masks beside a few kilobytes of weights
        ("swin", "config.args.window_size", [BILLION, 10**5]),
        ("vim", "labels", [["a"] * 4, [1, 2, 3], "abc", {"a": 1}]),
        ("vim", "transform", [[1], {"input_size": [3, 10**6, 10**6]}, {"crop_pct": 1e-9}, {"mean": [0.5] * 4}]),
        ("vim", "transform", [{"std": [0, 0, 0]}, {"interpolation": "/x"}, {"mean": "x"}, {"std": [float("nan")]}]),
        ("vim", "crop_pct", [1e-9]),  # what older files say outside of transform
        ("vim", "report", [[1], {"table": 5}, {"table": ["x"]}]),
        ("vim", "epochs", ["5", float("nan"), [5]]),
        ("vim", "architecture", ["os", 5, ["vim"]]),
        ("vim", "config", ["x", [1], 5]),
    ],
)
def test_no_value_of_a_description_does_harm(kind, where, values, tmp_path):
    model = MAKE[kind]()
    description = describe(model)
    path = tmp_path / "a.safetensors"
    mambascope.load(stored(path, model.state_dict(), description))  # warm, and fine as it is
    for value in values:
        stored(path, model.state_dict(), changed(description, where.split("."), value))
        refused(lambda: mambascope.load(path), str(path))


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(
    "args",
    [
        {"checkpoint_path": "evil.pth"},
        {"pretrained": True, "pretrained_cfg": {"file": "evil.pth"}},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": "evil.pth"}},
        {"pretrained": True, "cache_dir": "cache"},
        {"features_only": True},
        {"block_fn": "os.system"},
        {"act_layer": {"class_path": "os.system"}},
    ],
    ids=lambda args: [*args][-1],
)
def test_a_description_gives_timm_no_other_arguments(args, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(RunsCode(tmp_path / "code was run"), "evil.pth")
    model = MAKE["resnet"]()
    description = describe(model)
    description["config"]["args"] = {**description["config"]["args"], **args}
    stored(tmp_path / f"a{suffix}", model.state_dict(), description)
    refused(lambda: mambascope.load(tmp_path / f"a{suffix}"), [*args][-1])
    assert {p.name for p in tmp_path.iterdir()} == {"evil.pth", f"a{suffix}"}


@pytest.mark.parametrize(
    "name",
    ["hf-hub:timm/resnet50.a1_in1k", "local-dir:.", "../resnet50", 5, ["resnet50"], "mambascope_tiny_patch16_224"],
)
def test_a_description_names_a_model_of_timms_own(name, tmp_path):
    model = MAKE["resnet"]()
    path = stored(tmp_path / "a.safetensors", model.state_dict(), changed(describe(model), ["config", "name"], name))
    refused(lambda: mambascope.load(path), "name" if not isinstance(name, str) else name)
    stored(path, model.state_dict(), changed(describe(model), ["config", "name"], "vit_giant_patch14_dinov2"))
    refused(lambda: mambascope.load(path))  # a billion parameters for the names of a few


def test_where_weights_came_from_is_no_part_of_a_file(tmp_path):
    model = MAKE["resnet"]()
    older = changed(describe(model), ["config", "args", "pretrained"], True)  # what files of ours said until now
    assert "pretrained" not in mambascope.load(stored(tmp_path / "a.ckpt", model.state_dict(), older)).config.args
    object.__setattr__(model.config, "args", {**model.config.args, "pretrained": True})
    assert describe(model)["config"]["args"] == {
        k: v for k, v in RESNET.items() if k not in ("img_size", "num_classes")
    }
    with pytest.raises(ValueError, match=r"resnet18 is not made with exportable: arguments .* taken here are aa_layer"):
        TimmConfig.of("resnet18", {"exportable": True})  # a training says at once what its file could not


@pytest.mark.parametrize("kind", ["expanded", "meta", "sparse", "shared", "nested"])
def test_tensors_must_lie_in_the_file(kind, tmp_path):
    state = MAKE["vim"]().state_dict()
    wide = {
        "expanded": lambda: torch.zeros(1, 1).expand(BILLION, 16),
        "meta": lambda: torch.empty(BILLION, 16, device="meta"),
        "sparse": lambda: torch.sparse_coo_tensor(torch.zeros(2, 0, dtype=torch.long), torch.zeros(0), (BILLION, 16)),
        "nested": lambda: torch.nested.nested_tensor([torch.zeros(2, 16), torch.zeros(1, 16)]),
    }
    if kind == "shared":
        values = torch.zeros(10**6)
        state |= {f"extra.{i}": values for i in range(500)}
    else:
        state["head.weight"] = wide[kind]()
    description = changed(describe(MAKE["vim"]()), ["config", "num_classes"], BILLION)
    path = stored(tmp_path / "a.ckpt", state, description)
    refused(lambda: mambascope.load(path), "was refused")
    refused(lambda: load_checkpoint(MAKE["vim"](), path, strict=False), "was refused")


def test_an_archive_that_grows_is_not_read(tmp_path):
    state = MAKE["vim"]().state_dict() | {"extra": torch.zeros(2 * 10**7)}
    stored(tmp_path / "a.ckpt", state, {})
    del state
    with zipfile.ZipFile(tmp_path / "a.ckpt") as plain, zipfile.ZipFile(tmp_path / "b.ckpt", "w") as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED, 1)
    assert (tmp_path / "b.ckpt").stat().st_size < 2_000_000
    refused(lambda: load_checkpoint(MAKE["vim"](), tmp_path / "b.ckpt"), "unpacks to more than its own size")


def test_descriptions_that_are_no_plain_values(tmp_path):
    state, description = MAKE["vim"]().state_dict(), describe(MAKE["vim"]())
    shared = ["x"] * 10
    for _ in range(30):
        shared = [shared] * 10  # 10 ** 31 values in a kilobyte
    loop = []
    loop.append(loop)
    for value in (shared, loop, torch.zeros(3), {5: 1}, b"x"):
        stored(tmp_path / "a.ckpt", state, {**description, "report": {"x": value}})
        refused(lambda: mambascope.load(tmp_path / "a.ckpt"), "damaged description")
    for text in ("9" * 5000, "[" * 100_000, "[1]", '{"config": 5}'):
        save_file(state, tmp_path / "a.safetensors", {"mambascope": text})
        refused(lambda: mambascope.load(tmp_path / "a.safetensors"), "damaged description")


@pytest.mark.parametrize(
    "choice", [3, ["rule"], {"rule": 5}, {"rule": "\x1b[2J"}, {"rule": "a\nb"}, {"rule": "x" * 2000}]
)
def test_the_rule_that_predict_prints_is_one_line(choice, tmp_path):
    model = MAKE["scope"]()
    state, description = model.state_dict(), describe(model)
    path = stored(tmp_path / "a.safetensors", state, {**description, "report": {"choice": choice}})
    refused(lambda: mambascope.load(path), "report.choice must be a mapping whose rule is one line")
    kept = {"rule": "top-1 drop at most 0.50 %", "threshold": model.threshold}
    stored(path, state, {**description, "report": {"choice": kept}})
    assert stored_rule(mambascope.load(path)) == kept["rule"]


@pytest.mark.parametrize(
    "extra",
    [
        {"checkpoint_path": "evil.pth"},
        {"pretrained": True, "pretrained_cfg": {"file": "evil.pth"}},
        {"d_state": BILLION},
        {"img_size": 10**6},
    ],
    ids=lambda extra: [*extra][-1],
)
def test_other_ways_to_a_described_model(extra, tmp_path, monkeypatch):
    """``--model NAME`` and timm's ``pretrained=True`` take options from the file, too."""
    monkeypatch.chdir(tmp_path)
    torch.save(RunsCode(tmp_path / "code was run"), "evil.pth")
    model = timm.create_model("vim_nano_patch8_64")
    description = describe(model)
    description["config"] |= extra
    path = stored(tmp_path / "a.ckpt", model.state_dict(), description)
    refused(lambda: ready_model(path, name="vim_nano_patch8_64"))
    overlay = {"file": str(path)}
    refused(lambda: timm.create_model("vim_nano_patch8_64", pretrained=True, pretrained_cfg_overlay=overlay))
    assert not (tmp_path / "code was run").exists()


def test_weights_load_whatever_sizes_their_description_has(tmp_path):
    """The model is there already; only its position table asks for sizes."""
    model, description = MAKE["vim"](), describe(MAKE["vim"]())
    for size in ("x", [1, 2, 3], 0, None, 10**6):
        stored(tmp_path / "a.safetensors", model.state_dict(), changed(description, ["config", "img_size"], size))
        larger = VisionMamba(**{**SMALL, "img_size": 64})
        if size in (None, 10**6):
            assert load_checkpoint(larger, tmp_path / "a.safetensors", verbose=False).resampled == ["pos_embed"]
        else:
            refused(lambda: load_checkpoint(larger, tmp_path / "a.safetensors"), "img_size")  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
@pytest.mark.parametrize("name", ["head.weight", "pos_embed"])
def test_tensors_of_no_real_numbers_are_not_copied(name, dtype, tmp_path):
    model = MAKE["vim"]()
    state = model.state_dict()
    state[name] = torch.ones(state[name].shape, dtype=dtype)
    path = stored(tmp_path / "a.ckpt", state, describe(model))
    refused(lambda: mambascope.load(path), f"{name} is {dtype}, the description asks for torch.float32")
    refused(lambda: load_checkpoint(model, path), f"{name} is {dtype} in the file and torch.float32 in the model")
    half = {k: v.bfloat16() for k, v in model.state_dict().items()}
    assert mambascope.load(stored(path, half, describe(model))).head.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["head.weight", "pos_embed", "patch_embed.stem_proj.weight", "layers.0.mixer.A_log"])
def test_tensors_of_no_such_shape_are_named(name, tmp_path):
    """Files that do not describe themselves are asked for their sizes."""
    model = timm.create_model("vim_nano_patch8_64")
    for shape in ((), (3,), (0,), (0, 0, 0), (1, 0, 96), (1, 1, 96), (2, 65, 96), (1, 1, 1, 1, 1)):
        torch.save({"model": {**model.state_dict(), name: torch.zeros(shape)}}, tmp_path / "a.pth")
        refused(lambda: load_checkpoint(model, tmp_path / "a.pth"), "does not fit VisionMamba")
        refused(lambda: ready_model(tmp_path / "a.pth", name="vim_nano_patch8_64"), "does not fit VisionMamba")


def test_the_hub_reads_no_other_description(tmp_path):
    MAKE["scope"]().save_pretrained(tmp_path)
    for text in ('{"model_id": "x", "token": 5}', '{"config": {"depth": 1000000000}}', "[1]", "{", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        assert MambaScope.from_pretrained(tmp_path).config.depth == 2


def test_labels_of_a_classifier_that_was_replaced_are_not_saved(tmp_path):
    model = MAKE["vim"]()
    model.description = {"labels": list("abc")}
    model.reset_classifier(2)
    save_safetensors(model, tmp_path / "a.safetensors")
    assert mambascope.load(tmp_path / "a.safetensors").labels is None
    model.reset_classifier(5)  # a model may have more classes than its data have names
    save_safetensors(model, tmp_path / "a.safetensors", {"labels": list("abcd")})
    assert mambascope.load(tmp_path / "a.safetensors").labels == list("abcd")


GLIMPSES = "mambascope.eye.datamodules.GlimpseImageDataModule"


@pytest.mark.parametrize(
    "section",
    [
        {"class_path": "stranger.Data"},
        "stranger.Data",
        {"class_path": GLIMPSES, "init_args": {"root": ".", "augment": "stranger.Data"}},
        {"class_path": GLIMPSES, "init_args": {"root": ".", "glimpses": {"class_path": "stranger.Data"}}},
        {"class_path": "os.system", "init_args": {"command": "touch imported"}},
        {"class_path": "mambascope.data.image_io.open_image"},
        {"class_path": ["x"]},
        None,
        5,
    ],
)
def test_a_runs_configuration_imports_nothing_else(section, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("stranger.py").write_text("open('imported', 'w').close()\nclass Data: pass\n")
    save_safetensors(MAKE["vim"](), "model.safetensors")
    Path("config.yaml").write_text(yaml.safe_dump({"data": section}))
    assert eval_cli.main(["model.safetensors"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith("is none of this package's data modules; pass --data\n")
    assert not Path("imported").exists()


def test_damaged_configurations_of_runs(tmp_path):
    lists = "a: &a [x, x, x, x, x, x, x, x]\n"
    for old, new in zip("abcdefg", "bcdefgh", strict=True):
        lists += f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n"
    config = tmp_path / "config.yaml"
    for text in ("- a", "{", "data: !!python/name:os.system", f"{lists}data: *h", "data: &x [*x]", ""):
        config.write_text(text)
        start = time.perf_counter()
        with pytest.raises(DataError, match=r"config\.yaml cannot be opened: .*; pass --data$") as caught:
            run_module(config)
        assert time.perf_counter() - start < 5
        assert "\n" not in str(caught.value)


def test_timm_reads_checkpoints_safely_from_the_lowest_version_on():
    """timm 1.0.26 is the first with this default."""
    lines = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["dependencies"]
    (least,) = (line.removeprefix("timm>=") for line in lines if line.startswith("timm"))
    assert tuple(map(int, least.split("."))) >= (1, 0, 26)
    assert inspect.signature(timm.models.load_checkpoint).parameters["weights_only"].default is True
