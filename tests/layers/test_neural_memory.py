"""The memory layer against NumPy: projections, convolutions, gates, prefix, precision, scale."""

import dataclasses
import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from memjax import miras, sharding
from memjax.layers import (
    RWKV7,
    GatedAssociativeMemory,
    MatrixMemory,
    MixtureOfMemories,
    NeuralMemory,
    TNTMemory,
    shell,
)
from memjax.layers.gates import Gating
from tests.oracles import miras as engine
from tests.oracles import titans as oracle

DIM, HEADS, TIME = 6, 2, 11
IDS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2], [3, 4, 4, 4, 4, 4, 5, 5, 0, 0, 0]], np.int32)

DEEP = miras.zoo.titans(expansion=2, chunk=4)
CASES = {
    "titans": (DEEP, engine.Rule(4, norm=True, residual=True), {"persistent": 3}),
    "plain": (
        miras.zoo.titans(depth=1, norm=False, residual=False, chunk=3, read="before"),
        engine.Rule(3, read="before"),
        {"conv": 0, "head_dim": 4},
    ),
    # a prefix longer than a chunk
    "ttt": (
        miras.zoo.ttt_mlp(chunk=2, expansion=2),
        engine.Rule(2, norm=True, residual=True, momentum=False),
        {"persistent": 5, "conv": 2},
    ),
    "yaad": (
        miras.zoo.yaad(chunk=3, expansion=2),
        engine.Rule(3, norm=True, residual=True, momentum=False, bias="huber switch"),
        {"persistent": 2, "conv": 2},
    ),
    "atlas": (
        miras.zoo.atlas(chunk=3, window=3, degree=2, expansion=2),
        engine.Rule(
            3, norm=True, residual=True, learner="muon", window=3, features=("polynomial", 2)
        ),
        {"conv": 2},
    ),
    "lact": (
        miras.zoo.lact(chunk=3),
        engine.Rule(
            3,
            structure="gated_mlp",
            activation="silu",
            bias="dot",
            retention="renormalise",
            learner="by chunk",
            read="chunk",
        ),
        {"conv": 0},
    ),
}


# What five steps of Newton-Schulz make of a rounding: small singular values grow by 3.4445 in each.
ORTHOGONAL = 3.4445**5 * float(jnp.finfo(jnp.float32).eps)


@functools.cache
def layer(name="titans"):
    """A memory whose every parameter is away from its start, and learns fast."""
    rule, _, options = CASES[name]
    module = NeuralMemory(DIM, HEADS, **({"rule": rule, "lr_max": 0.3} | options), rngs=nnx.Rngs(0))
    graphdef, values = nnx.split(module)
    random = np.random.default_rng(1)
    moved = jax.tree.map(
        lambda w: w + 0.2 * jnp.asarray(random.normal(size=w.shape), w.dtype), values
    )
    module = nnx.merge(graphdef, moved)
    if module.retain is not None:
        module.retain.linear.bias[...] -= 4.6  # near 0.9, so that forgetting shows
    return module


@functools.cache
def compiled(name="titans"):
    graphdef, values = nnx.split(layer(name))

    @jax.jit
    def run(values, x, ids=None, state=None):
        return nnx.merge(graphdef, values)(x, state, segment_ids=ids)

    return run, values


def inputs(time=TIME):
    return np.random.default_rng(0).normal(size=(2, time, DIM))


def param(p):
    return None if p is None else np.asarray(p[...], np.float64)


def parameters(module, rule):
    """The layer's parameters as the oracle's."""

    def gate(head):
        return None if head is None else (param(head.linear.weight), param(head.linear.bias))

    return oracle.Memory(
        query=param(module.query.weight),
        key=param(module.key.weight),
        value=param(module.value.weight),
        gate=param(module.gate.weight),
        out=param(module.out.weight),
        norm=param(module.norm.scale),
        convs=tuple(param(conv.weight) for conv in module.convs),
        lr=gate(module.lr),
        momentum=gate(module.momentum),
        retain=gate(module.retain),
        fast=[param(w) for w in module.fast],
        slow={name: param(w) for name, w in module.slow.items()},
        persistent=param(module.persistent),
        lr_max=module.lr_max,
        rule=rule,
        threshold=gate(module.threshold),
        window=gate(module.window),
    )


