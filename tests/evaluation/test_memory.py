"""The memory of a call is what it holds at most, and what it keeps."""

import sys

import numpy as np
import pytest

from mambascope.evaluation import memory
from mambascope.evaluation.memory import peak_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the system tells resident sizes on Linux only")
MIB = 2**20


@pytest.mark.parametrize("size", [32, 128])
def test_what_a_call_holds_at_most(size):
    def call():
        first = np.ones(size * MIB, np.uint8)
        del first  # given back before the second is taken
        np.ones(size * MIB // 2, np.uint8)

    assert abs(peak_memory(call) - size) < 8


def test_what_a_call_keeps_counts_once():
    kept = {}
    assert abs(peak_memory(lambda: kept.setdefault("block", np.ones(64 * MIB, np.uint8))) - 128) < 8
    assert peak_memory(lambda: kept["block"].sum()) < 8


def test_a_system_that_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    calls = []
    assert peak_memory(lambda: calls.append(1)) is None
    assert len(calls) == 2  # whoever measures sees that it works


def test_an_error_of_the_call_is_raised():
    with pytest.raises(ValueError, match="invalid literal"):
        peak_memory(lambda: int("x"))
