"""Every matrix memory against NumPy, at float64, and through what every mixer must be."""

import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax import miras
from memjax.layers import MatrixMemory, matrix_memory
from memjax.layers.gates import GateHead, Gating
from memjax.layers.matrix_memory.layer import elu_plus_one
from tests.contracts.scenes import float64, quick_jit
from tests.layers import matrix_oracle as oracle
from tests.oracles.titans import by_document

DIM, HEADS, KEY, VALUE = 6, 2, 4, 3
LONG, TIME = 70, 5  # LONG: more than a tile of the closed form
NAMES = (
    "linear_attention", "retnet", "gla", "mamba2", "delta_net", "gated_delta_net", "kda",
    "longhorn", "mesa_net",
)  # fmt: skip
# documents of one token, over the edge of a tile, and an id that comes back
LONG_IDS = np.array(
    [[1] * 5 + [2] * 1 + [3] * 62 + [1] * 2, [4] * 30 + [5] * 10 + [6] * 30], np.int32
)
IDS = np.array([[1, 1, 2, 2, 2], [3, 4, 3, 3, 0]], np.int32)
ONE = np.ones_like(IDS)


class Case(NamedTuple):
    """A builder, its options, the oracle, and keywords of the oracle that are wrong."""

    build: Any
    options: dict
    expect: Any
    faults: list


def case(name, faults, options=None, **right):
    expect = functools.partial(getattr(oracle, name), **right)
    return Case(getattr(matrix_memory, name), options or {}, expect, faults)


CASES = {
    "linear_attention": case("linear_attention", [{"divided": False}]),
    "retnet": case("retnet", [{"base": 9000.0}]),
    "gla": case("gla", [{"temperature": 15}]),
    "mamba2": case("mamba2", [{"gate_first": False}, {"scale": 0.5}], {"conv": 3}),
    "delta_net": case("delta_net", [{"most": 1.01}, {"keys": lambda k: k}], {"conv": 3}),
    "gated_delta_net": case(
        "gated_delta_net", [{"recurrence": oracle.after_the_step}], {"conv": 3}
    ),
    "kda": case("kda", [{"recurrence": oracle.after_the_step}], {"conv": 3}),
    "longhorn": case("longhorn", [{"diagonal": True}], {"conv": 3}),
    "mesa_net": case("mesa_net", [{"ridged": False}, {"decayed": False}], {"conv": 3}),
}
# options that no builder takes by itself
MORE = {
    "retnet, other base": case("retnet", [{"base": 10000.0}], {"rope_base": 50.0}, base=50.0),
    "mamba2 in groups": case("mamba2", [], {"conv": 2, "heads": 4, "key_heads": 2}),
    "delta_net, reflecting, plain": case(
        "delta_net",
        [{"most": 1.0}],
        {"conv": 0, "negative_eigenvalues": True},
        most=2.0,
        conv=False,
    ),
    "gated_delta_net, reflecting": case(
        "gated_delta_net", [{"most": 1.0}], {"conv": 3, "negative_eigenvalues": True}, most=2.0
    ),
    "kda, reflecting": case(
        "kda", [{"most": 1.0}], {"conv": 3, "negative_eigenvalues": True}, most=2.0
    ),
}


class Layer(NamedTuple):
    """A layer whose every parameter is away from its start, in fp32; its compiled functions."""

    graphdef: Any
    values: Any
    module: MatrixMemory
    run: Any
    gradient: Any


def build(name, **changes):
    one = (CASES | MORE)[name]
    options = {"heads": HEADS, "head_dim": KEY, "value_dim": VALUE} | one.options | changes
    return one.build(DIM, **options, rngs=nnx.Rngs(0))


def abstract(make):
    """The module with shapes for parameters: nothing is drawn, nothing compiled."""
    return nnx.eval_shape(make)


@functools.cache
def layer(name):
    graphdef, shapes = nnx.split(abstract(lambda: build(name)), nnx.Param)
    random = np.random.default_rng(1)

    def draw(w):
        size = 1.0 if w.ndim == 1 else 0.6
        return jnp.asarray(size * random.normal(size=w.shape), jnp.float32)

    values = jax.tree.map(draw, shapes)

    @quick_jit
    def run(values, x, state=None, ids=None):
        return nnx.merge(graphdef, values)(x, state, segment_ids=ids)

    @quick_jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(values, x, ids, cotangent):
        return jnp.vdot(cotangent, nnx.merge(graphdef, values)(x, segment_ids=ids)[0])

    return Layer(graphdef, values, nnx.merge(graphdef, values), run, gradient)


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    """One builder after the other: their programs together are more than a process may map."""
    yield request.param
    layer.cache_clear()
    jax.clear_caches()


