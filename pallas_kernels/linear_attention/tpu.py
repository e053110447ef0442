"""Tiles of decayed linear attention, for the grid of `pallas_kernels.sequence`.

With `P[i, j]` the decay between two tokens (`pallas_kernels.decays`), `Q_i = P[i, 0] q_i`:

    Y = Q W + S V            S[i, j] = lr_j (q_i P k_j) for j <= i
    W' = P[C, 0] W + B^T V   B_j = lr_j P[C, j] k_j

Tokens of a document that begins in a tile have its W_0 in the place of W.
"""

import jax.numpy as jnp

from pallas_kernels import decays
from pallas_kernels.tiles import column, dot, of_tile


def tiles(state, initial, wide, gates, document, *, after: bool, compute):
    """See `sequence.Plan`.

    Args:
        state: (W [heads, K, V],); initial: (W_0,) with `document`, else ().
        wide: (q, k, v) or (q, k, v, log decay of channels).
        gates: (lr,) or (lr, log decay).
        document: number of each token's document, 0 = the one in progress; or None.
        after: whether a token reads what it has written.
        compute: dtype of the products' operands.
    """
    count = wide[0].shape[1]
    q, k, v, *decay = (x.reshape(-1, *x.shape[2:]) for x in wide)
    lr, *of_heads = gates
    decayed = decays.make((*decay, *of_heads, None)[0], k, document, compute)
    (scores,) = decayed.scores(((q, after),), k)
    y = dot(scores * lr[:, None, :], v, "nn", compute)
    reads = decayed.read(q, after)
    if document is not None:
        fresh, (weights_0,) = decayed.down > 0, initial
        begin = jnp.concatenate([weights_0[:, None]] * count, axis=1).reshape(
            -1, *weights_0.shape[1:]
        )
        y = y + dot(jnp.where(fresh, reads, 0.0), begin, "nn", compute)
        reads = jnp.where(fresh, 0.0, reads)
    added = dot(column(lr) * decayed.write(k), v, "tn", compute)

    (weights,), outputs = state, []
    for tile in range(count):
        at = of_tile(tile, count)
        outputs.append(at(y) + dot(at(reads), weights, "nn", compute))
        if document is not None:
            weights = jnp.where(at(decayed.down)[:, -1:] > 0, weights_0, weights)
        weights = decayed.keep(weights, at) + at(added)
    return (weights,), (jnp.stack(outputs, axis=1),), ()
