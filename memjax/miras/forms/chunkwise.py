"""The fast form: a sequence in tiles, each computed by the dual form or by the closed one.

This file is about places: which tokens belong to the chunk in progress, to the next, to a document
that starts. `dual.py` is about the arithmetic of such a run of tokens, and `by_token.py` of those
whose weights are no sums. `linear.py` has that of matrix memories which learn at every token; where
it fits, it is taken.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from memjax import checks, documents, sharding
from memjax.miras import features
from memjax.miras.forms import by_token, dual, isolation, kernels, linear, normal, shards
from memjax.miras.forms.inputs import as_given, check
from memjax.miras.forms.remat import in_groups
from memjax.miras.rule import Gates, Pairs, Rule, State
from memjax.miras.state import close_chunk, scaled
from memjax.typing import Array, Bool, Float, Int, PyTree


class Tile(NamedTuple):
    """Consecutive tokens of every row; `live` is False on padding, `starts` begin documents.

    `learned` are the tokens whose gradients these take: themselves, or with those before them.
    """

    q: Float[Array, "B H C K"]
    learned: dual.Learned
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

    What is not finite in a token or in the state makes NaN of its document's weights from there on,
    and of nothing else. By kernels, or where the time axis is split over devices, it may reach the
    tokens of its chunk before it, and the row's later documents of this call, not of later ones;
    never another row.

    Args:
        rule: the memory.
        state: where it stands.
        q, k: queries and keys [B, T, H, K].
        v: values [B, T, H, V].
        gates: rates, each [B, T, H].
        segment_ids: document of each token; the memory restarts where it changes. None: all tokens
            continue the document of the state.
        block: tile size, at most the chunk (default: the chunk, at most 128, or 32 where each
            token's weights are formed); only speed. The closed form of online matrix memories
            takes any (default 64).
        implementation: "pallas" = the kernel of this rule, "xla", or None = the kernel where the
            platform is a TPU and there is one for the rule (`kernels`), else "xla".
        remat: tiles per group of recomputation in the backward pass, which holds one state a group
            and what one group computes: None = as few as keep those states within 8 times the size
            of keys and values (memory is linear in T), 0 = recompute nothing. The closed form
            keeps a state a tile whatever it says.
    Returns:
        (y [B, T, H, V] in q's dtype, the state after the last token)
    Raises:
        ValueError: an argument that does not fit, by name.
    """
    options = {"block": block, "remat": remat, "implementation": implementation, "loss": False}
    y, _, state = trace(rule, state, q, k, v, gates, segment_ids=segment_ids, **options)
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
    implementation: str | None = None,
    remat: int | None = None,
    aligned: bool = False,
    loss: bool = True,
    unit: bool = False,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"] | None, State]:
    """`chunkwise` and `surprise` in one pass: (y, surprise, state).

    Args:
        aligned: the caller's promise that chunks and documents begin at multiples of `block` in
            this call, if they begin in it at all, the first of its tokens being such a place; what
            is for any other place is then not compiled (where `block` divides the chunk). A promise
            that is broken gives wrong results.
        loss: whether the surprise is wanted; else None stands for it.
        unit: whether q and k are to be divided by their norms first (`features.unit`), which a
            kernel does on its way.
        interpret: runs a kernel in Pallas' TPU interpreter, on any platform.

    Under the mesh of `jax.set_mesh` each device computes its rows and heads, and, where the rule is
    affine (`linear.fits`), its tokens (`shards`). All other arguments are those of `chunkwise`.
    """
    given = state
    state, gates = check(rule, given, q, k, v, gates, segment_ids)
    closed = rule.learner.solves or linear.fits(rule, gates)
    if block is None:
        block = linear.BLOCK if closed else _default_block(rule)
    checks.whole("block", block)
    if remat is not None:
        checks.whole("remat", remat, least=0)
    if block > rule.chunk and not closed:
        raise ValueError(f"block {block} must be between 1 and the rule's chunk {rule.chunk}")
    kernel = kernels.wanted(rule, state, q, v, gates, implementation, loss=loss)
    if kernel:
        run = functools.partial(_by_kernel, aligned=aligned, unit=unit, interpret=interpret)
    else:
        run = functools.partial(_by_tiles, remat=remat, aligned=aligned, unit=unit)

    run = functools.partial(run, rule, block=block, loss=loss)
    dims = {"batch": k.shape[0], "heads": k.shape[2]}
    along = sharding.devices_along("time")
    cut = along > 1 and k.shape[1] % along == 0 and linear.fits(rule, gates)
    if cut:
        dims["time"] = k.shape[1]

    def share(state, q, k, v, gates, segment_ids):
        if cut:
            return shards.run(run, state, q, k, v, gates, segment_ids)
        starts = None
        if segment_ids is not None:
            starts = documents.starts(segment_ids, state.segment)
        if kernel:
            if starts is not None and closed:
                state = isolation.begun(state, starts)
            y, surprises, state = run(state, q, k, v, gates, starts)
        else:
            y, surprises, state = isolation.contained(run, rule, state, q, k, v, gates, starts)
        if starts is not None:
            state = state._replace(segment=segment_ids[:, -1].astype(jnp.int32))
        return y, surprises, state

    tokens, states = PartitionSpec("batch", "time", "heads"), axes_of(state)
    y, surprises, state = sharding.on_each_device(
        share,
        (state, q, k, v, gates, segment_ids),
        (states, tokens, tokens, tokens, tokens, PartitionSpec("batch", "time")),
        (tokens, tokens, states),
        dims=dims,
    )
    return y, surprises, as_given(rule, given, state)


