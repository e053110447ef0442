"""Sequences whose backward pass recomputes inside groups, so that few states are held at once."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from memjax.miras import passes
from memjax.typing import PyTree

FREE = 8  # steps that are kept without recomputation, unless a group size is asked for


def group_size(length: int, group: int | None = None) -> int:
    """Steps per group: as asked, or the divisor of `length` nearest its square root.

    Up to `FREE` steps are one group, all kept. A length with no divisor between half and twice its
    square root takes the square root, and leaves a shorter group at the end.
    """
    if group is not None:
        if group < 0:
            raise ValueError(f"remat {group} must be 0 (keep everything) or a group size")
        return min(group, length) if group else length
    if length <= FREE:
        return length
    return _near(length, math.sqrt(length))


def _near(length: int, size: float) -> int:
    """The divisor of `length` nearest `size`, or `size` where none is between half and twice it."""
    fits = [n for n in range(math.ceil(size / 2), math.floor(size * 2) + 1) if length % n == 0]
    return min(fits, key=lambda n: abs(n - size), default=math.ceil(size))


def in_groups(
    run: Callable, carry: PyTree, xs: PyTree, *, group: int | None = None
) -> tuple[PyTree, PyTree]:
    """Runs a sequence group by group, saving for the backward pass one carry a group.

    Args:
        run: `(carry, xs) -> (carry, ys)` over the steps of a group, xs and ys with a leading axis.
        carry: the first carry.
        xs: inputs, with one leading axis.
        group: steps per group; None = near the square root of the length (a few steps are all
            saved), 0 = groups of that size, and everything saved.
    """
    length = jax.tree.leaves(xs)[0].shape[0]
    size = group_size(length, group or None)
    if size == length and group in (None, 0):
        return run(carry, xs)
    if group != 0:
        run = jax.checkpoint(run, prevent_cse=False, policy=passes.keep_numbers)
    whole = length - length % size
    folded = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), xs)
    carry, ys = jax.lax.scan(run, carry, folded)
    ys = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)
    if whole < length:
        carry, rest = run(carry, jax.tree.map(lambda x: x[whole:], xs))
        ys = jax.tree.map(lambda y, z: jnp.concatenate([y, z]), ys, rest)
    return carry, ys


def grouped_scan(
    step: Callable, carry: PyTree, xs: PyTree, *, group: int | None = None, levels: int = 1
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan(step, carry, xs)`, saving for the backward pass one carry a group.

    Args:
        step, carry, xs, group: as for `in_groups`, of one step.
        levels: groups within groups. n of them hold some (n + 1) T^(1 / (n + 1)) carries of T
            steps, and compute n times again; 1 where a `group` is given.
    """
    if levels == 1:
        return in_groups(lambda carry, xs: jax.lax.scan(step, carry, xs), carry, xs, group=group)
    length = jax.tree.leaves(xs)[0].shape[0]
    run = functools.partial(grouped_scan, step, levels=levels - 1)
    return in_groups(run, carry, xs, group=_near(length, length ** (levels / (levels + 1))))
