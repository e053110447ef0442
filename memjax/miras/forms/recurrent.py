"""The definition of a memory: token by token, gradients by automatic differentiation.

All but the bias's signal is differentiated as it stands; the signal is the bias's own definition.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax import documents
from memjax.miras.fit import reads
from memjax.miras.forms import normal
from memjax.miras.forms.inputs import as_given, check, widened
from memjax.miras.forms.remat import grouped_scan
from memjax.miras.precision import matmul
from memjax.miras.rule import Gates, Pairs, Rule, State
from memjax.miras.state import close_chunk, scaled
from memjax.typing import Array, Bool, Float, Int, PyTree


class Token(NamedTuple):
    """One token of every row and head; `starts` begin documents."""

    q: Float[Array, "B H K"]
    k: Float[Array, "B H K"]
    v: Float[Array, "B H V"]
    gates: Gates
    starts: Bool[Array, " B"]


def recurrent(
    rule: Rule,
    state: State,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    gates: Gates,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Runs a memory over a sequence by its definition (see `Rule`), one token after the other.

    The slow form that the others are held against. Its backward pass recomputes in groups of about
    sqrt(T) tokens, so that no weights per token are held.

    Args:
        rule: the memory.
        state: where it stands.
        q, k: queries and keys [B, T, H, K].
        v: values [B, T, H, V].
        gates: rates, each [B, T, H].
        segment_ids: document of each token; the memory restarts where it changes. None: all tokens
            continue the document of the state.
    Returns:
        (y [B, T, H, V] in q's dtype, the state after the last token)
    Raises:
        ValueError: an argument that does not fit, by name.
    """
    given = state
    state, gates = check(rule, given, q, k, v, gates, segment_ids)
    tokens = _tokens(state, q, k, v, gates, segment_ids)
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)

    def body(carry, x):
        return _write_and_read(rule, state, carry, x)

    carry = (state.base, state.weights, state.momentum, state.place, state.pairs)
    carry, y = grouped_scan(body, carry, xs)
    y, state = _outcome(state, carry, jnp.moveaxis(y, 0, 1), q, segment_ids)
    return y, as_given(rule, given, state)


def step(
    rule: Rule,
    state: State,
    q: Float[Array, "B 1 H K"],
    k: Float[Array, "B 1 H K"],
    v: Float[Array, "B 1 H V"],
    gates: Gates,
    *,
    segment_ids: Int[Array, "B 1"] | None = None,
) -> tuple[Float[Array, "B 1 H V"], State]:
    """One token, as in decoding: the body of `recurrent` with T = 1, in constant time and space.

    Args, returns and errors as for `recurrent`; ValueError where T is not 1.
    """
    if k.ndim == 4 and k.shape[1] != 1:
        raise ValueError(f"step takes one token, got {k.shape[1]}: use chunkwise")
    given = state
    state, gates = check(rule, given, q, k, v, gates, segment_ids)
    token = jax.tree.map(lambda x: x[:, 0], _tokens(state, q, k, v, gates, segment_ids))
    carry = (state.base, state.weights, state.momentum, state.place, state.pairs)
    carry, y = _write_and_read(rule, state, carry, token)
    y, state = _outcome(state, carry, y[:, None], q, segment_ids)
    return y, as_given(rule, given, state)


def read(rule: Rule, state: State, q: Float[Array, "B T H K"]) -> Float[Array, "B T H V"]:
    """`M(q; W)` with the state's weights W as they are; nothing is written.

    Args:
        rule: the memory.
        state: where it stands.
        q: queries [B, T, H, K].
    Returns:
        [B, T, H, V] in q's dtype.
    """
    batch, heads = state.weights[0].shape[:2]
    if q.ndim != 4 or (q.shape[0], q.shape[2]) != (batch, heads):
        raise ValueError(
            f"q has shape {q.shape}, but the state is for batch {batch} and heads {heads}"
        )
    reads(rule, state.weights, state.slow, q.shape[3])
    state = widened(state)
    if rule.learner.solves:
        y = jnp.moveaxis(q, 1, 2)
        y = normal.read(rule, state.weights, state.momentum, state.slow, y, q.dtype)
        return jnp.moveaxis(y, 2, 1).astype(q.dtype)
    weights = jax.tree.map(rule.retention.link, state.weights)
    y = _answer(rule, weights, state.slow, jnp.moveaxis(q, 1, 2), q.dtype)
    return jnp.moveaxis(y, 2, 1).astype(q.dtype)


def _tokens(state, q, k, v, gates, segment_ids) -> Token:
    if segment_ids is None:
        starts = jnp.zeros(k.shape[:2], bool)
    else:
        starts = documents.starts(segment_ids, state.segment)
    return Token(q, k, v, gates, starts)


def _outcome(state, carry, y, q, segment_ids) -> tuple[Array, State]:
    base, weights, velocity, place, pairs = carry
    segment = state.segment if segment_ids is None else segment_ids[:, -1].astype(jnp.int32)
    state = state._replace(
        base=base, weights=weights, momentum=velocity, place=place, segment=segment, pairs=pairs
    )
    return y.astype(q.dtype), state


