"""Titans' blocks: against NumPy, and through one suite of what every mixer must be.

Each check of the suite takes the compiled mixer as an argument and is held against planted faults.
"""

import functools
import inspect
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.models import LanguageModelConfig, mixers, sample
from memjax.models.config import MemoryConfig
from memjax.models.remat import computed_again
from tests.layers.test_neural_memory import close, param, parameters
from tests.models.toys import model_of, tokens_of
from tests.oracles import miras as engine
from tests.oracles import titans as oracle

DIM, TIME, CHUNK, SEGMENT, WINDOW = 8, 9, 3, 4, 4
NAMES = ("lmm", "mac", "mag", "mal")
ONE = np.ones((2, TIME), np.int32)
# short documents, none on the grid of chunks or segments; ids that come back
IDS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2], [3, 4, 4, 3, 3, 3, 3, 3, 0]], np.int32)


def config(**changes):
    fields = {"vocab": 8, "dim": DIM, "layers": 1, "heads": 2, "segment": SEGMENT}
    fields |= {"window": WINDOW, "persistent": 2, "conv": 3, "dtype": "float32"}
    memory = {"chunk": CHUNK, "expansion": 2, "lr_max": 0.3}
    memory |= {name: changes.pop(name) for name in ("chunk", "combine") if name in changes}
    memory = MemoryConfig(**memory)
    return LanguageModelConfig(**(fields | changes), memory=memory)


class Mixer(NamedTuple):
    """A mixer, its compiled call `run(x, state, ids)`, and its parameters."""

    module: Any
    run: Any
    graphdef: Any
    values: Any


@functools.cache
def mixer(name, **changes):
    """A mixer whose every parameter is away from its start."""
    graphdef, values = nnx.split(mixers.build(name, config(**changes), nnx.Rngs(0)), nnx.Param)
    random = np.random.default_rng(1)
    values = jax.tree.map(lambda w: w + 0.2 * random.normal(size=w.shape).astype("f"), values)

    @jax.jit
    def call(values, x, state, ids):
        return nnx.merge(graphdef, values)(x, state, segment_ids=ids)

    def run(x, state=None, ids=None):
        return call(values, x, state, ids)

    return Mixer(nnx.merge(graphdef, values), run, graphdef, values)


@functools.cache
def fresh(name):
    return mixer(name).module.start(2)


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    """One mixer after the other: their programs together are more than a process may map."""
    yield request.param
    for cached in (mixer, fresh, gradient):
        cached.cache_clear()
    jax.clear_caches()


def inputs(time=TIME):
    return np.random.default_rng(0).normal(size=(2, time, DIM))


X = jnp.asarray(inputs(), jnp.float32)


def must_fail(check, *args):
    """The check rejects a planted fault."""
    with pytest.raises(AssertionError):
        check(*args)


def fails(check, *args):
    try:
        check(*args)
    except AssertionError:
        return True
    return False


# The oracle


def attention_of(module, persistent, window=None):
    weights = (param(getattr(module, n).weight) for n in ("query", "key", "value", "output"))
    return oracle.Attention(*weights, param(persistent), module.rope_base, window)


def combined(module):
    scales = (module.attention_norm.scale, module.memory_norm.scale)
    return (module.way, *map(param, scales))


def expected(name, module, *, chunk=CHUNK, **faults):
    """The oracle of a mixer as a function of one document."""
    rule = engine.Rule(chunk, norm=True, residual=True)
    if name == "lmm":
        return functools.partial(oracle.neural_memory, parameters(module, rule))
    memory = parameters(module.memory, rule)
    if name == "mac":
        p = oracle.Context(
            memory,
            attention_of(module, module.persistent),
            faults.pop("segment", SEGMENT),
            combined(module.combine),
        )
        return functools.partial(oracle.memory_as_context, p, **faults)
    window = faults.pop("window", WINDOW)
    attention = attention_of(module.attention, module.attention.persistent, window)
    if name == "mag":
        how = faults.pop("how", combined(module.combine))
        return functools.partial(oracle.memory_as_gate, attention, memory, how)
    return functools.partial(oracle.memory_as_layer, attention, memory, param(module.norm.scale))


FAULTS = {
    "lmm": [{"chunk": CHUNK + 1}],
    "mac": [{"chunk": CHUNK + 1}, {"segment": SEGMENT + 1}, {"seen_ahead": 1}],
    "mag": [{"window": WINDOW + 1}],
    "mal": [{"window": WINDOW + 1}],
}


def test_equals_its_equations(name):
    module, run, *_ = mixer(name)
    for ids in (None, IDS):
        y, _ = run(X, None, ids)
        close(y, oracle.by_document(expected(name, module), inputs(), ids))
        must_fail(close, y, oracle.by_document(expected(name, module), inputs(), IDS[::-1]))
        for fault in FAULTS[name]:
            other = expected(name, module, **fault)
            must_fail(close, y, oracle.by_document(other, inputs(), ids))


