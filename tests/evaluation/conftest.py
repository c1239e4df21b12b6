"""A small MambaScope whose confidences are spread, and images for it."""

import pytest
import torch

from mambascope.models import MambaScope, ScopeConfig


@pytest.fixture(scope="session")
def tiny_scope():
    """Two blocks of width 32 on 32-pixel images: 8 x 8 patches, 4 x 4 cells; in evaluation mode."""
    torch.manual_seed(0)
    config = ScopeConfig(img_size=32, patch_size=4, embed_dim=32, depth=2, num_classes=7, alpha=0.5)
    model = MambaScope(config).eval()
    with torch.no_grad():
        model.head.weight.mul_(60)  # an untrained head is sure of nothing
    return model


@pytest.fixture(scope="session")
def images():
    """Thirty images [30, 3, 32, 32] that differ in contrast."""
    torch.manual_seed(1)
    return torch.randn(30, 3, 32, 32) * torch.linspace(0.2, 3, 30).view(-1, 1, 1, 1)


@pytest.fixture(scope="session")
def labels():
    """Their labels [30]."""
    return torch.arange(30) % 7


@pytest.fixture(scope="session")
def eta(tiny_scope, images):
    """A threshold that about half of the images pass, in the middle between two confidences."""
    from mambascope.models.exit import confidence

    with torch.no_grad():
        ranked = confidence(tiny_scope.forward_coarse(images).logits).sort().values
    return float((ranked[14] + ranked[15]) / 2)
