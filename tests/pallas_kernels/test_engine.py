"""Rules run by their kernels, interpreted, against the definition of `miras.recurrent`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import miras, sharding

B, T, H, K = 2, 40, 2, 64
SEGMENTS = {
    "one document": None,
    "at chunks": jnp.repeat(jnp.array([[0, 0, 1], [0, 1, 1]]), 16, axis=1)[:, :T],
    "anywhere": jnp.cumsum(jnp.arange(T)[None] % jnp.array([[7], [17]]) == 5, 1, jnp.int32),
}
RULES = {
    "gated_delta_net": (miras.zoo.gated_delta_net(), ("lr", "retain")),
    "kda": (miras.zoo.kda(), ("lr", "channels")),
    "longhorn": (miras.zoo.longhorn(), ("lr",)),
    "gla": (miras.zoo.gla(), ("lr", "channels")),
    "titans": (miras.zoo.titans(chunk=16, expansion=2), ("small", "momentum", "retain")),
}


def drawn(name):
    """(state, (q, k, v), gates) of a rule."""
    rule, kinds = RULES[name]
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def sigmoid(*more):
        return jax.nn.sigmoid(jax.random.normal(next(keys), (B, T, H, *more)))

    gates = {}
    for kind in kinds:
        field = {"channels": "retain", "small": "lr"}.get(kind, kind)
        value = sigmoid(K) if kind == "channels" else sigmoid()
        gates[field] = 0.1 * value if kind == "small" else value
    weights = jax.vmap(lambda key: rule.init(key, K, K))(jax.random.split(next(keys), H))
    tokens = [jax.random.normal(next(keys), (B, T, H, K)) for _ in range(3)]
    tokens[:2] = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in tokens[:2])
    return miras.start(rule, weights, B), tokens, miras.Gates(**gates)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("gated_delta_net", "anywhere"),
        ("kda", "one document"),
        ("longhorn", "one document"),
        ("gla", "anywhere"),
        ("titans", "at chunks"),
        pytest.param("titans", "one document", marks=pytest.mark.slow),
        pytest.param("titans", "anywhere", marks=pytest.mark.slow),
        pytest.param("kda", "anywhere", marks=pytest.mark.slow),
    ],
)
def test_a_kernel_computes_what_the_rule_says(name, where):
    rule, _ = RULES[name]
    state, tokens, gates = drawn(name)
    loss = isinstance(rule.bias, miras.l2)
    options = {"segment_ids": SEGMENTS[where]}

    def value(run, tokens, gates, state):
        y, after = run(tokens, gates, state)
        return jnp.sum(jnp.sin(y)) + sum(jnp.sum(jnp.cos(w)) for w in after.weights), (y, after)

    def by_kernel(tokens, gates, state):
        y, surprise, after = miras.trace(
            rule, state, *tokens, gates, implementation="pallas", interpret=True, loss=loss,
            **options,
        )  # fmt: skip
        assert (surprise is not None) == loss
        return y, after

    def by_definition(tokens, gates, state):
        return miras.recurrent(rule, state, *tokens, gates, **options)

    (found, outputs), (wanted, expected) = (
        jax.jit(
            lambda *a, run=run: (
                jax.grad(lambda *a: value(run, *a)[0], argnums=(0, 1))(*a),
                value(run, *a)[1],
            )
        )(tokens, gates, state)
        for run in (by_kernel, by_definition)
    )
    for a, b in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-6))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-5 * max(np.abs(b).max(), 1e-6))


def test_without_a_tpu_it_is_xla():
    """None picks by platform; the interpreter alone does not make it pick a kernel."""
    state, tokens, gates = drawn("gated_delta_net")
    jaxpr = jax.make_jaxpr(
        lambda q, k, v: miras.chunkwise(RULES["gated_delta_net"][0], state, q, k, v, gates)
    )(*tokens)
    assert "pallas_call" not in str(jaxpr)


def calls(name, *, q, k, v, heads=H, size=K, implementation=None):
    """Kernels in the program of a rule's call whose tokens have these dtypes."""
    rule, kinds = RULES[name]
    tokens = [jax.ShapeDtypeStruct((B, T, heads, size), x) for x in (q, k, v)]
    gates = {{"small": "lr", "channels": "retain"}.get(kind, kind): kind for kind in kinds}

    def run(q, k, v):
        weights = jax.vmap(lambda key: rule.init(key, size, size))(
            jax.random.split(jax.random.key(0), heads)
        )
        given = {
            field: jnp.ones((B, T, heads, *([size] if kind == "channels" else [])))
            for field, kind in gates.items()
        }
        state = miras.start(rule, weights, B)
        return miras.chunkwise(
            rule, state, q, k, v, miras.Gates(**given), implementation=implementation
        )

    return str(jax.make_jaxpr(run)(*tokens)).count("pallas_call[")