def parameters(values):
    """By name, in float64."""
    return {
        ".".join(map(str, path)): np.asarray(p[...], np.float64)
        for path, p in nnx.to_flat_state(values)
    }


def inputs(time, batch=2, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, time, DIM))


def wide(name):
    """The layer's values in float64 (with x64 on)."""
    return jax.tree.map(lambda w: w.astype(jnp.float64), layer(name).values)


def expect(name, x, ids=None, p=None, **faults):
    p = parameters(layer(name).values) if p is None else p
    return by_document(functools.partial((CASES | MORE)[name].expect, p, **faults), x, ids)


def off(actual, expected):
    """The largest difference over the largest value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.abs(actual - expected).max() / np.abs(expected).max()


def check_equations(name):
    x, run = inputs(LONG), layer(name).run
    y, state = run(wide(name), jnp.asarray(x), None, LONG_IDS)
    assert y.dtype == state.memory.weights[0].dtype == jnp.float64
    assert off(y, expect(name, x, LONG_IDS)) < 1e-9
    for fault in (CASES | MORE)[name].faults:
        assert off(y, expect(name, x, LONG_IDS, **fault)) > 1e-4, fault
    return y


@float64
def test_equals_its_equations(name):
    y = check_equations(name)
    x, random = inputs(LONG), np.random.default_rng(2)
    assert off(y, expect(name, x)) > 1e-3  # documents matter
    p = parameters(layer(name).values)
    for key, value in p.items():  # and so does every parameter
        moved = p | {key: value + 0.1 * random.normal(size=value.shape)}
        assert off(y, expect(name, x, LONG_IDS, moved)) > 1e-4, key


@pytest.mark.parametrize("other", MORE)
@float64
def test_options_have_their_equations(other):
    check_equations(other)


def parts(run, state, x, ids, lengths):
    """Outputs and last state of the parts of a sequence, one after the other."""
    outputs, at = [], 0
    for n in lengths:
        here = slice(at, at + n)
        y, state = run(x[:, here], state, None if ids is None else ids[:, here])
        outputs.append(y)
        at += n
    return jnp.concatenate(outputs, axis=1), state


@float64
def test_split_anywhere_and_token_by_token(name):
    x, values, run = inputs(TIME), wide(name), layer(name).run
    start = nnx.merge(layer(name).graphdef, values).start(2)  # it holds slow weights too
    call = lambda x, state, ids: run(values, jnp.asarray(x), state, ids)  # noqa: E731
    ways = [(1,) * TIME, (TIME,), *((n, TIME - n) for n in range(1, TIME))]
    for ids, given in ((None, None), (None, ONE), (IDS, IDS)):
        want, ends = expect(name, x, ids), []
        for lengths in ways if given is not None else [(TIME,)]:
            y, end = parts(call, start, x, given, lengths)
            assert off(y, want) < 1e-9, lengths
            assert jax.tree.map(jax.typeof, end) == jax.tree.map(jax.typeof, start)
            ends.append(end._replace(stats=None))
        for end in ends[1:]:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), end, ends[0])

    def lost(change):
        """Whether the outputs show a state that loses something on the way."""

        def faulty(x, state, ids):
            y, state = call(x, state, ids)
            return y, change(state)

        return (
            max(off(parts(faulty, start, x, ONE, way)[0], expect(name, x)) for way in ways) > 1e-3
        )

    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    assert lost(lambda s: s._replace(memory=s.memory._replace(weights=zeros(s.memory.weights))))
    assert lost(lambda s: s._replace(convs=zeros(s.convs))) == ("conv" in CASES[name].options)
    assert lost(lambda s: s._replace(seen=s.seen + 1)) == (name == "retnet")
    unseen = lambda s: s._replace(memory=s.memory._replace(segment=s.memory.segment * 0 - 1))  # noqa: E731
    y, state = call(x[:, :2], start, IDS[:, :2])
    for kept, change in ((True, lambda s: s), (False, unseen)):
        later, _ = call(x[:, 2:], change(state), IDS[:, 2:])
        assert (off(later[0], expect(name, x, IDS)[0, 2:]) < 1e-9) == kept


@float64
def test_causality_documents_and_rows_are_exact_zeros(name):
    """Token t of row b depends on tokens up to t of its document in row b, and on nothing else."""
    x, values, random = jnp.asarray(inputs(TIME)), wide(name), np.random.default_rng(3)
    for b, t in np.ndindex(2, TIME):
        cotangent = np.zeros(x.shape)
        cotangent[b, t] = random.normal(size=DIM)
        _, by_x = layer(name).gradient(values, x, IDS, cotangent)
        reach = np.abs(by_x).max(-1) > 0
        number = np.cumsum(np.diff(IDS[b], prepend=IDS[b, 0]) != 0)
        visible = np.zeros((2, TIME), bool)
        visible[b] = (number == number[t]) & (np.arange(TIME) <= t)
        np.testing.assert_array_equal(reach, visible)
    start = layer(name).module.start(2)
    y, _ = layer(name).run(values, x, start, IDS)
    z, _ = layer(name).run(values, x.at[1].multiply(-3.0), start, IDS)
    np.testing.assert_array_equal(y[0], z[0])
    assert np.abs(y[1] - z[1]).max() > 0


@float64
def test_gradients_are_those_of_the_equations(name):
    """Of every parameter and the input, along random directions, by differences of the oracle."""
    x, values, random = inputs(TIME), wide(name), np.random.default_rng(4)
    cotangent, p = random.normal(size=x.shape), parameters(layer(name).values)
    gradients, by_x = layer(name).gradient(values, jnp.asarray(x), IDS, cotangent)
    gradients = parameters(gradients)

    def difference(change, step=1e-5):
        at = {n: np.vdot(cotangent, change(n * step)) for n in (-2, -1, 1, 2)}
        return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)

    for key, value in p.items():
        way = random.normal(size=value.shape)
        want = difference(lambda s, k=key, v=value, w=way: expect(name, x, IDS, p | {k: v + s * w}))
        np.testing.assert_allclose(np.vdot(gradients[key], way), want, rtol=1e-6, atol=1e-8)
        assert np.abs(gradients[key]).max() > 1e-6, key
    way = random.normal(size=x.shape)
    want = difference(lambda s: expect(name, x + s * way, IDS))
    np.testing.assert_allclose(np.vdot(by_x, way), want, rtol=1e-6)
    for leaf in jax.tree.leaves(layer(name).gradient(values, 0 * jnp.asarray(x), IDS, cotangent)):
        assert np.isfinite(leaf).all()  # nothing to normalise


def test_bfloat16_with_a_state_in_fp32(name):
    one, x = layer(name), jnp.asarray(inputs(TIME), jnp.bfloat16)
    start = one.module.start(2)
    y, state = one.run(one.values, x, start, IDS)
    assert y.dtype == jnp.bfloat16
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, start)
    assert {a.dtype for a in jax.tree.leaves(state)} == {np.dtype("float32"), np.dtype("int32")}
    x = np.asarray(x, np.float64)
    rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16), one.values)
    exact, near = expect(name, x, IDS), expect(name, x, IDS, parameters(rounded))
    # a few times what it does to round nothing but the parameters
    tolerance = 4 * off(near, exact)
    assert tolerance < 0.2
    assert off(y, exact) < tolerance
    assert off(1.3 * y, exact) > tolerance


def test_a_fresh_state_can_be_donated():
    one, x = layer("mamba2"), jnp.asarray(inputs(1), jnp.float32)
    step = jax.jit(lambda x, state: one.module(x, state), donate_argnums=1)
    y, state = step(x, one.module.start(2))
    assert np.isfinite(step(y, state)[0]).all()


def test_reports_surprise_and_gates():
    one, x = layer("kda"), inputs(TIME)
    _, state = one.run(one.values, jnp.asarray(x, jnp.float32))
    p, stats = parameters(one.values), state.stats
    for b, row in enumerate(x):
        np.testing.assert_allclose(stats.lr[b], oracle.head_gate(p, row).mean(0), rtol=1e-5)
        decay = oracle.kda_decay(p, row)
        np.testing.assert_allclose(stats.retain[b], decay.mean((0, 2)), rtol=1e-5)
        losses = oracle.kda_losses(p, row)
        np.testing.assert_allclose(stats.surprise[b], losses.mean(0), rtol=1e-4)
    assert stats.momentum is None
    for other, absent in (("retnet", "surprise"), ("delta_net", "retain")):
        module = abstract(lambda other=other: build(other))
        begun, after = jax.eval_shape(lambda m: (m.start(2), m(jnp.zeros((2, 3, DIM)))[1]), module)
        assert jax.tree.map(jnp.shape, begun) == jax.tree.map(jnp.shape, after)
        assert getattr(begun.stats, absent) is None


def test_sizes_of_the_papers():
    """What a builder takes where nothing is said."""

    def shapes(builder, **options):
        module = abstract(lambda: builder(8, 2, rngs=nnx.Rngs(0), **options))
        values = nnx.state(module, nnx.Param)
        return {".".join(map(str, path)): p.shape for path, p in nnx.to_flat_state(values)}

    gla = shapes(matrix_memory.gla, rank=5)
    assert gla["query.weight"] == gla["value.weight"] == gla["gate.weight"] == (8, 2, 4)
    assert gla["gates.decay.rates.down.weight"] == (8, 5)
    assert not any("convs" in key for key in gla)
    assert shapes(matrix_memory.retnet)["value.weight"] == (8, 2, 8)
    mamba2 = shapes(matrix_memory.mamba2)
    assert mamba2["key.weight"] == (8, 1, 4)
    assert mamba2["value.weight"] == mamba2["gate.weight"] == (8, 2, 8)
    assert mamba2["norm.scale"] == (16,)
    assert mamba2["skip"] == mamba2["gates.log_rate"] == (2,)
    assert mamba2["convs.0.weight"] == (4, 4)
    assert mamba2["convs.2.weight"] == (4, 16)
    kda = shapes(matrix_memory.kda)
    assert kda["gate_down.weight"] == kda["gates.decay.rates.down.weight"] == (8, 4)
    assert kda["gate.weight"] == (4, 2, 4)
    assert "gate.weight" not in shapes(matrix_memory.delta_net)
    plain = shapes(matrix_memory.linear_attention)
    assert sorted(plain) == [f"{name}.weight" for name in ("key", "out", "query", "value")]


def test_parameters_name_their_axes():
    def axes(name):
        flat = nnx.to_flat_state(nnx.state(abstract(lambda: build(name)), nnx.Param))
        return {".".join(map(str, path)): p.axes for path, p in flat}

    into = ("embed", "heads", "kv")
    assert axes("kda") == {
        **{f"{name}.weight": into for name in ("query", "key", "value")},
        "out.weight": ("heads", "kv", "embed"),
        **{f"convs.{i}.weight": ("conv", "heads") for i in range(3)},
        "gate_down.weight": ("embed", None),
        "gate.weight": (None, "heads", "kv"),
        "norm.scale": ("kv",),
        "gates.rate.linear.weight": ("embed", "heads"),
        "gates.rate.linear.bias": ("heads",),
        "gates.decay.rates.down.weight": ("embed", None),
        "gates.decay.rates.up.weight": (None, "heads", "kv"),
        "gates.decay.log_rate": ("heads",),
        "gates.decay.offset": ("heads", "kv"),
    }
    # the one head of keys that all memories share is not for a mesh to split
    mamba2 = axes("mamba2")
    assert mamba2["key.weight"] == mamba2["query.weight"] == ("embed", None, "kv")
    assert mamba2["convs.0.weight"] == mamba2["convs.1.weight"] == ("conv", None)
    assert mamba2["convs.2.weight"] == ("conv", "heads")
    assert mamba2["norm.scale"] == mamba2["skip"] == ("heads",)
    assert axes("mamba2 in groups")["key.weight"] == into


def test_linear_attention_keeps_small_features_in_bfloat16():
    """elu(x) + 1 is e^x below 0: beside 1 it would vanish from x = -6 on."""
    feature, x = elu_plus_one, np.array([-20.0, -6.0, -1.0, 0.0, 2.0, 90.0])
    got = feature(jnp.asarray(x, jnp.bfloat16))
    want = np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-7)
    slope = jax.vmap(jax.grad(feature))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(slope, np.minimum(want, 1), rtol=1e-6)


def plain(**changes):
    """A layer of the shell itself."""
    gates = Gating(GateHead(DIM, HEADS, initial=0.5, rngs=nnx.Rngs(0)), None, HEADS)
    options = {"heads": HEADS, "rule": miras.zoo.delta_net(), "gates": gates} | changes
    return MatrixMemory(DIM, **options, rngs=nnx.Rngs(0))


PLAIN = miras.Rule(miras.matrix(), miras.l2(), miras.none(), miras.gd())
MOMENTUM = dataclasses.replace(PLAIN, learner=miras.momentum())
HUBER = dataclasses.replace(PLAIN, bias=miras.huber())
DRAWN = dataclasses.replace(PLAIN, structure=miras.matrix(scale=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4}, "dim 6 is not a multiple of heads 4"),
        ({"heads": 0}, "heads 0"),
        ({"head_dim": 0}, "head_dim 0"),
        ({"value_dim": 0}, "value_dim 0"),
        ({"key_heads": 0}, "key_heads 0"),
        ({"conv": -1}, "conv -1"),
        ({"heads": 3, "key_heads": 2}, "heads 3 must be a multiple of key_heads 2"),
        ({"rope_base": 100.0}, "head_dim 3 must be even"),
        ({"features": "relu"}, "'relu'.*elu"),
        ({"gate": "tanh"}, "'tanh'.*sigmoid"),
        ({"rule": miras.zoo.titans(depth=1)}, r"matrix\(\), not of mlp"),
        ({"rule": DRAWN}, r"MatrixMemory begins at W_0 = 0.*NeuralMemory"),
        ({"rule": MOMENTUM}, r"gates\.momentum .*Gating gives none.*layers\.Neural"),
        ({"rule": HUBER}, r"needs gates\.threshold \(.*huber.*Gating gives"),
        ({"rule": miras.zoo.rwkv7()}, r"needs gates\.write \(exchange.*Gating gives none.*RWKV7"),
        ({"gate_rank": 0}, "gate_rank 0 must be an integer of at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        plain(**options)


class WithMomentum(nnx.Module):
    """Gates of a user's own."""

    def __init__(self):
        self.gating = Gating(None, None, HEADS)

    def __call__(self, x):
        gates = self.gating(x)
        return gates._replace(momentum=0.5 * gates.lr)


