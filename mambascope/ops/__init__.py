"""Operators of Vision Mamba. Needs torch only."""

from mambascope.ops.backends import BACKENDS, check_backend, report
from mambascope.ops.causal_conv1d import bidirectional_conv, causal_conv1d
from mambascope.ops.flops import count_macs
from mambascope.ops.gemm import linear
from mambascope.ops.norm import add_rms_norm
from mambascope.ops.selective_scan import ScanDirection, bidirectional_scan, selective_scan

__all__ = [
    "BACKENDS",
    "ScanDirection",
    "add_rms_norm",
    "bidirectional_conv",
    "bidirectional_scan",
    "causal_conv1d",
    "check_backend",
    "count_macs",
    "linear",
    "report",
    "selective_scan",
]
