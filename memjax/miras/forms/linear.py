"""The closed form of matrix memories that learn at every token, in tiles.

With rows `k` [K], `v` [V] and W [K, V], gradient descent on `l2` or `dot` at chunk 1 is affine:

    u_t = k_t Z_t                        what the memory answers: Z_t = W_{t-1}, or a_t W_{t-1}
                                         where the retention decays first
    e_t = v_t - u_t (l2),  v_t (dot)
    W_t = a_t W_{t-1} + lr_t k_t^T e_t

Over a tile that begins at W, with `P[i, j] = prod_{j < m <= i} a_m` (channels on the side of k),
the errors of its tokens solve a unit lower triangular system, and all else is products:

    (I + A) E = V - X W        A[i, j] = lr_j (k_i P k_j) for j < i,   X_i = k_i P[i, 0]
    Y = Q W + S E              S[i, j] = lr_j (q_i P k_j),             Q_i = q_i P[i, 0]
    W_C = P[C, 0] W + B^T E    B_j = lr_j k_j P[C, j]

Only `E` and `W_C` wait for the tile before. `exchange`, which erases along one key and writes along
another, has `E = -U` in the same places, with `lr o k` for `lr k`, and beside it the same three
products of the values under the scores of the keys that are written. This is the WY representation
of a product of Householder-like factors (Bischof and Van Loan, 1987; for sequences Yang et al.,
arXiv:2406.06484), with every product of decays taken as such, never as a quotient.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.miras.bias import dot, l2
from memjax.miras.learner import gd, implicit
from memjax.miras.precision import matmul
from memjax.miras.products import (
    decayed_scores,
    following_products,
    restarting_products,
    segment_products,
    unit_lower_inverse,
)  # fmt: skip
from memjax.miras.retention import decay, none
from memjax.miras.rule import Gates, Rule, State
from memjax.miras.structure import matrix
from memjax.typing import Array, Bool, Float

BLOCK = 64  # tokens a tile, unless asked for


class Run(NamedTuple):
    """A tile of one head: all that does not wait for the weights that it begins with."""

    values: Float[Array, "C V"]  # (I + A)^-1 (V - X W_0), W_0 where a document begins
    keys: Float[Array, "C K"]  # (I + A)^-1 X, of the document in progress
    queries: Float[Array, "C K"]  # Q, of the document in progress
    scores: Float[Array, "C C"]  # S
    writes: Float[Array, "C K"]  # B
    added: Float[Array, "K V"] | None  # what `exchange` writes, at the tile's end
    kept: Float[Array, "*K"] | None  # P[C, 0]; None = 1
    begun: Float[Array, "C V"] | None  # Q W_0 where a document begins, and reads of `added`
    predicts: tuple[Array, Array, Array] | None  # X, A and X W_0 for the loss of `dot`


def fits(rule: Rule, gates: Gates) -> bool:
    """Whether the closed form computes this rule with these gates."""
    return (
        isinstance(rule.structure, matrix)
        and isinstance(rule.bias, l2 | dot)
        and isinstance(rule.learner, gd | implicit)
        and not rule.learner.erases
        and rule.chunk == 1
        and gates.scale is None
        and type(rule.retention) in (decay, none)
        and not rule.retention.to_initial
        and rule.read != "chunk"
    )


def run(
    rule: Rule,
    state: State,
    tiles,
    *,
    restarts: bool,
    compute: jnp.dtype,
    loss: bool,
) -> tuple[Float[Array, "N B H C V"], Float[Array, "N B H C"] | None, State]:
    """All tiles of a call.

    Args:
        rule: a rule that `fits`.
        state: where it stands.
        tiles: the sequence cut into tiles, see `chunkwise.Tile`.
        restarts: whether documents may begin in this call.
        compute: dtype of the products' operands.
        loss: whether the losses are wanted.
    Returns:
        (y, loss or None, state with the last weights).
    """
    (begin,) = state.begin.weights
    document = jnp.cumsum(tiles.starts, axis=2, dtype=jnp.int32)
    head = functools.partial(_prepare, rule, restarts=restarts, compute=compute, loss=loss)
    over_heads = jax.vmap(head, in_axes=(0, 0, 0, 0, None, None, 0, 0))
    over_rows = jax.vmap(over_heads, in_axes=(0, 0, 0, 0, 0, 0, None, None))
    over_tiles = jax.vmap(over_rows, in_axes=(0, 0, 0, 0, 0, 0, None, None))
    prepare = jax.checkpoint(
        over_tiles, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
    )
    k, v = tiles.learned.k, tiles.learned.v
    runs = prepare(tiles.q, k, v, tiles.gates, tiles.live, document, begin, state.slow)

    def step(weights, now):
        run, fresh = now
        errors = run.values
        if isinstance(rule.bias, l2):
            errors = errors - matmul(run.keys, weights, compute=compute)
        kept = weights
        if restarts:
            kept = jnp.where(fresh[:, None, None, None], begin, kept)
        if run.kept is not None:
            kept = (run.kept[..., None] if run.kept.ndim == 3 else run.kept[..., None, None]) * kept
        learned = matmul(jnp.swapaxes(run.writes, -1, -2), errors, compute=compute)
        if run.added is not None:
            learned = learned + run.added
        return kept + learned, (weights, errors)

    (weights,) = state.weights
    weights, (before, errors) = jax.lax.scan(step, weights, (runs, document[:, :, -1] > 0))
    y = matmul(runs.queries, before, compute=compute) + matmul(runs.scores, errors, compute=compute)
    if runs.begun is not None:
        y = y + runs.begun
    state = state._replace(base=(weights,), weights=(weights,))
    if not loss:
        return y, None, state
    if isinstance(rule.bias, l2):
        if rule.learner.exchanges:
            errors = errors + v.astype(errors.dtype)
        return y, 0.5 * jnp.sum(jnp.square(errors), axis=-1), state
    reads, scores, begun = runs.predicts
    answers = matmul(reads, before, compute=compute) + matmul(scores, errors, compute=compute)
    return y, rule.bias.loss(answers + begun, v.astype(y.dtype)), state


def _prepare(rule, q, k, v, gates, live, document, begin, slow, *, restarts, compute, loss) -> Run:
    """The `Run` of one tile and head: q, k [C, K], v [C, V], gates [C] (retain also [C, K])."""
    dtype = begin.dtype
    count = live.shape[0]
    order = jnp.arange(count)
    same = document[:, None] == document[None, :]
    last = document == document[-1]
    first = jnp.diff(document, prepend=document[:1] - 1) != 0
    lr = jnp.where(live.reshape(-1, *[1] * (gates.lr.ndim - 1)), gates.lr, 0)
    wide_k, wide_q = (rule.structure.mapped(slow, z.astype(dtype)) for z in (k, q))
    wide_v = v.astype(dtype)
    lower = same & (order[:, None] >= order[None, :])
    strict = same & (order[:, None] > order[None, :])
    retain = gates.retain
    if retain is not None:
        retain = jnp.where(live.reshape(-1, *[1] * (retain.ndim - 1)), retain, 1)

    def spread(gate):  # [C] or [C, K] beside [C, K]
        return gate if gate.ndim == 2 else gate[:, None]

    def shift(x):  # of the token before in the document, 1 where there is none
        above = jnp.concatenate([jnp.ones_like(x[:1]), x[:-1]])
        return jnp.where(first.reshape(-1, *[1] * (x.ndim - 1)), 1, above)

    def reads(x, decayed: bool):
        """x_i P[i, 0], the decay of token i included or not."""
        if retain is None:
            return x
        return spread(prefixes if decayed else shift(prefixes)) * x

    def scored(x, rows, decayed: bool, mask: Bool[Array, "C C"]):
        """x_i P rows_j under the mask, for a scalar rate times lr_j."""
        if retain is None:
            scores = matmul(x, rows.T, compute=compute)
        elif retain.ndim == 1:
            between = kept if decayed else jnp.concatenate([jnp.zeros_like(kept[:1]), kept[:-1]])
            scores = between * matmul(x, rows.T, compute=compute)
        else:
            scores = decayed_scores(x, rows, retain, decayed, compute)
        scores = jnp.where(mask, scores, 0)
        return scores if exchanges else scores * lr

    def written(rows):
        """What a row of each token is at the tile's end, of the last document alone."""
        rows = jnp.where(last[:, None], rows if exchanges else rows * lr[:, None], 0)
        return rows if retain is None else rows * spread(following_products(retain))

    exchanges = rule.learner.exchanges
    erased = lr * wide_k if exchanges else wide_k

    if retain is not None:
        prefixes = restarting_products(retain, first)
        kept = segment_products(retain, same) if retain.ndim == 1 else None
    after, mask = (True, lower) if rule.read == "after" else (False, strict)
    queries, scores = reads(wide_q, after), scored(wide_q, erased, after, mask)
    in_progress = (document == 0)[:, None]
    begun, predicts, values, solved = None, None, wide_v, jnp.zeros_like(wide_k)
    added = None
    if restarts:
        begun = matmul(jnp.where(in_progress, 0, queries), begin, compute=compute)
        queries = jnp.where(in_progress, queries, 0)
    if exchanges:
        keys = jnp.where(live[:, None], gates.write, 0)
        found = matmul(scored(wide_q, keys, after, mask), wide_v, compute=compute)
        begun = found if begun is None else begun + found
        added = matmul(written(keys).T, wide_v, compute=compute)
    learns_errors = isinstance(rule.bias, l2)
    if learns_errors or loss:
        first_decayed = rule.retention.first
        asked, system = reads(wide_k, first_decayed), scored(wide_k, erased, first_decayed, strict)
        known = jnp.zeros_like(wide_v)
        if restarts:
            known = matmul(jnp.where(in_progress, 0, asked), begin, compute=compute)
            asked = jnp.where(in_progress, asked, 0)
        if exchanges:
            scores_of_keys = scored(wide_k, keys, first_decayed, strict)
            known = known + matmul(scores_of_keys, wide_v, compute=compute)
            values = jnp.zeros_like(wide_v)
        if learns_errors:
            inverse = unit_lower_inverse(system)
            values = matmul(inverse, values - known, compute=dtype)
            solved = matmul(inverse, asked, compute=dtype)
        else:
            predicts = (asked, system, known)
    return Run(
        values, solved, queries, scores, written(erased), added,
        None if retain is None else prefixes[-1], begun, predicts,
    )  # fmt: skip