def _answer(rule, fast, slow, x, compute):
    """M(x) for x [B, H, T, K] with fast weights [B, H, ...] and slow ones [H, ...]."""

    def answer(fast, slow, x):
        return rule.structure.forward(
            lambda i, z: matmul(z, fast[i], compute=compute), slow, x.astype(fast[0].dtype)
        )

    return jax.vmap(jax.vmap(answer), in_axes=(0, None, 0))(fast, slow, x)


def _inputs(rule, fast, slow, x, compute) -> tuple[Array, ...]:
    """What each linear map gets in `_answer`, [B, H, T, I]."""

    def answer(fast, slow, x):
        found = [None] * len(fast)

        def linear(i, z):
            found[i] = z
            return matmul(z, fast[i], compute=compute)

        rule.structure.forward(linear, slow, x.astype(fast[0].dtype))
        return tuple(found)

    return jax.vmap(jax.vmap(answer), in_axes=(0, None, 0))(fast, slow, x)


def _turned(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _write_and_read(rule: Rule, state: State, carry: PyTree, token: Token) -> tuple[PyTree, Array]:
    base, weights, velocity, place, pairs = carry
    compute = token.q.dtype
    begin, link = state.begin, rule.retention.link

    def restart(now, begin):
        return documents.choose(token.starts, begin, now)

    base, weights = restart(base, begin.weights), restart(weights, begin.weights)
    velocity = restart(velocity, begin.momentum)
    place = jnp.where(token.starts, 0, place)
    gates = token.gates
    if rule.learner.solves:
        qkv = (token.q, token.k, token.v)
        weights, velocity, y = normal.token(rule, state, weights, velocity, *qkv, gates, compute)
        return (weights, weights, velocity, place, pairs), y

    def decayed(weights):
        if gates.retain is None:
            return weights
        factor = (gates.retain if gates.retain.ndim == 3 else gates.retain[..., None])[..., None]
        if rule.retention.to_initial:
            return jax.tree.map(lambda w, w_0: w_0 + factor * (w - w_0), weights, begin.weights)
        return jax.tree.map(lambda w: factor * w, weights)

    if rule.retention.first:
        base = decayed(base)
    pairs, k, v, threshold, share = _learned(pairs, token)
    threshold = () if threshold is None else (threshold,)

    def answers(fast):
        return _answer(rule, fast, state.slow, k, compute)

    y, pull_back = jax.vjp(answers, jax.tree.map(link, base))
    signal = rule.bias.signal(y, v.astype(y.dtype), *threshold)
    (gradient,) = pull_back(signal if share is None else share[..., None] * signal)
    if rule.learner.erases:
        inputs = _inputs(rule, base, state.slow, k, compute)
        gradient = jax.tree.map(
            lambda g, z, w: g + matmul(_turned(z), matmul(z, w, compute=compute), compute=compute),
            gradient, inputs, weights,
        )  # fmt: skip
    if rule.learner.exchanges:
        erased, added = gates.lr * token.k, gates.write
        rows = jnp.stack([erased, added], axis=-1)
        values = jnp.concatenate([-y, v.astype(y.dtype)], axis=2)
        new_velocity, change = (), (matmul(rows, values, compute=compute),)
    else:
        new_velocity, change = jax.vmap(jax.vmap(rule.learner.update))(
            velocity, gradient, gates.lr, gates.momentum
        )
    written = jax.tree.map(jnp.add, decayed(weights), change)
    seen = {"after": written, "before": weights, "chunk": base}[rule.read]
    seen = jax.tree.map(link, scaled(base, seen, gates.scale))
    y = _answer(rule, seen, state.slow, token.q[:, :, None], compute)

    complete = place + 1 == rule.chunk
    closed, closed_velocity = close_chunk(rule, begin, base, written, new_velocity, gates.scale)

    def choose(yes, no):
        return documents.choose(complete, yes, no)

    new_carry = (
        choose(closed, base), choose(closed, written), choose(closed_velocity, new_velocity),
        jnp.where(complete, 0, place + 1), pairs,
    )  # fmt: skip
    return new_carry, y[:, :, 0]


def _learned(pairs: Pairs | tuple[()], token: Token):
    """What a token learns: (pairs with it, keys, values, thresholds, shares), [B, H, c, ...]."""
    gates = token.gates
    k, v = token.k[:, :, None], token.v[:, :, None]
    threshold = None if gates.threshold is None else gates.threshold[:, :, None]
    if not pairs:
        return pairs, k, v, threshold, None
    live = jnp.pad(pairs.live & ~token.starts[:, None], ((0, 0), (0, 1)), constant_values=True)
    here = live[:, None, :, None]
    k = jnp.where(here, jnp.concatenate([pairs.k, k.astype(pairs.k.dtype)], axis=2), 0)
    v = jnp.where(here, jnp.concatenate([pairs.v, v.astype(pairs.v.dtype)], axis=2), 0)
    if threshold is not None:
        threshold = jnp.concatenate([pairs.threshold, threshold], axis=2)
        threshold = jnp.where(live[:, None], threshold, 1)
    share = jnp.ones(k.shape[:3], k.dtype) if gates.window is None else gates.window[..., ::-1]
    share = jnp.where(live[:, None], share, 0)
    kept = Pairs(
        k[:, :, 1:], v[:, :, 1:], None if threshold is None else threshold[:, :, 1:], live[:, 1:]
    )
    return kept, k, v, threshold, share
