"""The dual form: a whole chunk at a time, without weights per token.

Inside a chunk all gradients are taken at the same weights W', so token i reads

    W_i = beta_i W + f_i S - sum_{j <= i} G[i, j] X_j^T D_j       for every linear map,

with X_j its input and D_j the signal at its output on the key side, both at W'. A linear map of the
query side is then three products: with W, with S, and with D under the masked scores Xq X^T.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax import documents
from memjax.miras.forms.inputs import check
from memjax.miras.forms.remat import grouped_scan
from memjax.miras.precision import accumulation_dtype, matmul
from memjax.miras.products import prefix_products, segment_products
from memjax.miras.rule import Gates, Rule, State
from memjax.typing import Array, Bool, Float, Int, PyTree


class Tile(NamedTuple):
    """Consecutive tokens of every row; `live` is False on padding, `starts` begin documents."""

    q: Float[Array, "B H C K"]
    k: Float[Array, "B H C K"]
    v: Float[Array, "B H C V"]
    gates: Gates
    starts: Bool[Array, "B C"]
    live: Bool[Array, "B C"]


class Carry(NamedTuple):
    """What passes from tile to tile, as in `State`."""

    base: PyTree
    weights: PyTree
    momentum: PyTree
    place: Int[Array, " B"]


def chunkwise(
    rule: Rule,
    state: State,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    gates: Gates,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    block: int | None = None,
    implementation: str | None = None,
    remat: int | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Runs a memory over a sequence chunk by chunk: `recurrent`, computed by the dual form.

    Work per token and head is about 13 times the weights in training, plus tile x widths; it is
    fastest where chunks and documents begin at multiples of `block` (other places are as exact,
    at up to three times the work for the whole call).

    Args:
        rule: the memory.
        state: where it stands.
        q, k: queries and keys [B, T, H, K].
        v: values [B, T, H, V].
        gates: rates, each [B, T, H].
        segment_ids: document of each token; the memory restarts where it changes. None: all tokens
            continue the document of the state.
        block: tile size, at most the chunk (default: the chunk, at most 128); only speed.
        implementation: "xla", or None for the platform's best (here also "xla").
        remat: tiles per group of recomputation in the backward pass: None = about the square root
            of their number (memory grows with sqrt(T) states), 0 = recompute nothing.
    Returns:
        (y [B, T, H, V] in q's dtype, the state after the last token)
    Raises:
        ValueError: an argument that does not fit, by name.
    """
    if implementation not in (None, "xla"):
        raise ValueError(f'implementation {implementation!r} must be None or "xla"')
    y, _, state = trace(
        rule, state, q, k, v, gates, segment_ids=segment_ids, block=block, remat=remat
    )
    return y, state


