"""Causal and sliding-window attention over [prefix | cache | new tokens].

Token t sees, all in one softmax:

* the prefix (persistent keys and values), always;
* the last `window` tokens of its own document, itself included;
* the first `sinks` tokens of its own document.

A `Cache` of constant size carries what later tokens need, so that a sequence may be cut anywhere.
Training never forms a T x T matrix where T exceeds the window: blocks of `window` queries see their
own block and the one before, so the cost is linear in T.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from memjax import documents
from memjax.attention import backends
from memjax.typing import Array, Bool, Float, Int


class Cache(NamedTuple):
    """Keys and values that later tokens may still see; its size does not depend on the position.

    Token number i of a document lies in slot `i % window` of the ring, and in sink slot i if
    i < sinks. `seen` tells which slots count: a new document starts it anew and clears nothing.

    Args:
        keys, values: [B, W, G, D], the ring.
        sink_keys, sink_values: [B, sinks, G, D]; slot i counts if i < seen.
        seen: [B], tokens of the running document so far.
        segment: [B], id of the last token; -1 = nothing seen yet.
    """

    keys: Float[Array, "B W G D"]
    values: Float[Array, "B W G D"]
    sink_keys: Float[Array, "B N G D"]
    sink_values: Float[Array, "B N G D"]
    seen: Int[Array, "B"]
    segment: Int[Array, "B"]


class Prefix(NamedTuple):
    """Persistent keys and values, seen by every token of every document.

    Args:
        keys, values: [P, G, D].
    """

    keys: Float[Array, "P G D"]
    values: Float[Array, "P G D"]


def start(
    batch: int,
    kv_heads: int,
    head_dim: int,
    *,
    window: int,
    sinks: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> Cache:
    """An empty cache.

    Args:
        batch: B.
        kv_heads: G, heads of keys and values.
        head_dim: D.
        window: W, tokens that a token sees, itself included.
        sinks: first tokens of a document that stay visible.
        dtype: of the keys and values; `attend` keeps the dtype of the cache it is given.

    Returns:
        A `Cache`.

    Raises:
        ValueError: window below 1 or sinks below 0.
    """
    _check_sizes(window, sinks)

    def slots(count):
        return jnp.zeros((batch, count, kv_heads, head_dim), dtype)

    # each its own array: a caller may donate them
    return Cache(
        keys=slots(window),
        values=slots(window),
        sink_keys=slots(sinks),
        sink_values=slots(sinks),
        seen=jnp.zeros((batch,), jnp.int32),
        segment=jnp.full((batch,), -1, jnp.int32),
    )


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T G D"],
    v: Float[Array, "B T G D"],
    cache: Cache | None = None,
    *,
    window: int,
    sinks: int = 0,
    prefix: Prefix | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H D"], Cache]:
    """Attends from each new token to what it sees, and takes the new tokens into the cache.

        y[t] = softmax(q[t] . k[seen by t] / sqrt(D)) v[seen by t]

    Softmax in fp32. Any T per call, also beyond the window; cutting a sequence anywhere changes
    nothing.

    Args:
        q: [B, T, H, D], rotated queries.
        k, v: [B, T, G, D], rotated keys, and values; query head h reads head h // (H / G).
        cache: what the tokens before left; None = the sequence starts here.
        window: tokens that a token sees, itself included; of a cache, its capacity.
        sinks: first tokens of each document that stay visible.
        prefix: keys and values that every token sees.
        segment_ids: [B, T]; a change starts a new document, which sees none of the one before.
            None = every token continues the document of the cache.
        implementation: None, "xla", "splash" or "cudnn"; see `backends.choose`. An explicit one
            is used or refused, never replaced.

    Returns:
        [B, T, H, D] in the dtype of q, and the cache after the last token.

    Raises:
        ValueError: shapes, window or sinks that do not fit each other or the cache; a call that
            an explicit implementation cannot compute.
    """
    _check(q, k, v, cache, window, sinks, prefix)
    fresh, documented, time = cache is None, segment_ids is not None, q.shape[1]
    picked = backends.choose(
        implementation,
        q,
        fresh=fresh,
        window=window,
        sinks=sinks,
        prefix=prefix is not None,
    )
    if cache is None:
        wide = jnp.promote_types(k.dtype, jnp.float32)
        cache = start(q.shape[0], *k.shape[2:], window=window, sinks=sinks, dtype=wide)
    place = documents.follow(segment_ids, cache.segment, cache.seen, time)
    after = _write(cache, k, v, place)
    plain = fresh and prefix is None and not documented
    if picked == "splash":
        number = place.number if documented else None
        y = backends.splash(q, k, v, window=window, number=number)
    elif plain and time <= window:
        y = backends.dense(q, k, v, None, picked)
    elif plain and picked == "cudnn" and sinks == 0:
        y = backends.dense(q, k, v, None, picked, window)
    elif time <= window:
        y = _whole(q, k, v, None if fresh else cache, after, prefix, place, picked)
    else:
        y = _banded(q, k, v, cache, prefix, place, picked)
    return y, after


def _whole(q, k, v, cache, after, prefix, place, picked) -> Array:
    """At most `window` queries: every new token of the document before them is in the window."""
    time, sources = q.shape[1], []
    if cache is not None and time == 1:
        # the ring that holds the token itself is all it sees: no copy to append it
        cache, place = after, place._replace(number=jnp.zeros_like(place.number))
    else:
        steps = jnp.arange(time)
        own = place.number[:, :, None] == place.number[:, None, :]
        sources.append((k, v, own & (steps[:, None] >= steps)))
    if cache is not None:
        window = cache.keys.shape[1]
        carried, index = place.number[:, :, None] == 0, place.index[:, :, None]
        slots = _held(cache)[:, None, :]
        seen = (slots >= 0) & (slots > index - window) & (slots <= index)
        sources.append((cache.keys, cache.values, carried & seen))
        sinks = jnp.arange(cache.sink_keys.shape[1])
        sources.append((cache.sink_keys, cache.sink_values, carried & (sinks <= index - window)))
    if prefix is not None:
        sources.append(_prefix_source(prefix, q.shape[0], time))
    return backends.dense(q, *_join(sources, q.dtype), picked)


def _banded(q, k, v, cache, prefix, place, picked) -> Array:
    """More queries than the window: blocks of it, each seeing its own block and the one before."""
    batch, time = q.shape[:2]
    window, sinks = cache.keys.shape[1], cache.sink_keys.shape[1]
    count = math.ceil(time / window)
    padding = count * window - time

    def split(x):
        widths = ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)
        return jnp.pad(x, widths, mode="edge").reshape(batch, count, window, *x.shape[2:])

    def pairs(ring, new):
        blocks = split(new)
        before = jnp.concatenate([ring.astype(new.dtype)[:, None], blocks[:, :-1]], axis=1)
        return jnp.concatenate([before, blocks], axis=2)

    def fold(x):
        return x.reshape(batch * count, *x.shape[2:])

    # the block before the first: the ring in the order of time
    order = cache.seen[:, None] - window + jnp.arange(window)
    rows = jnp.arange(batch)[:, None]
    ring = [x[rows, order % window] for x in (cache.keys, cache.values)]
    number, index = split(place.number), split(place.index)
    # -1: no document, for slots that hold nothing yet
    numbers = pairs(jnp.where(order >= 0, 0, -1), place.number)
    distance = window + jnp.arange(window)[:, None] - jnp.arange(2 * window)
    near = (distance >= 0) & (distance < window)
    mask = near & (number[..., :, None] == numbers[..., None, :])
    sources = [(fold(pairs(ring[0], k)), fold(pairs(ring[1], v)), fold(mask))]
    if sinks:
        # A query whose document's first token is out of its window shares that document with the
        # first query of its block, so one set of sinks serves the block.
        begin = jnp.arange(count) * window - index[:, :, 0]
        at = begin[:, :, None] + jnp.arange(sinks)
        at = jnp.where(at < 0, jnp.arange(sinks), sinks + jnp.minimum(at, time - 1))
        at = at.reshape(batch, count * sinks)
        far = jnp.arange(sinks) <= index[..., None] - window
        mask = far & (number[..., None] == number[:, :, :1, None])

        def gather(old, new):
            x = jnp.concatenate([old.astype(new.dtype), new], axis=1)[rows, at]
            return x.reshape(batch * count, sinks, *x.shape[2:])

        keys, values = gather(cache.sink_keys, k), gather(cache.sink_values, v)
        sources.append((keys, values, fold(mask)))
    if prefix is not None:
        sources.append(_prefix_source(prefix, batch * count, window))
    y = backends.dense(fold(split(q)), *_join(sources, q.dtype), picked)
    return y.reshape(batch, count * window, *q.shape[2:])[:, :time]


def _prefix_source(prefix: Prefix, batch: int, time: int):
    keys, values = (jnp.broadcast_to(x, (batch, *x.shape)) for x in prefix)
    return keys, values, jnp.ones((batch, time, keys.shape[1]), bool)


def _join(sources, dtype) -> tuple[Array, Array, Bool[Array, "B T S"]]:
    sources = [source for source in sources if source[0].shape[1]]
    keys, values, masks = zip(*sources, strict=True)
    keys = [x.astype(dtype) for x in keys]
    values = [x.astype(dtype) for x in values]
    if len(sources) == 1:
        return keys[0], values[0], masks[0]
    return jnp.concatenate(keys, 1), jnp.concatenate(values, 1), jnp.concatenate(masks, 2)


def _held(cache: Cache) -> Int[Array, "B W"]:
    """Which token of the running document each slot of the ring holds; negative = none."""
    window, newest = cache.keys.shape[1], cache.seen[:, None] - 1
    return newest - (newest - jnp.arange(window)) % window


def _write(cache: Cache, k: Array, v: Array, place: documents.Documents) -> Cache:
    """The cache once the new tokens of the last document are in it."""
    window, sinks = cache.keys.shape[1], cache.sink_keys.shape[1]
    last = place.number[:, -1:]
    ours = place.number == last
    # of more tokens than the ring holds, only the last may be written: the order is not defined
    tail = slice(max(0, k.shape[1] - window), None)
    slot = jnp.where(ours, place.index % window, window)[:, tail]
    sink = jnp.where(ours, place.index, sinks)

    @jax.vmap
    def put(slots, at, new):
        return slots.at[at].set(new.astype(slots.dtype), mode="drop")

    return Cache(
        keys=put(cache.keys, slot, k[:, tail]),
        values=put(cache.values, slot, v[:, tail]),
        sink_keys=put(cache.sink_keys, sink, k) if sinks else cache.sink_keys,
        sink_values=put(cache.sink_values, sink, v) if sinks else cache.sink_values,
        seen=place.seen,
        segment=place.last,
    )


def _check_sizes(window: int, sinks: int) -> None:
    if window < 1:
        raise ValueError(f"window {window} must be at least 1: a token sees itself")
    if sinks < 0:
        raise ValueError(f"sinks {sinks} must be at least 0")


def _check(q, k, v, cache, window, sinks, prefix) -> None:
    _check_sizes(window, sinks)
    if q.shape[1] < 1:
        raise ValueError(f"q has shape {q.shape}: there must be at least one token")
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} must agree in batch, time and head_dim"
        )
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads:
        raise ValueError(
            f"q has {heads} heads, which must be a multiple of the {kv_heads} heads of k and v"
        )
    if cache is not None:
        expected = jax.eval_shape(
            lambda: start(q.shape[0], *k.shape[2:], window=window, sinks=sinks)
        )
        for name, have, want in zip(Cache._fields, cache, expected, strict=True):
            if have.shape != want.shape:
                raise ValueError(
                    f"cache.{name} has shape {have.shape}, but batch {q.shape[0]}, window {window} "
                    f"and sinks {sinks} need {want.shape}; use start(...) with the same sizes"
                )
    if prefix is not None and (
        prefix.keys.shape != prefix.values.shape or prefix.keys.shape[1:] != k.shape[2:]
    ):
        raise ValueError(
            f"prefix keys {prefix.keys.shape} and values {prefix.values.shape} must be "
            f"[P, {kv_heads}, {k.shape[3]}]"
        )
