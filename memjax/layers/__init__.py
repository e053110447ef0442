"""Layers: the Flax modules that own slow weights and call the pure functions."""

from memjax.layers.conv import CausalConv, ConvState
from memjax.layers.feed_forward import SwiGLU
from memjax.layers.linear import Linear
from memjax.layers.norm import RMSNorm
from memjax.layers.rotary import rotary

__all__ = [
    "CausalConv",
    "ConvState",
    "Linear",
    "RMSNorm",
    "SwiGLU",
    "rotary",
]
