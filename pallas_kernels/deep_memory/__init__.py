"""The deep memory: `deep_memory`; `reference` says what it computes."""

from pallas_kernels.deep_memory.op import deep_memory, fits

__all__ = ["deep_memory", "fits"]
