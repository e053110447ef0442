"""The deep memory, token by token with its weights: what the kernel must equal."""

import jax
import jax.numpy as jnp

from pallas_kernels.deep_memory.tpu import ACTIVATIONS, NORM_EPSILON


def deep_memory(
    q, k, v, lr, log_momentum, log_retain, weights, velocity, norm, *, chunk, initial=None,
    starts=None, activation="gelu", residual=True, read="after", unit_eps=None,
):  # fmt: skip
    """Gradients at the weights of the chunk's start; see `op.deep_memory`."""
    dtype = weights[0].dtype
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    if unit_eps is not None:
        q, k = _unit(q, unit_eps), _unit(k, unit_eps)
    length, momentum = q.shape[1], velocity is not None
    velocity = velocity if momentum else tuple(map(jnp.zeros_like, weights))
    if log_momentum is None:
        log_momentum = jnp.full(lr.shape, -jnp.inf, dtype)
    if log_retain is None:
        log_retain = jnp.zeros(lr.shape, dtype)
    if starts is None:
        starts = jnp.zeros((q.shape[0], -(-length // chunk)), bool)
    if initial is None:
        initial = jax.tree.map(jnp.zeros_like, (weights[0][0], weights[1][0]))
        initial += jax.tree.map(jnp.zeros_like, initial) if momentum else ()
    if len(initial) == 2:
        initial += tuple(map(jnp.zeros_like, initial))

    def answer(weights, x, norm):
        h = ACTIVATIONS[activation](x @ weights[0]) @ weights[1]
        if norm is not None:
            h = h - jnp.mean(h)
            h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h)) + NORM_EPSILON) * norm[0] + norm[1]
        return x + h if residual else h

    def loss(weights, k, v, norm):
        return 0.5 * jnp.sum(jnp.square(answer(weights, k, norm) - v))

    def token(carry, now):
        base, weights, velocity = carry
        q, k, v, lr, eta, retain, norm = now
        value, gradient = jax.value_and_grad(loss)(base, k, v, norm)
        velocity = jax.tree.map(lambda s, g: jnp.exp(eta) * s - lr * g, velocity, gradient)
        new = jax.tree.map(lambda w, s: jnp.exp(retain) * w + s, weights, velocity)
        y = answer(new if read == "after" else weights, q, norm)
        return (base, new, velocity), (y, value)

    def of_all(carry, now, norm):
        over_heads = jax.vmap(lambda c, n, m: token(c, (*n, m)))
        return jax.vmap(over_heads, in_axes=(0, 0, None))(carry, now, norm)

    def step(carry, now):
        index, start, tokens = now
        carry = jax.tree.map(
            lambda new, old: jnp.where(
                start.reshape(-1, *[1] * (old.ndim - 1)) & (index % chunk == 0), new, old
            ),
            (initial[:2], initial[:2], initial[2:]),
            carry,
        )
        base = jax.tree.map(
            lambda w, b: jnp.where(index % chunk == 0, w, b), carry[1], carry[0]
        )  # fmt: skip
        return of_all((base, *carry[1:]), tokens, norm)

    tokens = (q, k, v, lr, log_momentum, log_retain)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x.astype(dtype), 1, 0), tokens)
    chunks = jnp.arange(length) // chunk
    now = (jnp.arange(length), starts.T[chunks], tokens)
    (_, weights, velocity), (y, losses) = jax.lax.scan(step, (weights, weights, velocity), now)
    y, losses = jnp.moveaxis(y, 0, 1), jnp.moveaxis(losses, 0, 1)
    return y, losses, weights, velocity if momentum else None


def _unit(x, eps):
    return x / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + eps**2)
