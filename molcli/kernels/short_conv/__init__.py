"""Causal depthwise convolution inside segments, with weights of their own for every block."""

from molcli.kernels.short_conv.reference import short_conv, short_conv_state

__all__ = ["short_conv", "short_conv_state"]
