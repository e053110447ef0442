"""The gates against their formulas, where they start, and between which bounds they stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax import miras
from memjax.layers import gates
from tests.contracts.scenes import float64

DIM, HEADS, CHANNELS = 5, 3, 4


def make(name):
    """A gate of each kind, its parameters as `start` would have them."""
    rngs = nnx.Rngs(0)
    return {
        "head": lambda: gates.GateHead(DIM, HEADS, initial=0.2, rngs=rngs),
        "head by channel": lambda: gates.GateHead(
            DIM, HEADS, channels=CHANNELS, initial=0.2, rngs=rngs
        ),
        "threshold": lambda: gates.ThresholdHead(DIM, HEADS, rngs=rngs),
        "softplus": lambda: gates.SoftplusDecay(DIM, HEADS, rngs=rngs),
        "softplus by channel": lambda: gates.SoftplusDecay(
            DIM, HEADS, channels=CHANNELS, rank=2, rngs=rngs
        ),
        "power": lambda: gates.PowerDecay(DIM, HEADS, CHANNELS, rank=2, temperature=8.0, rngs=rngs),
        "step": lambda: gates.StepSize(DIM, HEADS, rngs=rngs),
    }[name]()


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softplus(z):
    return np.logaddexp(0, z)


def into(x, weight):
    return np.tensordot(x, weight, axes=1)


def rate_and_decay(step, rate):
    return np.stack([step, np.exp(-rate * step)])


# each gate of x [B, T, E], from the parameters by name
FORMULAS = {
    "head": lambda p, x: sigmoid(into(x, p["linear.weight"]) + p["linear.bias"]),
    "head by channel": lambda p, x: sigmoid(into(x, p["linear.weight"]) + p["linear.bias"]),
    "threshold": lambda p, x: softplus(into(x, p["linear.weight"]) + p["linear.bias"]),
    "softplus": lambda p, x: np.exp(
        -np.exp(p["log_rate"]) * softplus(into(x, p["rates.up.weight"]) + p["offset"])
    ),
    "softplus by channel": lambda p, x: np.exp(
        -np.exp(p["log_rate"])[:, None]
        * softplus(into(into(x, p["rates.down.weight"]), p["rates.up.weight"]) + p["offset"])
    ),
    "power": lambda p, x: (
        sigmoid(into(into(x, p["rates.down.weight"]), p["rates.up.weight"]) + p["offset"])
        ** (1 / 8)
    ),
    "step": lambda p, x: rate_and_decay(
        softplus(into(x, p["linear.weight"]) + p["offset"]), np.exp(p["log_rate"])
    ),
}


def outputs(name, module, x):
    """The gate as one array; of a step, the rate and the decay."""
    y = module(x)
    return jnp.stack([y.lr, y.retain]) if name == "step" else y


def moved(name):
    """The gate with every parameter away from its start, in float64, and the parameters."""
    graphdef, values = nnx.split(make(name), nnx.Param)
    random = np.random.default_rng(1)
    values = jax.tree.map(lambda w: jnp.asarray(random.normal(size=w.shape)), values)
    named = {".".join(p): np.asarray(w[...]) for p, w in nnx.to_flat_state(values)}
    return nnx.merge(graphdef, values), named


def inputs(scale=1.0):
    return scale * np.random.default_rng(0).normal(size=(2, 7, DIM))


@pytest.mark.parametrize("name", FORMULAS)
@float64
def test_formula(name):
    module, p = moved(name)
    y = outputs(name, module, jnp.asarray(inputs()))
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, FORMULAS[name](p, inputs()), rtol=1e-12)
    for key, value in p.items():
        other = FORMULAS[name](p | {key: value + 0.01}, inputs())
        assert np.abs(other - y).max() > 1e-5, key


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_stays_in_its_range(name, scale):
    """Also far out, where exponentials end, values and gradients are finite."""
    module, _ = moved(name)
    module = jax.tree.map(lambda w: w.astype(jnp.float32), module)
    x = jnp.asarray(inputs(scale), jnp.float32)
    y = outputs(name, module, x)
    assert np.isfinite(y).all()
    assert (y >= 0).all()
    bounded = y[1] if name == "step" else y
    assert (bounded <= 1).all() or name == "threshold"
    assert bounded.min() < bounded.max()
    graphdef, values = nnx.split(module, nnx.Param)
    gradient = jax.grad(lambda values: outputs(name, nnx.merge(graphdef, values), x).sum())
    for leaf in jax.tree.leaves(gradient(values)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("name", FORMULAS)
def test_fp32_whatever_the_input_is(name):
    module, x = make(name), jnp.asarray(inputs(), jnp.bfloat16)
    y = outputs(name, module, x)
    assert y.dtype == jnp.float32
    # the product with the weights is in fp32 too: no more than the input has been rounded
    np.testing.assert_array_equal(y, outputs(name, module, x.astype(jnp.float32)))


NOTHING = jnp.zeros((1, 1, DIM))


def test_a_threshold_starts_at_one():
    module = gates.ThresholdHead(DIM, 64, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(module(NOTHING), np.ones((1, 1, 64)), rtol=1e-6)
    assert abs(float(module.linear.weight[...].std()) - 0.1 * DIM**-0.5) < 0.01


@pytest.mark.parametrize("initial", [0.1, 0.5, 0.999])
def test_a_head_starts_where_it_is_told(initial):
    module = gates.GateHead(DIM, 64, initial=initial, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(module(NOTHING), np.full((1, 1, 64), initial), rtol=1e-5)
    assert abs(float(module.linear.weight[...].std()) - 0.1 * DIM**-0.5) < 0.01


def test_decays_start_where_the_papers_start_them():
    many = 2000
    decay = gates.SoftplusDecay(DIM, many, rngs=nnx.Rngs(0))
    step = gates.StepSize(DIM, many, rngs=nnx.Rngs(1))
    for module in (decay, step):
        rate = np.exp(module.log_rate[...])
        assert 1 <= rate.min() < rate.max() <= 16
        np.testing.assert_allclose(rate.mean(), 8.5, atol=0.5)  # uniform from 1 to 16
        first = softplus(np.asarray(module.offset[...], np.float64))
        assert 0.00099 <= first.min() < first.max() <= 0.101
        np.testing.assert_allclose(np.log10(first).mean(), -2, atol=0.1)  # uniform in the logarithm
        np.testing.assert_allclose(np.log10(first).std(), 2 / 12**0.5, atol=0.05)
    np.testing.assert_allclose(step(NOTHING).lr[0, 0], first, rtol=1e-4)
    retain = decay(NOTHING)
    assert (retain > np.exp(-1.7)).all()
    assert (retain < 1).all()
    power = gates.PowerDecay(DIM, HEADS, CHANNELS, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(power(NOTHING), np.full((1, 1, HEADS, CHANNELS), 0.5 ** (1 / 16)))


def test_fixed_decay():
    module = gates.FixedDecay(4)
    assert not jax.tree.leaves(nnx.state(module, nnx.Param))
    x = jnp.asarray(inputs(), jnp.bfloat16)
    want = np.broadcast_to([31 / 32, 63 / 64, 127 / 128, 255 / 256], (2, 7, 4))
    np.testing.assert_array_equal(module(x), want)
    assert module(x).dtype == jnp.float32


def test_gating_puts_a_rate_and_a_decay_together():
    x = jnp.asarray(inputs(), jnp.float32)
    rate, decay = make("head"), make("softplus by channel")
    both = gates.Gating(rate, decay, HEADS, most=2.0)(x)
    np.testing.assert_array_equal(both.lr, 2 * rate(x))
    np.testing.assert_array_equal(both.retain, decay(x))
    assert both.momentum is both.scale is None
    neither = gates.Gating(None, None, HEADS)(x.astype(jnp.bfloat16))
    assert neither == miras.Gates(lr=neither.lr)
    np.testing.assert_array_equal(neither.lr, np.ones((2, 7, HEADS), np.float32))
    assert neither.lr.dtype == jnp.float32


@pytest.mark.parametrize("name", FORMULAS)
def test_every_parameter_names_its_axes(name):
    unnamed = CHANNELS if name == "head by channel" else 2
    shapes = {"heads": HEADS, "kv": CHANNELS, "embed": DIM, None: unnamed}
    for path, p in nnx.to_flat_state(nnx.state(make(name), nnx.Param)):
        assert p.shape == tuple(shapes[axis] for axis in p.axes), path
        assert p.dtype == jnp.float32


@pytest.mark.parametrize("initial", [0.0, 1.0, -0.5])
def test_a_head_that_could_not_start_is_refused(initial):
    with pytest.raises(ValueError, match=f"initial {initial}"):
        gates.GateHead(DIM, HEADS, initial=initial, rngs=nnx.Rngs(0))


def test_a_decay_without_a_temperature_is_refused():
    with pytest.raises(ValueError, match=r"temperature 0\.0"):
        gates.PowerDecay(DIM, HEADS, CHANNELS, temperature=0.0, rngs=nnx.Rngs(0))
