"""CausalConv against loops over its definition; states, resets and causality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.layers import CausalConv

DIM = 3


def convolve(x, weight, segment_ids=None):
    """y[t] = sum_s weight[s] x[t - s] inside the document, in float64 loops."""
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for s in range(min(len(weight), t + 1)):
                j = t - s
                if s and segment_ids is not None and segment_ids[b, j + 1] != segment_ids[b, j]:
                    break
                y[b, t] += weight[s] * x[b, j]
    return y


def setup(width=4, batch=2, time=11, seed=0):
    layer = CausalConv(DIM, width, rngs=nnx.Rngs(seed))
    x = np.random.default_rng(seed).normal(size=(batch, time, DIM))
    return layer, x, np.asarray(layer.weight[...], np.float64)


def close(actual, expected, tolerance=1e-5):
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=tolerance, atol=tolerance
    )


# the id 1 comes back: a new document all the same
IDS = np.array([[1, 1, 1, 2, 2, 3, 1, 1, 1, 1, 0], [5, 5, 5, 5, 5, 5, 5, 6, 6, 0, 0]])


@pytest.mark.parametrize("width", [1, 2, 4, 13])
@pytest.mark.parametrize("ids", [None, IDS])
def test_equals_the_definition(width, ids):
    layer, x, weight = setup(width)
    given = None if ids is None else jnp.asarray(ids)
    y, _ = jax.jit(layer.__call__)(jnp.asarray(x, jnp.float32), segment_ids=given)
    close(y, convolve(x, weight, ids))
    if width > 1:
        with pytest.raises(AssertionError):
            close(y, convolve(x, weight[::-1], ids))
        with pytest.raises(AssertionError):
            close(y, convolve(x, weight, IDS if ids is None else None))


@pytest.mark.parametrize("ids", [None, IDS])
def test_split_anywhere_and_one_by_one(ids):
    layer, x, _ = setup()
    x = jnp.asarray(x, jnp.float32)
    cut = lambda a, b: None if ids is None else jnp.asarray(ids[:, a:b])  # noqa: E731
    call = jax.jit(layer.__call__)
    whole, end = call(x, segment_ids=cut(0, None))
    lengths = [(i, 11 - i) for i in range(1, 11)] + [(1,) * 11, (2, 1, 5, 3)]
    for parts in lengths:
        state, at, outs = layer.start(2), 0, []
        for n in parts:
            y, state = call(x[:, at : at + n], state, segment_ids=cut(at, at + n))
            outs.append(y)
            at += n
        close(jnp.concatenate(outs, 1), whole)
        jax.tree.map(close, state, end)
    # the check can fail: a state dropped between the parts shows
    y, _ = layer(x[:, 5:], segment_ids=cut(5, None))
    with pytest.raises(AssertionError):
        close(y, whole[:, 5:])


def test_a_carried_document_resets_at_the_first_token():
    layer, x, _ = setup()
    x = jnp.asarray(x, jnp.float32)
    _, state = layer(x[:, :4], segment_ids=jnp.full((2, 4), 7))
    alone, _ = layer(x[:, 4:])
    y, _ = layer(x[:, 4:], state, segment_ids=jnp.full((2, 7), 8))
    np.testing.assert_array_equal(y, alone)
    y, _ = layer(x[:, 4:], state, segment_ids=jnp.full((2, 7), 7))
    assert np.abs(y - alone).max() > 1e-3


def test_causality_isolation_and_documents_are_exact_zeros():
    layer, x, _ = setup()
    x = jnp.asarray(x, jnp.float32)
    jacobian = jax.jacobian(lambda x: layer(x, segment_ids=jnp.asarray(IDS))[0])(x)
    reach = np.abs(jacobian).max(axis=(2, 5))  # [B, T, B', T']
    for b, t, c, s in np.ndindex(*reach.shape):
        number = np.cumsum(np.diff(IDS[b], prepend=IDS[b, 0]) != 0)
        visible = b == c and 0 <= t - s < 4 and number[s] == number[t]
        assert (reach[b, t, c, s] > 0) == visible


def test_silu_follows_where_it_is_asked_for():
    layer, x, weight = setup()
    y, state = layer(jnp.asarray(x, jnp.float32), silu=True)
    z = convolve(x, weight)
    close(y, z / (1 + np.exp(-z)))
    jax.tree.map(close, state, layer(jnp.asarray(x, jnp.float32))[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs(dtype):
    layer, x, weight = setup()
    x = jnp.asarray(x, dtype)
    y, state = layer(x)
    assert y.dtype == dtype
    assert state.inputs.dtype == jnp.float32
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, layer.start(2))
    expected = convolve(np.asarray(x, np.float64), weight)
    close(y, expected, float(jnp.finfo(dtype).eps) * 2)
    again, kept = layer(x, layer.start(2, dtype))
    assert kept.inputs.dtype == dtype
    np.testing.assert_array_equal(y, again)


def test_gradients_reach_the_weight_and_the_state():
    layer, x, _ = setup()
    graphdef, params = nnx.split(layer, nnx.Param)
    x = jnp.asarray(x, jnp.float32)
    state = layer(x)[1]

    def loss(params, inputs):
        y, _ = nnx.merge(graphdef, params)(x, state._replace(inputs=inputs))
        return jnp.sum(jnp.sin(y))

    gradients = jax.grad(loss, argnums=(0, 1))(params, state.inputs)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()
        assert (np.abs(leaf) > 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer: CausalConv(0, rngs=nnx.Rngs(0)), "dim 0"),
        (lambda layer: CausalConv(3, 0, rngs=nnx.Rngs(0)), "width 0"),
        (lambda layer: layer(jnp.ones((2, 5, 4))), r"\(2, 5, 4\)"),
        (lambda layer: layer(jnp.ones((2, 0, 3))), r"\(2, 0, 3\)"),
        (lambda layer: layer(jnp.ones((2, 5, 3)), layer.start(1)), r"start\(2\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(setup()[0])
