"""The engine's matrix product: operands in the compute dtype, accumulation in fp32 or wider."""

import functools

import jax
import jax.numpy as jnp

from memjax.typing import Array, Float


def accumulation_dtype(*dtypes) -> jnp.dtype:
    """fp32, or fp64 where an argument is fp64: the dtype of states and sums."""
    return functools.reduce(jnp.promote_types, dtypes, jnp.float32)


def matmul(
    a: Float[Array, "*N I J"], b: Float[Array, "*N J K"], *, compute: jnp.dtype
) -> Float[Array, "*N I K"]:
    """`a @ b` with operands rounded to `compute` and the sum kept in the accumulation dtype.

    In 16-bit dtypes its derivative rounds the cotangent to `compute` too, so that every product of
    forward and backward runs at the matrix unit's native rate.
    """
    if jnp.dtype(compute).itemsize < 4:
        return _narrow_matmul(a, b, jnp.dtype(compute))
    return jnp.matmul(a, b, preferred_element_type=accumulation_dtype(a.dtype, b.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow_matmul(a, b, compute):
    return jnp.matmul(a.astype(compute), b.astype(compute), preferred_element_type=jnp.float32)


def _forward(a, b, compute):
    return _narrow_matmul(a, b, compute), (a.astype(compute), b.astype(compute), a[:0], b[:0])


def _backward(compute, residuals, cotangent):
    a, b, a_like, b_like = residuals
    by_a = _narrow_matmul(cotangent, jnp.swapaxes(b, -1, -2), compute)
    by_b = _narrow_matmul(jnp.swapaxes(a, -1, -2), cotangent, compute)
    return by_a.astype(a_like.dtype), by_b.astype(b_like.dtype)


_narrow_matmul.defvjp(_forward, _backward)
