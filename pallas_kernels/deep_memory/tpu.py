"""Chunks of a deep memory, for the grid of `pallas_kernels.sequence`: a chunk is a tile.

All gradients of a chunk are taken at the weights that it begins with, so that token i reads

    W_i = b_i W + f_i S - sum_{j <= i} G[i, j] X_j^T D_j

for each of the two maps, X_j its input and D_j the signal at its output for the key of token j.
With `A[i, j]` the retention between two tokens and `E[i, j]` the momentum: `G = A E diag(lr)`, b_i
is the retention and m_i the momentum since the chunk began, and `f_i = sum_l A[i, l] m_l`. No
token's weights are formed: reading is three products a map.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decays import NEVER, sums
from pallas_kernels.dispatch import LANES
from pallas_kernels.tiles import column, dot, exact, of_tile, order, unit

NORM_EPSILON = 1e-6
ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class Coefficients:
    """What the gates say of all chunks of a step, before any weights: [heads * tiles, ...]."""

    def __init__(self, gates, *, momentum: bool, decay: bool, after: bool, compute):
        lr, gates = gates[0], list(gates[1:])
        eta = gates.pop(0) if momentum else None
        retain = gates.pop(0) if decay else None
        live = gates.pop(0)[:, None, :] if gates else None
        row, col = order(lr.shape[1])
        between, kept = _between(retain, row >= col)  # A, b
        between = between if live is None else between * live
        by_token, of_momentum = lr[:, None, :] * between, None
        if momentum:
            response, left = _between(eta, row >= col)  # E, m
            both = (jnp.broadcast_to(between, response.shape), response)
            wide = jnp.dtype(compute).itemsize > 2
            by_token = dot(*both, "nn", compute) if wide else exact(*both, "nn")
            by_token = by_token * lr[:, None, :]
            of_momentum = jnp.sum(between * jnp.swapaxes(left, 1, 2), axis=2, keepdims=True)
            self.moved = left[:, -1:]
            self.to_momentum = jnp.swapaxes((lr[:, None, :] * response)[:, -1:], 1, 2)
        self.kept, self.added = kept[:, -1:], jnp.swapaxes(by_token[:, -1:], 1, 2)
        self.of_momentum = of_momentum[:, -1:] if momentum else None
        if not after:
            kept, by_token = _above(kept, 1.0), _above(by_token, 0.0)
            of_momentum = _above(of_momentum, 0.0) if momentum else None
        self.reads = kept, of_momentum, by_token


def _between(log_gate, lower):
    """Products of gates from each token to each later one, and since the chunk began."""
    if log_gate is None:
        return jnp.where(lower, 1.0, 0.0)[None], jnp.ones((1, lower.shape[0], 1))
    across = sums(log_gate, lower)[:, None, :]
    down = column(across[:, 0])
    return jnp.exp(jnp.where(lower, down - across, NEVER)), jnp.exp(down)


def _above(x, first: float):
    """Each token's coefficients before it was written: of the row above."""
    down = jnp.roll(x, 1, axis=1)
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(row == 0, first, down)