def expect(p, x, ids=None):
    return oracle.by_document(functools.partial(oracle.neural_memory, p), x, ids)


def close(actual, expected, tolerance=1e-5):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-30)
    )


def faults(p):
    """The oracle with one thing changed, for everything the layer is made of."""
    changed = {
        "chunk": {"rule": replace(p.rule, chunk=p.rule.chunk + 1)},
        "rates": {"lr": (1.5 * p.lr[0], p.lr[1])},
        "norm": {"norm": p.norm[::-1]},
        "heads": {"out": p.out[::-1]},
        "gate": {"gate": 1.01 * p.gate},
        "value": {"value": 1.01 * p.value},
        "swapped": {"query": p.key, "key": p.query},
    }
    if p.rule.learner != "by chunk":  # that is blind to what all rates share
        changed["rate"] = {"lr_max": 1.1 * p.lr_max}
    if p.convs:
        changed["convolution"] = {"convs": tuple(c[::-1] for c in p.convs)}
    if p.retain:
        changed["retain"] = {"retain": (p.retain[0], p.retain[1] + 0.1)}
    if p.momentum:
        changed["momentum"] = {"momentum": (p.momentum[0], p.momentum[1] + 0.1)}
    if p.threshold:
        changed["threshold"] = {"threshold": (p.threshold[0], p.threshold[1] + 0.3)}
    if p.window:
        changed["shares"] = {"window": (p.window[0], p.window[1] - 0.5)}
        changed["window"] = {"rule": replace(p.rule, window=p.rule.window - 1)}
    if p.persistent is not None:
        changed["prefix"] = {"persistent": p.persistent[1:]}
        changed["order of the prefix"] = {"persistent": p.persistent[::-1]}
    return {name: replace(p, **change) for name, change in changed.items()}


@pytest.mark.parametrize("name", CASES)
def test_equals_its_equations(name):
    run, values = compiled(name)
    x, p = inputs(), parameters(layer(name), CASES[name][1])
    y, _ = run(values, jnp.asarray(x, jnp.float32), IDS)
    close(y, expect(p, x, IDS), ORTHOGONAL if name in ("atlas", "lact") else 1e-5)
    for fault, other in faults(p).items():
        wrong = expect(other, x, IDS)
        assert np.abs(y - wrong).max() > 1e-3 * np.abs(wrong).max(), fault
    with pytest.raises(AssertionError):
        close(y, expect(p, x))


@pytest.mark.parametrize("name", CASES)
def test_equals_its_equations_in_float64(name):
    """At this precision a term that is only nearly right has no room left."""
    _, values = compiled(name)
    x, p = inputs(), parameters(layer(name), CASES[name][1])
    with jax.enable_x64(True):
        run, _ = compiled(name)
        values = jax.tree.map(lambda w: w.astype(jnp.float64), values)
        y, state = run(values, jnp.asarray(x), IDS)
        assert y.dtype == state.memory.weights[0].dtype == jnp.float64
        close(y, expect(p, x, IDS), 1e-9)
        if name == "titans":
            first, state = run(values, jnp.asarray(x[:, :5]), IDS[:, :5])
            second, _ = run(values, jnp.asarray(x[:, 5:]), IDS[:, 5:], state)
            close(jnp.concatenate([first, second], axis=1), expect(p, x, IDS), 1e-9)


def test_a_chunk_that_tiles_do_not_divide():
    """Tiles are 128 tokens at most; 129 is 3 times 43."""
    module = NeuralMemory(4, 1, rule=miras.zoo.ttt_linear(chunk=129), rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 300, 4))
    y, _ = jax.jit(module.__call__)(jnp.asarray(x, jnp.float32))
    rule = engine.Rule(129, norm=True, residual=True, momentum=False)
    close(y, expect(parameters(module, rule), x))
    with pytest.raises(AssertionError):
        close(y, expect(parameters(module, replace(rule, chunk=128)), x))


