"""What the checks share: random streams and states, conversions, compiled forms, comparisons."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax import miras
from tests.oracles import miras as oracle

BATCH, LENGTH, PREFIX = 2, 13, 6

# Tiny programs that run a few times each: what counts is how long they take to compile.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Forms(NamedTuple):
    """The forms of one function; a fault is a wrapper that replaces some of them."""

    start: Callable
    recurrent: Callable
    chunkwise: Callable
    step: Callable
    read: Callable
    surprise: Callable


FORMS = Forms(miras.start, miras.recurrent, miras.chunkwise, miras.step, miras.read, miras.surprise)


class Stream(NamedTuple):
    """Arrays with leading axes [B, T, H]; gates: miras.Gates."""

    q: Any
    k: Any
    v: Any
    gates: Any


class Scene(NamedTuple):
    """A carried state in the middle of its chunks, what comes next, and its documents."""

    state: Any
    stream: Stream
    ids: Any


def stream(case, length=LENGTH, batch=BATCH, seed=0) -> Stream:
    """Random float64 inputs of a rule; keys and queries have a norm near 1."""
    random = np.random.default_rng(seed)
    shape = (batch, length, case.heads)
    q, k = random.normal(size=(2, *shape, case.key)) / np.sqrt(case.key)
    v = random.normal(size=(*shape, case.value))
    channels = (*shape, case.key) if case.retain == "channel" else shape
    return Stream(q, k, v, miras.Gates(
        lr=case.rate * random.uniform(0.1, 0.4, shape),
        momentum=random.uniform(0.2, 0.9, shape) if case.oracle.momentum else None,
        retain=random.uniform(0.8, 1.0, channels) if case.retain else None,
        scale=random.uniform(0.5, 1.5, shape) if case.scale else None,
        threshold=random.uniform(*case.threshold, shape) if case.threshold else None,
        window=random.uniform(0, 1, (*shape, case.oracle.window)) if case.shares else None,
    ))  # fmt: skip


def weights(case, seed=100):
    """Random float64 weights [H, ...] of a rule, slow ones included, unlike what `init` draws."""
    random = np.random.default_rng(seed)
    init = functools.partial(case.rule.init, dim_k=case.key, dim_v=case.value)
    shapes = jax.eval_shape(init, jax.random.key(0))
    gain = 2.0 if len(shapes.fast) > 2 else 1.0  # or the activations make a deep memory faint

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        size = (case.heads, *leaf.shape)
        if "scale" in name or "taylor" in name:
            return random.uniform(0.5, 1.5, size)
        spread = 1.0 if "bias" in name else gain / np.sqrt(leaf.shape[0])
        return spread * random.normal(size=size)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def cast(tree, dtype):
    """The tree on the device: floats as `dtype`, integers as int32."""

    def leaf(a):
        a = jnp.asarray(a)
        if a.dtype == bool:
            return a
        return a.astype(dtype if jnp.issubdtype(a.dtype, jnp.floating) else jnp.int32)

    return jax.tree.map(leaf, tree)


def to_oracle(state) -> oracle.State:
    """The engine's state as the oracle's."""

    def leaf(a):
        a = np.asarray(a)
        return a.astype({"i": np.int64, "b": bool}.get(a.dtype.kind, np.float64))

    state = jax.tree.map(leaf, state)
    return oracle.State(
        list(state.began), list(state.weights), _lists(state.momentum), state.place, state.segment,
        list(state.begin.weights), _lists(state.begin.momentum), dict(state.slow),
        state.pairs._asdict() if state.pairs else None,
    )  # fmt: skip


def from_oracle(state, other: oracle.State):
    """The engine's state with what the oracle computed in it."""
    momentum = _tuples(other.momentum)
    if isinstance(state.momentum, dict):
        momentum |= {"count": np.broadcast_to(other.place[:, None], momentum["rate"].shape) * 1.0}
    return state._replace(
        base=tuple(other.base) if state.base else (), weights=tuple(other.weights),
        momentum=momentum, place=other.place, segment=other.segment,
        pairs=miras.Pairs(**other.pairs) if other.pairs else (),
    )  # fmt: skip