@pytest.mark.parametrize("way", ["product", "sum"])
def test_other_ways_to_combine(way):
    module, run, *_ = mixer("mag", combine=way)
    y, _ = run(X)
    close(y, oracle.by_document(expected("mag", module), inputs()))
    how = ("gate", *combined(module.combine)[1:])
    must_fail(close, y, oracle.by_document(expected("mag", module, how=how), inputs()))


# The suite: faults are wrappers of `run`, outside of what is compiled


def carried(change):
    """A fault in the state that comes back."""

    def fault(run):
        def faulty(x, state=None, ids=None):
            y, after = run(x, state, ids)
            return y, change(after)

        return faulty

    return fault


def on_memory(change):
    """A fault in the memory's part of the state."""

    def inside(state):
        if hasattr(state, "convs"):
            return change(state)
        return state._replace(memory=change(state.memory))

    return carried(inside)


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def engine_fault(change):
    return on_memory(lambda s: s._replace(memory=change(s.memory)))


place_lost = engine_fault(lambda m: m._replace(place=zeros(m.place)))
momentum_lost = engine_fault(lambda m: m._replace(momentum=zeros(m.momentum)))
base_lost = engine_fault(lambda m: m._replace(base=m.weights))
begin_lost = engine_fault(lambda m: m._replace(begin=zeros(m.begin)))
segment_lost = engine_fault(lambda m: m._replace(segment=m.segment * 0 - 1))
history_lost = on_memory(
    lambda s: s._replace(convs=tuple(c._replace(inputs=zeros(c.inputs)) for c in s.convs))
)
MEMORY_FAULTS = {
    "place": place_lost,
    "momentum": momentum_lost,
    "base": base_lost,
    "convolution": history_lost,
}
OWN_FAULTS = {
    "lmm": {},
    "mac": {
        "recalled": carried(lambda s: s._replace(recalled=s.memory.memory.weights)),
        "keys": carried(lambda s: s._replace(keys=zeros(s.keys))),
        "values": carried(lambda s: s._replace(values=zeros(s.values))),
        "slot": carried(lambda s: s._replace(slot=(s.slot + 1) % SEGMENT)),
        "position": carried(lambda s: s._replace(position=s.position + 1)),
    },
    "mag": {
        "cache": carried(lambda s: s._replace(attention=zeros(s.attention))),
        "attention's position": carried(
            lambda s: s._replace(attention=s.attention._replace(position=s.attention.position + 1))
        ),
    },
}
OWN_FAULTS["mal"] = OWN_FAULTS["mag"]


def check_parts(run, start, whole, ids, lengths):
    """The parts of a sequence, one after the other, give the whole, outputs and last state."""
    state, outputs, at = start, [], 0
    for n in lengths:
        y, state = run(X[:, at : at + n], state, ids[:, at : at + n])
        outputs.append(y)
        at += n
    close(jnp.concatenate(outputs, axis=1), whole[0])
    for got, want in zip(moving(state), moving(whole[1]), strict=True):
        close(got, want, 2e-5)


def moving(state):
    """What a state must hold; not the stats of its last call, nor places that no token sees."""
    kept = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if not any(part in name for part in ("stats", "keys", "values")):
            kept.append(leaf)
    return kept


def test_split_at_every_position_and_token_by_token(name):
    run = mixer(name).run
    ways = [(n, TIME - n) for n in range(1, TIME)] + [(1,) * TIME, (2, 1, 4, 2)]
    for ids in (ONE, IDS):
        whole = run(X, fresh(name), ids)
        for lengths in ways:
            check_parts(run, fresh(name), whole, ids, lengths)
    whole = run(X, fresh(name), ONE)
    close(run(X)[0], whole[0])  # no state and no ids: the same
    for fault, plant in (MEMORY_FAULTS | OWN_FAULTS[name]).items():
        assert any(fails(check_parts, plant(run), fresh(name), whole, ONE, w) for w in ways), fault


@pytest.mark.parametrize("chunk", [2, SEGMENT])
def test_segments_of_whole_chunks(chunk):
    """Chunks that divide the segments: the memory is told that they begin with them."""
    module, run, *_ = mixer("mac", chunk=chunk)
    for ids in (ONE, IDS):
        whole = run(X, module.start(2), ids)
        close(whole[0], oracle.by_document(expected("mac", module, chunk=chunk), inputs(), ids))
        for lengths in [(4, 5), (5, 4), (1,) * TIME]:
            check_parts(run, module.start(2), whole, ids, lengths)
    alone = oracle.by_document(expected("mac", module, chunk=chunk), inputs())
    close(run(X)[0], alone)
    must_fail(close, run(X)[0], oracle.by_document(expected("mac", module, chunk=3), inputs()))