def test_reports_surprise_and_gates():
    run, values = compiled()
    x, p = inputs(), parameters(layer(), CASES["titans"][1])
    _, state = run(values, jnp.asarray(x, jnp.float32))
    for b in range(2):
        for stat, (weight, offset), most in [
            (state.stats.lr, p.lr, p.lr_max),
            (state.stats.momentum, p.momentum, 1),
            (state.stats.retain, p.retain, 1),
        ]:
            close(stat[b], (most * oracle.sigmoid(x[b] @ weight + offset)).mean(0))
    for b in range(2):
        losses = oracle.losses(p, oracle.begin(p), x[b])
        close(state.stats.surprise[b], losses.mean(0))
        with pytest.raises(AssertionError):
            close(state.stats.surprise[b], losses[1:].mean(0))


def test_gates_start_where_the_paper_leaves_them_to_us():
    module = NeuralMemory(DIM, HEADS, lr_max=0.2, rngs=nnx.Rngs(0))
    _, state = module(jnp.zeros((1, 1, DIM)))
    for gate, value in zip(state.stats[1:], (0.02, 0.5, 0.999), strict=True):
        np.testing.assert_allclose(gate, value, rtol=1e-6)


def test_recall_reads_and_writes_nothing():
    module, x = layer(), inputs()
    p = parameters(module, CASES["titans"][1])
    run, values = compiled()
    _, state = run(values, jnp.asarray(x, jnp.float32))
    # The oracle's weights: what rounding has made of the layer's own is not recall's doing.
    runs = [oracle.write(p, oracle.begin(p), x[b])[1] for b in range(2)]
    fast = tuple(
        jnp.asarray(np.concatenate(rows), jnp.float32)
        for rows in zip(*(run.state.weights for run in runs), strict=True)
    )
    h = module.recall(jnp.asarray(x[:, :3], jnp.float32), state, fast)
    for b in range(2):
        close(h[b], oracle.recall(p, runs[b], x[b, :3]))
        with pytest.raises(AssertionError):
            close(h[b], oracle.recall(p, oracle.begin(p), x[b, :3]))
    h = module.recall(jnp.asarray(x[:, :3], jnp.float32), state, state.memory.weights)
    again = module.recall(jnp.asarray(x[:, :3], jnp.float32), state, state.memory.weights)
    np.testing.assert_array_equal(h, again)


def test_bfloat16():
    run, values = compiled()
    x, p = jnp.asarray(inputs(), jnp.bfloat16), parameters(layer(), CASES["titans"][1])
    y, state = run(values, x, IDS)
    assert y.dtype == jnp.bfloat16
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, layer().start(2))
    close(y, expect(p, np.asarray(x, np.float64), IDS), 8 * float(jnp.finfo(jnp.bfloat16).eps))


def test_a_fresh_state_can_be_donated():
    module = layer()
    step = jax.jit(module.__call__, donate_argnums=1)
    x = jnp.asarray(inputs(1), jnp.float32)
    y, state = step(x, module.start(2))
    assert np.isfinite(step(y, state)[0]).all()
    assert np.isfinite(module.fast[0][...]).all()  # the weights are still there


@pytest.mark.parametrize("name", ["mesa_net", "gated_delta_net"])
def test_a_document_inside_a_row_begins_with_what_the_prefix_left(name):
    """The statistics of MesaNet too."""
    rule = getattr(miras.zoo, name)()
    module = NeuralMemory(DIM, HEADS, rule=rule, persistent=3, conv=0, rngs=nnx.Rngs(0))
    x = jnp.asarray(inputs(), jnp.float32)
    ids = jnp.asarray([[0] * 4 + [1] * (TIME - 4)] * 2)
    y, _ = module(x, segment_ids=ids)
    alone, _ = module(x[:, 4:])
    close(y[:, 4:], np.asarray(alone, np.float64), 1e-5)


@pytest.mark.parametrize("name", ["mesa_net", "titans", "ttt_linear"])
def test_no_parameter_is_without_a_gradient(name):
    """MesaNet, which solves for its memory, has no W_0."""
    rule = getattr(miras.zoo, name)()
    module = NeuralMemory(DIM, HEADS, rule=rule, persistent=3, rngs=nnx.Rngs(0))
    x = jnp.asarray(inputs(), jnp.float32)
    gradients = nnx.grad(lambda module: jnp.mean(module(x)[0] ** 2))(module)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("chunks", [(1, 4), (4, 1)])
