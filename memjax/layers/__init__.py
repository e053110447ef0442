"""Layers: the Flax modules that own slow weights and call the pure functions."""

from memjax.layers.attention import Attention, AttentionState
from memjax.layers.continuum import ContinuumMemory, ContinuumState
from memjax.layers.conv import CausalConv, ConvState
from memjax.layers.feed_forward import SwiGLU
from memjax.layers.gated_associative import GatedAssociativeMemory
from memjax.layers.hope import Hope, HopeState
from memjax.layers.linear import Linear
from memjax.layers.matrix_memory import MatrixMemory, MatrixMemoryState
from memjax.layers.mixture_of_memories import MixtureOfMemories, MixtureOfMemoriesState
from memjax.layers.neural_memory import NeuralMemory, NeuralMemoryState
from memjax.layers.norm import RMSNorm
from memjax.layers.rotary import rotary
from memjax.layers.rwkv7 import RWKV7, RWKV7State
from memjax.layers.self_referential import SelfReferentialMemory, SelfReferentialState
from memjax.layers.tnt import TNTMemory, TNTState

__all__ = [
    "RWKV7",
    "Attention",
    "AttentionState",
    "CausalConv",
    "ContinuumMemory",
    "ContinuumState",
    "ConvState",
    "GatedAssociativeMemory",
    "Hope",
    "HopeState",
    "Linear",
    "MatrixMemory",
    "MatrixMemoryState",
    "MixtureOfMemories",
    "MixtureOfMemoriesState",
    "NeuralMemory",
    "NeuralMemoryState",
    "RMSNorm",
    "RWKV7State",
    "SelfReferentialMemory",
    "SelfReferentialState",
    "SwiGLU",
    "TNTMemory",
    "TNTState",
    "rotary",
]
