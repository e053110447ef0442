"""Reductions of matrices by one pass over them, whose results are kept for the backward pass.

XLA's reductions on CPU take three to ten times as long as such a pass, and read what goes into them
from memory. Sums of slices are one loop with it. Elsewhere reductions are what they should be.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from memjax.typing import Array, Float

PARTS = 16  # of the rows, at most
_NUMBER, _ROWS = "number of a pass", "rows of a pass"
# For `jax.checkpoint`: what is kept, where matrices are formed again.
keep_numbers = jax.checkpoint_policies.save_only_these_names(_NUMBER)
keep_results = jax.checkpoint_policies.save_only_these_names(_NUMBER, _ROWS)


def result(x: Float[Array, "*N I O"]) -> Float[Array, "*N I O"]:
    """x, which took a pass over a matrix to find: a number, or rows of it."""
    return checkpoint_name(x, _NUMBER if x.shape[-2:] == (1, 1) else _ROWS)


def total(of: Callable, *x: Float[Array, "*N I O"]) -> Float[Array, "*N 1 1"]:
    """The sum of `of(x)` over every matrix."""
    return _reduced(jnp.sum, jnp.add, (-2, -1), of, *x)


def largest(of: Callable, *x: Float[Array, "*N I O"]) -> Float[Array, "*N 1 1"]:
    """The largest entry of `of(x)` in every matrix."""
    return _reduced(jnp.max, jnp.maximum, (-2, -1), of, *x)


def largest_of_columns(x: Float[Array, "*N I O"]) -> Float[Array, "*N 1 O"]:
    """The largest entry of every column."""
    return _reduced(jnp.max, jnp.maximum, -2, lambda part: part, x)


def _reduced(reduce, combine, axis, of, *x: Float[Array, "*N I O"]) -> Float[Array, "*N 1 J"]:
    """`reduce(of(x))`, where that is slow of parts that `combine` has put together."""
    return jax.lax.platform_dependent(
        *x,
        cpu=lambda *x: reduce(_folded(combine, of, *x), axis=axis, keepdims=True),
        default=lambda *x: reduce(of(*x), axis=axis, keepdims=True),
    )


def _folded(combine, of, *x: Float[Array, "*N I O"]) -> Float[Array, "*N J O"]:
    """`of(x)` with its rows cut into even parts, if they can be, and these put together."""
    rows = x[0].shape[-2]
    parts = max(d for d in range(1, PARTS + 1) if rows % d == 0)
    cut = zip(*(jnp.split(z, parts, axis=-2) for z in x), strict=True)
    y = functools.reduce(combine, (of(*part) for part in cut))
    if y.shape[-2] % 2 == 0:  # slices: XLA would take what is no slice into the reduction
        y = combine(*jnp.split(y, 2, axis=-2))
    return y