@pytest.mark.parametrize("name", ["gated_delta_net", "titans"])
def test_values_of_another_dtype_are_left_to_xla(name, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    one, other = jnp.float32, jnp.bfloat16
    assert calls(name, q=one, k=one, v=one)
    assert not calls(name, q=other, k=one, v=one)
    assert not calls(name, q=one, k=one, v=other)
    with pytest.raises(ValueError, match="q and v of one dtype, not float32 and bfloat16"):
        calls(name, q=one, k=one, v=other, implementation="pallas")


@pytest.mark.parametrize("name", ["gated_delta_net", "titans"])
def test_keys_of_another_dtype_are_made_like_queries(name, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    assert calls(name, q=jnp.float32, k=jnp.bfloat16, v=jnp.float32)
    assert calls(name, q=jnp.bfloat16, k=jnp.float32, v=jnp.bfloat16)


def test_heads_that_the_mesh_does_not_divide_stay_whole(monkeypatch):
    """Five heads of 64 fill no registers; two of them, which no device has, would."""
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    dtypes = dict.fromkeys("qkv", jnp.float32)
    with jax.set_mesh(sharding.make_mesh(tensor=2, devices=jax.devices()[:2])):
        assert not calls("gated_delta_net", heads=5, **dtypes)
        assert calls("gated_delta_net", heads=5, size=128, **dtypes)
        assert calls("gated_delta_net", heads=4, **dtypes)
        with pytest.raises(ValueError, match=r"5 heads of \(64, 64\)"):
            calls("gated_delta_net", heads=5, implementation="pallas", **dtypes)


def test_steps_that_may_not_fit_are_left_to_xla(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    dtypes = dict.fromkeys("qkv", jnp.bfloat16)
    for name in ("kda", "gla"):
        assert not calls(name, heads=16, size=200, **dtypes)
        assert calls(name, heads=16, size=256, **dtypes)
    with pytest.raises(ValueError, match=r"heads of \(200, 200\) .* may not fit in VMEM"):
        calls("kda", heads=16, size=200, implementation="pallas", **dtypes)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (miras.zoo.titans(chunk=12), "power of two"),
        (miras.zoo.titans(depth=3, chunk=16), "depth=2"),
        (miras.zoo.titans(chunk=16, read="chunk"), "read=.chunk."),
        (miras.zoo.titans(chunk=16, expansion=20), "does not fit in VMEM"),
        (miras.Rule(miras.mlp(), miras.huber(), miras.none(), miras.gd()), "bias l2"),
        (miras.zoo.rwkv7(), "no kernel for exchange"),
        (miras.zoo.mesa_net(), "no kernel for least_squares"),
    ],
)
def test_what_has_no_kernel_is_refused_with_the_reason(rule, reason):
    weights = jax.vmap(lambda key: rule.init(key, K, K))(jax.random.split(jax.random.key(0), H))
    ones = jnp.ones((B, T, H))
    gates = miras.Gates(
        lr=jnp.ones((B, T, H, K)) if rule.learner.exchanges else ones,
        momentum=ones if rule.learner.needs_momentum else None,
        retain=ones if rule.retention.needs_retain else None,
        threshold=ones if rule.bias.needs_threshold else None,
        write=jnp.ones((B, T, H, K)) if rule.learner.exchanges else None,
    )
    x = jnp.ones((B, T, H, K))
    with pytest.raises(ValueError, match=reason):
        miras.chunkwise(
            rule, miras.start(rule, weights, B), x, x, x, gates, implementation="pallas"
        )


def test_heads_that_do_not_fill_a_register_are_refused():
    rule, size = miras.zoo.delta_net(), 48
    weights = jax.vmap(lambda key: rule.init(key, size, size))(jax.random.split(jax.random.key(0)))
    x = jnp.ones((B, T, 2, size))
    with pytest.raises(ValueError, match="multiple of 8 heads"):
        miras.chunkwise(
            rule, miras.start(rule, weights, B), x, x, x, miras.Gates(lr=jnp.ones((B, T, 2))),
            implementation="pallas",
        )  # fmt: skip