def check_documents(run, start):
    """Every document of IDS comes out as it does alone, whole or carried over a cut."""
    outputs = [run(X, start, IDS)[0]]
    for cut in (4, 5):  # inside of documents, and where one begins
        first, state = run(X[:, :cut], start, IDS[:, :cut])
        second, _ = run(X[:, cut:], state, IDS[:, cut:])
        outputs.append(jnp.concatenate([first, second], axis=1))
    for y in outputs:
        for b, row in enumerate(IDS):
            cuts = [0, *np.flatnonzero(np.diff(row)) + 1, TIME]
            for begin, end in itertools.pairwise(cuts):
                alone, _ = run(X[:, begin:end], start, np.full((2, end - begin), 7, np.int32))
                close(y[b, begin:end], alone[b])


def test_packed_documents_are_the_documents_alone(name):
    run = mixer(name).run
    check_documents(run, fresh(name))
    must_fail(check_documents, lambda x, s, ids: run(x, s, np.ones_like(ids)), fresh(name))
    overlooked = lambda x, s, ids: run(x, s, np.where(ids == 3, 4, ids))  # noqa: E731
    must_fail(check_documents, overlooked, fresh(name))
    must_fail(check_documents, segment_lost(run), fresh(name))
    must_fail(check_documents, begin_lost(run), fresh(name))


def check_reach(run, start):
    """Token t of row b depends on tokens up to t of its document in row b, and on nothing else."""
    jacobian = jax.jacobian(lambda x: run(x, start, IDS)[0].sum(-1))(X)
    reach = np.abs(jacobian).max(-1) > 0  # [B, T, B, T]
    for b, t, c, s in np.ndindex(*reach.shape):
        number = np.cumsum(np.diff(IDS[b], prepend=IDS[b, 0]) != 0)
        assert reach[b, t, c, s] == (b == c and s <= t and number[s] == number[t])


def test_causality_documents_and_rows_are_exact_zeros(name):
    run = mixer(name).run
    check_reach(run, fresh(name))

    def leak(change):
        def faulty(x, state, ids):
            y, state = run(x, state, ids)
            return y + change(x), state

        return faulty

    for change in (
        lambda x: 1e-30 * jnp.roll(x, -1, axis=1),  # the next token
        lambda x: 1e-30 * jnp.roll(x, 5, axis=1),  # another document
        lambda x: 1e-30 * x[::-1],  # another row
    ):
        must_fail(check_reach, leak(change), fresh(name))
    must_fail(check_reach, lambda x, s, ids: run(x, s, np.asarray(ONE)), fresh(name))


def check_rows(run, start):
    """A row in another batch comes out the same, bit by bit."""
    y, _ = run(X, start, IDS)
    other = X.at[1].multiply(-3.0)
    z, _ = run(other, start, IDS)
    np.testing.assert_array_equal(y[0], z[0])
    assert np.abs(y[1] - z[1]).max() > 0


def test_rows_are_isolated_exactly(name):
    run = mixer(name).run
    check_rows(run, fresh(name))

    def leaky(x, state, ids):
        y, state = run(x, state, ids)
        return y + 1e-6 * y.mean(0), state

    must_fail(check_rows, leaky, fresh(name))


def test_dtypes_and_states_stay_as_they_are(name):
    run, start = mixer(name).run, fresh(name)
    types = jax.tree.map(jax.typeof, start)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(start))
    state = start
    for x, given, ids in [
        (X, state, ONE),
        (X[:, :1], None, None),
        (X[:, :1], state, ONE[:, :1]),
        (X, None, IDS),
        (X.astype(jnp.bfloat16), None, IDS),
    ]:
        y, after = run(x, given, ids)
        assert y.dtype == x.dtype
        assert y.shape == x.shape
        assert jax.tree.map(jax.typeof, after) == types
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(after)) == size
    module, _, graphdef, values = mixer(name)
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(w.dtype), values)
    exact, rounded = (
        oracle.by_document(expected(name, m), np.asarray(x, np.float64), IDS)
        for m in (module, nnx.merge(graphdef, narrow))
    )
    # a few times what it does to round nothing but the parameters
    tolerance = 4 * np.abs(rounded - exact).max() / np.abs(exact).max()
    assert tolerance < 0.2
    close(y, exact, tolerance)
    must_fail(close, y * 1.3, exact, tolerance)


def of_segments(remat, ids):
    """Loss of a MAC layer as a function of parameters and x, inside a model's `remat`."""
    made = mixer("mac", chunk=2, remat=remat)

    def loss(values, x):
        def body(x, _):
            return nnx.merge(made.graphdef, values)(x, segment_ids=ids)[0], None

        body = computed_again(body, remat)
        return jnp.sum(jnp.sin(jax.lax.scan(body, x, jnp.arange(2))[0]))

    return loss, made.values


