"""Shared test settings: one thread keeps small tests fast, and random draws repeat."""

import os
import signal
from pathlib import Path

# before torch reads them; the commands that tests start inherit them. Tests of several threads ask for them
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import pytest
import torch

from mambascope.models import MambaScope, ScopeConfig
from mambascope.ops.native import library

GOLDEN = Path(__file__).parent / "golden"

# a shell that starts the tests in the background leaves SIGINT ignored, also in the commands that tests interrupt
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With ``-n``, the tests of a file that share a fixture of the module run in the process that makes it."""
    for item in items:
        fixtures = [fixture for group in item._fixtureinfo.name2fixturedefs.values() for fixture in group]
        if any(fixture.scope == "module" for fixture in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    torch.set_num_threads(1)


LEVELS = [level for level in library.LEVELS if (library._HERE / f"_kernels_{level}.so").exists()]


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """Every instruction level of the CPU kernels that this machine runs, in one process."""
    lowest = library.Library(LEVELS[-1], library._HERE / f"_kernels_{LEVELS[-1]}.so")
    if request.param != "base" and int(request.param[1:]) > lowest.cpu_level():
        pytest.skip("beyond this CPU")
    path = library._HERE / f"_kernels_{request.param}.so"
    monkeypatch.setattr(library, "_library", library.Library(request.param, path))
    return request.param


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory for commands that run in this process; the runs they started are left afterwards."""
    from mambascope.training.runs import leave_runs

    monkeypatch.chdir(tmp_path)
    yield tmp_path
    leave_runs()
    os.environ.pop("PL_GLOBAL_SEED", None)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value."""
    return ((value.double() - reference.double()).abs().max() / reference.double().abs().max().clamp_min(1e-30)).item()


class FineCalls:
    """Counts the images that go through a MambaScope's fine stage from now on.

    Attributes:
        images: How many did.
    """

    def __init__(self, model: MambaScope) -> None:
        self.images = 0
        self._forward = model.forward_fine
        model.forward_fine = self._counted

    def _counted(self, x: torch.Tensor, *args, **kwargs):
        self.images += len(x)
        return self._forward(x, *args, **kwargs)


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
    from mambascope.models.gate import confidence

    with torch.no_grad():
        ranked = confidence(tiny_scope.forward_coarse(images).logits).sort().values
    return float((ranked[14] + ranked[15]) / 2)