def room(maps: Sequence[tuple[int, int]], chunk: int, dtype: Any) -> int:
    """Bytes of VMEM that the backward kernel wants for a head with documents, about.

    Fitted to what the compiler says of heads that are too large (tests/pallas_kernels has them).
    """
    hidden, *dims = (-(-size // LANES) * LANES for size in (maps[0][1], maps[0][0], maps[1][1]))
    weights = maps[0][0] * hidden + maps[1][0] * dims[1]
    size = 81 * weights + chunk * (87 * hidden + 150 * max(dims))
    return size * 7 // 4 if dtype == jnp.float32 else size


def tiles(
    state,
    initial,
    wide,
    gates,
    document,
    *,
    momentum: bool,
    decay: bool,
    activation: str,
    norm: bool,
    residual: bool,
    after: bool,
    unit_eps: float | None,
    compute,
):
    """See `sequence.Plan`.

    Args:
        state: (W_1 [heads, K, F], W_2 [heads, F, V]), with momentum (..., S_1, S_2).
        initial: with norm its (scale, bias), each [heads, 1, V]; then, with `document`, what
            documents begin from, like the state.
        wide: (q, k, v).
        gates: (lr, [log momentum], [log retention], [1 for tokens, 0 for padding]).
        document: above 0 in a chunk that a document begins with; or None.
        momentum, decay: whether the learner has one, whether the retention is not 1.
        activation, norm, residual: of the memory network.
        after: whether a token reads what it has written.
        unit_eps: what keeps the norms of q and k from 0 where they are divided by them, or None.
        compute: dtype of the products' operands.
    """
    count = wide[0].shape[1]
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in wide)
    q, k = unit(q, unit_eps), unit(k, unit_eps)
    slow, begin = (initial[:2], initial[2:]) if norm else ((), initial)
    plan = Coefficients(gates, momentum=momentum, decay=decay, after=after, compute=compute)
    act = ACTIVATIONS[activation]

    def product(a, b, kind="nn"):
        return dot(a, b, kind, compute)

    def finish(x, h):
        if norm:
            h = h - jnp.mean(h, axis=-1, keepdims=True)
            h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + NORM_EPSILON)
            h = h * slow[0] + slow[1]
        return x + h if residual else h

    outputs, losses = [], []
    for tile in range(count):
        at = of_tile(tile, count)
        if document is not None:
            fresh = document[tile : tile + 1, :1] > 0
            state = tuple(jnp.where(fresh, x, y) for x, y in zip(begin, state, strict=True))
        (w_1, w_2), velocity = state[:2], state[2:]
        now_q, now_k, now_v = at(q), at(k), at(v)

        # Keys and queries meet the first map at once: weights are loaded for twice the rows.
        both = product(jnp.concatenate([now_k, now_q], axis=1), w_1)
        hidden, pull = jax.vjp(act, both[:, : q.shape[1]])
        answer, pull_answer = jax.vjp(lambda h, x=now_k: finish(x, h), product(hidden, w_2))
        wrong = answer - now_v
        (d_2,) = pull_answer(wrong)
        (d_1,) = pull(product(d_2, w_2, "nt"))
        losses.append(jnp.swapaxes(0.5 * jnp.sum(wrong * wrong, 2, keepdims=True), 1, 2)[:, 0])

        of_weights, of_momentum, of_tokens = (
            None if x is None else at(jnp.broadcast_to(x, (q.shape[0], *x.shape[1:])))
            for x in plan.reads
        )

        def read(x, of_w, keys, signals, speed, tokens=of_tokens, w=of_weights, s=of_momentum):
            z = w * of_w - product(product(x, keys, "nt") * tokens, signals)
            return z if s is None else z + s * product(x, speed)

        speeds = velocity if momentum else (None, None)
        z = read(now_q, both[:, q.shape[1] :], now_k, d_1, speeds[0])
        asked = act(z)
        z = read(asked, product(asked, w_2), hidden, d_2, speeds[1])
        outputs.append(finish(now_q, z))

        learned = []
        pairs = ((now_k, d_1), (hidden, d_2))
        kept, added = (
            at(jnp.broadcast_to(x, (q.shape[0], *x.shape[1:]))) for x in (plan.kept, plan.added)
        )
        for i, (x, d) in enumerate(pairs):
            w = kept * state[i] - product(x, added * d, "tn")
            learned.append(w + at(plan.of_momentum) * velocity[i] if momentum else w)
        if momentum:
            for i, (x, d) in enumerate(pairs):
                moved = at(plan.moved) * velocity[i]
                learned.append(moved - product(x, at(plan.to_momentum) * d, "tn"))
        state = tuple(learned)
    losses = jnp.stack(losses, axis=1).reshape(gates[0].shape)
    return state, (jnp.stack(outputs, axis=1),), (losses,)
