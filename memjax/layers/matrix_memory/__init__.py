"""Matrix memories as sequence mixers: linear attention, its decays, and the delta family.

`MatrixMemory` is the shell that these papers share; the functions build each paper's own, by name.
"""

from memjax.layers.matrix_memory.decayed import gla, linear_attention, mamba2, retnet
from memjax.layers.matrix_memory.delta import delta_net, gated_delta_net, kda, longhorn, mesa_net
from memjax.layers.matrix_memory.layer import MatrixMemory, MatrixMemoryState

__all__ = [
    "MatrixMemory",
    "MatrixMemoryState",
    "delta_net",
    "gated_delta_net",
    "gla",
    "kda",
    "linear_attention",
    "longhorn",
    "mamba2",
    "mesa_net",
    "retnet",
]