def test_a_memory_goes_on_with_chunks_of_another_length(chunks):
    """Of one token, whose states do not hold what began the chunk, to four, and back."""
    first, second = (
        NeuralMemory(DIM, HEADS, rule=replace(DEEP, chunk=chunk), rngs=nnx.Rngs(3))
        for chunk in chunks
    )
    x = jnp.asarray(inputs(), jnp.float32)
    _, state = first(x[:, :8])
    memory = state.memory
    assert bool(memory.base) == (chunks[0] > 1)
    y, after = second(x[:, 8:], state)
    both = state._replace(memory=memory._replace(base=memory.weights))
    y_2, _ = second(x[:, 8:], both)
    np.testing.assert_array_equal(y, y_2)
    assert bool(after.memory.base)
    again, last = second(x[:, :1], after)
    assert jax.tree.structure(last) == jax.tree.structure(after)
    assert np.isfinite(again).all()


def test_zeros_have_a_gradient():
    """Nothing to normalise: sizes 0 are where a norm's derivative breaks."""
    graphdef, values = nnx.split(layer(), nnx.Param)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(values, x):
        return jnp.sum(nnx.merge(graphdef, values)(x)[0])

    for leaf in jax.tree.leaves(gradient(values, jnp.zeros((1, 5, DIM)))):
        assert np.isfinite(leaf).all()


def test_parameters_name_their_axes():
    _, values = nnx.split(layer(), nnx.Param)
    axes = {".".join(map(str, path)): p.axes for path, p in nnx.to_flat_state(values)}
    into = ("embed", "heads", "kv")
    assert axes == {
        **{f"{name}.weight": into for name in ("query", "key", "value", "gate")},
        "out.weight": ("heads", "kv", "embed"),
        "norm.scale": ("kv",),
        **{f"convs.{i}.weight": ("conv", "heads") for i in range(3)},
        **{f"{name}.linear.weight": ("embed", "heads") for name in ("lr", "momentum", "retain")},
        **{f"{name}.linear.bias": ("heads",) for name in ("lr", "momentum", "retain")},
        **{f"fast.{i}": ("heads", "memory_in", "memory_out") for i in range(2)},
        **{f"slow.{name}": ("heads", "memory_out") for name in ("scale", "bias")},
        "persistent": ("persistent", "embed"),
    }
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(values))
    assert layer("ttt").momentum is layer("ttt").retain is None


def test_on_a_mesh_as_on_one_device():
    run, values = compiled()
    x = jnp.asarray(np.concatenate([inputs(), inputs()[::-1]]), jnp.float32)
    ids = np.concatenate([IDS, IDS[::-1]])
    alone, _ = run(values, x, ids)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        y, state = run(jax.device_put(values, sharding.shardings(values, mesh)), x, ids)
    close(y, alone)
    assert state.memory.weights[0].sharding.shard_shape((4, HEADS, 3, 6))[:2] == (1, 1)


def test_finite_over_a_long_sequence_in_bfloat16():
    """2048 tokens through four layers, as a memory starts: values and gradients keep their size."""
    rule = miras.zoo.titans(depth=4, chunk=64)
    module = NeuralMemory(16, 2, rule=rule, persistent=2, rngs=nnx.Rngs(0))
    graphdef, values = nnx.split(module, nnx.Param)
    x = jax.random.normal(jax.random.key(0), (1, 2048, 16), jnp.bfloat16)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(values, x):
        y, state = nnx.merge(graphdef, values)(x)
        return jnp.mean(jnp.square(y.astype(jnp.float32))), (y, state)

    def largest(tree):
        return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))

    gradient, (y, state) = run(values, x)
    assert y.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves((y, state, gradient)):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    assert largest(y) < 100
    assert 1e-3 < largest(gradient) < 100
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert jnp.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    # a memory that forgets a hundredth with every token loses its W_0, and then its footing
    values["retain"]["linear"]["bias"][...] -= 2.3
    assert largest(run(values, x)[0]) > 1e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4}, "dim 6 is not a multiple of heads 4"),
        ({"heads": 0}, "heads 0"),
        ({"head_dim": 0}, "head_dim 0 must be an integer of at least 1"),
        ({"conv": -1}, "conv -1"),
        ({"persistent": -1}, "persistent -1"),
        ({"lr_max": 0.0}, r"lr_max 0\.0 must be .* above 0"),
        ({"rule": miras.zoo.rwkv7()}, r"exchange.*layers\.RWKV7"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NeuralMemory(DIM, **({"heads": 2} | options), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer: layer(jnp.ones((2, 5, 4))), r"\(2, 5, 4\).*6"),
        (lambda layer: layer(jnp.ones((2, 0, 6))), r"\(2, 0, 6\)"),
        (lambda layer: layer(jnp.ones((2, 5, 6)), layer.start(1)), r"start\(2\)"),
    ],
)
def test_bad_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(layer())


