"""Newton-Schulz iteration: the nearest orthogonal matrix, by products alone."""

import jax
import jax.numpy as jnp

from memjax import sharding
from memjax.miras.precision import matmul
from memjax.typing import Array, Float
from pallas_kernels.newton_schulz import fits, newton_schulz
from pallas_kernels.newton_schulz.reference import COEFFICIENTS


def orthogonal(x: Float[Array, "*N I J"], steps: int = 5) -> Float[Array, "*N I J"]:
    """Singular values of x brought near 1 (between about 0.7 and 1.2 after 5 steps).

        X_0 = x / ||x||_F,   A = X X^T,   X <- 3.4445 X + (-4.7750 A + 2.0315 A A) X

    The products are on the side of the shorter axis; where x is 0, so is the result. On TPU a
    kernel does all iterations in VMEM, its products in bf16 unless `jax.default_matmul_precision`
    asks for more, as XLA would have them.

    Args:
        x: matrices.
        steps: number of iterations.
    Source: Muon (K. Jordan, 2024), whose coefficients trade exactness for speed.
    """
    exact = jax.config.jax_default_matmul_precision in ("highest", "float32")
    compute = jnp.float32 if exact else jnp.bfloat16
    # What the compiler still splits over devices is no place for a kernel.
    if (
        sharding.platform() == "tpu"
        and not sharding.compiler_axes()
        and x.dtype in (jnp.float32, jnp.bfloat16)
        and fits(x.shape[-2:], x.dtype, compute, steps)
    ):
        return newton_schulz(x, steps, compute=compute, implementation="pallas")
    turn = x.shape[-2] > x.shape[-1]
    x = _transposed(x) if turn else x
    square = jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)
    tiny = jnp.finfo(x.dtype).tiny
    x = x * jnp.where(square > tiny, 1 / jnp.sqrt(jnp.maximum(square, tiny)), 0)
    for _ in range(steps):
        x = _iterate(x)
    return _transposed(x) if turn else x


@jax.custom_vjp
def _iterate(x):
    return COEFFICIENTS[0] * x + _product(_symmetric(x)[1], x)


def _forward(x):
    return _iterate(x), x


def _backward(x, by_next):
    """With A = X X^T, H = b A + c A A, both symmetric, and S = G X^T + X G^T:

        dX = a G + H G + (b S + c (A S + S A)) X

    Four products beside A and H, where the derivative of each product for itself takes seven.
    """
    a, b, c = COEFFICIENTS
    gram, polynomial = _symmetric(x)
    s = _product(by_next, _transposed(x))
    s += _transposed(s)
    both = _product(gram, s)
    by_gram = b * s + c * (both + _transposed(both))
    return (a * by_next + _product(polynomial, by_next) + _product(by_gram, x),)


_iterate.defvjp(_forward, _backward)


def _symmetric(x):
    """A = X X^T and b A + c A A."""
    _, b, c = COEFFICIENTS
    gram = _product(x, _transposed(x))
    return gram, b * gram + c * _product(gram, gram)


def _product(x, y):
    return matmul(x, y, compute=x.dtype)


def _transposed(x):
    return jnp.swapaxes(x, -1, -2)
