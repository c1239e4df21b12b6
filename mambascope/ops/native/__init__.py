"""Compiled CPU kernels: selective scan, depthwise convolution, RMSNorm; forward and backward, float32 and bfloat16.

C++ with a plain C interface, called through ctypes: no link to torch, so one build serves every torch and Python
version. It is compiled when the package is installed, once per instruction-set level; without a compiler
:func:`why_unavailable` says so and the PyTorch implementations are used. ``MAMBASCOPE_NATIVE_ISA`` (``v1``, ``v3``,
``v4``, ``base``, ``off``) overrides the choice that is made from the flags of the CPU.

Work is spread over batch and channel blocks on ``torch.get_num_threads()`` threads of the OpenMP pool that torch uses.
A process that was forked always runs on one thread: the pool of its parent does not exist there.
"""

from mambascope.ops.native.library import info, why_unavailable
from mambascope.ops.native.pointwise import (
    add_rms_norm_backward,
    add_rms_norm_forward,
    conv_backward,
    conv_forward,
    supports_conv,
    supports_norm,
)
from mambascope.ops.native.scan import (
    bidirectional_backward,
    bidirectional_forward,
    new_states,
    scan_backward,
    scan_forward,
    supports,
)

__all__ = [
    "add_rms_norm_backward",
    "add_rms_norm_forward",
    "bidirectional_backward",
    "bidirectional_forward",
    "conv_backward",
    "conv_forward",
    "info",
    "new_states",
    "scan_backward",
    "scan_forward",
    "supports",
    "supports_conv",
    "supports_norm",
    "why_unavailable",
]
