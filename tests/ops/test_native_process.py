"""Compiled CPU kernels in forked processes, data-loader workers and several threads; choice of level; build hook."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mambascope.ops import native

ROOT = Path(__file__).parents[2]
needs_kernels = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

_PRELUDE = """
import multiprocessing, numpy, sys, torch
from mambascope.ops import native
torch.manual_seed(0)
torch.set_num_threads(2)
x, dt, A, B, C = torch.randn(4, 200, 96), torch.randn(4, 200, 96), -torch.rand(96, 8), *torch.randn(2, 4, 200, 8)
inputs, ones = (x, dt, A, B, C), torch.ones_like(x)
def work():
    y = native.scan_forward(*inputs)
    return [y, *[g for g in native.scan_backward(ones, *inputs) if g is not None]]
expected = work()  # starts the OpenMP pool of this process
def same(found):  # in numpy: a parallel torch operation is what hangs in a forked child
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(found, expected)]  # sums over threads differ in their last bits
    return all(numpy.abs(a - b).max() <= 1e-5 * numpy.abs(b).max() for a, b in pairs)
"""


def _run(script: str, seconds: int = 120, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script in a fresh interpreter; a deadlock shows up as a timeout instead of hanging the test session."""
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


_FAILING_ALLOCATOR = r"""
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
int refused = 0;  // 1: on every thread, 2: on every thread but the first
void *aligned_alloc(size_t alignment, size_t size) {
  void *memory = 0;
  if (refused == 1 || (refused == 2 && syscall(SYS_gettid) != getpid())) return 0;
  return posix_memalign(&memory, alignment, size) ? 0 : memory;
}
"""


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="replaces the C library's allocator by LD_PRELOAD")
@pytest.mark.parametrize("refused", [1, 2])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_running_out_of_memory_is_an_error_on_any_thread(tmp_path, threads, refused):
    """An exception that left a worker thread would end the process."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "failing.c", tmp_path / "failing.so"
    source.write_text(_FAILING_ALLOCATOR)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    done = _run(
        f"""
import ctypes, torch
from mambascope.ops import native
torch.set_num_threads({threads})
refused = ctypes.c_int.in_dll(ctypes.CDLL({str(library)!r}), "refused")
x, dt, A, B, C = torch.randn(8, 50, 96), torch.rand(8, 50, 96), -torch.rand(96, 8), *torch.randn(2, 8, 50, 8)
calls = {{
    "forward": lambda: native.scan_forward(x, dt, A, B, C),
    "backward": lambda: native.scan_backward(torch.ones_like(x), x, dt, A, B, C)[0],
}}
for name, call in calls.items():
    refused.value = {refused}
    try:
        call()
        print(name, "went through")
    except MemoryError as error:
        print(name, error)
    refused.value = 0
    assert bool(call().isfinite().all())
""",
        LD_PRELOAD=str(library),
        OMP_NUM_THREADS=str(threads),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, line in zip(("forward", "backward"), done.stdout.splitlines(), strict=True):
        failed = f"{name} native scan_{name} could not allocate its buffers"
        if refused == 1:
            assert line == failed
        else:  # the first thread may have done the work of all before they came to it
            assert line in ((failed, f"{name} went through") if threads > 1 else (f"{name} went through",))


@needs_kernels
@needs_fork
def test_fork_after_openmp():
    """The pool's threads do not survive a fork: the child must not wait for them."""
    done = _run(
        _PRELUDE
        + """
def child():
    assert torch.get_num_threads() == 2
    sys.exit(0 if same(work()) else 3)
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(60)
assert process.exitcode == 0, f"child: {process.exitcode} (None: deadlock)"
assert same(work())
"""
    )
    assert done.returncode == 0, done.stderr


@needs_kernels
@needs_fork
def test_dataloader_workers():
    done = _run(
        _PRELUDE
        + """
class Items(torch.utils.data.Dataset):
    def __len__(self): return 6
    def __getitem__(self, i): return torch.tensor(same(work()))
loader = torch.utils.data.DataLoader(Items(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
assert all(batch.all() for batch in loader)
assert same(work())
"""
    )
    assert done.returncode == 0, done.stderr


@needs_kernels
def test_many_python_threads_at_once():
    """ctypes releases the GIL: calls of several threads overlap, each with scratch memory of its own."""
    make = torch.Generator().manual_seed(0)
    problems = []
    for i in range(4):
        B, L, E, N = 1 + i, 10 + 17 * i, 16 + 20 * i, 8 * (1 + i % 2)
        randn = lambda *shape: torch.randn(*shape, generator=make)  # noqa: E731
        problems.append((randn(B, L, E), randn(B, L, E), -randn(E, N).abs(), randn(B, L, N), randn(B, L, N)))

    def work(inputs):
        y = native.scan_forward(*inputs)
        return [y, *[g for g in native.scan_backward(torch.ones_like(y), *inputs) if g is not None]]

    expected = [work(p) for p in problems]
    wrong: list[int] = []

    def loop(index: int) -> None:
        for _ in range(25):
            result = work(problems[index])
            if not all(
                torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(result, expected[index], strict=True)
            ):
                wrong.append(index)

    threads = [threading.Thread(target=loop, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@needs_kernels
def test_level_is_chosen_by_environment():
    show = "from mambascope.ops import native; print(native.info()['isa'], native.why_unavailable())"
    here = Path(native.__file__).parent
    lowest = next(isa for isa in ("v1", "base") if (here / f"_kernels_{isa}.so").exists())
    assert _run(show, MAMBASCOPE_NATIVE_ISA=lowest).stdout.split()[0] == lowest
    off = _run(show, MAMBASCOPE_NATIVE_ISA="off").stdout
    assert off.startswith("None switched off by MAMBASCOPE_NATIVE_ISA")
    unknown = _run(show, MAMBASCOPE_NATIVE_ISA="v9").stdout
    assert "'v9' is not one of the levels built here" in unknown
    assert lowest in unknown


def _build(target: Path, compiler: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(target)],
        cwd=ROOT,
        env={**os.environ, "CXX": compiler},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


needs_source = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@needs_source
def test_build_without_compiler_warns_and_goes_on(tmp_path):
    done = _build(tmp_path, str(tmp_path / "no-such-compiler"))
    assert done.returncode == 0, done.stderr
    assert "CPU kernels were not compiled" in done.stderr
    built = tmp_path / "mambascope" / "ops" / "native"
    assert not list(built.glob("*.so"))
    assert "no-such-compiler" in (built / "_build_error.txt").read_text()


@needs_source
def test_build_with_a_compiler_that_lacks_openmp(tmp_path):
    """As on macOS: -fopenmp is refused, the second attempt with -pthread counts."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'for argument; do if [ "$argument" = -fopenmp ]; then echo "error: unsupported option" >&2; exit 1; fi; done\n'
        'while [ "$1" != -o ]; do shift; done; echo built > "$2"\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    done = _build(tmp_path / "out", str(compiler))
    assert done.returncode == 0, done.stderr
    assert "not compiled" not in done.stderr
    built = tmp_path / "out" / "mambascope" / "ops" / "native"
    assert [path.read_text() for path in built.glob("_kernels_*.so")]
    assert not (built / "_build_error.txt").exists()
    assert not list(built.glob("*.tmp"))