def _lists(momentum):
    """Matrices as the oracle holds them, which counts a chunk's tokens by their place."""
    if isinstance(momentum, dict):
        return {name: _lists(value) for name, value in momentum.items() if name != "count"}
    return list(momentum) if isinstance(momentum, tuple) else momentum


def _tuples(momentum):
    """Matrices as the engine holds them."""
    if isinstance(momentum, dict):
        return {name: _tuples(value) for name, value in momentum.items()}
    return tuple(momentum) if isinstance(momentum, list) else momentum


def ids_of(*rows):
    """Segment ids from (id, length) pairs."""
    return np.array([[i for i, n in row for _ in range(n)] for row in rows], np.int32)


PREFIX_IDS = ids_of([(1, PREFIX)], [(1, 4), (2, 2)])


def fresh(case, forms=FORMS, batch=BATCH, dtype=np.float64):
    """The state before the first token."""
    return forms.start(case.rule, cast(weights(case), dtype), batch)


@functools.cache
def _states(case):
    """A state at its start and one in the middle of its chunks, as the oracle computes it.

    Documents start with a momentum here, as they do behind a prefix that the memory has read.
    """
    with jax.enable_x64(True):
        state = jax.tree.map(np.asarray, fresh(case))
    random = np.random.default_rng(5)
    begin = jax.tree.map(lambda s: 0.1 * random.normal(size=s.shape), state.begin.momentum)
    if isinstance(begin, dict):
        begin["count"] = np.zeros_like(begin["count"])
    state = state._replace(begin=state.begin._replace(momentum=begin))
    before = stream(case, PREFIX, seed=1)
    _, _, last = oracle.run(case.oracle, to_oracle(state), *before, PREFIX_IDS)
    return state, from_oracle(state, last)


def scene(case, kind="carried") -> Scene:
    """A scene in float64 NumPy.

    carried: chunks in progress; row 0 goes on with its document and packs another behind it, row 1
        starts one at once, then a document of one token, a longer one and padding.
    aligned: from the start, documents begin where chunks do.
    halfway: chunks in progress, documents begin at even places only.
    """
    start, middle = _states(case)
    place, chunk = np.arange(LENGTH), case.rule.chunk
    if kind == "aligned":
        ids = np.stack([1 + (place >= chunk), 1 + (place >= 2 * chunk)]).astype(np.int32)
        return Scene(start, stream(case), ids)
    rows = {
        "carried": ([(1, 4), (2, 9)], [(3, 3), (4, 1), (5, 6), (0, 3)]),
        "halfway": ([(1, 13)], [(2, 4), (3, 9)]),
    }
    return Scene(middle, stream(case), ids_of(*rows[kind]))


def cut(tree, begin, end):
    """Tokens begin to end of every array [B, T, ...] of a tree."""
    return jax.tree.map(lambda a: a[:, begin:end], tree)


@functools.cache
def stepwise(step):
    """The loop over `step` as a form."""

    def form(rule, state, q, k, v, gates, segment_ids=None):
        def body(state, token):
            (q, k, v, gates), ids = jax.tree.map(lambda a: a[:, None], token)
            y, state = step(rule, state, q, k, v, gates, segment_ids=ids)
            return state, y[:, 0]

        tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), ((q, k, v, gates), segment_ids))
        state, y = jax.lax.scan(body, state, tokens)
        return jnp.moveaxis(y, 0, 1), state

    return form


def forms_of(forms):
    """The three forms that run over a sequence, by name."""
    return {
        "recurrent": forms.recurrent,
        "chunkwise": forms.chunkwise,
        "step": stepwise(forms.step),
    }


@functools.cache
def _compiled(form, rule, options):
    def apply(state, stream, ids):
        return form(rule, state, *stream, segment_ids=ids, **dict(options))

    return quick_jit(apply)


def run(form, case, state, stream, ids=None, **options):
    """The jitted form; compiled once for a form, a rule, its options and the shapes."""
    return _compiled(form, case.rule, tuple(options.items()))(state, stream, ids)


