"""The Triton kernels compile for an H200 without one being there, and the compiled code is what was designed.

The speed of these kernels hangs on Triton choosing layouts that keep states in registers. A hint that no longer works
shows up here as shared memory, shuffles or spills, not as a wrong result.
"""

import functools
import os
import re
import subprocess
from pathlib import Path

import pytest

from mambascope.ops.triton.launch import interpreted

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter was asked for")

FLOATS = {
    "states", "starts", "score", "ends", "dt_sums", "inner", "carry", "BC", "dBC", "packed", "dA", "dD", "dbias",
    "a0", "a1", "d0", "d1", "bias0", "bias1", "weight_f", "weight_b", "bias_f", "bias_b", "dw", "weight", "total",
    "rstd", "d_total", "d_weight", "grad_total", "residual",
}  # fmt: skip
STREAMS = {
    "x0", "x1", "dt0", "dt1", "z", "raw", "out", "y_sum", "grad", "dx0", "dx1", "ddt0", "ddt1", "dz",
    "x", "y_f", "y_b", "grad_f", "grad_b", "dx", "hidden", "normed",
}  # fmt: skip
COLUMNS = {"b0", "b1", "c0", "c1", "v0", "v1"}
ALIGNED = {"E", "D", "x_b", "x_l", "z_b", "z_l", "dt_b", "dt_l", "g_b", "g_l", "gf_b", "gf_l", "gb_b", "gb_l"}


@functools.cache
def tools() -> Path:
    return Path(triton.__file__).parent / "backends/nvidia/bin"


