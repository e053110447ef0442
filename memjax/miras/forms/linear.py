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

Only `E` and `W_C` wait for the tile before. With `dot` nothing is solved, and lr stands beside V,
once, instead of in S and B. `exchange`, which erases along one key and writes along another, has
`E = -U` in the same places, with `lr o k` for `lr k`, and beside it the same three products of the
values under the scores of the keys that are written. This is the WY representation
of a product of Householder-like factors (Bischof and Van Loan, 1987; for sequences Yang et al.,
arXiv:2406.06484), with every product of decays taken as such, never as a quotient.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.documents import beside
from memjax.miras import kinds
from memjax.miras.bias import dot, l2
from memjax.miras.learner import exchange, gd, implicit
from memjax.miras.precision import matmul
from memjax.miras.products import (
    Decayed,
    decayed,
    following_products,
    restarting_products,
    segment_products,
    unit_lower_inverse,
)  # fmt: skip
from memjax.miras.retention import decay, none
from memjax.miras.rule import Gates, Rule, State
from memjax.miras.structure import matrix
from memjax.typing import Array, Float

BLOCK = 64  # tokens a tile, unless asked for


class Run(NamedTuple):
    """A tile of one head: all that does not wait for the weights that it begins with."""

    values: Float[Array, "C V"]  # (I + A)^-1 (V - X W_0), W_0 where a document begins; lr V of dot
    keys: Float[Array, "C K"] | None  # (I + A)^-1 X, of the document in progress; l2 only
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
        kinds.keeps(rule.structure, (matrix,), "forward", "mapped")
        and kinds.keeps(rule.bias, (l2, dot), "loss", "signal")
        and kinds.keeps(rule.learner, (gd, implicit, exchange), "update", "rates")
        and not (rule.learner.erases or rule.learner.solves)
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

    learns_errors = isinstance(rule.bias, l2)
    if not learns_errors:  # what is learned does not wait
        learned = matmul(jnp.swapaxes(runs.writes, -1, -2), runs.values, compute=compute)
        runs = runs._replace(added=learned)

    def step(weights, now):
        run, fresh = now
        errors = None
        if learns_errors:
            errors = run.values - matmul(run.keys, weights, compute=compute)
        kept = weights
        if restarts:
            kept = jnp.where(fresh[:, None, None, None], begin, kept)
        if run.kept is not None:
            kept = (run.kept[..., None] if run.kept.ndim == 3 else run.kept[..., None, None]) * kept
        if run.added is not None:
            kept = kept + run.added
        if learns_errors:
            kept = kept + matmul(jnp.swapaxes(run.writes, -1, -2), errors, compute=compute)
        return kept, (weights, errors)

    (weights,) = state.weights
    weights, (before, errors) = jax.lax.scan(step, weights, (runs, document[:, :, -1] > 0))
    if not learns_errors:
        errors = runs.values
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
    lower = jnp.tril(jnp.ones((live.shape[0],) * 2, bool))
    strict = jnp.tril(lower, -1)
    if restarts:
        same = document[:, None] == document[None, :]
        lower, strict = lower & same, strict & same
    lr = jnp.where(beside(live, gates.lr), gates.lr, 0)
    retain = gates.retain
    if retain is not None:
        retain = jnp.where(beside(live, retain), retain, 1)
    wide_k, wide_q = (rule.structure.mapped(slow, z.astype(dtype)) for z in (k, q))
    wide_v = v.astype(dtype)

    learns_errors = isinstance(rule.bias, l2)
    if not learns_errors:
        wide_v, lr = lr[:, None] * wide_v, None
    after = rule.read == "after"
    asked, inclusive = (wide_q,), (after,)
    masks = [lower if after else strict]
    if learns_errors or loss:
        asked, inclusive = (wide_q, wide_k), (after, rule.retention.first)
        masks.append(strict)
    rows = (wide_k,)
    if rule.learner.exchanges:
        rows, lr = (lr * wide_k, jnp.where(live[:, None], gates.write, 0)), None
    form = _by_channel if retain is not None and retain.ndim == 2 else _by_head
    found = form(asked, rows, lr, retain, inclusive, document, compute)
    scores = [[jnp.where(m, s, 0) for m, s in zip(masks, by, strict=True)] for by in found.scores]
    writes = found.writes
    if restarts:
        writes = [jnp.where(beside(document == document[-1], w), w, 0) for w in writes]

    queries, *asked = found.reads
    in_progress = (document == 0)[:, None]
    begun, predicts, values, solved = None, None, wide_v, None
    added = None
    if restarts:
        begun = matmul(jnp.where(in_progress, 0, queries), begin, compute=compute)
        queries = jnp.where(in_progress, queries, 0)
    if rule.learner.exchanges:
        of_keys = matmul(scores[1][0], wide_v, compute=compute)
        begun = of_keys if begun is None else begun + of_keys
        added = matmul(writes[1].T, wide_v, compute=compute)
    if learns_errors or loss:
        (asked,), system = asked, scores[0][1]
        known = jnp.zeros_like(wide_v)
        if restarts:
            known = matmul(jnp.where(in_progress, 0, asked), begin, compute=compute)
            asked = jnp.where(in_progress, asked, 0)
        if rule.learner.exchanges:
            known = known + matmul(scores[1][1], wide_v, compute=compute)
            values = jnp.zeros_like(wide_v)
        if learns_errors:
            inverse = unit_lower_inverse(system)
            values = matmul(inverse, values - known, compute=dtype)
            solved = matmul(inverse, asked, compute=dtype)
        else:
            predicts = (asked, system, known)
    return Run(values, solved, queries, scores[0][0], writes[0], added, found.kept, begun, predicts)


def _by_channel(asked, rows, lr, retain, inclusive, document, compute) -> Decayed:
    """Queries and keys `asked` against `rows` times lr, with channel-wise decay."""
    if lr is not None:
        rows = [lr[:, None] * y for y in rows]
    return decayed(asked, rows, retain, inclusive, document, compute)


def _by_head(asked, rows, lr, retain, inclusive, document, compute) -> Decayed:
    """The same with one gate a head, or none: `kept` is a number, or None."""
    scores = [[matmul(x, y.T, compute=compute) for x in asked] for y in rows]
    kept, reads, writes = None, asked, rows
    if retain is not None:
        same = document[:, None] == document[None, :]
        first = jnp.diff(document, prepend=document[:1] - 1) != 0
        prefix, between = restarting_products(retain, first), segment_products(retain, same)
        kept = prefix[-1]
        # Before its own decay a token stands where the one above it in the document does after.
        above = jnp.concatenate([jnp.ones_like(prefix[:1]), prefix[:-1]])
        above = jnp.where(first, 1, above)
        earlier = jnp.concatenate([jnp.zeros_like(between[:1]), between[:-1]])
        to = [prefix if own else above for own in inclusive]
        reads = [p[:, None] * x for p, x in zip(to, asked, strict=True)]
        to = [between if own else earlier for own in inclusive]
        scores = [[p * s for p, s in zip(to, by, strict=True)] for by in scores]
        writes = [following_products(retain)[:, None] * y for y in rows]
    if lr is not None:
        scores = [[s * lr for s in by] for by in scores]
        writes = [lr[:, None] * y for y in writes]
    return Decayed(scores, reads, writes, kept)
