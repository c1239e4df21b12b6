"""Build hook for the compiled CPU kernels; everything else about the package is in pyproject.toml.

The kernels are one torch-free C++ file, compiled once per instruction-set level into ``mambascope/ops/native`` with
``$CXX`` (default ``c++``). They are optional: without a working compiler the installation goes through as a pure Python
package, and ``mambascope.ops.report()`` tells why the PyTorch implementations are used. ``MAMBASCOPE_BUILD_NATIVE=0``
skips them on purpose.
"""

import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PACKAGE = "mambascope.ops.native"
# -ffast-math is left out on purpose: it removes the rounding by a large constant that the exponential is built on.
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fvisibility=hidden", "-fPIC", "-shared", "-Wno-psabi"]
LEVELS = {"v1": "-march=x86-64", "v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4"}


def compile_level(compiler: list[str], source: Path, target: Path, machine: list[str]) -> str | None:
    """Compiles one shared object, with OpenMP if the compiler has it; returns the error text or None."""
    partial = target.with_suffix(".tmp")
    error = ""
    for threads in (["-fopenmp"], ["-pthread"]):
        command = [*compiler, *FLAGS, *machine, *threads, str(source), "-o", str(partial)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as failure:
            return f"{compiler[0]}: {failure.strerror or failure}"
        if done.returncode == 0:
            os.replace(partial, target)
            return None
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        error = error or f"{compiler[0]}: {lines[0] if lines else f'exit status {done.returncode}'}"
    return error


def build_kernels(source_dir: Path, target_dir: Path) -> list[Path]:
    """Compiles every level into `target_dir`, after removing an earlier build; returns what was built."""
    log = target_dir / "_build_error.txt"
    for old in (*target_dir.glob("_kernels_*.so"), log):
        old.unlink(missing_ok=True)
    if os.environ.get("MAMBASCOPE_BUILD_NATIVE", "1") == "0":
        log.write_text("switched off with MAMBASCOPE_BUILD_NATIVE=0 when the package was installed\n")
        return []
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    jobs = [(target_dir / f"_kernels_{name}.so", [flag]) for name, flag in LEVELS.items()] if x86 else []
    jobs = jobs or [(target_dir / "_kernels_base.so", [])]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        errors = list(pool.map(lambda job: compile_level(compiler, source_dir / "kernels.cpp", *job), jobs))
    failed = [target.stem for (target, _), error in zip(jobs, errors, strict=True) if error]
    if failed:
        message = f"{', '.join(failed)}: {'; '.join(sorted({error for error in errors if error}))}"
        print(
            f"warning: mambascope: CPU kernels were not compiled ({message}). Installing without them: the slower "
            "PyTorch implementations will be used. Install a C++17 compiler and reinstall to get them.",
            file=sys.stderr,
        )
        log.write_text(message + "\n")
    return [target for target, _ in jobs if target.exists()]


class BuildWithKernels(build_py):
    """Copies the Python files, then compiles next to them (into the source tree for an editable install)."""

    def run(self) -> None:
        super().run()
        source_dir = Path(self.get_package_dir(PACKAGE))
        target_dir = source_dir if self.editable_mode else Path(self.build_lib, *PACKAGE.split("."))
        target_dir.mkdir(parents=True, exist_ok=True)
        self.kernels = build_kernels(source_dir, target_dir)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *(str(path) for path in getattr(self, "kernels", []))]


class PlatformWheel(bdist_wheel):
    """Tags the wheel for this platform if it holds kernels: they fit any Python version, but one kind of machine."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.get_finalized_command("build_py").kernels
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, tag_platform = super().get_tag()
        return (python, abi, tag_platform) if self.root_is_pure else ("py3", "none", tag_platform)


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
