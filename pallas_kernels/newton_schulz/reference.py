"""Newton-Schulz orthogonalisation, product by product: what the kernel must equal."""

import jax.numpy as jnp

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(x, steps=5):
    """`X <- a X + (b A + c A A) X` with `A = X X^T`, from `x / ||x||_F`; see `op.newton_schulz`."""
    a, b, c = COEFFICIENTS
    square = jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)
    x = x / jnp.sqrt(jnp.where(square > 0, square, 1))
    for _ in range(steps):
        if x.shape[-2] <= x.shape[-1]:
            gram = x @ jnp.swapaxes(x, -1, -2)
            x = a * x + (b * gram + c * gram @ gram) @ x
        else:
            gram = jnp.swapaxes(x, -1, -2) @ x
            x = a * x + x @ (b * gram + c * gram @ gram)
    return x
