"""Tiles of the gated delta rule, for the grid of `pallas_kernels.sequence`.

With `P[i, j]` the decay between two tokens (`pallas_kernels.decays`), `X_i = P[i, 0] k_i`,
`Q_i = P[i, 0] q_i`:

    (I + A) E = V - X W      A[i, j] = lr_j (k_i P k_j) for j < i
    Y = Q W + S E            S[i, j] = lr_j (q_i P k_j) for j <= i
    W' = P[C, 0] W + B^T E   B_j = lr_j P[C, j] k_j

Tokens of a document that begins in the tile have its W_0 in the place of W.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import decays
from pallas_kernels.tiles import column, dot, of_tile, solve, unit, unit_lower_inverse


def tiles(
    state,
    initial,
    wide,
    gates,
    document,
    *,
    first: bool,
    after: bool,
    surprise: bool,
    unit_eps: float | None,
    compute,
):
    """See `sequence.Plan`.

    Args:
        state: (W [heads, K, V],); initial: (W_0,) with `document`, else ().
        wide: (q, k, v) or (q, k, v, log decay of channels).
        gates: (lr,) or (lr, log decay).
        document: number of each token's document, 0 = the one in progress; or None.
        first: whether a token's decay comes before its prediction.
        after: whether a token reads what it has written.
        surprise: whether the losses are wanted.
        unit_eps: what keeps the norms of q and k from 0 where they are divided by them, or None.
        compute: dtype of the products' operands.
    """
    count = wide[0].shape[1]
    q, k, v, *decay = (x.reshape(-1, *x.shape[2:]) for x in wide)
    q, k = unit(q, unit_eps), unit(k, unit_eps)
    lr, *of_heads = gates
    decayed = decays.make((*decay, *of_heads, None)[0], k, document, compute)
    of_reads, of_keys = decayed.scores(((q, after), (k, first)), k)
    reads, keys = decayed.read(q, after), decayed.read(k, first)
    across = lr[:, None, :]
    values = v
    if document is not None:
        (weights_0,) = initial
        begin = jnp.concatenate([weights_0[:, None]] * count, axis=1)
        begin = begin.reshape(-1, *begin.shape[2:])
        fresh = decayed.down > 0
        known, begun = (dot(jnp.where(fresh, x, 0.0), begin, "nn", compute) for x in (keys, reads))
        values = v - known
        reads, keys = jnp.where(fresh, 0.0, reads), jnp.where(fresh, 0.0, keys)
    system, scores = of_keys * across, of_reads * across
    inverse = unit_lower_inverse(lax.stop_gradient(system), compute)
    writes = column(lr) * decayed.write(k)

    (weights,), outputs, losses = state, [], []
    for tile in range(count):
        at = of_tile(tile, count)
        errors = at(values) - dot(at(keys), weights, "nn", compute)
        errors = solve(at(system), at(inverse), errors, compute)
        y = dot(at(reads), weights, "nn", compute) + dot(at(scores), errors, "nn", compute)
        if document is not None:
            y = y + at(begun)
            weights = jnp.where(at(decayed.down)[:, -1:] > 0, weights_0, weights)
        weights = decayed.keep(weights, at) + dot(at(writes), errors, "tn", compute)
        outputs.append(y)
        if surprise:
            loss = 0.5 * jnp.sum(jnp.square(errors), axis=2, keepdims=True)
            losses.append(jnp.swapaxes(loss, 1, 2)[:, 0])
    y = jnp.stack(outputs, axis=1)
    if surprise:
        losses = [jnp.stack(losses, axis=1).reshape(lr.shape)]
    return (weights,), (y,), tuple(losses)
