"""Splash attention (interpreted) against the definition, and which kernel is picked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import sharding
from memjax.attention import attend, backends
from tests.attention import oracle

TIME, DIM = 150, 8


def inputs(batch, heads, kv_heads, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, TIME, heads, DIM))
    k, v = rng.normal(size=(2, batch, TIME, kv_heads, DIM))
    number = np.cumsum(rng.random((batch, TIME)) < 0.03, axis=1).astype(np.int32)
    return q, k, v, number


def single(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


@functools.partial(jax.jit, static_argnames="window")
def splash(q, k, v, number, window):
    return backends.splash(q, k, v, window=window, number=number, interpret=True)


@pytest.mark.parametrize(("window", "kv_heads"), [(40, 1), (1000, 2)])
def test_splash_equals_the_definition(window, kv_heads):
    q, k, v, number = inputs(1, 2, kv_heads)
    y = splash(*single(q, k, v), number, window)
    options = {"window": window, "segment_ids": number}
    close(y, oracle.attend(q, k, v, **options))
    for fault in [{"window": 39}, {"segment_ids": None}]:
        with pytest.raises(AssertionError):
            close(y, oracle.attend(q, k, v, **(options | fault)))


def test_splash_gradients_equal_those_of_xla():
    q, k, v, number = inputs(1, 2, 1)
    arrays = single(q, k, v)

    def gradients(y):
        loss = lambda *a: jnp.sum(jnp.sin(3 * y(*a)))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

    def xla(window, *arrays):
        return attend(*arrays, window=window, segment_ids=jnp.asarray(number + 1))[0]

    actual = gradients(lambda *a: splash(*a, number, 40))
    for ours, theirs in zip(actual, gradients(functools.partial(xla, 40)), strict=True):
        close(ours, theirs, 3e-5)
    with pytest.raises(AssertionError):
        close(actual[0], gradients(functools.partial(xla, 39))[0], 3e-5)


def test_splash_on_a_mesh_computes_each_share_apart():
    q, k, v, number = inputs(4, 4, 2)
    arrays = single(q, k, v)
    alone = splash(*arrays, number, 40)
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        y = splash(*arrays, number, 40)
        assert y.sharding.spec[0] == ("data", "fsdp")
        assert "tensor" in y.sharding.spec
        close(y, alone)
        # a batch that the mesh does not divide stays whole
        close(splash(*(x[:1] for x in arrays), number[:1], 40), alone[:1])
    with (
        jax.set_mesh(sharding.make_mesh(tensor=4)),
        pytest.raises(ValueError, match="2 kv_heads over the mesh"),
    ):
        splash(*arrays, number, 40)


def test_what_none_picks(monkeypatch):
    q = jnp.ones((1, 8, 2, DIM))
    fresh = {"fresh": True, "window": 4}
    assert backends.choose(None, q, **fresh) == "xla"
    assert backends.choose("splash", q, **fresh) == "splash"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert backends.choose(None, q, **fresh) == "splash"
    assert backends.choose("xla", q, **fresh) == "xla"
    assert backends.choose(None, q, fresh=True, window=8, sinks=1) == "splash"
    for beyond in [{"fresh": False}, {"sinks": 1}, {"prefix": True}]:
        assert backends.choose(None, q, **(fresh | beyond)) == "xla"
    assert backends.choose(None, q.astype(jnp.float16), **fresh) == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    half = q.astype(jnp.float16)
    assert backends.choose(None, half, **fresh) == "xla"
    assert backends.choose("cudnn", half, **fresh) == "cudnn"
    for wrong, message in [(q, "float32"), (jnp.ones((1, 8, 2, 12), jnp.float16), "head_dim 12")]:
        with pytest.raises(ValueError, match=message):
            backends.choose("cudnn", wrong, **fresh)
