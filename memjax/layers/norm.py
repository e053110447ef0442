"""Normalisation by the root mean square, with a learned scale."""

import jax
import jax.numpy as jnp
from flax import nnx

from memjax import checks
from memjax.typing import Array, Float


class RMSNorm(nnx.Module):
    """Divides by the root mean square of the last axis: `y = x / sqrt(mean(x^2) + eps) * scale`.

    Computed in fp32 (float64 for float64 inputs), returned in the dtype of the input. The scale
    starts at one.

    Args:
        dim: size of the last axis.
        rngs: taken as every layer takes it; nothing is drawn.
        eps: added to the mean square.
        axis_name: logical name of the last axis.

    Raises:
        ValueError: dim is no integer of at least 1.

    Source: Zhang and Sennrich, 2019, arXiv:1910.07467, equation 4.
    """

    def __init__(
        self,
        dim: int,
        *,
        rngs: nnx.Rngs,
        eps: float = 1e-6,
        axis_name: str | None = "embed",
    ):
        checks.whole("dim", dim)
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), axes=(axis_name,))

    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        """Normalises x.

        Args:
            x: [..., dim].

        Returns:
            [..., dim] in the dtype of x.

        Raises:
            ValueError: the last axis of x is not `dim`.
        """
        dim = self.scale.shape[-1]
        if x.shape[-1:] != (dim,):
            raise ValueError(f"x has shape {x.shape}; its last axis must be {dim}")
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * self.scale[...]).astype(x.dtype)
