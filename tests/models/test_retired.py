"""Options that were removed: what names them is read where they had no effect, and refused in one line elsewhere."""

import inspect
import json
import shutil
from dataclasses import fields

import pytest
import timm
from safetensors import safe_open
from safetensors.torch import save_file

from mambascope import MambaScope, VisionMamba, load, load_checkpoint
from mambascope.models import load_model
from mambascope.models.architectures import ARCHITECTURES
from mambascope.models.checkpoint import CheckpointError, describe
from mambascope.models.losses import ScopeLoss
from mambascope.models.ready import ready_model
from mambascope.models.retired import RETIRED, RETIRED_LOSS, without_retired
from mambascope.models.weights import SHIPPED

ENTRY = "mambascope_nano_patch8_64"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 3}
OTHERS = {
    "registers": 4, "shuffle_rate": 0.2, "alpha_rule": "mass", "alpha_min": 0.1, "alpha_max": 0.5, "alpha_buckets": 2,
    "confidence": "entropy", "temperature": 0.7, "score_source": "post_gate", "score_direction": "forward",
    "score_stride": 1, "rest_tokens": "none", "rest_join": 1, "fine_depth": 1, "fine_pool": "all",
    "coarse_interpolation": "nearest",
}  # fmt: skip
"""A value of each retired field that had an effect."""
SWITCH = {"alpha_rule": "mass"}


@pytest.fixture(scope="module")
def model():
    return MambaScope(**SMALL).eval()


def write(model, folder, **retired):
    """A weights file of an earlier version: its description has all retired fields."""
    description = describe(model)
    description["config"] |= RETIRED | retired
    path = folder / "model.safetensors"
    save_file(model.state_dict(), path, metadata={"mambascope": json.dumps(description)})
    return path


def readers(model):
    """Every way from a file to a model."""
    return {
        "load": load,
        "load_model": load_model,
        "folder": lambda path: load_model(path.parent),
        "load_checkpoint": lambda path: load_checkpoint(model, path, verbose=False),
        "not strict": lambda path: load_checkpoint(model, path, strict=False, verbose=False),
        "from_pretrained": lambda path: MambaScope.from_pretrained(path.parent),
        "ready_model": ready_model,
        "pretrained": lambda path: timm.create_model(
            ENTRY, pretrained=True, pretrained_cfg_overlay={"file": str(path)}
        ),
    }


def test_weights_of_an_earlier_version_load(model, tmp_path):
    path = write(model, tmp_path)
    for name, read in readers(model).items():
        read(path)
        if name in ("load", "load_model", "folder", "from_pretrained", "ready_model", "pretrained"):
            assert read(path).config == model.config, name


@pytest.mark.parametrize("name", RETIRED)
def test_weights_of_an_option_that_was_removed_are_refused(model, name, tmp_path):
    path = write(model, tmp_path, **{**(SWITCH if name.startswith("alpha_") else {}), name: OTHERS[name]})
    field = "alpha_rule" if name.startswith("alpha_") else name
    line = f"{field}={OTHERS[field]!r} is of an option that was removed; commit ed6fe22 is the last one that has it"
    for reader, read in readers(model).items():
        with pytest.raises(CheckpointError) as error:
            read(path)
        assert str(error.value) == f"checkpoint {path} cannot be used: {line}", reader


def test_fields_that_did_nothing_are_no_reason(model, tmp_path):
    assert load_model(write(model, tmp_path, alpha_min=0.1, alpha_max=0.5, alpha_buckets=2)).config == model.config


def test_the_shipped_weights_are_of_an_earlier_version(tmp_path):
    with safe_open(SHIPPED["scopedigits_published"], framework="pt") as file:
        config = json.loads(file.metadata()["mambascope"])["config"]
    carried = config.keys() & RETIRED.keys()
    assert "score_stride" in carried
    assert all(config[field] == RETIRED[field] for field in carried)
    path = shutil.copy(SHIPPED["scopedigits_published"], tmp_path / "copy.safetensors")
    assert load("scopedigits_published").config == load(path).config
    timm.create_model(ENTRY, pretrained=True)


def test_all_retired_fields_at_their_defaults_load(model, tmp_path):
    assert load_model(write(model, tmp_path, **RETIRED)).config == model.config


@pytest.mark.parametrize("name", RETIRED)
def test_arguments(name):
    kinds = (MambaScope, VisionMamba) if name in ("registers", "shuffle_rate") else (MambaScope,)
    for kind in kinds:
        assert kind(**SMALL, **{name: RETIRED[name]}).config == kind(**SMALL).config
    with pytest.raises(ValueError, match=rf"\w+={OTHERS['alpha_rule' if 'alpha' in name else name]!r} is of an option"):
        timm.create_model(ENTRY, **{**(SWITCH if name.startswith("alpha_") else {}), name: OTHERS[name]})


def test_types_of_numbers_do_not_matter():
    assert without_retired({"temperature": 1, "registers": 0.0, "depth": 2}) == {"depth": 2}
    for wrong in ({"registers": False}, {"temperature": True}, {"alpha_rule": ["constant"]}, {"rest_join": 0}):
        with pytest.raises(ValueError, match="was removed"):
            without_retired(wrong)


def test_what_is_retired_is_nowhere_else():
    for architecture in ARCHITECTURES.values():
        assert not {field.name for field in fields(architecture.config_class)} & RETIRED.keys()
    assert not inspect.signature(ScopeLoss).parameters.keys() & RETIRED_LOSS.keys()
