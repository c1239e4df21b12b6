"""The gate's confidence: values by hand, and its range."""

import pytest
import torch

from mambascope.models.gate import confidence


def test_values_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    assert confidence(p.log()).tolist() == pytest.approx([0.7, 1 / 3], abs=1e-12)
    assert confidence(torch.zeros(2, 1)).tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_range_and_extremes(dtype):
    logits = torch.cat([torch.randn(50, 7) * 20, torch.zeros(1, 7), 200.0 * torch.eye(7)[:1]]).to(dtype)
    values = confidence(logits)
    assert values.dtype == torch.float32
    assert bool(((values >= 0) & (values <= 1)).all())
    assert values[-1] == 1
    assert values[-2] == pytest.approx(1 / 7, abs=1e-6)