def build(kernel, constants, warps, stream="*bf16", columns="*fp32", registers=None):
    """Compiles a kernel for compute capability 9.0; returns (compiled, registers, stack bytes, shared bytes, SASS)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOATS:
            signature[name] = "*fp32"
        elif name in STREAMS:
            signature[name] = stream
        elif name in COLUMNS:
            signature[name] = columns
        else:
            signature[name] = "fp32" if name in ("scale", "eps") else "i32"
        if signature[name].startswith("*") or name in ALIGNED:
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": warps} | ({"maxnreg": registers} if registers else {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled


def resources(compiled, folder):
    """Registers, stack bytes, shared bytes and disassembly, read with the tools that come with Triton."""
    dump, disassemble = tools() / "cuobjdump", tools() / "nvdisasm"
    if not (os.access(dump, os.X_OK) and os.access(disassemble, os.X_OK)):
        pytest.skip("this build of triton brings no cuobjdump and nvdisasm")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([dump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage_figures = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    code = subprocess.run([disassemble, "-c", cubin], capture_output=True, text=True, check=True).stdout
    return (*(int(v) for v in usage_figures.groups()), code)


def count(code, instruction):
    return len(re.findall(rf"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?{instruction}", code, re.MULTILINE))


def forward_constants(**changes):
    constants = {
        "N": 16, "NB": 16, "NG": 1, "DIRS": 2, "REVERSE": False, "BE": 64, "CPT": 2, "T": 4, "KEEP": 32, "ALIGN": 16,
        "SOFTPLUS": True, "HAS_D": True, "HAS_BIAS": True, "HAS_Z": True, "SAVE_SUM": False, "SAVE_STATES": False,
        "HAS_STARTS": False, "HAS_SCORE": False,
    }  # fmt: skip
    return constants | changes


def test_forward_walk_stays_in_registers(tmp_path):
    from mambascope.ops.triton.forward_kernels import scan_forward_kernel

    compiled = build(scan_forward_kernel, forward_constants(), 2, registers=168)
    registers, stack, shared, code = resources(compiled, tmp_path)
    assert registers <= 168
    assert stack <= 64, "the states should not be spilled"
    assert shared == 0, "nothing is exchanged between threads"
    assert count(code, "SHFL") == 0
    # 4 tokens x 2 channels x (16 decays + softplus + gate), and one vector load of B and C per 4 states
    assert count(code, r"MUFU\.EX2") == 4 * 2 * (16 + 2)
    assert count(code, "LDG") <= 16 * 2 + 4 * (2 * 4 + 4) + 8


def test_single_channel_threads_stay_in_registers(tmp_path):
    from mambascope.ops.triton.forward_kernels import scan_forward_kernel

    compiled = build(scan_forward_kernel, forward_constants(BE=32, CPT=1), 2)
    registers, stack, shared, code = resources(compiled, tmp_path)
    assert (stack, shared, count(code, "SHFL")) == (0, 0, 0)
    assert registers <= 128


@pytest.mark.parametrize(
    ("changes", "warps", "columns"),
    [
        ({"SAVE_SUM": True, "SAVE_STATES": True, "HAS_SCORE": True}, 2, "*bf16"),
        (
            {"DIRS": 1, "REVERSE": True, "HAS_Z": False, "HAS_D": False, "HAS_BIAS": False, "SOFTPLUS": False},
            1,
            "*fp32",
        ),
        ({"N": 12, "BE": 32, "CPT": 1, "HAS_STARTS": True, "SAVE_STATES": True}, 2, "*fp32"),
        ({"N": 32, "NG": 2, "BE": 32, "CPT": 1}, 2, "*fp32"),
    ],
    ids=["training", "bare", "masked", "32_states"],
)
def test_forward_variants_compile(changes, warps, columns):
    from mambascope.ops.triton.forward_kernels import scan_forward_kernel

    build(scan_forward_kernel, forward_constants(**changes), warps, columns=columns)


def test_backward_keeps_its_chunk_in_registers(tmp_path):
    from mambascope.ops.triton.backward_kernels import scan_backward_kernel

    constants = {
        "N": 16, "DIRS": 2, "REVERSE": False, "BE": 64, "CPT": 2, "T": 8, "M": 4, "SOFTPLUS": True, "HAS_D": True,
        "HAS_BIAS": True, "HAS_Z": True, "ATOMIC": False,
    }  # fmt: skip
    registers, stack, _, code = resources(build(scan_backward_kernel, constants, 1, registers=168), tmp_path)
    assert registers <= 168
    assert stack <= 512
    # sums over channels for dB and dC: 2 x 8 tokens x 5 steps across a warp; anything more is a layout gone wrong
    assert count(code, "SHFL") == 2 * 8 * 5


def test_the_other_kernels_compile():
    from mambascope.ops.triton.backward_kernels import scan_backward_kernel, scan_pack_kernel, scan_unpack_kernel
    from mambascope.ops.triton.conv_kernels import conv_backward_kernel, conv_forward_kernel
    from mambascope.ops.triton.forward_kernels import segment_carry_kernel, segment_state_kernel
    from mambascope.ops.triton.norm_kernels import norm_backward_kernel, norm_forward_kernel

    state = {k: v for k, v in forward_constants(N=8, NB=8).items() if k in segment_state_kernel.arg_names}
    for grad in (False, True):
        build(segment_state_kernel, state | {"GRAD": grad}, 2)
        carry = {"N": 8, "DIRS": 2, "REVERSE": False, "BE": 128, "GRAD": grad}
        build(segment_carry_kernel, carry, 4)
    tile = {"N": 12, "NP": 16, "DIRS": 2, "REVERSE": False, "T": 8, "BL": 64}
    build(scan_pack_kernel, tile, 4, columns="*bf16")
    build(scan_unpack_kernel, tile, 4, columns="*bf16")
    atomic = {
        "N": 12, "DIRS": 1, "REVERSE": True, "BE": 32, "CPT": 1, "T": 8, "M": 4, "SOFTPLUS": False, "HAS_D": False,
        "HAS_BIAS": False, "HAS_Z": False, "ATOMIC": True,
    }  # fmt: skip
    build(scan_backward_kernel, atomic, 1, stream="*fp32")
    conv = {"K": 4, "CAUSAL": True, "ANTI": True, "HAS_BIAS": True, "SILU": True, "BE": 128, "SPAN": 64, "T": 4}
    for changes in ({}, {"ANTI": False, "K": 3, "SILU": False}, {"CAUSAL": False, "K": 1, "HAS_BIAS": False}):
        build(conv_forward_kernel, conv | changes, 2)
        build(conv_backward_kernel, conv | changes, 2)
    build(norm_forward_kernel, {"HAS_RESIDUAL": True, "BD": 512}, 2)
    build(norm_backward_kernel, {"HAS_TOTAL": True, "BD": 512}, 2)
