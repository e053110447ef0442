"""The matrix memories of the zoo are the recurrences of their papers, and their tiles are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import miras
from memjax.miras import products, zoo
from tests.contracts.scenes import assert_close, float64, quick_jit
from tests.oracles import recurrences

TIME, KEY, VALUE = 21, 6, 5


def _inputs(seed=0):
    random = np.random.default_rng(seed)
    q, k = random.normal(size=(2, TIME, KEY))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    return q, k, random.normal(size=(TIME, VALUE)), random.normal(size=(VALUE, KEY)), random


def _rates(random, low, high, *shape):
    return random.uniform(low, high, (TIME, *shape))


def _linear_attention(random):
    return {}, ()


def _retnet(random):
    return {"retain": np.full(TIME, 0.9)}, (0.9,)


def _gla(random):
    a = _rates(random, 0.2, 1.0, KEY)
    return {"retain": a}, (a,)


def _mamba2(random):
    dt = _rates(random, 0.01, 1.5)
    return {"lr": dt, "retain": np.exp(-2.0 * dt)}, (dt, 2.0)


def _delta_net(random):
    b = _rates(random, 0.0, 2.0)
    return {"lr": b}, (b,)


def _gated_delta_net(random):
    a, b = _rates(random, 0.0, 1.0), _rates(random, 0.0, 2.0)
    return {"lr": b, "retain": a}, (b, a)


def _kda(random):
    a, b = _rates(random, 0.0, 1.0, KEY), _rates(random, 0.0, 2.0)
    return {"lr": b, "retain": a}, (b, a)


def _longhorn(random):
    th = _rates(random, 0.1, 20.0)
    return {"lr": th}, (th,)


ROWS = {
    "linear_attention": _linear_attention, "retnet": _retnet, "gla": _gla, "mamba2": _mamba2,
    "delta_net": _delta_net, "gated_delta_net": _gated_delta_net, "kda": _kda,
    "longhorn": _longhorn,
}  # fmt: skip


@pytest.mark.parametrize("form", ["recurrent", "chunkwise", "chunkwise 1", "chunkwise 5"])
@pytest.mark.parametrize("name", ROWS)
@float64
def test_the_recurrence_of_the_paper(name, form):
    q, k, v, start, random = _inputs()
    gates, rates = ROWS[name](random)
    want, last = getattr(recurrences, name)(q, k, v, *rates, start)
    if name == "longhorn":
        k = 3 * k  # its step is stable for keys of any length
        want, last = recurrences.longhorn(q, k, v, *rates, start)
    rule = getattr(zoo, name)()
    gates = {"lr": np.ones(TIME)} | gates
    gates = miras.Gates(**{g: jnp.asarray(value)[None, :, None] for g, value in gates.items()})
    weights = miras.Weights((jnp.asarray(start.T),), {})
    which, _, block = form.partition(" ")
    options = {"block": int(block)} if block else {}

    def run(q, k, v, gates):
        state = miras.start(rule, weights, 1)
        return getattr(miras, which)(rule, state, q, k, v, gates, **options)

    y, state = quick_jit(run)(*(jnp.asarray(x)[None, :, None] for x in (q, k, v)), gates)
    assert_close(y[0, :, 0], want, 1e-10, f"{name} {form}")
    assert_close(state.weights[0][0, 0].T, last, 1e-10, f"{name} {form} state")


@pytest.mark.parametrize("count", [1, 2, 3, 16, 21, 64])
@float64
def test_the_inverse(count):
    random = np.random.default_rng(count)
    lower = np.tril(random.normal(size=(count, count)), -1) / np.sqrt(count)
    inverse = products.unit_lower_inverse(jnp.asarray(lower))
    want = np.linalg.inv(np.eye(count) + lower)
    assert_close(inverse, want, 1e-11)
    weight = random.normal(size=(count, count))
    got = jax.grad(lambda a: jnp.vdot(weight, products.unit_lower_inverse(a)))(jnp.asarray(lower))
    assert_close(got, -np.tril(want.T @ weight @ want.T, -1), 1e-10)


def test_the_inverse_where_powers_grow():
    # (-A)^32 reaches 1e17 on the way to an inverse of entries at most 1: in fp32 a sum of powers
    # would lose every digit
    lower = np.tril(np.ones((64, 64), np.float32), -1)
    inverse = products.unit_lower_inverse(jnp.asarray(lower))
    want = np.eye(64) - np.eye(64, k=-1)
    assert np.abs(np.linalg.matrix_power(lower.astype(np.float64), 32)).max() > 1e17
    assert_close(inverse, want, 1e-6)


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("count", [1, 2, 7, 16, 33])
@float64
def test_the_decayed_scores(count, inclusive):
    random = np.random.default_rng(count)
    x, y = random.normal(size=(2, count, 3))
    gate = random.uniform(0, 1, (count, 3)) * (random.uniform(size=(count, 3)) > 0.1)  # some are 0
    got = products.decayed_scores(
        jnp.asarray(x), jnp.asarray(y), jnp.asarray(gate), inclusive, np.dtype(np.float64)
    )
    want = np.zeros((count, count))
    for i in range(count):
        for j in range(i + inclusive):
            passed = gate[j + 1 : i + inclusive].prod(axis=0)
            want[i, j] = (x[i] * passed * y[j]).sum()
    if not inclusive:
        got = jnp.tril(got, -1)
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize("name", ["gated_delta_net", "kda", "gla"])
def test_long_and_hard_decay(name):
    """Decays down to exactly 0 over 4,096 tokens: values and gradients finite, in fp32."""
    time, dim = 4096, 8
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(z, jnp.float32) for z in random.normal(size=(3, 1, time, 1, dim)))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    shape = (1, time, 1, dim) if name != "gated_delta_net" else (1, time, 1)
    retain = random.uniform(0, 1, shape) ** 20
    retain[:, ::7] = 0
    gates = miras.Gates(jnp.ones((1, time, 1)), retain=jnp.asarray(retain, jnp.float32))
    rule = getattr(zoo, name)()

    def loss(form, q, k, v, gates):
        state = miras.start(rule, rule.init(jax.random.key(0), dim, dim), 1)
        return jnp.sum(form(rule, state, q, k, v, gates)[0] ** 2)

    results = [
        jax.jit(jax.value_and_grad(lambda *a, f=form: loss(f, *a), argnums=(0, 1, 2, 3)))(
            q, k, v, gates
        )
        for form in (miras.recurrent, miras.chunkwise)
    ]
    assert_close(results[1], results[0], 2e-5)


@pytest.mark.parametrize(
    "parts",
    [
        (miras.mlp(depth=1), miras.l2(), 1),
        (miras.matrix(), miras.dot(), 1),
        (miras.matrix(), miras.l2(), 2),
    ],
)
def test_implicit_says_what_it_needs(parts):
    structure, bias, chunk = parts
    with pytest.raises(ValueError, match="implicit"):
        miras.Rule(structure, bias, miras.none(), miras.implicit(), chunk=chunk)


def test_decay_before_what():
    with pytest.raises(ValueError, match="before"):
        miras.decay(before="step")
