"""How the branches of MAC and MAG meet: attention's output and the memory's."""

import jax
from flax import nnx

from memjax.layers import RMSNorm
from memjax.typing import Array, Float

WAYS = ("gate", "product", "sum")


class Combine(nnx.Module):
    """Two branches into one, each normalised first with a learned vector (Titans, section 4.4).

        gate:     RMSNorm(y) * sigmoid(RMSNorm(m))
        product:  RMSNorm(y) * SiLU(RMSNorm(m))
        sum:      RMSNorm(y) + RMSNorm(m)

    The paper writes a gating with a non-linearity and leaves its form open (docs/deviations.md).

    Args:
        dim: model dimension.
        way: "gate", "product" or "sum".
        rngs: taken as every layer takes it; nothing is drawn.
    Raises:
        ValueError: another way.
    Source: Titans (arXiv:2501.00663), equations 25 and 28.
    """

    def __init__(self, dim: int, way: str = "gate", *, rngs: nnx.Rngs):
        if way not in WAYS:
            raise ValueError(f"combine {way!r} must be one of {', '.join(WAYS)}")
        self.way = way
        self.attention_norm = RMSNorm(dim, rngs=rngs)
        self.memory_norm = RMSNorm(dim, rngs=rngs)

    def __call__(
        self, attention: Float[Array, "B T E"], memory: Float[Array, "B T E"]
    ) -> Float[Array, "B T E"]:
        """The combined output, [B, T, dim]."""
        y, m = self.attention_norm(attention), self.memory_norm(memory)
        if self.way == "gate":
            return y * jax.nn.sigmoid(m)
        if self.way == "product":
            return y * jax.nn.silu(m)
        return y + m
