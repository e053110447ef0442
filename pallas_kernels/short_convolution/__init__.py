"""Causal depthwise convolution of a few taps: `short_convolution`; `reference` says what it
computes."""

from pallas_kernels.short_convolution.op import misfit, short_convolution

__all__ = ["misfit", "short_convolution"]
