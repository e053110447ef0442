"""The attention mixer against NumPy: projections, rotation, persistent tokens, state, dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax import sharding
from memjax.layers import Attention
from tests.attention import oracle

DIM, HEADS, TIME = 6, 4, 13
IDS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2], [3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 0, 0]])


def mixer(**options):
    options = {"kv_heads": 2, "window": 4} | options
    return Attention(DIM, HEADS, 4, **options, rngs=nnx.Rngs(0))


@functools.cache
def caller(**options):
    """The compiled call of `mixer(**options)`."""
    return jax.jit(mixer(**options).__call__)


def inputs(time=TIME, batch=2):
    return np.random.default_rng(0).normal(size=(batch, time, DIM))


def param(p):
    return np.asarray(p[...], np.float64)


def rotate(x, positions, base):
    half = x.shape[-1] // 2
    frequency = base ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[..., None, None] * frequency)
    return np.concatenate([z.real, z.imag], axis=-1)


def counted(ids, time):
    begin = np.stack([oracle.document_starts(row, time) for row in ids])
    return np.arange(time) - begin


def expect(layer, x, *, window, sinks=0, ids=None, positions=None, base=10000.0):
    """The mixer from its equations, in float64."""

    def project(x, weight, norm):
        y = np.einsum("...e,ehd->...hd", x, param(weight))
        if norm is not None:
            y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * param(norm.scale)
        return y

    if positions is None:
        positions = counted([None] * len(x) if ids is None else ids, x.shape[1])
    q = project(x, layer.query.weight, layer.query_norm)
    k = project(x, layer.key.weight, layer.key_norm)
    v = project(x, layer.value.weight, None)
    prefix = None
    if layer.persistent is not None:
        tokens = param(layer.persistent)
        prefix = (
            project(tokens, layer.key.weight, layer.key_norm),
            project(tokens, layer.value.weight, None),
        )
    q, k = rotate(q, positions, base), rotate(k, positions, base)
    y = oracle.attend(q, k, v, window=window, sinks=sinks, prefix=prefix, segment_ids=ids)
    return np.einsum("bthd,hde->bte", y, param(layer.output.weight))


def close(actual, expected, tolerance=1e-5):
    expected = np.asarray(expected, np.float64)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=tolerance, atol=tolerance * scale
    )


@pytest.mark.parametrize(
    "options",
    [
        {"window": 4},
        {"window": None, "context": 20},
        {"window": None, "context": 5},  # the last `context` tokens
        {"sinks": 2, "persistent": 3, "qk_norm": True},
        {"rope_base": 100.0, "kv_heads": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one", "documents"])
def test_equals_its_equations(options, ids):
    layer = mixer(**options)
    if layer.query_norm is not None:
        layer.query_norm.scale[...] = jnp.asarray([1.0, 2.0, 0.5, 1.5])
    x = inputs()
    y, _ = jax.jit(layer.__call__)(jnp.asarray(x, jnp.float32), segment_ids=ids)
    width = options.get("window", 4) or options["context"]
    right = {
        "window": width,
        "sinks": options.get("sinks", 0),
        "ids": ids,
        "base": options.get("rope_base", 10000.0),
    }
    close(y, expect(layer, x, **right))
    for fault in [{"window": 3}, {"base": 50.0}, {"ids": IDS if ids is None else None}]:
        with pytest.raises(AssertionError):
            close(y, expect(layer, x, **(right | fault)))


def test_positions_rotate_and_nothing_else():
    layer, x = mixer(), inputs()
    positions = np.arange(TIME)[None] * 3 + np.array([[5], [0]])
    y, state = jax.jit(layer.__call__)(jnp.asarray(x, jnp.float32), positions=positions)
    close(y, expect(layer, x, window=4, positions=positions))
    np.testing.assert_array_equal(state.position, positions[:, -1] + 1)
    with pytest.raises(AssertionError):
        close(y, expect(layer, x, window=4))


OPTIONS = {"window": 4, "sinks": 2, "persistent": 2}


@pytest.mark.parametrize("given", ["none", "ids", "ids and positions"])
def test_split_anywhere_and_one_by_one(given):
    call, layer = caller(**OPTIONS), mixer(**OPTIONS)
    x = jnp.asarray(inputs(), jnp.float32)
    positions = counted(IDS, TIME)

    def cut(here):
        named = {}
        if given != "none":
            named["segment_ids"] = jnp.asarray(IDS[:, here])
        if given == "ids and positions":
            named["positions"] = jnp.asarray(positions[:, here])
        return named

    whole, end = call(x, **cut(slice(None)))
    close(whole, expect(layer, inputs(), window=4, sinks=2, ids=None if given == "none" else IDS))
    for parts in [(i, TIME - i) for i in range(1, TIME)] + [(1,) * TIME, (3, 1, 7, 2)]:
        state, outs, at = layer.start(2), [], 0
        types = jax.tree.map(jax.typeof, state)
        for n in parts:
            here = slice(at, at + n)
            y, state = call(x[:, here], state, **cut(here))
            assert jax.tree.map(jax.typeof, state) == types
            outs.append(y)
            at += n
        close(jnp.concatenate(outs, 1), whole)
        np.testing.assert_array_equal(state.position, end.position)
    # the check can fail: a position lost on the way shows
    _, state = call(x[:, :6], layer.start(2), **cut(slice(0, 6)))
    state = state._replace(position=state.position + 1)
    y, _ = call(x[:, 6:], state, **cut(slice(6, None)))
    if given == "ids and positions":
        close(y, whole[:, 6:])
    else:
        with pytest.raises(AssertionError):
            close(y, whole[:, 6:])


def test_a_document_in_a_row_is_the_document_alone():
    call, x = caller(**OPTIONS), jnp.asarray(inputs(), jnp.float32)
    alone, _ = call(x[:1, 5:])
    whole, _ = call(x[:1], segment_ids=IDS[:1])
    close(whole[:, 5:], alone)
    _, state = call(x[:1, :5], segment_ids=IDS[:1, :5])
    after, _ = call(x[:1, 5:], state, segment_ids=IDS[:1, 5:])
    close(after, alone)
    continued, _ = call(x[:1, 5:], state, segment_ids=np.ones_like(IDS[:1, 5:]))
    with pytest.raises(AssertionError):
        close(continued, alone)


def test_causality_and_isolation_are_exact_zeros():
    call, x = caller(**OPTIONS), jnp.asarray(inputs(), jnp.float32)
    jacobian = jax.jacobian(lambda x: call(x, segment_ids=IDS)[0].sum(-1))(x)
    reach = np.abs(jacobian).max(-1) > 0
    expected = np.zeros((2, TIME, 2, TIME), bool)
    for b in range(2):
        expected[b, :, b] = oracle.visible(IDS[b], TIME, 4, 2)
    np.testing.assert_array_equal(reach, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtype_in_is_dtype_out(dtype):
    layer = mixer(**OPTIONS)
    x = jnp.asarray(inputs(), dtype)
    y, state = caller(**OPTIONS)(x, segment_ids=IDS)
    assert y.dtype == dtype
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, layer.start(2))
    exact = expect(layer, np.asarray(x, np.float64), window=4, sinks=2, ids=IDS)
    # a handful of roundings in a row: projections, rotation, probabilities, products, output
    close(y, exact, 8 * float(jnp.finfo(dtype).eps))
    _, state = caller(**OPTIONS)(x, layer.start(2, dtype))
    assert state.cache.keys.dtype == dtype


def test_parameters_are_fp32_name_their_axes_and_get_gradients():
    layer = mixer(**OPTIONS, qk_norm=True)
    graphdef, params = nnx.split(layer, nnx.Param)
    flat = nnx.to_flat_state(params)
    axes = {".".join(path): p.axes for path, p in flat}
    assert axes == {
        "query.weight": ("embed", "heads", "kv"),
        "key.weight": ("embed", "heads", "kv"),
        "value.weight": ("embed", "heads", "kv"),
        "output.weight": ("heads", "kv", "embed"),
        "query_norm.scale": ("kv",),
        "key_norm.scale": ("kv",),
        "persistent": ("persistent", "embed"),
    }
    x = jnp.asarray(inputs(), jnp.float32)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x, segment_ids=jnp.asarray(IDS))[0]))

    for leaf in jax.tree.leaves(gradient(params)):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


def test_on_a_mesh_as_on_one_device():
    layer = mixer(**OPTIONS)
    x = jnp.asarray(inputs(batch=4), jnp.float32)
    alone, before = caller(**OPTIONS)(x)
    next_alone, _ = caller(**OPTIONS)(x[:, :1], before)
    graphdef, params = nnx.split(layer, nnx.Param)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, sharding.shardings(params, mesh))
    with jax.set_mesh(mesh):
        y, state = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(placed, x)
        assert y.sharding.spec[0] == ("data", "fsdp")
        close(y, alone)
        more, _ = jax.jit(lambda p, x, s: nnx.merge(graphdef, p)(x, s))(placed, x[:, :1], state)
    close(more, next_alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 3}, "head_dim 3 must be even"),
        ({"head_dim": 0}, "head_dim 0"),
        ({"heads": 3, "kv_heads": 2}, "heads 3 must be a multiple of kv_heads 2"),
        ({"heads": 4, "head_dim": None}, "dim 6 is not a multiple of heads 4"),
        ({"heads": 0}, "heads 0"),
        ({"window": None}, "a window, or a context"),
        ({"window": None, "context": 0}, "context 0"),
        ({"window": 0}, "window 0"),
        ({"sinks": -1}, "sinks -1"),
        ({"kv_heads": True}, "kv_heads True must be an integer"),
        ({"persistent": -1}, "persistent -1"),
        ({"implementation": "flash"}, "'flash'.*xla"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(DIM, **({"heads": 2, "head_dim": 4, "window": 4} | options), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer: layer(jnp.ones((2, 5, 4))), r"\(2, 5, 4\).*6"),
        (lambda layer: layer(jnp.ones((2, 0, 6))), r"\(2, 0, 6\)"),
        (lambda layer: layer(jnp.ones((2, 5, 6)), layer.start(1)), r"start\(2\)"),
        (
            lambda layer: layer(jnp.ones((2, 5, 6)), mixer(window=3).start(2)),
            r"another Attention: cache\.keys is \(2, 3, 2, 4\), here \(2, 4, 2, 4\)",
        ),
    ],
)
def test_bad_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(mixer())


def test_the_state_keeps_its_types_whatever_the_ids_are():
    call, x = caller(**OPTIONS), jnp.asarray(inputs(), jnp.float32)
    types = jax.tree.map(jax.typeof, mixer(**OPTIONS).start(2))
    for kind in (jnp.int8, jnp.int16):
        ids = jnp.asarray(IDS, kind)
        y, state = call(x, segment_ids=ids, positions=ids)
        assert jax.tree.map(jax.typeof, state) == types
        again, _ = call(x, segment_ids=jnp.asarray(IDS), positions=jnp.asarray(IDS))
        np.testing.assert_array_equal(y, again)


def test_a_fresh_state_can_be_donated():
    layer = mixer(**OPTIONS)
    step = jax.jit(layer.__call__, donate_argnums=1)
    x = jnp.asarray(inputs(1), jnp.float32)
    y, state = step(x, layer.start(2))
    assert np.isfinite(step(y, state)[0]).all()
