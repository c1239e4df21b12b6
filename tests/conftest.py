"""Shared test settings: one thread keeps small tests fast, and random draws repeat."""

import signal
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

# a shell that starts the tests in the background leaves SIGINT ignored, also in the commands that tests interrupt
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value."""
    return ((value.double() - reference.double()).abs().max() / reference.double().abs().max().clamp_min(1e-30)).item()
