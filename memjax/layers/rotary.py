"""Rotary positions."""

import jax.numpy as jnp

from memjax.typing import Array, Float, Int


def rotary(
    x: Float[Array, "B T H D"],
    positions: Int[Array, "B T"],
    base: float = 10000.0,
) -> Float[Array, "B T H D"]:
    """Rotates each pair of features by an angle that grows with the position.

    Feature i < D/2 is paired with i + D/2; both turn by `positions * base^(-2 i / D)`, so that the
    product of a query and a key depends on the distance of their positions only. Position 0
    changes nothing. Angles and products are fp32 (float64 for float64 inputs).

    Args:
        x: [B, T, H, D], queries or keys.
        positions: [B, T], place of each token in its document.
        base: of the geometric series of wavelengths.

    Returns:
        [B, T, H, D] in the dtype of x.

    Raises:
        ValueError: D is odd.

    Source: Su et al., 2021, arXiv:2104.09864, equations 15 and 34 (with the halves paired, not
    neighbours).
    """
    dim = x.shape[-1]
    if dim % 2:
        raise ValueError(f"rotary positions pair features: head_dim {dim} must be even")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    frequency = base ** (-jnp.arange(0, dim, 2, dtype=wide) / dim)
    angle = positions[:, :, None, None].astype(wide) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