def surprise(
    rule: Rule,
    state: State,
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    gates: Gates,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H"]:
    """The loss of each token before it is learned: `bias(M(k_t; W'), v_t)` at its chunk's start.

    Arguments and errors as for `chunkwise`. Returns [B, T, H] in the state's dtype.
    """
    return trace(rule, state, k, k, v, gates, segment_ids=segment_ids)[1]


def trace(
    rule: Rule,
    state: State,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    gates: Gates,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    block: int | None = None,
    remat: int | None = None,
    aligned: bool = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"], State]:
    """`chunkwise` and `surprise` in one pass: (y, surprise, state).

    Args:
        aligned: the caller's promise that chunks and documents begin at multiples of `block` in
            this call, if they begin in it at all, the first of its tokens being such a place; what
            is for any other place is then not compiled. A promise that is broken gives wrong
            results. All other arguments are those of `chunkwise`.
    """
    gates = check(rule, state, q, k, v, gates, segment_ids)
    if block is None:
        block = _default_block(rule.chunk)
    if not 1 <= block <= rule.chunk:
        raise ValueError(f"block {block} must be between 1 and the rule's chunk {rule.chunk}")
    length = k.shape[1]
    block = min(block, length)
    tiles = _tiles(state, q, k, v, gates, segment_ids, block)
    carry = Carry(state.base, state.weights, state.momentum, state.place)

    def by_tile(carry, tiles):
        def body(carry, tile):
            if segment_ids is not None:
                carry = _restart(state, carry, tile.starts[:, 0])
            if block < rule.chunk:
                return _tile_of_chunk(rule, state, carry, tile)
            return _whole_chunk(rule, state, carry, tile)

        carry, outputs = grouped_scan(body, carry, tiles, group=remat)
        return _settle(rule, carry), outputs

    def anywhere(carry, tiles):
        def body(carry, tile):
            return _any_tile(rule, state, carry, tile)

        return grouped_scan(body, carry, tiles, group=remat)

    if length == 1 or aligned:
        carry, (y, loss) = by_tile(carry, tiles)
    else:
        # Where no tile holds a boundary but at its first token, one run a tile is enough.
        places = _places(rule, state, segment_ids, length)[:, ::block]
        whole = jnp.all(places + block <= rule.chunk) & ~jnp.any(tiles.starts[:, :, 1:])
        carry, (y, loss) = jax.lax.cond(whole, by_tile, anywhere, carry, tiles)
    y, loss = _unfold(y, length), _unfold(loss, length)
    segment = state.segment if segment_ids is None else segment_ids[:, -1].astype(jnp.int32)
    state = state._replace(**carry._asdict(), segment=segment)
    return y.astype(q.dtype), loss, state


def _default_block(chunk: int, most: int = 128) -> int:
    """The largest divisor of the chunk that is at most 128 (or, where that is small, just 128)."""
    divisor = max(d for d in range(1, min(chunk, most) + 1) if chunk % d == 0)
    return divisor if 2 * divisor > min(chunk, most) else min(chunk, most)


def _tiles(state, q, k, v, gates, segment_ids, block) -> Tile:
    """Everything cut into tiles: leading axis the tile, heads before time."""
    batch, length = k.shape[:2]
    count = -(-length // block)

    def fold(x):
        x = jnp.pad(x, [(0, 0), (0, count * block - length)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, count, block, *x.shape[2:])
        return jnp.moveaxis(x, (1, 3), (0, 2)) if x.ndim > 3 else jnp.moveaxis(x, 1, 0)

    live = jnp.ones((batch, length), bool)
    starts = ~live if segment_ids is None else documents.starts(segment_ids, state.segment)
    return jax.tree.map(fold, Tile(q, k, v, gates, starts, live))


def _unfold(x: Float[Array, "N B H C *V"], length: int) -> Array:
    """[N, B, H, C, ...] back to [B, T, H, ...]."""
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _places(rule, state, segment_ids, length) -> Int[Array, "B T"]:
    """Place in its chunk of every token, before it is written."""
    index = jnp.arange(length)
    if segment_ids is None:
        return (state.place[:, None] + index) % rule.chunk
    starts = documents.starts(segment_ids, state.segment)
    begun = jax.lax.cummax(jnp.where(starts, index, -1), axis=1)
    return jnp.where(begun < 0, state.place[:, None] + index, index - begun) % rule.chunk


def _tile_of_chunk(rule, state, carry: Carry, tile: Tile):
    """A tile inside a chunk."""
    flat = jnp.zeros_like(tile.live, jnp.int32)
    y, loss, weights, velocity = _run(rule, state, carry, tile, tile.live, flat)
    return _close(rule, carry, weights, velocity, tile, tile.live), (y, loss)


def _whole_chunk(rule, state, carry: Carry, tile: Tile):
    """A tile that is a chunk, or what there is of the last one: `_settle` tells them apart."""
    carry = carry._replace(base=carry.weights)
    flat = jnp.zeros_like(tile.live, jnp.int32)
    y, loss, weights, velocity = _run(rule, state, carry, tile, tile.live, flat)
    if tile.gates.scale is not None:
        scale = jnp.where(tile.live[:, None, -1], tile.gates.scale[:, :, -1], 1)[..., None, None]
        weights = jax.tree.map(lambda b, w: b + scale * (w - b), carry.base, weights)
    place = jnp.sum(tile.live, axis=1, dtype=carry.place.dtype)
    return Carry(carry.base, weights, velocity, place), (y, loss)


def _settle(rule, carry: Carry) -> Carry:
    """Ends the chunk that the last tile filled."""
    complete = carry.place == rule.chunk
    base = jax.tree.map(lambda w, b: _where(complete, w, b), carry.weights, carry.base)
    return carry._replace(base=base, place=jnp.where(complete, 0, carry.place))


def _any_tile(rule, state, carry: Carry, tile: Tile):
    """A tile anywhere: the rest of a chunk, the beginning of the next, documents that start.

    A tile is no longer than a chunk, so three runs do: the tokens that end the chunk in progress,
    those that begin the next at its weights, and those of new documents, all at W_0.
    """
    carry = _restart(state, carry, tile.starts[:, 0])
    starts = tile.starts.at[:, 0].set(False)
    document = jnp.cumsum(starts, axis=1)
    index = jnp.arange(tile.live.shape[1])
    ends = (document == 0) & (carry.place[:, None] + index < rule.chunk)
    kinds = jnp.stack([ends, (document == 0) & ~ends, document > 0]) & tile.live
    last_start = jnp.max(jnp.where(starts, index, 0), axis=1)

    def run(carry: Carry, kind):
        number, live = kind

        def act(carry, tile):
            fresh = jnp.any(live, axis=1) & (number == 2)
            carry = _restart(state, carry, fresh)
            group = jnp.where(number == 2, document, 0)
            y, loss, weights, velocity = _run(rule, state, carry, tile, live, group)
            # Only the last of several new documents goes on.
            own = live & ((number < 2) | (index >= last_start[:, None]))
            return _close(rule, carry, weights, velocity, tile, own), (y, loss)

        def skip(carry, tile):
            shapes = jax.eval_shape(act, carry, tile)[1]
            return carry, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        act = jax.checkpoint(act)
        carry, (y, loss) = jax.lax.cond(jnp.any(live), act, skip, carry, tile)
        mask = live[:, None]
        return carry, (jnp.where(mask[..., None], y, 0), jnp.where(mask, loss, 0))

    carry, (y, loss) = jax.lax.scan(run, carry, (jnp.arange(3), kinds))
    return carry, (jnp.sum(y, axis=0), jnp.sum(loss, axis=0))


def _restart(state: State, carry: Carry, rows: Bool[Array, " B"]) -> Carry:
    """The given rows at the beginning of a document."""
    weights, velocity = state.begin
    begin = Carry(weights, weights, velocity, jnp.zeros((), jnp.int32))
    return jax.tree.map(lambda now, new: _where(rows, new.astype(now.dtype), now), carry, begin)


def _close(rule, carry: Carry, weights, velocity, tile: Tile, own: Bool[Array, "B C"]) -> Carry:
    """The carry after the `own` tokens of a tile; a chunk that they fill ends."""
    place = carry.place + jnp.sum(own, axis=1, dtype=carry.place.dtype)
    complete = place == rule.chunk
    closed = weights
    if tile.gates.scale is not None:
        final = jnp.max(jnp.where(own, jnp.arange(own.shape[1]), 0), axis=1)
        scale = jnp.take_along_axis(tile.gates.scale, final[:, None, None], axis=2)[..., None]
        closed = jax.tree.map(lambda b, w: b + scale * (w - b), carry.base, weights)
    base = jax.tree.map(lambda c, b: _where(complete, c, b), closed, carry.base)
    weights = jax.tree.map(lambda c, w: _where(complete, c, w), closed, weights)
    return Carry(base, weights, velocity, jnp.where(complete, 0, place))


def _where(rows: Bool[Array, " B"], yes: Array, no: Array) -> Array:
    return jnp.where(rows.reshape(-1, *[1] * (no.ndim - 1)), yes, no)


def _run(rule, state: State, carry: Carry, tile: Tile, live, document):
    """`_run_head` over rows and heads: (y [B,H,C,V], loss [B,H,C], weights, momentum)."""

    # Keep the products for the backward pass, compute what lies between them again.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def head(base, weights, velocity, slow, q, k, v, gates, live, document):
        return _run_head(rule, base, weights, velocity, slow, q, k, v, gates, live, document)

    over_heads = jax.vmap(head, in_axes=(0, 0, 0, 0, 0, 0, 0, 0, None, None))
    over_rows = jax.vmap(over_heads, in_axes=(0, 0, 0, None, 0, 0, 0, 0, 0, 0))
    return over_rows(
        carry.base, carry.weights, carry.momentum, state.slow,
        tile.q, tile.k, tile.v, tile.gates, live, document,
    )  # fmt: skip


class Coefficients(NamedTuple):
    """How much of W, of S and of each token's gradient is in the weights after each token."""

    of_weights: Float[Array, "C *K"] | None  # beta; None = 1
    of_momentum: Float[Array, "C *K"] | None  # f; None = no momentum
    of_tokens: Float[Array, "C C *K"]  # G


def _run_head(rule, base, weights, velocity, slow, q, k, v, gates, live, document):
    """One run of one head: tokens that are not `live` change nothing.

    Args:
        base: weights at which gradients are taken; weights, velocity: those to go on from.
        q, k, v: [C, K], [C, K], [C, V].
        gates: each [C] (retain also [C, K]).
        live: [C].
        document: number of the token's document [C]; a new one starts from `weights` again.
    """
    loss, inputs, signals = _capture(rule, base, slow, k, v)
    same = document[:, None] == document[None, :]
    first = jnp.diff(document, prepend=document[:1] - 1) != 0
    lr = jnp.where(live, gates.lr, 0)
    eta = None if gates.momentum is None else jnp.where(live, gates.momentum, 1)
    # Tokens that are not live keep the weights and add no momentum to them.
    between, of_velocity = rule.learner.response(eta, same, first)
    lower = same & (jnp.arange(same.shape[0])[:, None] >= jnp.arange(same.shape[0])[None, :])
    by_token = jnp.diag(lr) if between is None else between * lr
    if gates.retain is None:
        kept, of_weights = lower.astype(lr.dtype), None
    else:
        spread = (slice(None),) + (None,) * (gates.retain.ndim - 1)
        retain = jnp.where(live[spread], gates.retain, 1)
        kept = segment_products(retain, same)
        of_weights = prefix_products(kept, retain, first)
    kept = jnp.where(live[(None, slice(None)) + (None,) * (kept.ndim - 2)], kept, 0)
    if between is None:
        of_tokens = kept * (lr if kept.ndim == 2 else lr[:, None])
    else:
        of_tokens = jnp.einsum("il...,lj->ij...", kept, by_token)
    of_momentum = None if of_velocity is None else jnp.einsum("il...,l->i...", kept, of_velocity)
    after = Coefficients(of_weights, of_momentum, of_tokens)

    seen = after if rule.read == "after" else _before(after, first)
    y = _corrected_read(rule, base, weights, velocity, slow, q, inputs, signals, seen, gates.scale)

    end = jax.tree.map(lambda x: x[-1], after)
    weights = tuple(
        _updated(end, w, s, x, d, q.dtype)
        for w, s, x, d in zip(
            weights, velocity or (None,) * len(weights), inputs, signals, strict=True
        )
    )
    if of_velocity is not None:
        velocity = tuple(
            of_velocity[-1] * s - matmul(x.T, by_token[-1][:, None] * d, compute=q.dtype)
            for s, x, d in zip(velocity, inputs, signals, strict=True)
        )
    return y, loss, weights, velocity


def _capture(rule, base, slow, k, v):
    """The key side at W': (loss [C], input X of each linear map, signal D at its output)."""
    dtype = accumulation_dtype(base[0].dtype)

    def forward(taps):
        inputs = []

        def linear(i, x):
            inputs.append(x)
            return matmul(x, base[i], compute=k.dtype) + taps[i]

        return rule.structure.forward(linear, slow, k.astype(dtype)), tuple(inputs)

    taps = tuple(jnp.zeros((k.shape[0], w.shape[-1]), dtype) for w in base)
    y, pull_back, inputs = jax.vjp(forward, taps, has_aux=True)
    v = v.astype(dtype)
    (signals,) = pull_back(rule.bias.signal(y, v))
    return rule.bias.loss(y, v), inputs, signals


def _corrected_read(rule, base, weights, velocity, slow, q, inputs, signals, seen, scale):
    """M(q_i; W_i) for every i at once, W_i by its coefficients."""
    compute = q.dtype

    def scaled(gate, x):
        return x if gate is None else (gate * x if gate.ndim == 2 else gate[:, None] * x)

    def linear(i, x):
        if seen.of_tokens.ndim == 2:
            scores = matmul(x, inputs[i].T, compute=compute) * seen.of_tokens
            by_weights = scaled(seen.of_weights, matmul(x, weights[i], compute=compute))
        else:
            scores = jnp.einsum("ik,jk,ijk->ij", x, inputs[i], seen.of_tokens)
            by_weights = matmul(scaled(seen.of_weights, x), weights[i], compute=compute)
        z = by_weights - matmul(scores, signals[i], compute=compute)
        if seen.of_momentum is not None and seen.of_momentum.ndim == 1:
            z += seen.of_momentum[:, None] * matmul(x, velocity[i], compute=compute)
        elif seen.of_momentum is not None:
            z += matmul(seen.of_momentum * x, velocity[i], compute=compute)
        if scale is not None:
            anchor = matmul(x, base[i], compute=compute)
            z = anchor + scale[:, None] * (z - anchor)
        return z

    return rule.structure.forward(linear, slow, q.astype(accumulation_dtype(base[0].dtype)))


def _before(after: Coefficients, first: Bool[Array, " C"]) -> Coefficients:
    """The coefficients before each token's write: of the row above, or none where a run begins."""

    def shift(x, fill):
        above = jnp.concatenate([jnp.full_like(x[:1], fill), x[:-1]])
        return jnp.where(first.reshape(-1, *[1] * (x.ndim - 1)), fill, above)

    return Coefficients(
        None if after.of_weights is None else shift(after.of_weights, 1),
        None if after.of_momentum is None else shift(after.of_momentum, 0),
        shift(after.of_tokens, 0),
    )


def _updated(end: Coefficients, weight, velocity, x, signal, compute):
    """One weight after the run's last token."""

    def rows(gate, w):
        return gate[:, None] * w if gate.ndim else gate * w

    kept = weight if end.of_weights is None else rows(end.of_weights, weight)
    if end.of_momentum is not None:
        kept = kept + rows(end.of_momentum, velocity)
    if end.of_tokens.ndim == 1:
        return kept - matmul(x.T, end.of_tokens[:, None] * signal, compute=compute)
    return kept - matmul((end.of_tokens * x).T, signal, compute=compute)
