"""Newton-Schulz orthogonalisation: `newton_schulz`; `reference` says what it computes."""

from pallas_kernels.newton_schulz.op import newton_schulz

__all__ = ["newton_schulz"]