def test_gates_of_ones_own_may_give_momentum():
    layer = plain(rule=MOMENTUM, gates=WithMomentum())
    y, _ = jax.eval_shape(lambda x: layer(x), jax.ShapeDtypeStruct((2, 5, DIM), jnp.float32))
    assert y.shape == (2, 5, DIM)
    inside = nnx.eval_shape(lambda: plain(rule=MOMENTUM, gates=WithMomentum()))
    assert inside.heads == layer.heads


@pytest.mark.parametrize("builder", NAMES)
def test_builders_name_what_does_not_divide(builder):
    with pytest.raises(ValueError, match=r"6 is not a multiple of heads 4|12 .* of heads 5"):
        getattr(matrix_memory, builder)(DIM, 5 if builder == "mamba2" else 4, rngs=nnx.Rngs(0))


def test_mamba2_takes_heads_that_divide_its_values():
    build = functools.partial(matrix_memory.mamba2, DIM, 4, head_dim=5)
    assert abstract(lambda: build(rngs=nnx.Rngs(0))).value_dim == 3


# the checks of the tests come before those of the layer, so that these are seen behind them
CALL = inspect.unwrap(MatrixMemory.__call__)
X = jnp.ones((2, 5, DIM))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(jnp.ones((2, 5, 4))), r"\(2, 5, 4\).*6"),
        (lambda m: m(jnp.ones((2, 0, DIM))), r"\(2, 0, 6\)"),
        (lambda m: CALL(m, jnp.ones((5, DIM))), r"\(5, 6\)"),
        (lambda m: m(X, m.start(1)), r"batch of 1, x has 2; use start\(2\)"),
        (
            lambda m: m(X, plain(conv=2).start(2)),
            r"convs\[0\]\.inputs.*\(2, 1, 6\).*start\(2\)",
        ),
        (lambda m: m(X, plain(conv=3, value_dim=4).start(2)), r"\(2, 2, 3, 4\).*start\(2\)"),
        (lambda m: m(X, plain(conv=3, heads=3, head_dim=2).start(2)), r"\(2, 3, 2, 2\)"),
        (lambda m: CALL(m, X, segment_ids=jnp.ones((2, 4), int)), r"segment_ids.*\(2, 4\).*\(2, 5"),
        (lambda m: CALL(m, X, segment_ids=jnp.ones(5, int)), r"segment_ids.*\(5,\)"),
        (lambda m: CALL(m, X, positions=jnp.ones((1, 5), int)), r"positions.*\(1, 5\)"),
    ],
)
def test_bad_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(plain(conv=3))


def test_what_is_no_rule_or_no_state_is_named():
    """Behind the checks of the tests, as above."""
    gates = Gating(None, None, HEADS)
    with pytest.raises(TypeError, match=r"miras\.Rule, such as.*got None"):
        inspect.unwrap(MatrixMemory.__init__)(
            object(), DIM, HEADS, rule=None, gates=gates, rngs=nnx.Rngs(0)
        )
    with pytest.raises(TypeError, match=r"MatrixMemoryState, got State: use start\(2\)"):
        CALL(plain(), X, plain().start(2).memory)


def test_states_of_another_size_are_refused_without_convolutions():
    with pytest.raises(ValueError, match=r"weights\[0\] is \(2, 2, 3, 4\), here \(2, 2, 3, 3\)"):
        plain()(X, plain(value_dim=4).start(2))
    with pytest.raises(ValueError, match=r"\(2, 3, 3, 3\)"):
        plain()(X, plain(heads=3, head_dim=3).start(2))
