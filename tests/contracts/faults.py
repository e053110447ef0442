"""Planted faults: each takes a form and returns one that is wrong in a single way.

A check is worth what it rejects, so `test_faults` holds every check against the faults it is for.
"""

import functools

import jax
import jax.numpy as jnp

from tests.contracts.scenes import FORMS, LENGTH

MIDDLE = LENGTH // 2


def plant(which, fault):
    """The engine's forms with the fault in one of them."""
    return FORMS._replace(**{which: fault(getattr(FORMS, which))})


def outputs(change):
    """A fault in the outputs: `change(y, v, options)`."""

    def fault(form):
        def faulty(rule, state, q, k, v, gates, **options):
            y, last = form(rule, state, q, k, v, gates, **options)
            return change(y, v, options), last

        return faulty

    return fault


def last_state(change):
    """A fault in the state that comes back: `change(state, rule, length)`."""

    def fault(form):
        def faulty(rule, state, q, k, v, gates, **options):
            y, last = form(rule, state, q, k, v, gates, **options)
            return y, change(last, rule, q.shape[1])

        return faulty

    return fault


def arguments(change):
    """A fault in what goes in: `change(rule, state, q, k, v, gates, ids)` gives it anew."""

    def fault(form):
        def faulty(rule, state, q, k, v, gates, *, segment_ids=None, **options):
            changed = change(rule, state, q, k, v, gates, segment_ids)
            return form(*changed[:-1], segment_ids=changed[-1], **options)

        return faulty

    return fault


# Outputs: a factor far below rounding leaves the values and still has a gradient.
future_leak = outputs(lambda y, v, _: y + 1e-30 * jnp.roll(v, -1, axis=1))
present_leak = outputs(lambda y, v, _: y + 1e-30 * v)
row_leak = outputs(lambda y, v, _: y + 1e-30 * v[::-1])
head_leak = outputs(lambda y, v, _: y + 1e-30 * v[:, :, ::-1])
future_seen = outputs(lambda y, v, _: y + 1e-3 * jax.lax.stop_gradient(jnp.roll(v, -1, axis=1)))
row_seen = outputs(lambda y, v, _: y + 1e-3 * jax.lax.stop_gradient(v[::-1]))
head_seen = outputs(lambda y, v, _: y + 1e-3 * jax.lax.stop_gradient(v[:, :, ::-1]))
imprecise = outputs(lambda y, v, _: y * (1 + 1e-4))
wide_output = outputs(lambda y, v, _: y.astype(jnp.float32))
block_seen = outputs(lambda y, v, options: y * (1 + 1e-9 * (options.get("block") or 0)))
remat_seen = outputs(lambda y, v, options: y * (1 + 1e-9 * (options.get("remat") or 0)))
infinite = outputs(lambda y, v, _: y.at[:, -1].multiply(jnp.inf))
# The root's derivative at 0 is infinite: finite values, no finite gradient.
gradient_infinite = outputs(lambda y, v, _: y + jnp.sqrt(0 * v))


# States.
momentum_dropped = last_state(
    lambda s, *_: s._replace(momentum=jax.tree.map(jnp.zeros_like, s.momentum))
)
place_dropped = last_state(lambda s, *_: s._replace(place=jnp.zeros_like(s.place)))
base_dropped = last_state(lambda s, *_: s._replace(base=s.weights))
segment_dropped = last_state(lambda s, *_: s._replace(segment=jnp.full_like(s.segment, -1)))


@last_state
def pairs_dropped(state, *_):
    """The window is empty behind a call."""
    return state._replace(pairs=jax.tree.map(jnp.zeros_like, state.pairs))


gradient_cut = last_state(
    lambda s, *_: s._replace(weights=jax.tree.map(jax.lax.stop_gradient, s.weights))
)
narrow_state = last_state(
    lambda s, *_: s._replace(weights=jax.tree.map(lambda w: w.astype(jnp.bfloat16), s.weights))
)
rounded_state = last_state(
    lambda s, *_: s._replace(
        weights=jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(w.dtype), s.weights)
    )
)


@last_state
def tail_decayed(state, rule, length):
    """Padding behind the last whole chunk is taken for tokens."""
    factor = 1 - 1e-6 * (length % rule.chunk != 0)
    return state._replace(weights=jax.tree.map(lambda w: factor * w, state.weights))


