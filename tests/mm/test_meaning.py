"""Backbones start from weights of the same meaning, and checkpoints of anything else are named."""

import pytest
import torch

from mambascope import MambaScope, VisionMamba
from mambascope.models.checkpoint import save_safetensors
from tests.mm import common

from mambascope.mm.backbone import VimBackbone  # isort: skip
from mambascope.mm.loading import build_model  # isort: skip
from mambascope.mm.scope_backbone import ScopeBackbone  # isort: skip

SIZES = {"img_size": 64, "patch_size": 8, "num_classes": 3, **common.TINY}


def start(path, make=ScopeBackbone, **options):
    arch = {ScopeBackbone: "mambascope_nano_patch8_64", VimBackbone: "vim_nano_patch8_64"}[make]
    init = {"type": "Pretrained", "checkpoint": str(path)}
    make(arch, arch_options={**common.TINY, **options}, init_cfg=init).init_weights()


@pytest.mark.parametrize(
    ("field", "value"),
    [("norm_eps", 1e-3), ("fine_order", "important_last"), ("cell_order", "raster"), ("coarse_pos", "resampled")],
)
def test_every_field_that_makes_another_meaning_is_compared(field, value, tmp_path):
    save_safetensors(MambaScope(**SIZES, **{field: value}), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"it has {field}={value!r} .here .*change arch or arch_options"):
        start(tmp_path / "a.safetensors")
    start(tmp_path / "a.safetensors", **{field: value})


def test_what_the_head_reads_is_no_part_of_a_backbone(tmp_path):
    save_safetensors(MambaScope(**SIZES, global_pool="lse", alpha=0.5), tmp_path / "a.safetensors")
    start(tmp_path / "a.safetensors")


@pytest.mark.parametrize("make", [ScopeBackbone, VimBackbone])
def test_a_table_of_another_stride_is_named(make, tmp_path):
    torch.save({"model": VisionMamba(**SIZES, stride=4).state_dict()}, tmp_path / "vim.pth")
    with pytest.raises(ValueError, match="stride is 4 in the file and 8 in the model, as its 15 x 15 positions"):
        start(tmp_path / "vim.pth", make)


@pytest.mark.parametrize("content", [{"state_dict": 5}, {"state_dict": {"x": 5}}, [1], {"model": {}}])
def test_checkpoints_of_anything_else_are_named(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth is not one of a segmentor or detector"):
        build_model(common.demo_config("seg"), tmp_path / "a.pth")
