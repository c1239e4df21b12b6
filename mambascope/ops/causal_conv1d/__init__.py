"""Causal depthwise convolution over tokens with SiLU, in one or both directions."""

from mambascope.ops.causal_conv1d.api import bidirectional_conv, causal_conv1d

__all__ = ["bidirectional_conv", "causal_conv1d"]
