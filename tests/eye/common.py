"""Small pictures and sizes for the tests of MambaEye."""

import numpy as np
from PIL import Image

from mambascope.eye.dataset import GlimpseOptions

SMALL = {"embed_dim": 32, "depth": 2, "d_state": 8, "head_dim": 16, "move_dim": 8, "patch_size": 8, "num_classes": 3}
LABELS = ["ant", "bee", "cat"]
OPTIONS = GlimpseOptions(length=20, canvas_size=32, patch_size=8)


class Pictures:
    """Seven random pictures of different sizes."""

    def __len__(self):
        return 7

    def __call__(self, index):
        rng = np.random.default_rng(index)
        return Image.fromarray(rng.integers(0, 256, (30 + index, 40, 3), dtype=np.uint8)), index % 3
