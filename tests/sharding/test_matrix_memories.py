"""Memories on a mesh: values and gradients of one device, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax import miras, sharding
from memjax.layers import (
    RWKV7,
    ContinuumMemory,
    Hope,
    MixtureOfMemories,
    SelfReferentialMemory,
    TNTMemory,
    matrix_memory,
)
from tests.contracts.scenes import assert_close, float64

DIM, HEADS, BATCH, TIME = 8, 4, 4, 4
MESHES = {
    "heads": {"data": 2, "tensor": 4},
    "mixed": {"fsdp": 2, "tensor": 2, "sequence": 2},
}
BUILDERS = {
    "linear_attention": {}, "retnet": {}, "gla": {}, "mamba2": {"conv": 3},
    "delta_net": {"conv": 3}, "gated_delta_net": {"conv": 3}, "kda": {"conv": 3},
    "longhorn": {"conv": 3}, "mesa_net": {"conv": 3},
}  # fmt: skip
LAYERS = {
    "rwkv7": lambda: RWKV7(DIM, HEADS, 2, rngs=nnx.Rngs(0)),
    "mom": lambda: MixtureOfMemories(DIM, HEADS, 2, memories=2, active=1, conv=3, rngs=nnx.Rngs(0)),
    "tnt": lambda: TNTMemory(
        DIM, HEADS, 2, chunk=2, local_chunks=(1,), shard=2, expansion=2, conv=3, rngs=nnx.Rngs(0)
    ),
    **{
        name: lambda name=name, options=options: getattr(matrix_memory, name)(
            DIM, HEADS, 2, 3, **options, rngs=nnx.Rngs(0)
        )
        for name, options in BUILDERS.items()
    },
}
WHERE = [(name, "mixed") for name in LAYERS] + [("mamba2", "heads"), ("delta_net", "heads")]


def hope():
    """HOPE, whose heads are of two modules and whose continuum is split by hidden units."""
    sizes = {"chunk": 2, "projection_chunk": 1, "expansion": 2, "conv": 3}
    titans = SelfReferentialMemory(DIM, HEADS, 2, **sizes, rngs=nnx.Rngs(0))
    return Hope(titans, ContinuumMemory(DIM, periods=(2,), expansion=2, rngs=nnx.Rngs(1)))


def inputs():
    """Documents begin at a place of its own in every row."""
    ids = np.where(np.arange(TIME) < np.arange(1, 1 + BATCH)[:, None], 1, 2)
    return np.random.default_rng(0).normal(size=(BATCH, TIME, DIM)), ids.astype(np.int32)


@functools.cache
def on_one_device(name):
    """A function of (parameters, x, ids), random parameters, and what one device makes of them."""
    module = nnx.eval_shape(hope if name == "hope" else LAYERS[name])
    graphdef, shapes = nnx.split(module, nnx.Param)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda w: jnp.asarray(0.6 * random.normal(size=w.shape)), shapes)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(params, x, ids):
        params = sharding.constrain_params(params)  # as the language model does
        y, state = nnx.merge(graphdef, params)(x, segment_ids=ids)
        return jnp.sum(jnp.sin(y)), (y, state)

    return run, params, run(params, *inputs())


def on_mesh(run, params, mesh):
    params = jax.device_put(params, sharding.shardings(params, mesh))
    x, ids = inputs()
    axes = (("batch", "time", None), ("batch", "time"))
    placed = [jax.NamedSharding(mesh, sharding.spec(a, mesh)) for a in axes]
    with jax.set_mesh(mesh):
        return run(params, *jax.device_put((x, ids), tuple(placed)))


def close(a, b):
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * max(np.abs(b).max(), 1e-3))


def held(array):
    """The shape of a device's part."""
    return array.addressable_shards[0].data.shape


@pytest.mark.parametrize(("name", "layout"), WHERE)
@float64
def test_values_and_gradients_are_those_of_one_device(name, layout):
    run, params, alone = on_one_device(name)
    mesh = sharding.make_mesh(**MESHES[layout])
    sharded = on_mesh(run, params, mesh)
    jax.tree.map(close, sharded, alone)
    gradients, fsdp, heads = sharded[0][0], mesh.shape["fsdp"], HEADS // mesh.shape["tensor"]
    heads, size = (3 if name == "mom" else 1) * heads, 3 if name in BUILDERS else 2
    assert held(gradients["value"]["weight"].get_value()) == (DIM // fsdp, heads, size)
    # the one head of keys that Mamba-2's memories share is whole on every device
    shared = 1 if name == "mamba2" else heads
    assert held(gradients["key"]["weight"].get_value()) == (DIM // fsdp, shared, 2)
    _, state = sharded[1]
    rows = BATCH // (fsdp * mesh.shape["data"])
    memory = state.overall if name == "tnt" else state.memory
    assert held(memory.weights[0])[:2] == (rows, heads)
    if layout == "heads":  # the comparison can fail: one parameter, a millionth off, is seen
        changed = jax.tree.map(lambda leaf: leaf, params)
        changed["key"]["weight"] = jax.tree.map(
            lambda w: w.at[0, 0, 0].multiply(1 + 1e-6), params["key"]["weight"]
        )
        with pytest.raises(AssertionError):
            jax.tree.map(close, on_mesh(run, changed, mesh), alone)


@float64
def test_hope_is_that_of_one_device():
    run, params, alone = on_one_device("hope")
    mesh = sharding.make_mesh(**MESHES["mixed"])
    sharded = on_mesh(run, params, mesh)
    jax.tree.map(close, sharded, alone)
    gradients, (_, state) = sharded
    heads = HEADS // mesh.shape["tensor"]
    weight = gradients[0]["titans"]["content"]["weight"].get_value()
    assert held(weight) == (DIM // mesh.shape["fsdp"], heads, 2)
    rows = BATCH // mesh.shape["fsdp"]
    assert held(state.titans.memory.weights[0])[:2] == (rows, heads)
    assert held(state.titans.projections.weights[0])[:2] == (rows, 4 * heads)
    level = gradients[0]["continuum"]["levels"][0]["weights"]["fast"][0].get_value()
    hidden = 2 * DIM // mesh.shape["tensor"]
    assert held(level) == (1, DIM // mesh.shape["fsdp"], hidden)
    assert held(state.continuum.levels[0].weights[0])[0] == rows


def test_a_document_begins_anew_on_a_split_time_axis_whatever_the_state_was():
    rule = miras.zoo.gated_delta_net()
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, 8, HEADS, DIM)) / 3 for key in keys[:3])
    gates = miras.Gates(lr=jnp.full(k.shape[:3], 0.5), retain=jnp.full(k.shape[:3], 0.9))
    state = miras.start(rule, rule.init(keys[3], DIM, DIM), 2, HEADS)
    state = state._replace(segment=jnp.asarray([5, 5]))
    lost = state._replace(weights=(state.weights[0].at[0].set(jnp.nan),))
    ids = jnp.asarray([[1] * 3 + [2] * 5, [5] * 8])
    with jax.set_mesh(sharding.make_mesh(sequence=4)):
        run = jax.jit(functools.partial(miras.chunkwise, rule))
        got = run(lost, q, k, v, gates, segment_ids=ids)
    want = miras.recurrent(rule, state, q, k, v, gates, segment_ids=ids)
    assert_close(got, want, 1e-5)
