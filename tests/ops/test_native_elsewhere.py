"""The CPU kernels on their own, without PyTorch: on this machine, and built for AArch64 under an emulator.

The second needs Debian's ``g++-aarch64-linux-gnu`` and ``qemu-user``; continuous integration without them skips it.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("native_check.cpp")
KERNELS = Path(__file__).parents[2] / "mambascope" / "ops" / "native"
FLAGS = ["-O2", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fopenmp"]


def check(compiler: str, folder: Path, *, flags: tuple[str, ...] = (), under: tuple[str, ...] = ()) -> str:
    """Builds the checks and returns what they print."""
    program = folder / "check"
    command = [compiler, *FLAGS, *flags, f"-I{KERNELS}", str(SOURCE), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode and any(word in built.stderr for word in ("-fopenmp", "omp.h", "libgomp")):
        pytest.skip(f"{compiler} has no OpenMP")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([*under, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_kernels_without_pytorch(tmp_path):
    lines = check("c++", tmp_path).splitlines()
    assert lines[-1] == "all checks passed"
    assert len([line for line in lines if line.endswith("ok")]) > 100


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None,
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)
def test_kernels_on_aarch64(tmp_path):
    printed = check("aarch64-linux-gnu-g++", tmp_path, flags=("-static",), under=("qemu-aarch64",))
    assert printed.startswith("lanes 4\n")
    assert printed.endswith("all checks passed\n")


def test_a_wrong_kernel_is_seen(tmp_path):
    """The checks can fail: with another slope of the softplus they do."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    kernels = tmp_path / "native"
    shutil.copytree(KERNELS, kernels, ignore=shutil.ignore_patterns("*.so", "*.py", "__pycache__"))
    simd = kernels / "simd.h"
    text = simd.read_text()
    assert "4.999949315e-01f" in text
    simd.write_text(text.replace("4.999949315e-01f", "4.9e-01f"))
    program = tmp_path / "check"
    command = ["c++", *FLAGS, f"-I{kernels}", str(SOURCE), "-o", str(program)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "WRONG" in done.stdout
