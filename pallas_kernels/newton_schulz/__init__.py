"""Newton-Schulz orthogonalisation: `newton_schulz`; `reference` says what it computes."""

from pallas_kernels.newton_schulz.op import fits, newton_schulz

__all__ = ["fits", "newton_schulz"]