@pytest.mark.parametrize("ids", [None, np.repeat([[1, 1, 2]], 2, 0).repeat(SEGMENT, 1), IDS])
def test_segments_computed_again_change_nothing(ids):
    time = TIME if ids is None else ids.shape[1]
    ids = None if ids is None else jnp.asarray(ids, jnp.int32)
    ways = [of_segments(remat, ids) for remat in ("none", "full")]
    with jax.enable_x64(True):
        x = jnp.asarray(inputs(time))
        kept, again = (
            jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
                jax.tree.map(lambda w: w.astype(x.dtype), values), x
            )
            for loss, values in ways
        )
        close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
        jax.tree.map(close, again, kept)
        assert all(abs(leaf).max() > 0 for leaf in jax.tree.leaves(again))


def test_of_segments_the_memory_alone_is_kept():
    x = jnp.asarray(inputs(3 * SEGMENT), jnp.float32)
    loss, values = of_segments("full", None)
    kept = jax.eval_shape(lambda *z: jax.vjp(loss, *z)[1], values, x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(kept)]
    fast = mixer("mac", chunk=2, remat="full").module.start(2).memory.memory.weights
    weights = [w.shape for w in (*fast, *fast)]  # and momentum; of two layers, three segments
    assert sorted(s for s in shapes if len(s) == 6) == sorted((2, 3, *s) for s in weights)
    assert sum(s[:1] == (2,) and s[-2:] == x.shape[-2:] for s in shapes) == 2  # x and outputs
    # attention runs forward once, and once more where segments are gone back through
    assert softmaxes(jax.make_jaxpr(jax.grad(loss))(values, x)) == 2


def softmaxes(jaxpr):
    """Exponentials in a program, which attention alone has here."""
    counts = []
    for equation in jaxpr.eqns:
        inner = jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns"))
        counts += [softmaxes(p) for p in inner if hasattr(p, "eqns")]
        counts.append(equation.primitive.name == "exp")
    return sum(counts)


@functools.cache
def gradient(name):
    _, _, graphdef, values = mixer(name)

    @jax.jit
    @jax.grad
    def by_values(values):
        y, _ = nnx.merge(graphdef, values)(X, segment_ids=jnp.asarray(IDS))
        return jnp.sum(jnp.sin(y))

    return by_values(values)


def check_gradients(gradient):
    """A finite gradient, other than zero, for every parameter; W_0 of every head by itself."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        where = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), where
        for part in leaf if "fast" in where else [leaf]:
            assert np.abs(part).max() > 0, where


def test_gradient_reaches_every_parameter(name):
    check_gradients(gradient(name))
    paths = [
        jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(gradient(name))
    ]
    for part in ("fast", "slow", "persistent", "lr", "momentum", "retain", "convs"):
        assert any(part in path for path in paths), part
    for value in (0.0, np.nan):
        for cut in ("fast", "persistent", "retain"):
            faulty = jax.tree_util.tree_map_with_path(
                lambda path, g, v=value, c=cut: g * v if c in jax.tree_util.keystr(path) else g,
                gradient(name),
            )
            must_fail(check_gradients, faulty)


def test_bad_inputs_are_named(name):
    module = mixer(name).module
    for x, message in [
        (jnp.ones((2, 5, DIM + 1)), rf"\(2, 5, {DIM + 1}\)"),
        (jnp.ones((2, 0, DIM)), rf"\(2, 0, {DIM}\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            module(x)
    with pytest.raises(ValueError, match=r"start\(2\)"):
        module(X, module.start(1))
    call = inspect.unwrap(type(module).__call__)  # behind the checks of the tests
    with pytest.raises(TypeError, match=r"State, got tuple: use start\(2\)"):
        call(module, X, (1, 2))
    for beside in ("segment_ids", "positions"):
        with pytest.raises(ValueError, match=rf"{beside} has shape \(1, 2\)"):
            call(module, X, **{beside: jnp.ones((1, 2), int)})


def test_generates(name):
    """A fresh state is used up by the prompt, and the weights are not."""
    memory = MemoryConfig(chunk=CHUNK, expansion=2)
    model = model_of(pattern=(name,), memory=memory, segment=4, window=4, persistent=2)
    prompt = tokens_of(batch=2, time=6)
    tokens = sample(model, prompt, length=3, temperature=0)
    again = sample(model, prompt, length=3, temperature=0)
    np.testing.assert_array_equal(tokens, again)
    row = jnp.concatenate([prompt, tokens[:, :2]], axis=1)
    logits, _ = jax.jit(lambda row: model(row))(row)
    np.testing.assert_array_equal(tokens, logits[:, 5:].argmax(-1))
