"""A scan whose backward pass recomputes inside groups, so that few states are held at once."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from memjax.typing import PyTree


def group_size(length: int, group: int | None) -> int:
    """Steps per group: as asked, or the size near sqrt(length) that wastes the fewest steps."""
    if group is not None:
        if group < 0:
            raise ValueError(f"remat {group} must be 0 (keep everything) or a group size")
        return min(group, length) if group else length
    root = math.sqrt(length)
    sizes = range(max(1, math.ceil(root / 2)), min(length, math.ceil(root * 2)) + 1)
    return min(sizes, key=lambda g: (math.ceil(length / g) * g - length, abs(g - root)))


def grouped_scan(
    step: Callable, carry: PyTree, xs: PyTree, *, group: int | None, inert: PyTree
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan(step, carry, xs)`, saving for the backward pass one carry a group.

    Args:
        step: `(carry, x) -> (carry, y)`.
        carry: the first carry.
        xs: inputs, with one leading axis.
        group: steps per group; None = near the square root of the length, 0 = save every step.
        inert: an input (without the leading axis) on which `step` leaves the carry as it is.
    """
    length = jax.tree.leaves(xs)[0].shape[0]
    size = group_size(length, group)
    if group == 0 or length == 1:
        return jax.lax.scan(step, carry, xs)
    groups = math.ceil(length / size)
    spare = groups * size - length

    def fold(x, pad):
        if spare:
            x = jnp.concatenate([x, jnp.broadcast_to(pad, (spare, *pad.shape)).astype(x.dtype)])
        return x.reshape(groups, size, *x.shape[1:])

    folded = jax.tree.map(fold, xs, inert)
    inner = jax.checkpoint(lambda c, x: jax.lax.scan(step, c, x), prevent_cse=False)
    carry, ys = jax.lax.scan(inner, carry, folded)
    return carry, jax.tree.map(lambda y: y.reshape(groups * size, *y.shape[2:])[:length], ys)
