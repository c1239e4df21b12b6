"""The Triton backend on a machine without a GPU: imports, refusals, and its kernels in Triton's interpreter."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambascope.ops import triton
from mambascope.ops.backends import Request, why_not

HERE = Path(__file__).parent
HAS_TRITON = importlib.util.find_spec("triton") is not None


def test_importing_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import mambascope.ops\n"
        "from mambascope.ops import triton\n"
        "assert not [m for m in sys.modules if m.endswith('_kernels')]\n"
        "assert 'triton' in triton.why_unavailable('cpu'), triton.why_unavailable('cpu')\n"
    )
    env = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(triton.interpreted(), reason="the interpreter was asked for")
def test_reasons_name_what_is_missing():
    assert "TRITON_INTERPRET" in triton.why_unavailable("cpu")
    assert "mps" in triton.why_unavailable("mps")
    if not torch.cuda.is_available():
        assert "CUDA" in triton.why_unavailable()
        assert "CUDA" in why_not("triton", Request("scan", "cuda", torch.bfloat16, 16))
    assert "TRITON_INTERPRET" in why_not("triton", Request("conv", "cpu", torch.float32, 4))


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_limits_are_refused_in_words(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "float64" in triton.supports(torch.float64, device="cpu")
    assert "65" in triton.supports(torch.float32, N=65, device="cpu")
    assert "E = 0" in triton.supports(torch.float32, E=0, device="cpu")
    assert "9" in triton.supports_conv(torch.float32, 9, device="cpu")
    assert "16384" in triton.supports_norm(torch.float32, 1 << 20, device="cpu")
    assert "gemm" in triton.why_not("gemm", "cpu", torch.float32)
    for op, size in (("scan", 16), ("conv", 4), ("norm", 0)):
        assert triton.why_not(op, "cpu", torch.bfloat16, size) is None


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_kernels_in_the_interpreter():
    """All of ``triton_kernels.py``, in a process whose Triton was imported with its interpreter switched on."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", HERE / "triton_kernels.py"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=HERE.parent.parent, env=env, capture_output=True, text=True, timeout=570)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout
    assert int(passed[1]) >= 25
    assert "skipped" not in run.stdout