def test_integers_are_refused():
    with pytest.raises(ValueError, match="x has dtype int32: it must be floating-point"):
        shell.check_inputs(jnp.ones((2, 5, DIM), jnp.int32), DIM)


@dataclasses.dataclass(frozen=True)
class Mixed(miras.matrix):
    """`M(x) = gain (x mix) W`, both slow."""

    def init(self, key, dim_k, dim_v):
        fast, _ = super().init(key, dim_k, dim_v)
        return miras.Weights(fast, {"mix": jnp.eye(dim_k), "gain": jnp.ones(())})

    def forward(self, linear, slow, x):
        return slow["gain"] * linear(0, x @ slow["mix"])


def test_slow_weights_of_any_rank_name_their_axes():
    rule = miras.Rule(Mixed(), miras.l2(), miras.none(), miras.gd())
    gates = Gating(None, None, HEADS)
    for layer in (
        other(rule=rule),
        MatrixMemory(DIM, HEADS, rule=rule, gates=gates, rngs=nnx.Rngs(0)),
    ):
        axes = {name: (p.axes, p.shape) for name, p in layer.slow.items()}
        assert axes == {
            "mix": (("heads", None, None), (HEADS, DIM // HEADS, DIM // HEADS)),
            "gain": (("heads",), (HEADS,)),
        }


@pytest.fixture
def unchecked():
    """Without the tests' own type checks, as for a user."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def other(**options):
    return NeuralMemory(DIM, HEADS, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: layer()(x, segment_ids=x[:, :4, 0]), ValueError, r"\(2, 4\), must be \(2, 5\)"),
        (lambda x: layer()(x, segment_ids=x[:1, :, 0]), ValueError, r"\(1, 5\), must be \(2, 5\)"),
        (lambda x: layer()(x, (1, 2)), TypeError, r"NeuralMemoryState, got tuple: .*start\(2\)"),
        (lambda x: layer()(x, layer().start(2).memory), TypeError, "got State"),
        (lambda x: layer()(x, other(conv=0).start(2)), ValueError, "of another NeuralMemory"),
        (
            lambda x: layer()(x, other(conv=2).start(2)),
            ValueError,
            r"another NeuralMemory: .*here \(2, 2, 3, 6\)",
        ),
        (lambda x: other(rule=miras.mlp()), TypeError, r"rule must be a miras.Rule.* got mlp\("),
        (lambda x: other(rule=miras.zoo.titans), TypeError, "rule must be .*got <function titans"),
    ],
)
def test_what_is_of_another_kind_is_named(unchecked, call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.ones((2, 5, DIM)))


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (NeuralMemory, {"heads": 2.0}, "heads 2.0 must be an integer"),
        (NeuralMemory, {"head_dim": 4.0}, "head_dim 4.0 must be an integer"),
        (NeuralMemory, {"conv": 1.5}, "conv 1.5 must be an integer"),
        (NeuralMemory, {"persistent": True}, "persistent True must be an integer"),
        (TNTMemory, {"shard": 16.0}, "shard 16.0 must be an integer"),
        (TNTMemory, {"chunk": True}, "chunk True must be an integer"),
        (TNTMemory, {"local_chunks": (8.0,)}, r"local_chunks\[0\] 8.0 must be an integer"),
        (MixtureOfMemories, {"memories": True, "active": True}, "memories True must be an integer"),
        (MixtureOfMemories, {"active": True}, "active True must be an integer"),
        (RWKV7, {"rank": 8.0}, "rank 8.0 must be an integer"),
        (GatedAssociativeMemory, {"slots": 4.0}, "slots 4.0 must be an integer"),
    ],
)
def test_sizes_that_are_no_integers_are_named(unchecked, layer, options, message):
    heads = {} if layer is GatedAssociativeMemory else {"heads": 2}
    with pytest.raises(ValueError, match=message):
        layer(DIM, **(heads | options), rngs=nnx.Rngs(0))
