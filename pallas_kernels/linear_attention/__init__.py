"""Linear attention with decay: `linear_attention`; `reference` says what it computes."""

from pallas_kernels.linear_attention.op import linear_attention

__all__ = ["linear_attention"]
