"""Sequences in groups, computed again in the backward pass: the same, with fewer carries held."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.miras.forms.remat import grouped_scan

X = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)))


def step(carry, x):
    carry = jnp.tanh(carry * 0.9 + x)
    return carry, carry * x


def backward(length, **options):
    """The function that takes the gradient of a sum over outputs and the last carry."""

    def loss(carry, x):
        carry, y = grouped_scan(step, carry, x, **options)
        return jnp.sum(y) + jnp.sum(carry**2)

    return jax.value_and_grad(loss, argnums=(0, 1)), (jnp.ones(3, X.dtype), X[:length])


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 8, 23, 64])
def test_groups_change_nothing(length, levels):
    run, args = backward(length, levels=levels)
    plain, _ = backward(length, group=length)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, run(*args), plain(*args))


@pytest.mark.parametrize(("levels", "outer"), [(1, 8), (2, 4)])
def test_what_is_held_between_groups(levels, outer):
    def outputs(carry, x):
        return grouped_scan(step, carry, x, levels=levels)

    kept = jax.eval_shape(lambda *z: jax.vjp(outputs, *z)[1], *backward(64)[1])
    shapes = [leaf.shape for leaf in jax.tree.leaves(kept)]
    assert sorted(shapes) == [(outer, 3), (outer, 64 // outer, 3)]  # carries, and x itself
