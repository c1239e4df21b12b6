"""Values of options: numbers of every library, and what is refused by name."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mambascope import MambaScope, VisionMamba
from mambascope.models import ScopeConfig, VimConfig, load_model
from mambascope.models.cells import num_selected
from mambascope.models.checkpoint import CheckpointError, describe, read_state_dict
from mambascope.models.engine import ScopePredictor
from mambascope.models.gate import check_threshold, exit_mask

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 3}
HALVES = [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5).half()]
NO_NUMBERS = [True, False, None, "0.5", float("nan"), np.nan, torch.tensor([0.1, 0.2]), torch.tensor(True), 1j]


@pytest.mark.parametrize("half", HALVES, ids=lambda v: type(v).__name__)
def test_numbers_of_every_library(half):
    model = MambaScope(**SMALL, alpha=half, threshold=half).eval()
    assert (type(model.alpha), model.alpha, type(model.threshold), model.threshold) == (float, 0.5, float, 0.5)
    json.dumps(describe(model))
    model.set_alpha(half)
    model.threshold = half
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        out, plain = model.forward_scope(x, half, half), model.forward_scope(x, 0.5, 0.5)
    assert torch.equal(out.logits, plain.logits)
    assert num_selected(half, 9) == 5
    assert check_threshold(half) == 0.5
    assert exit_mask(torch.tensor([0.4, 0.5]), half).tolist() == [False, True]
    assert ScopePredictor(model, threshold=half, alpha=half).alpha == 0.5


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused(value):
    for name in ("threshold", "alpha", "beta", "drop_rate", "norm_eps", "reuse_ratio"):
        with pytest.raises(ValueError, match=f"{name} must"):
            MambaScope(**SMALL, **{name: value})
    model = MambaScope(**SMALL).eval()
    with pytest.raises(ValueError, match="threshold must be a number"):
        check_threshold(value)
    with pytest.raises(ValueError, match="alpha must lie in"):
        model.set_alpha(value)
    if value is not None:
        with pytest.raises(ValueError, match="threshold must be a number"):
            model.forward_scope(torch.randn(1, 3, 32, 32), value)
        with pytest.raises(ValueError, match="alpha must lie in"):
            model.forward_both(torch.randn(1, 3, 32, 32), value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_eps": 0}, "norm_eps must be a positive number, got 0"),
        ({"norm_eps": float("inf")}, "norm_eps must be a positive number"),
        ({"scan_backend": "cuda"}, "scan_backend must be None or one of reference, torch, cpu, triton, mamba_ssm"),
        ({"depth": True}, "depth must be a positive integer"),
        ({"drop_rate": 1.0}, r"drop_rate must lie in \[0, 1\)"),
    ],
)
@pytest.mark.parametrize("kind", [VimConfig, ScopeConfig])
def test_options_are_checked_where_the_config_is_made(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize("description", ["[1]", '"text"', "3", "null", '{"config": [1]}', "{", "[" * 100_000])
def test_descriptions_of_the_wrong_shape(tmp_path, description):
    state = VisionMamba(**SMALL).state_dict()
    save_file(state, tmp_path / "x.safetensors", metadata={"mambascope": description})
    for reader in (read_state_dict, load_model):
        with pytest.raises(CheckpointError, match="damaged description"):
            reader(tmp_path / "x.safetensors")
    torch.save({"state_dict": state, "mambascope": [1]}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="damaged description"):
        read_state_dict(tmp_path / "x.ckpt")


def test_from_pretrained_takes_no_model_options(tmp_path):
    MambaScope(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_pretrained does not accept alpha, depht, only cache_dir"):
        MambaScope.from_pretrained(tmp_path, alpha=0.3, depht=4)
    assert MambaScope.from_pretrained(tmp_path, local_files_only=True).alpha == 0.7


def test_off_may_be_what_yaml_makes_of_it():
    model = MambaScope(img_size=32, patch_size=8, embed_dim=16, depth=1, reuse=False)
    assert (model.config.reuse, model.reuse) == ("off", None)
