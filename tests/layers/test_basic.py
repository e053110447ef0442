"""Linear, RMSNorm, rotary and SwiGLU against their equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.layers import Linear, RMSNorm, SwiGLU, rotary
from memjax.layers.linear import fan_in_normal


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def param(p):
    return np.asarray(p[...], np.float64)


def close(actual, expected, rtol=1e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=rtol, atol=rtol * np.abs(expected).max()
    )


@pytest.mark.parametrize("bias", [False, True])
def test_linear_contracts_the_trailing_axes(bias):
    axes = ("heads", "kv", "embed", None)
    layer = Linear((3, 4), (5, 2), axes=axes, bias=bias, rngs=nnx.Rngs(0))
    if bias:
        layer.bias[...] = jnp.asarray(draw(1, 5, 2), jnp.float32)
    x = draw(2, 2, 7, 3, 4)
    expected = np.einsum("btij,ijkl->btkl", x, param(layer.weight))
    if bias:
        expected = expected + param(layer.bias)
    close(layer(jnp.asarray(x, jnp.float32)), expected)
    assert layer.weight.axes == axes
    assert not bias or layer.bias.axes == ("embed", None)


def test_linear_starts_with_fan_in_deviation():
    weight = np.asarray(fan_in_normal(jax.random.key(0), (200, 300), 200))
    assert abs(weight.std() * np.sqrt(200) - 1) < 0.01
    assert abs(weight.mean()) < 1e-3
    # truncated at two deviations of the normal before truncation
    assert np.abs(weight).max() * np.sqrt(200) <= 2 / 0.8796
    layer = Linear((8, 25), 300, axes=("heads", "kv", "embed"), rngs=nnx.Rngs(0))
    assert abs(param(layer.weight).std() * np.sqrt(200) - 1) < 0.01


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_norm_divides_by_the_root_mean_square(scale):
    layer = RMSNorm(6, rngs=nnx.Rngs(0))
    layer.scale[...] = jnp.asarray(draw(1, 6), jnp.float32)
    x = draw(2, 2, 3, 6) * scale
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * param(layer.scale)
    close(layer(jnp.asarray(x, jnp.float32)), expected)
    # without eps the small input would come out another size
    if scale < 1:
        planted = x / np.sqrt((x**2).mean(-1, keepdims=True)) * param(layer.scale)
        with pytest.raises(AssertionError):
            close(layer(jnp.asarray(x, jnp.float32)), planted)


def rotate(x, positions, base):
    """Complex rotation of the pairs (i, i + D/2), one number at a time."""
    out = np.zeros_like(x)
    half = x.shape[-1] // 2
    for b, t, h, i in np.ndindex(*x.shape[:3], half):
        z = complex(x[b, t, h, i], x[b, t, h, i + half])
        z *= np.exp(1j * positions[b, t] * base ** (-2 * i / x.shape[-1]))
        out[b, t, h, i], out[b, t, h, i + half] = z.real, z.imag
    return out


def test_rotary_turns_pairs():
    x, positions = draw(0, 2, 3, 2, 6), np.array([[0, 1, 2], [7, 100, 3]])
    y = rotary(jnp.asarray(x, jnp.float32), jnp.asarray(positions), 100.0)
    close(y, rotate(x, positions, 100.0))
    np.testing.assert_array_equal(y[0, 0], x[0, 0].astype(np.float32))
    with pytest.raises(AssertionError):
        close(y, rotate(x, positions + 1, 100.0))


def test_rotary_products_depend_on_distance_only():
    q, k = draw(0, 1, 1, 1, 8), draw(1, 1, 1, 1, 8)

    def product(i, j):
        turn = lambda x, p: rotary(jnp.asarray(x, jnp.float32), jnp.full((1, 1), p, jnp.int32))  # noqa: E731
        return float(jnp.sum(turn(q, i) * turn(k, j)))

    assert abs(product(5, 2) - product(1003, 1000)) < 1e-4
    assert abs(product(5, 2) - product(1003, 1001)) > 1e-3


def test_swiglu_is_the_equation():
    layer = SwiGLU(4, 10, rngs=nnx.Rngs(0))
    x = draw(0, 2, 3, 4)
    gate, up, down = (param(p.weight) for p in (layer.gate, layer.up, layer.down))
    g = x @ gate
    close(layer(jnp.asarray(x, jnp.float32)), (g / (1 + np.exp(-g)) * (x @ up)) @ down)
    u = x @ up
    with pytest.raises(AssertionError):  # gate and value swapped
        close(layer(jnp.asarray(x, jnp.float32)), (u / (1 + np.exp(-u)) * (x @ gate)) @ down)


LAYERS = {
    "linear": lambda rngs: Linear(4, 4, axes=("embed", None), bias=True, rngs=rngs),
    "norm": lambda rngs: RMSNorm(4, rngs=rngs),
    "swiglu": lambda rngs: SwiGLU(4, 6, rngs=rngs),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtype_in_is_dtype_out_and_parameters_are_fp32(name, dtype):
    layer = LAYERS[name](nnx.Rngs(0))
    x = jnp.asarray(draw(0, 2, 3, 4), dtype)
    y = layer(x)
    assert y.dtype == dtype
    wide = layer(x.astype(jnp.float32))
    close(y, wide, rtol=float(jnp.finfo(dtype).eps) * 8)
    leaves = jax.tree.leaves(nnx.state(layer, nnx.Param))
    assert leaves
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_name_every_dimension_and_get_gradients(name):
    graphdef, params = nnx.split(LAYERS[name](nnx.Rngs(0)), nnx.Param)
    for _, p in nnx.to_flat_state(params):
        assert len(p.axes) == p[...].ndim
    x = jnp.asarray(draw(0, 2, 3, 4), jnp.float32)
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(x))))(params)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: Linear(0, 4, axes=("embed", None), rngs=r), "at least 1"),
        (lambda r: Linear(4, 4, axes=("embed",), rngs=r), "must name each of the 2 dimensions"),
        (lambda r: Linear(4, 4, axes=("embed", None), rngs=r)(jnp.ones((2, 3))), r"\(2, 3\)"),
        (lambda r: RMSNorm(0, rngs=r), "dim 0"),
        (lambda r: RMSNorm(4, rngs=r)(jnp.ones((2, 3))), r"\(2, 3\).*must be 4"),
        (lambda r: rotary(jnp.ones((1, 1, 1, 3)), jnp.ones((1, 1), int)), "head_dim 3"),
        (lambda r: SwiGLU(4, 0, rngs=r), "at least 1"),
        (lambda r: SwiGLU(4, 8, rngs=r)(jnp.ones((2, 3))), r"\(2, 3\)"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(nnx.Rngs(0))