def axes_of(state: State) -> State:
    """Which axes of a state are rows and heads."""
    rows, heads = PartitionSpec("batch"), PartitionSpec("heads")
    fast = PartitionSpec("batch", "heads")
    pairs = Pairs(fast, fast, fast, rows) if state.pairs else ()
    return State(fast, fast, fast, rows, rows, heads, heads, pairs)


def _by_kernel(rule, state, q, k, v, gates, starts, *, block, loss, aligned, unit, interpret):
    """A call by the rule's Pallas kernel: all of it, or the whole chunks of it."""
    if linear.fits(rule, gates):
        options = {"loss": loss, "unit": unit, "interpret": interpret}
        return kernels.affine(rule, state, q, k, v, gates, starts, **options)
    chunk, length = rule.chunk, k.shape[1]
    whole = length - length % chunk

    def anywhere(state):
        options = {"loss": True, "remat": None, "aligned": False, "unit": unit}
        return _by_tiles(rule, state, q, k, v, gates, starts, block=block, **options)

    if not whole:
        return anywhere(state)

    def in_place(state):
        first, rest = (
            jax.tree.map(lambda x, cut=cut: x[:, cut], (q, k, v, gates, starts))
            for cut in (slice(whole), slice(whole, None))
        )
        *tokens, begins = first
        if begins is not None:
            begins = begins[:, ::chunk]
        y, surprises, state = kernels.deep(
            rule, state, *tokens, begins, unit=unit, interpret=interpret
        )
        if whole < length:
            more, their, state = _by_tiles(
                rule, state, *rest, block=min(block, length - whole), loss=True, remat=None,
                aligned=False, unit=unit,
            )  # fmt: skip
            y, surprises = (jnp.concatenate(x, 1) for x in ((y, more), (surprises, their)))
        return y, surprises, state

    if aligned and block == chunk:
        y, surprises, state = in_place(state)
    else:
        placed = jnp.all(state.place == 0)
        if starts is not None:
            placed &= ~jnp.any(starts & (jnp.arange(length) % chunk != 0))
        y, surprises, state = jax.lax.cond(placed, in_place, jax.checkpoint(anywhere), state)
    return y, surprises if loss else None, state


