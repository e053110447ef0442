"""How states begin, and how a chunk ends."""

import jax
import jax.numpy as jnp

from memjax import checks
from memjax.miras.fit import dims_of, fits, of_a_head
from memjax.miras.precision import accumulation_dtype
from memjax.miras.rule import Begin, Pairs, Rule, State
from memjax.miras.structure import Weights
from memjax.typing import Array, Float, PyTree


def start(
    rule: Rule,
    weights: Weights,
    batch: int,
    heads: int | None = None,
    *,
    dims: tuple[int, int] | None = None,
) -> State:
    """The state before the first token: every row holds W_0 (0 for `normal_equations()`).

    Args:
        rule: the memory.
        weights: from `rule.init`, with or without a leading heads axis.
        batch: number of rows.
        heads: number of heads that share `weights`, where these have no heads axis (default 1).
        dims: (K, V), the dimensions of keys and values. Only the window of `omega()` needs them,
            and only of a structure whose weights are the same for several.
    Returns:
        A state in fp32 (fp64 where the weights are).
    Raises:
        ValueError: weights that are not this rule's at `dims`, `heads` that contradicts them, or
            no `dims` where they are needed. Without `dims`, the forms find weights of another rule.
    """
    checks.whole("batch", batch)
    if heads is not None:
        checks.whole("heads", heads)
    axes = weights.fast[0].ndim - 2
    if axes not in (0, 1):
        raise ValueError(
            f"weights have {axes} leading axes: rule.init gives none, a heads axis makes one"
        )
    if axes == 1 and heads not in (None, weights.fast[0].shape[0]):
        raise ValueError(f"heads {heads} contradicts weights for {weights.fast[0].shape[0]} heads")
    if axes == 0:
        copies = heads or 1
        weights = jax.tree.map(lambda w: jnp.broadcast_to(w, (copies, *w.shape)), weights)
    weights = jax.tree.map(lambda w: w.astype(accumulation_dtype(w.dtype)), weights)
    if dims is not None:
        fits(rule, *weights, *dims)
    fast = weights.fast
    if rule.learner.solves:
        fast = jax.tree.map(jnp.zeros_like, fast)
    begin = Begin(fast, rule.learner.start(fast))
    return _at(rule, begin, weights.slow, batch)._replace(pairs=_pairs(rule, weights, batch, dims))


def begin_from(rule: Rule, state: State, batch: int) -> State:
    """Makes what `state` (of one row) has learned the memory that every document starts from.

    Used for a fixed prefix, such as Titans' persistent tokens: the memory reads it once, and the
    chunk in progress ends with it, for a learner that acts at the ends of chunks too.

    Args:
        rule: the memory.
        state: the state of a single row.
        batch: number of rows of the new state.
    Raises:
        ValueError: a state of more than one row, or a batch below 1.
    """
    checks.whole("batch", batch)
    if state.place.shape[0] != 1:
        raise ValueError(f"begin_from takes a state of 1 row, got {state.place.shape[0]}")
    begin = Begin(state.weights, state.momentum)
    if rule.learner.closes or rule.retention.closes:
        inside = state.place[0] > 0
        closed = close_chunk(rule, state.begin, state.began, *begin)
        begin = jax.tree.map(lambda new, old: jnp.where(inside, new, old), Begin(*closed), begin)
    begin = jax.tree.map(lambda w: w[0], begin)
    pairs = jax.tree.map(lambda x: jnp.zeros((batch, *x.shape[1:]), x.dtype), state.pairs)
    return _at(rule, begin, state.slow, batch)._replace(pairs=pairs)


def close_chunk(
    rule: Rule,
    begin: Begin,
    base: PyTree,
    weights: PyTree,
    velocity: PyTree,
    scale: Float[Array, "B H"] | None = None,
) -> tuple[PyTree, PyTree]:
    """The end of a chunk: (weights, momentum) that the next one begins with.

    Args:
        rule: the memory.
        begin: what a document starts from.
        base, weights, velocity: as in `State`, after the chunk's last token.
        scale: `Gates.scale` of its last token.
    """
    weights = scaled(base, weights, scale)
    if rule.learner.closes:
        velocity, change = jax.vmap(jax.vmap(rule.learner.close))(velocity)
        weights = jax.tree.map(jnp.add, weights, change)
    return jax.tree.map(rule.retention.close, weights, begin.weights), velocity


def scaled(base: PyTree, weights: PyTree, scale: Float[Array, "*N"] | None) -> PyTree:
    """`base + scale (weights - base)`: the update of a chunk as seen through `Gates.scale`."""
    if scale is None:
        return weights
    return jax.tree.map(lambda b, w: b + scale[..., None, None] * (w - b), base, weights)


def _pairs(
    rule: Rule, weights: Weights, batch: int, dims: tuple[int, int] | None
) -> Pairs | tuple[()]:
    """An empty window, for weights [H, ...]."""
    count = rule.learner.window - 1
    if not count:
        return ()
    dims = dims or dims_of(rule, of_a_head(*weights))
    if dims is None:
        raise ValueError(
            f"{rule.learner} keeps keys and values, whose dimensions these weights of "
            f"{rule.structure} do not tell: give miras.start dims=(K, V)"
        )
    rows, dtype = (batch, weights.fast[0].shape[0], count), weights.fast[0].dtype
    return Pairs(
        jnp.zeros((*rows, dims[0]), dtype),
        jnp.zeros((*rows, dims[1]), dtype),
        jnp.ones(rows, dtype) if rule.bias.needs_threshold else None,
        jnp.zeros((batch, count), bool),
    )


def _at(rule: Rule, begin: Begin, slow: dict[str, Array], batch: int) -> State:
    """Every row at the beginning of a document, nothing seen."""
    rows = jax.tree.map(lambda w: jnp.broadcast_to(w, (batch, *w.shape)), begin)
    return State(
        base=rows.weights if rule.chunk > 1 else (),
        weights=rows.weights,
        momentum=rows.momentum,
        place=jnp.zeros(batch, jnp.int32),
        segment=jnp.full(batch, -1, jnp.int32),
        begin=begin,
        slow=slow,
    )
