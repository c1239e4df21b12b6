"""Capturing inference in a CUDA graph."""

import pytest
import torch
from torch import nn

from mambascope.ops.graphs import graphed


def test_needs_cuda():
    with pytest.raises(ValueError, match="CUDA"):
        graphed(nn.Linear(2, 2).eval(), torch.zeros(1, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestOnCuda:
    def test_training_mode_is_refused(self):
        with pytest.raises(ValueError, match="eval"):
            graphed(nn.Linear(2, 2).cuda(), torch.zeros(1, 2, device="cuda"))

    @pytest.mark.parametrize("name", ["vim_nano_patch8_64"])
    def test_vim_gives_the_same_logits(self, name):
        import timm

        import mambascope.models  # noqa: F401  (registers the entries)

        model = timm.create_model(name, num_classes=5).cuda().eval()
        first, second = (torch.randn(2, 3, 64, 64, device="cuda") for _ in range(2))
        run = graphed(model, first)
        with torch.no_grad():
            for x in (first, second):
                torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="x must be"):
            run(first[:1])