def _by_tiles(rule, state, q, k, v, gates, starts, *, block, loss, remat, aligned, unit):
    """A call by XLA: (y [B, T, H, V], loss [B, T, H] or None, state)."""
    length, restarts = k.shape[1], starts is not None
    if unit:
        q, k = features.unit(q), features.unit(k)
    starts = jnp.zeros(k.shape[:2], bool) if starts is None else starts
    past = _with_past(state, k, v, gates.threshold, starts) if state.pairs else None
    tiles = _tiles(q, k, v, gates, starts, past, min(block, length))
    if rule.learner.solves or linear.fits(rule, gates):
        run = normal.run if rule.learner.solves else linear.run
        y, surprises, state = run(rule, state, tiles, restarts=restarts, compute=q.dtype, loss=loss)
        return _outcome(state, q, y, surprises)
    aligned = aligned and rule.chunk % block == 0
    block = min(block, length)
    if remat is None:
        whole = aligned and block == rule.chunk
        remat = _default_group(state, block, -(-length // block), whole=whole)
    carry = Carry(state.base, state.weights, state.momentum, state.place)

    def by_tile(carry, tiles):
        def run(carry, tiles):
            return _run_tiles(rule, state, carry, tiles, restarts=restarts)

        carry, outputs = in_groups(run, carry, tiles, group=remat)
        return (_settle(rule, carry) if block == rule.chunk else carry), outputs

    def anywhere(carry, tiles):
        def run(carry, tiles):
            return _scan(lambda c, tile: _any_tile(rule, state, c, tile), carry, tiles)

        return in_groups(run, carry, tiles, group=remat)

    if length == 1 or aligned:
        carry, (y, surprises) = by_tile(carry, tiles)
    else:
        # Where no tile holds a boundary but at its first token, one run a tile is enough.
        places = _places(rule, state, starts if restarts else None, length)[:, ::block]
        whole = jnp.all(places + block <= rule.chunk) & ~jnp.any(tiles.starts[:, :, 1:])
        carry, (y, surprises) = jax.lax.cond(whole, by_tile, anywhere, carry, tiles)
    state = state._replace(**carry._asdict(), pairs=_last_pairs(state, past))
    return _outcome(state, q, y, surprises if loss else None)


def _outcome(state, q, y, surprises):
    """Results of a call from those of its tiles."""
    length = q.shape[1]
    y = _unfold(y, length).astype(q.dtype)
    if surprises is not None:
        surprises = _unfold(surprises, length)
    return y, surprises, state


def _default_block(rule: Rule) -> int:
    """The largest divisor of the chunk that is at most 128 (or, where that is small, just 128).

    Where the weights of each token are formed, 32: the backward pass holds those of a tile.
    """
    chunk, most = rule.chunk, 128 if dual.fits(rule) or rule.learner.closes else 32
    divisor = max(d for d in range(1, min(chunk, most) + 1) if chunk % d == 0)
    return divisor if 2 * divisor > min(chunk, most) else min(chunk, most)


def _default_group(
    state: State, block: int, count: int, *, whole: bool, most: int = 8, least: int = 16
) -> int:
    """Tiles a group, so that its state is at most 8 times the keys and values of its tokens.

    Unless tiles are whole chunks, a chunk's first weights are of the state. A divisor of the
    `count` of tiles leaves no shorter group, to be compiled for itself, at the end.
    """
    weights, fast = state.weights, (state.weights, state.momentum)
    if not whole:
        fast += (state.base,)
    held = sum(leaf[0, 0].size for leaf in jax.tree.leaves(fast))
    a_token = weights[0].shape[-2] + weights[-1].shape[-1]
    group = max(-(-held // (most * block * a_token)), -(-least // block))
    return next((n for n in range(group, 2 * group) if count % n == 0), group)


def _tiles(q, k, v, gates, starts, past: dual.Learned | None, block: int) -> Tile:
    """Everything cut into tiles: leading axis the tile, heads before time."""
    batch, length = k.shape[:2]
    count = -(-length // block)

    def fold(x, fill=0):
        pad = [(0, 0), (0, count * block - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad, constant_values=fill)
        return turn(x.reshape(batch, count, block, *x.shape[2:]))

    def turn(x):  # [B, N, C, H, ...] or [B, N, C] with the tile in front, heads before time
        return jnp.moveaxis(x, (1, 3), (0, 2)) if x.ndim > 3 else jnp.moveaxis(x, 1, 0)

    if past is None:
        learned = jax.tree.map(fold, dual.Learned(k, v, gates.threshold, None, None))
    else:
        before = past.seen.shape[1] - length
        where = jnp.arange(count)[:, None] * block + jnp.arange(block + before)[None, :]

        def windows(x, fill=0):
            x = jnp.pad(
                x, [(0, 0), (0, count * block - length)] + [(0, 0)] * (x.ndim - 2),
                constant_values=fill,
            )  # fmt: skip
            return turn(x[:, where])

        number = fold(past.seen[:, before:])
        learned = jax.tree.map(windows, past._replace(seen=None))
        learned = learned._replace(document=number, seen=windows(past.seen, -2))
    gates = jax.tree.map(fold, gates._replace(threshold=None))
    return Tile(fold(q), learned, gates, fold(starts), fold(jnp.ones_like(starts)))


def _with_past(state: State, k, v, threshold, starts) -> dual.Learned:
    """The state's window and the tokens of a call, time after batch; -1 numbers no document."""
    pairs = state.pairs
    dtype = k.dtype

    def join(old, new):
        return jnp.concatenate([jnp.moveaxis(old, 2, 1).astype(new.dtype), new], axis=1)

    number = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    seen = jnp.concatenate([jnp.where(pairs.live, 0, -1), number], axis=1)
    threshold = None if threshold is None else join(pairs.threshold, threshold)
    return dual.Learned(join(pairs.k.astype(dtype), k), join(pairs.v, v), threshold, None, seen)


def _last_pairs(state: State, past: dual.Learned | None) -> Pairs | tuple[()]:
    """The window after a call."""
    if past is None:
        return ()
    count = state.pairs.live.shape[1]

    def last(x, like):
        return None if x is None else jnp.moveaxis(x[:, -count:], 1, 2).astype(like.dtype)

    live = past.seen[:, -count:] == past.seen[:, -1:]
    threshold = last(past.threshold, state.pairs.threshold)
    pairs = Pairs(last(past.k, state.pairs.k), last(past.v, state.pairs.v), threshold, live)
    return _only(pairs, live[:, None, :, None])


def _unfold(x: Float[Array, "N B H C *V"], length: int) -> Array:
    """[N, B, H, C, ...] back to [B, T, H, ...]."""
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _places(rule, state, starts, length) -> Int[Array, "B T"]:
    """Place in its chunk of every token, before it is written; without starts, none is a first."""
    index = jnp.arange(length)
    if starts is None:
        return (state.place[:, None] + index) % rule.chunk
    begun = jax.lax.cummax(jnp.where(starts, index, -1), axis=1)
    return jnp.where(begun < 0, state.place[:, None] + index, index - begun) % rule.chunk


def _run_tiles(rule, state, carry: Carry, tiles: Tile, *, restarts: bool):
    """A group of tiles that hold a boundary at their first token, if any.

    What follows from the gates alone is put together for all of them before the loop.
    """
    if dual.fits(rule):
        document = jnp.zeros_like(tiles.live, jnp.int32)
        plans = jax.vmap(_plan(rule))(tiles.gates, tiles.learned, tiles.live, document)
    else:
        plans = None
    # Such a tile is a chunk of its own, or the call's last and what there is of one.
    whole = tiles.live.shape[2] == rule.chunk and not _closes(rule)

    def step(carry: Carry, now):
        tile, plan = now
        if restarts:
            carry = _restart(state, carry, tile.starts[:, 0])
            tile = _of_documents(tile, tile.live)
        if whole:
            carry = carry._replace(base=carry.weights)
        if plan is None:
            y, loss, *written = _run(rule, state, carry, tile, tile.live, None)
        else:
            loss, inputs, signals, *written = _write(rule, state, carry, tile, plan)
            y = _read(rule, state, carry, tile, inputs, signals, plan)
        loss = loss[..., -tile.live.shape[1] :]
        if whole:
            carry = _chunk_end(carry, *written, tile)
        else:
            carry = _close(rule, state, carry, *written, tile, tile.live)
        return carry, (y, loss)

    return _scan(step, carry, (tiles, plans))


def _scan(step, carry: Carry, tiles: PyTree):
    """`jax.lax.scan` over a group of tiles; a pair is computed without storing what both keep."""
    count = jax.tree.leaves(tiles)[0].shape[0]
    return jax.lax.scan(step, carry, tiles, unroll=count <= 2)


def _of_documents(tile: Tile, live: Bool[Array, "B C"]) -> Tile:
    """Only the learned tokens of the documents that the `live` ones belong to: others are emptied.

    Masks multiply: what is not finite in another run's tokens must not come near.
    """
    learned = tile.learned
    if learned.seen is None:
        here = live[:, None, :, None]
    else:
        belongs = learned.seen[:, :, None] == learned.document[:, None, :]
        here = jnp.any(belongs & live[:, None, :], axis=2)[:, None, :, None]
    return tile._replace(learned=_only(learned, here))


def _only(learned, here: Bool[Array, "B 1 E 1"]):
    """Keys, values and thresholds of the tokens that are `here`; the others as at the start."""
    threshold = learned.threshold
    if threshold is not None:
        threshold = jnp.where(here[..., 0], threshold, 1)
    k, v = jnp.where(here, learned.k, 0), jnp.where(here, learned.v, 0)
    return learned._replace(k=k, v=v, threshold=threshold)


def _closes(rule: Rule) -> bool:
    """Whether the end of a chunk does more than move its weights on."""
    return rule.learner.closes or rule.retention.closes


def _chunk_end(carry: Carry, base, weights, velocity, tile: Tile) -> Carry:
    """After a chunk, or what there is of the last one: `_settle` tells them apart."""
    scale = tile.gates.scale
    if scale is not None:
        scale = jnp.where(tile.live[:, None, -1], scale[:, :, -1], 1)
    weights = scaled(base, weights, scale)
    place = jnp.sum(tile.live, axis=1, dtype=carry.place.dtype)
    return Carry(base, weights, velocity, place)


def _settle(rule, carry: Carry) -> Carry:
    """Ends the chunk that the last tile filled."""
    complete = carry.place == rule.chunk
    base = documents.choose(complete, carry.weights, carry.base)
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
            tile = _of_documents(tile, live)
            y, loss, *written = _run(rule, state, carry, tile, live, group)
            # Only the last of several new documents goes on.
            own = live & ((number < 2) | (index >= last_start[:, None]))
            loss = loss[..., -live.shape[1] :]
            return _close(rule, state, carry, *written, tile, own), (y, loss)

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
    return documents.choose(rows, begin, carry)


def _close(
    rule, state, carry: Carry, base, weights, velocity, tile: Tile, own: Bool[Array, "B C"]
) -> Carry:
    """The carry after the `own` tokens of a tile; a chunk that they fill ends."""
    place = carry.place + jnp.sum(own, axis=1, dtype=carry.place.dtype)
    complete = place == rule.chunk
    scale = tile.gates.scale
    if scale is not None:
        final = jnp.max(jnp.where(own, jnp.arange(own.shape[1]), 0), axis=1)
        scale = jnp.take_along_axis(scale, final[:, None, None], axis=2)[..., 0]
    closed, moved = close_chunk(rule, state.begin, base, weights, velocity, scale)

    def choose(yes, no):
        return documents.choose(complete, yes, no)

    if rule.learner.closes:
        velocity = choose(moved, velocity)
    place = jnp.where(complete, 0, place)
    return Carry(choose(closed, base), choose(closed, weights), velocity, place)


def _run(rule, state: State, carry: Carry, tile: Tile, live, document):
    """One run over rows and heads: (y [B,H,C,V], loss [B,H,E], base, weights, momentum)."""
    if dual.fits(rule):
        plan = _plan(rule)(tile.gates, tile.learned, live, document)
        loss, inputs, signals, *written = _write(rule, state, carry, tile, plan)
        return _read(rule, state, carry, tile, inputs, signals, plan), loss, *written
    head = functools.partial(by_token.gather if rule.learner.closes else by_token.run, rule)
    # Axes that heads share: documents, and what is live.
    learned = dual.Learned(0, 0, 0, None, None)
    over_heads = jax.vmap(head, in_axes=(0, 0, 0, 0, 0, 0, learned, 0, None, None))
    over_rows = jax.vmap(over_heads, in_axes=(0, 0, 0, None, None, 0, 0, 0, 0, 0))
    return over_rows(
        carry.base, carry.weights, carry.momentum, state.begin, state.slow, tile.q, tile.learned,
        tile.gates, live, document,
    )  # fmt: skip


def _plan(rule):
    """`dual.plan` over rows and heads."""
    learned = dual.Learned(0, 0, 0, None, None)
    over_heads = jax.vmap(functools.partial(dual.plan, rule), in_axes=(0, learned, None, None))
    return jax.vmap(over_heads)


# In the backward pass, products are kept and what lies between them is computed again.
_keep_products = functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
)


def _write(rule, state: State, carry: Carry, tile: Tile, plan: dual.Plan):
    """`dual.write` over rows and heads."""
    head = _keep_products(functools.partial(dual.write, rule))
    learned = dual.Learned(0, 0, 0, None, None)
    over_heads = jax.vmap(head, in_axes=(0, 0, 0, 0, 0, learned, 0))
    over_rows = jax.vmap(over_heads, in_axes=(0, 0, 0, None, None, 0, 0))
    return over_rows(
        carry.base, carry.weights, carry.momentum, state.begin, state.slow, tile.learned, plan
    )


def _read(rule, state: State, carry: Carry, tile: Tile, inputs, signals, plan):
    """`dual.read` over rows and heads."""
    head = _keep_products(functools.partial(dual.read, rule))
    over_heads = jax.vmap(head)
    over_rows = jax.vmap(over_heads, in_axes=(0, 0, 0, None, None, 0, 0, 0, 0, 0))
    return over_rows(
        carry.base, carry.weights, carry.momentum, state.begin, state.slow, tile.q, inputs, signals,
        plan, tile.gates.scale,
    )  # fmt: skip
