"""Memories that are the exact least-squares solution of all they have read (`normal_equations`).

    H_t = a_t H_{t-1} + lr_t k_t^T k_t        [K, K]
    G_t = a_t G_{t-1} + lr_t k_t^T v_t        [K, V]
    y_t = q_t (H_t + diag(ridge))^-1 G_t

The inverse is never formed: conjugate gradients solve for `x_t = (H_t + diag(ridge))^-1 q_t`, for
all tokens of a tile at once, with `x H_t` as decayed linear attention. The backward pass solves
once more instead of going back through the iterations. In `State`, G is `weights` and H `momentum`.
"""

import functools

import jax
import jax.numpy as jnp

from memjax.miras.precision import matmul
from memjax.miras.products import restarting_products, segment_products
from memjax.typing import Array, Float

LEAST_RIDGE = 1e-6


def solve(matvec, b: Float[Array, "*N K"], steps: int) -> Float[Array, "*N K"]:
    """`matvec(x) = b` for a symmetric positive definite matvec, row by row, by `steps` iterations.

    Rows that are solved stay as they are: their residual is 0, and so is what they are moved by.
    """

    def iterate(matvec, b):
        def step(_, now):
            x, r, p, square = now
            moved = matvec(p)
            curvature = jnp.sum(p * moved, axis=-1, keepdims=True)
            alpha = square / jnp.where(curvature > 0, curvature, 1)
            x, r = x + alpha * p, r - alpha * moved
            new = jnp.sum(r * r, axis=-1, keepdims=True)
            return x, r, r + new / jnp.where(square > 0, square, 1) * p, new

        start = (jnp.zeros_like(b), b, b, jnp.sum(b * b, axis=-1, keepdims=True))
        return jax.lax.fori_loop(0, steps, step, start)[0]

    return jax.lax.custom_linear_solve(matvec, b, iterate, symmetric=True)


def ridge(slow: dict[str, Array]) -> Array:
    """The ridge of every key channel, from its weight; at least 1e-6, where softplus comes to 0."""
    return jnp.maximum(jax.nn.softplus(slow["ridge"]), LEAST_RIDGE)


def read(rule, weights, velocity, slow, q, compute) -> Float[Array, "B H T V"]:
    """Answers q [B, H, T, K] from G and H [B, H, ...]."""
    (weights,), (statistics,) = weights, velocity
    diagonal = ridge(slow)[None, :, None]
    q = q.astype(weights.dtype)
    x = solve(
        lambda x: matmul(x, statistics, compute=x.dtype) + diagonal * x, q, rule.learner.steps
    )
    return matmul(x, weights, compute=compute)


def token(rule, state, weights, velocity, q, k, v, gates, compute):
    """One token of every row and head: (G, H, y [B, H, V]); q, k [B, H, K], gates [B, H]."""
    (before,), (statistics,) = weights, velocity
    k, v = k.astype(before.dtype), v.astype(before.dtype)
    lr, retain = gates.lr[..., None, None], 1.0
    if gates.retain is not None:
        retain = gates.retain[..., None, None]
    scaled = lr * k[..., :, None]
    after = retain * before + matmul(scaled, v[..., None, :], compute=compute)
    statistics = retain * statistics + scaled * k[..., None, :]
    seen = ((after,), (statistics,)) if rule.read == "after" else (weights, velocity)
    y = read(rule, *seen, state.slow, q[:, :, None], compute)[:, :, 0]
    return (after,), (statistics,), y


def run(rule, state, tiles, *, restarts: bool, compute: jnp.dtype, loss: bool):
    """All tiles of a call: (y [N, B, H, C, V], loss [N, B, H, C] or None, state)."""
    begin = (*state.begin.weights, *state.begin.momentum)
    head = functools.partial(_tile, rule, compute=compute, loss=loss)
    over_heads = jax.vmap(head, in_axes=(0, 0, (0, 0), 0, 0, 0, 0, 0, None, None))
    over_rows = jax.vmap(over_heads, in_axes=(0, 0, None, None, 0, 0, 0, 0, 0, 0))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(carry, tile):
        document = jnp.cumsum(tile.starts, axis=1, dtype=jnp.int32)
        carry, outputs = over_rows(
            *carry, begin, ridge(state.slow), tile.q, tile.learned.k, tile.learned.v, tile.gates,
            tile.live, document,
        )  # fmt: skip
        return carry, outputs

    (weights,), (statistics,) = state.weights, state.momentum
    (weights, statistics), (y, losses) = jax.lax.scan(step, (weights, statistics), tiles)
    state = state._replace(base=(weights,), weights=(weights,), momentum=(statistics,))
    return y, losses if loss else None, state


def _tile(
    rule, weights, statistics, begin, diagonal, q, k, v, gates, live, document, *, compute, loss
):
    """One tile of one head, q, k [C, K], v [C, V], gates [C]: ((G, H), (y, loss))."""
    begin, begin_statistics = begin
    dtype = weights.dtype
    q, k, v = q.astype(dtype), k.astype(dtype), v.astype(dtype)
    order = jnp.arange(live.shape[0])
    same = document[:, None] == document[None, :]
    first = jnp.diff(document, prepend=jnp.zeros_like(document[:1])) != 0
    lr = jnp.where(live, gates.lr, 0)
    retain = jnp.ones_like(lr) if gates.retain is None else jnp.where(live, gates.retain, 1)
    between, prefix = segment_products(retain, same), restarting_products(retain, first)
    carried = (document == 0)[:, None]

    def answers(x, mask, prefix, between):
        def share(x):
            return jnp.where(mask, between * lr * matmul(x, k.T, compute=dtype), 0)

        def matvec(x):
            old = jnp.where(
                carried,
                matmul(x, statistics, compute=dtype),
                matmul(x, begin_statistics, compute=dtype),
            )
            return prefix[:, None] * old + matmul(share(x), k, compute=dtype) + diagonal * x

        x = solve(matvec, x, rule.learner.steps)
        old = jnp.where(
            carried, matmul(x, weights, compute=compute), matmul(x, begin, compute=compute)
        )
        return prefix[:, None] * old + matmul(share(x), v, compute=compute)

    lower, strict = (same & (order[:, None] >= order), same & (order[:, None] > order))
    above = jnp.where(first, 1, jnp.concatenate([jnp.ones_like(prefix[:1]), prefix[:-1]]))
    earlier = jnp.concatenate([jnp.zeros_like(between[:1]), between[:-1]])
    before, after = (strict, above, earlier), (lower, prefix, between)
    y = answers(q, *(after if rule.read == "after" else before))
    found = rule.bias.loss(answers(k, *before), v) if loss else jnp.zeros_like(lr)

    own = jnp.where(document == document[-1], between[-1] * lr, 0)
    scaled = (own[:, None] * k).T
    goes_on = document[-1] == 0
    weights = prefix[-1] * jnp.where(goes_on, weights, begin) + matmul(scaled, v, compute=compute)
    old = prefix[-1] * jnp.where(goes_on, statistics, begin_statistics)
    return (weights, old + matmul(scaled, k, compute=dtype)), (y, found)
