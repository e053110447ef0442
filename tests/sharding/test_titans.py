"""Titans' blocks on a mesh: the loss and gradients of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax import sharding
from memjax.models import LanguageModel
from memjax.models.config import MemoryConfig
from memjax.tpu import hlo
from tests.models.toys import config_of, tokens_of

MESHES = {
    "data": {"data": 8},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
    "long": {"fsdp": 4, "sequence": 2},
}
BATCH, TIME = 8, 12


def loss_of(graphdef):
    def loss(params, tokens, ids):
        logits, _ = nnx.merge(graphdef, params)(tokens, segment_ids=ids)
        likelihood = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(likelihood, tokens[:, 1:, None], axis=-1).mean()

    return jax.jit(jax.value_and_grad(loss))


def inputs():
    """Documents begin at a place of its own in every row."""
    ids = np.where(np.arange(TIME) < np.arange(2, 2 + BATCH)[:, None], 1, 2)
    return tokens_of(BATCH, TIME), jnp.asarray(ids, jnp.int32)


@functools.cache
def on_one_device(name):
    config = config_of(
        pattern=(name,),
        layers=1,
        segment=4,
        window=4,
        persistent=2,
        conv=3,
        memory=MemoryConfig(chunk=3, expansion=2),
    )
    graphdef, params = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)
    return graphdef, params, loss_of(graphdef)(params, *inputs())


def on_mesh(name, mesh, params):
    graphdef, _, _ = on_one_device(name)
    params = jax.device_put(params, sharding.shardings(params, mesh))
    placed = jax.NamedSharding(mesh, sharding.spec(("batch", "time"), mesh, shape=(BATCH, TIME)))
    with jax.set_mesh(mesh):
        return loss_of(graphdef)(params, *jax.device_put(inputs(), placed))


def close(a, b):
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("name", ["mac", "mag"])
@pytest.mark.parametrize("layout", MESHES)
def test_loss_and_gradients_are_those_of_one_device(name, layout):
    _, params, (loss, grads) = on_one_device(name)
    mesh = sharding.make_mesh(**MESHES[layout])
    sharded_loss, sharded_grads = on_mesh(name, mesh, params)
    close(sharded_loss, loss)
    jax.tree.map(close, sharded_grads, grads)
    if layout == "mixed":
        memory = sharded_grads["blocks"][0]["mixer"]["memory"]
        split = {"fast": memory["fast"][0], "query": memory["query"]["weight"]}
        # 2 heads over 2; 16 of dim over 2
        assert split["fast"].get_value().addressable_shards[0].data.shape == (1, 1, 8, 16)
        assert split["query"].get_value().addressable_shards[0].data.shape == (1, 8, 1, 8)


def test_no_segment_waits_for_another_device():
    """MAC on rows alone: what devices exchange stands outside of the loops, and is counted."""
    graphdef, params, _ = on_one_device("mac")
    mesh = sharding.make_mesh(data=8)
    params = jax.device_put(params, sharding.shardings(params, mesh))
    placed = jax.NamedSharding(mesh, sharding.spec(("batch", "time"), mesh, shape=(BATCH, TIME)))
    with jax.set_mesh(mesh):
        lowered = loss_of(graphdef).lower(params, *jax.device_put(inputs(), placed))
    module = hlo.parse(lowered.compile().as_text())
    found = [
        (one.opcode, name == module.entry)
        for name, computation in module.computations.items()
        for one in computation
        if one.opcode in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
    ]
    assert 1 <= len(found) <= 4, found
    assert all(outside for _, outside in found)


@pytest.mark.parametrize("name", ["mac", "mag"])
def test_the_comparison_can_fail(name):
    """W_0 of the memory, off by one part in a hundred, is seen."""
    _, params, (_, grads) = on_one_device(name)
    changed = jax.tree.map(lambda leaf: leaf, params)
    fast = changed["blocks"][0]["mixer"]["memory"]["fast"]
    fast[0] = jax.tree.map(lambda w: w * 1.01, fast[0])
    _, sharded = on_mesh(name, sharding.make_mesh(data=8), changed)
    with pytest.raises(AssertionError):
        jax.tree.map(close, sharded, grads)
