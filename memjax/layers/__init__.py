"""Layers: the Flax modules that own slow weights and call the pure functions."""

from memjax.layers.attention import Attention, AttentionState
from memjax.layers.conv import CausalConv, ConvState
from memjax.layers.feed_forward import SwiGLU
from memjax.layers.linear import Linear
from memjax.layers.matrix_memory import MatrixMemory, MatrixMemoryState
from memjax.layers.neural_memory import NeuralMemory, NeuralMemoryState
from memjax.layers.norm import RMSNorm
from memjax.layers.rotary import rotary

__all__ = [
    "Attention",
    "AttentionState",
    "CausalConv",
    "ConvState",
    "Linear",
    "MatrixMemory",
    "MatrixMemoryState",
    "NeuralMemory",
    "NeuralMemoryState",
    "RMSNorm",
    "SwiGLU",
    "rotary",
]