def held(state):
    """The floating parts of a state that change with the tokens."""
    pairs = state.pairs._replace(live=None) if state.pairs else ()
    return {
        "base": state.base, "weights": state.weights, "momentum": state.momentum, "pairs": pairs,
    }  # fmt: skip


def parts(state):
    """All floating parts of a state."""
    return held(state) | {"begin": state.begin, "slow": state.slow}


def with_parts(state, floats):
    """The state with these parts."""
    pairs = floats["pairs"]
    pairs = pairs._replace(live=state.pairs.live) if pairs else pairs
    return state._replace(**floats | {"pairs": pairs})


@functools.cache
def pulled(form, rule, options):
    """`pull` as a function of arrays, jitted."""

    def apply(state, stream, ids, cotangent):
        def function(floats, stream):
            y, last = form(
                rule, with_parts(state, floats), *stream, segment_ids=ids, **dict(options)
            )
            return y, held(last)

        out, pull = jax.vjp(function, parts(state), stream)
        return out, dict(zip(("state", "stream"), pull(cotangent), strict=True))

    return quick_jit(apply)


def pull(form, case, state, stream, ids, cotangent, **options):
    """(y, what is `held` at the end), and the gradient of every float that went in."""
    return pulled(form, case.rule, tuple(options.items()))(state, stream, ids, cotangent)


def folded(state, gradient):
    """The gradient by a state whose chunk has not begun, where W' and W are one: their sum."""
    if not state.base:
        return gradient
    idle = np.asarray(state.place) == 0

    def fold(base, weights):
        chosen = idle.reshape(-1, *[1] * (base.ndim - 1))
        return np.where(chosen, 0, base), weights + np.where(chosen, base, 0)

    both = [fold(*pair) for pair in zip(gradient["base"], gradient["weights"], strict=True)]
    base, weights = zip(*both, strict=True)
    return gradient | {"base": base, "weights": weights}


def forget():
    """Drops what was compiled: hundreds of small programs are more than a process may map."""
    _compiled.cache_clear()
    pulled.cache_clear()
    stepwise.cache_clear()
    jax.clear_caches()


def cotangent(case, state, length=LENGTH, seed=7):
    """A random cotangent of (y, what is `held`), in NumPy."""
    random = np.random.default_rng(seed)
    y = random.normal(size=(state.place.shape[0], length, case.heads, case.value))
    return y, jax.tree.map(lambda a: random.normal(size=a.shape), held(state))


def assert_close(got, want, tolerance, what=""):
    """Leaf by leaf, |got - want| <= tolerance * max |want|."""
    got, structure = jax.tree_util.tree_flatten_with_path(got)
    want, other = jax.tree_util.tree_flatten(want)
    assert structure == other, f"{what}: {structure} and {other}"
    for (path, a), b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        name = what + jax.tree_util.keystr(path)
        assert a.shape == b.shape, f"{name}: shapes {a.shape} and {b.shape}"
        assert np.isfinite(a).all(), f"{name}: not finite"
        error, size = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
        assert error <= tolerance * max(size, 1e-3), f"{name}: off by {error:.2e} of {size:.2e}"


def assert_zero(got, what=""):
    """Every entry of every leaf is exactly 0."""
    for path, a in jax.tree_util.tree_leaves_with_path(got):
        size = np.abs(np.asarray(a)).max(initial=0)
        assert size == 0, f"{what}{jax.tree_util.keystr(path)}: {size:.2e}, not exactly 0"


def moving(state):
    """What of a state changes with the tokens, of the engine's or the oracle's alike."""
    pairs = state.pairs
    if pairs:
        pairs = dict(pairs if isinstance(pairs, dict) else pairs._asdict())
    began = state.base if isinstance(state, oracle.State) else state.began
    return {
        "base": list(began), "weights": list(state.weights),
        "momentum": _lists(state.momentum), "place": state.place, "segment": state.segment,
        "pairs": pairs or (),
    }  # fmt: skip


def float64(check):
    """Runs a check with x64 on."""

    @functools.wraps(check)
    def inside(*args, **kwargs):
        with jax.enable_x64(True):
            return check(*args, **kwargs)

    return inside
