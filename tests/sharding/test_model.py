"""A sharded model computes the loss and gradients of one device, and really is split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax import sharding
from memjax.models import LanguageModel, sample
from tests.models.toys import config_of, model_of, tokens_of

MESHES = {
    "data": {"data": 8},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
    "long": {"fsdp": 4, "sequence": 2},
}
BATCH, TIME = 8, 12
CONFIG = config_of(pattern=("toy_average", "transformer", "swa"), layers=3, tied=False)


def loss_of(graphdef):
    def loss(params, tokens, ids):
        logits, _ = nnx.merge(graphdef, params)(tokens, segment_ids=ids)
        likelihood = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(likelihood, tokens[:, 1:, None], axis=-1).mean()

    return jax.jit(jax.value_and_grad(loss))


def inputs():
    ids = np.where(np.arange(TIME) < np.arange(2, 2 + BATCH)[:, None], 1, 2)
    return tokens_of(BATCH, TIME), jnp.asarray(ids, jnp.int32)


@functools.cache
def on_one_device():
    graphdef, params = nnx.split(LanguageModel(CONFIG, rngs=nnx.Rngs(0)), nnx.Param)
    return graphdef, params, loss_of(graphdef)(params, *inputs())


def on_mesh(mesh, params, inputs):
    graphdef, _, _ = on_one_device()
    params = jax.device_put(params, sharding.shardings(params, mesh))
    placed = jax.NamedSharding(mesh, sharding.spec(("batch", "time"), mesh, shape=(BATCH, TIME)))
    with jax.set_mesh(mesh):
        return params, loss_of(graphdef)(params, *jax.device_put(inputs, placed))


def close(a, b):
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("name", MESHES)
def test_loss_and_gradients_are_those_of_one_device(name):
    _, params, (loss, grads) = on_one_device()
    _, (sharded_loss, sharded_grads) = on_mesh(sharding.make_mesh(**MESHES[name]), params, inputs())
    close(sharded_loss, loss)
    assert jax.tree.structure(sharded_grads) == jax.tree.structure(grads)
    jax.tree.map(close, sharded_grads, grads)


def test_the_comparison_can_fail():
    """One parameter of one layer, off by one part in a thousand, is seen."""
    _, params, (_, grads) = on_one_device()
    changed = jax.tree.map(lambda leaf: leaf, params)
    changed["blocks"][1]["mixer"]["value"]["weight"] = jax.tree.map(
        lambda w: w * 1.001, params["blocks"][1]["mixer"]["value"]["weight"]
    )
    _, (_, sharded) = on_mesh(sharding.make_mesh(data=8), changed, inputs())
    with pytest.raises(AssertionError):
        jax.tree.map(close, sharded, grads)


@pytest.mark.parametrize("name", ["mixed", "long"])
def test_parameters_and_gradients_are_split(name):
    _, params, _ = on_one_device()
    mesh = sharding.make_mesh(**MESHES[name])
    params, (_, grads) = on_mesh(mesh, params, inputs())
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    expected = {
        ("embedding",): (32 // tensor, 16 // fsdp),
        ("head_kernel",): (16 // fsdp, 32 // tensor),
        ("blocks", 1, "mixer", "query", "weight"): (1, 16 // fsdp, 2 // tensor, 8),
        ("blocks", 2, "feed_forward", "down", "weight"): (1, 32 // tensor, 16 // fsdp),
    }
    flat = nnx.to_flat_state(params)
    found = {path: leaf.get_value() for path, leaf in flat}
    for path, shape in expected.items():
        assert found[path].addressable_shards[0].data.shape == shape, path
    held = sum(leaf.addressable_shards[0].data.size for leaf in found.values())
    assert held < 1.3 * sum(leaf.size for leaf in found.values()) / (fsdp * tensor)
    gradients = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(grads)}
    for path, shape in expected.items():
        assert gradients[path].addressable_shards[0].data.shape == shape, path


def test_created_in_place_it_is_the_same_model():
    _, params, _ = on_one_device()
    mesh = sharding.make_mesh(**MESHES["mixed"])

    def create():
        return nnx.split(LanguageModel(CONFIG, rngs=nnx.Rngs(0)), nnx.Param)[1]

    placed = sharding.shardings(jax.eval_shape(create), mesh)
    created = jax.jit(create, out_shardings=placed)()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), created, params)
    kernel = created["blocks"][0]["feed_forward"]["up"]["weight"].get_value()
    assert kernel.addressable_shards[0].data.shape == (1, 8, 16)


def test_activations_are_split():
    """The compiled step holds its residual stream in parts: no array of the whole shape."""
    graphdef, params, _ = on_one_device()
    mesh = sharding.make_mesh(**MESHES["long"])
    placed = jax.NamedSharding(mesh, sharding.spec(("batch", "time"), mesh))
    run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params).hidden(tokens)[0])
    with jax.set_mesh(mesh):
        x = run(
            jax.device_put(params, sharding.shardings(params, mesh)),
            jax.device_put(inputs()[0], placed),
        )
    assert x.addressable_shards[0].data.shape == (BATCH // 4, TIME // 2, 16)


def test_generates_on_a_mesh():
    prompt = tokens_of(batch=1, time=5)
    model = model_of(pattern=("transformer",))
    expected = sample(model, prompt, length=3, temperature=0)
    mesh = sharding.make_mesh(fsdp=2, tensor=2, sequence=2)
    graphdef, params = nnx.split(model)
    sharded = nnx.merge(graphdef, jax.device_put(params, sharding.shardings(params, mesh)))
    with jax.set_mesh(mesh):
        tokens = sample(sharded, prompt, length=3, temperature=0)
    np.testing.assert_array_equal(tokens, expected)


def test_mesh_that_does_not_divide():
    _, params, _ = on_one_device()
    with pytest.raises(ValueError, match=r"\['key'\].*'heads', size 2.* tensor of size 8"):
        sharding.shardings(params["blocks"][1]["mixer"], sharding.make_mesh(tensor=8))
