"""Selective scan (Mamba-1) in one or both directions."""

from mambascope.ops.selective_scan.api import ScanDirection, bidirectional_scan, selective_scan

__all__ = ["ScanDirection", "bidirectional_scan", "selective_scan"]
