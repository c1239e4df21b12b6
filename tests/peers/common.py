"""Small encoders with token reduction."""

import timm
import torch

SMALL = {"embed_dim": 16, "d_state": 4, "depth": 6, "img_size": 32, "patch_size": 4, "num_classes": 5}  # 64 patches
METHODS = {
    "hidden_align": {"name": "hidden_align", "keep": 0.6},
    "hidden_align_off": {"name": "hidden_align", "keep": (0.9, 0.5), "layers": [0, 3], "align": False},
    "r_meeto": {"name": "r_meeto", "r": 13},
    "tome": {"name": "tome", "r": 13},
    "mtr": {"name": "mtr", "r": 13, "start": 1},
    "dyvm": {"name": "dyvm", "keep": 0.7},
    "dyvm_tokens": {"name": "dyvm", "keep": 0.7, "block_ratio": 1},
    "dyvm_scans": {"name": "dyvm", "keep": 1, "block_ratio": 0.5},
}
NOTHING = {
    "hidden_align": {"name": "hidden_align", "keep": 1},
    "r_meeto": {"name": "r_meeto", "r": 0},
    "tome": {"name": "tome", "r": 0},
    "mtr": {"name": "mtr", "r": 0},
    "dyvm": {"name": "dyvm", "keep": 1, "block_ratio": 1},
}


def small(reduction=None, seed=0, **options):
    """A small Vim with weights that depend on the seed alone; its switches are neither all on nor all off."""
    torch.manual_seed(seed)
    plain = timm.create_model("vim_nano_patch8_64", **{**SMALL, **options})
    model = timm.create_model("vim_nano_patch8_64", **{**SMALL, **options}, reduction=reduction)
    model.load_state_dict({**model.state_dict(), **plain.state_dict()})
    spread_switches(model)
    return model.eval()


@torch.no_grad()
def spread_switches(model):
    """Makes the switches depend on the image: fresh ones are all open at test time."""
    for switch in getattr(getattr(model, "reduction", None), "switches", ()):
        switch.weight.normal_(std=20.0)
        switch.bias.zero_()


def images(count=3, size=32, seed=1, channels=3):
    """Normal noise [count, channels, size, size]."""
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))