# Arguments.
@arguments
def lr_off(rule, state, q, k, v, gates, ids):
    """One token learns a millionth too fast."""
    lr = gates.lr.at[:, MIDDLE].multiply(1 + 1e-6) if gates.lr.shape[1] > 1 else gates.lr
    return rule, state, q, k, v, gates._replace(lr=lr), ids


@arguments
def lr_doubled(rule, state, q, k, v, gates, ids):
    return rule, state, q, k, v, gates._replace(lr=gates.lr * 2), ids


@arguments
def place_off(rule, state, q, k, v, gates, ids):
    """Chunks end one token early."""
    return rule, state._replace(place=(state.place + 1) % rule.chunk), q, k, v, gates, ids


@arguments
def window_turned(rule, state, q, k, v, gates, ids):
    """The shares of the window are taken from its other end."""
    return rule, state, q, k, v, gates._replace(window=gates.window[..., ::-1]), ids


@arguments
def scale_ignored(rule, state, q, k, v, gates, ids):
    return rule, state, q, k, v, gates._replace(scale=None), ids


@arguments
def ids_ignored(rule, state, q, k, v, gates, ids):
    return rule, state, q, k, v, gates, None


@arguments
def ids_on_grid(rule, state, q, k, v, gates, ids):
    """Documents are seen at multiples of the chunk only."""
    grid = jnp.arange(ids.shape[1]) // rule.chunk * rule.chunk
    return rule, state, q, k, v, gates, ids[:, grid]


@arguments
def carried_id_forgotten(rule, state, q, k, v, gates, ids):
    return rule, state._replace(segment=jnp.full_like(state.segment, -1)), q, k, v, gates, ids


def stopped(name):
    """No gradient by one input, by its name among the inputs, the gates or the state's parts."""
    stop = functools.partial(jax.tree.map, jax.lax.stop_gradient)

    @arguments
    def fault(rule, state, q, k, v, gates, ids):
        inputs = {"q": q, "k": k, "v": v}
        if name in inputs:
            inputs[name] = stop(inputs[name])
        elif name in gates._fields:
            gates = gates._replace(**{name: stop(getattr(gates, name))})
        elif name == "pairs":
            kept = state.pairs._replace(live=None)
            state = state._replace(pairs=stop(kept)._replace(live=state.pairs.live))
        elif name == "velocity":
            state = state._replace(momentum=stop(state.momentum))
        else:
            state = state._replace(**{name: stop(getattr(state, name))})
        return rule, state, *inputs.values(), gates, ids

    return fault


# Transformations.
def knows_its_tracing(form):
    """Another result under jit than outside."""

    def faulty(rule, state, q, *rest, **options):
        y, last = form(rule, state, q, *rest, **options)
        return (y * (1 + 1e-6) if isinstance(q, jax.core.Tracer) else y), last

    return faulty


def counts_its_tracings(form):
    """Another result each time it is traced."""
    tracings = []

    def faulty(rule, state, q, *rest, **options):
        y, last = form(rule, state, q, *rest, **options)
        tracings.append(None)
        return y * (1 + 1e-6 * len(tracings)), last

    return faulty


@outputs
def wrong_batching(y, v, options):
    """A batching rule that takes the first member for all."""

    @jax.custom_batching.custom_vmap
    def same(y):
        return y

    @same.def_vmap
    def _(size, batched, y):
        return jnp.broadcast_to(y[:1], y.shape), True

    return y + jax.lax.stop_gradient(1e-3 * same(jax.lax.stop_gradient(y)))


# The other functions.
def reads_the_chunk_start(read):
    return lambda rule, state, q: read(rule, state._replace(weights=state.base), q)


def surprised_later(surprise):
    """Losses at the weights of each token instead of its chunk's first."""

    def faulty(rule, state, k, v, gates, **options):
        loss = surprise(rule, state, k, v, gates, **options)
        return jnp.concatenate([loss[:, :1], 0.999 * loss[:, 1:]], axis=1)

    return faulty


def heads_differ(start):
    """Heads that share weights get each their own multiple."""

    def faulty(rule, weights, batch, heads=None):
        state = start(rule, weights, batch, heads=heads)
        if heads is None:
            return state
        base = jax.tree.map(lambda w: w * (1 + jnp.arange(heads).reshape(1, -1, 1, 1)), state.base)
        return state._replace(base=base)

    return faulty


def start_unlearned(start):
    """Documents inside rows start from weights without a gradient."""

    def faulty(rule, weights, batch, heads=None):
        state = start(rule, weights, batch, heads=heads)
        return state._replace(begin=jax.tree.map(jax.lax.stop_gradient, state.begin))

    return faulty
