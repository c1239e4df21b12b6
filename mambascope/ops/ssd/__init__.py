"""State-space duality (Mamba-2): the scan with one scalar decay per head."""

from mambascope.ops.ssd.api import SSD_BACKENDS, ssd_backend, ssd_scan, ssd_step

__all__ = ["SSD_BACKENDS", "ssd_backend", "ssd_scan", "ssd_step"]
