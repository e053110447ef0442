"""Mixtures of memories against NumPy, at float64, and through what every mixer must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax import miras
from memjax.layers import MixtureOfMemories
from tests.contracts.scenes import float64
from tests.layers import mixer_checks as checks
from tests.layers import mixer_oracle as oracle

DIM, HEADS, KEY, MEMORIES = 6, 2, 4, 3


def build(**changes):
    options = {"heads": HEADS, "head_dim": KEY, "memories": MEMORIES, "conv": 2} | changes
    return MixtureOfMemories(DIM, **options, rngs=nnx.Rngs(0))


CASE = checks.Case(
    build,
    oracle.mixture_of_memories,
    ({"active": 1}, {"active": 3}, {"idle": "decays"}, {"scaled": False}, {"shared": False}),
    precise=("router", "lr.", "retain"),
    long=70,
)


@pytest.mark.parametrize(
    "check",
    [
        checks.check_equations, checks.check_splits, checks.check_reach, checks.check_gradients,
        checks.check_bfloat16, checks.check_donation,
    ],
)  # fmt: skip
def test_is_its_equations(check):
    check(CASE)


@float64
def test_other_rules_and_no_convolution():
    def plain(p, x, **faults):
        """Nothing decays."""
        still = {"retain.rates.up.weight": np.zeros((DIM, HEADS * (1 + MEMORIES)))}
        never = {"retain.offset": np.float64(-1e3), "retain.log_rate": np.float64(0)}
        return oracle.mixture_of_memories(p | still | never, x, **faults)

    module = lambda: build(rule=miras.zoo.delta_net(), conv=0, active=1)  # noqa: E731
    case = checks.Case(module, lambda p, x, active=1: plain(p, x, active=active), ({"active": 2},))
    checks.check_equations(case)


def test_shares_are_those_of_the_largest_and_sum_to_one():
    x = jnp.asarray(checks.inputs(CASE, 70), jnp.bfloat16)
    share = CASE.module().route(x)
    assert share.dtype == jnp.float32
    want = [oracle.shares(CASE.parameters(), np.asarray(row, np.float64), 2) for row in x]
    np.testing.assert_allclose(share, want, rtol=1e-5)
    np.testing.assert_array_equal(share[..., 0], 1)
    np.testing.assert_allclose(share[..., 1:].sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal((share[..., 1:] > 0).sum(-1), 2)
    assert ((share > 0).mean((0, 1)) > 0.3).all(), "each is used now and then"
    equal = CASE.module().route(jnp.zeros((1, 1, DIM)))  # a tie: still two
    assert sorted(equal[0, 0, 1:].tolist()) == [0, 0.5, 0.5]


@float64
def test_balancing_loss_is_its_equation_and_falls_where_the_router_spreads():
    x = checks.inputs(CASE, 70)
    module = build(balance=0.25)
    parameters = {"router.weight": np.asarray(module.router.weight[...], np.float64)}
    _, state = module(jnp.asarray(x))
    for row, loss in zip(x, state.balance.loss, strict=True):
        scores = row @ parameters["router.weight"]
        p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        routed = oracle.shares(parameters, row, 2)[:, 1:] > 0
        want = 0.25 * MEMORIES * np.sum(routed.sum(0) / (2 * 70) * p.mean(0))
        np.testing.assert_allclose(loss, want, rtol=1e-12)
        assert loss > 0.25
    module.router.weight[...] *= 0
    _, state = module(jnp.asarray(x))
    np.testing.assert_allclose(state.balance.loss, 0.25, rtol=1e-12)  # all alike: its least
    plain = build(balance=0)
    y, state = plain(jnp.asarray(x))
    assert state.balance is None
    np.testing.assert_array_equal(y, build()(jnp.asarray(x))[0])


@float64
def test_balancing_loss_alone_trains_the_router_of_one_active_memory():
    def gradient(balance):
        graphdef, params = nnx.split(build(active=1, balance=balance), nnx.Param)

        def loss(params):
            y, state = nnx.merge(graphdef, params)(x)
            own = 0 if state.balance is None else state.balance.loss.sum()
            return jnp.square(y).sum() + own

        return jax.grad(loss)(params)["router"]["weight"][...]

    x = jnp.asarray(checks.inputs(CASE, 70))
    np.testing.assert_allclose(gradient(0), 0, atol=1e-12)
    assert jnp.abs(gradient(1.0)).max() > 1e-3


def test_a_memory_that_is_not_used_stays_bit_by_bit():
    module, x = CASE.module(), jnp.asarray(checks.inputs(CASE, 70), jnp.float32)
    _, before = CASE.run(CASE.values, x, module.start(2), None)
    for time in (1, 70):  # a step, and the form with tiles
        more = (
            x[:, -1:]
            if time == 1
            else jnp.repeat(x[:, -1:], 70, axis=1) * jnp.linspace(1, 2, 70)[:, None]
        )
        used = np.repeat(module.route(more) > 0, HEADS, axis=-1).any(1)
        assert used.any(0).any()
        assert not used.all(0).all()
        _, after = CASE.run(CASE.values, more, before, None)
        for b, h in np.ndindex(used.shape):
            same = (after.memory.weights[0][b, h] == before.memory.weights[0][b, h]).all()
            assert same != used[b, h]


def test_a_memory_whose_share_underflows_is_written_all_the_same():
    module = build(balance=0.25)
    module.router.weight[...] *= 1e4
    x = jnp.asarray(checks.inputs(CASE, 1), jnp.float32)
    np.testing.assert_array_equal((module.route(x) > 0).sum(-1), 2)  # the shared and the first
    _, state = module(x)
    written = jnp.abs(state.memory.weights[0]).max((-2, -1)).reshape(2, 1 + MEMORIES, HEADS) > 0
    np.testing.assert_array_equal(written.all(-1).sum(1), 3)  # and the second
    np.testing.assert_array_equal(written.any(-1), written.all(-1))


RULES = {
    "momentum": miras.Rule(miras.matrix(), miras.l2(), miras.decay(), miras.momentum()),
    "threshold": miras.Rule(miras.matrix(), miras.huber(), miras.decay(), miras.gd()),
    "window": miras.Rule(miras.matrix(), miras.l2(), miras.none(), miras.omega(2, miras.gd())),
    "learned features": miras.Rule(
        miras.matrix(features=miras.polynomial(2)), miras.l2(), miras.none(), miras.gd()
    ),
    "chunks": miras.Rule(miras.matrix(scale=1.0), miras.l2(), miras.renormalise(), miras.gd()),
}
DRAWN = miras.Rule(miras.matrix(scale=1.0), miras.l2(), miras.none(), miras.gd())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4, "head_dim": None}, "dim 6 is not a multiple of heads 4"),
        ({"heads": 0}, "heads 0"),
        ({"head_dim": 0}, "head_dim 0"),
        ({"memories": 0}, "memories 0"),
        ({"conv": -1}, "conv -1"),
        ({"balance": -0.1}, "balance -0.1 must be a finite number of at least 0"),
        ({"balance": float("nan")}, "balance nan must be"),
        ({"active": 0}, "active 0 must be an integer of at least 1"),
        ({"active": 4}, "active 4 must be between 1 and memories 3"),
        ({"rule": DRAWN}, r"MixtureOfMemories begins at W_0 = 0.*NeuralMemory"),
        ({"rule": miras.zoo.titans()}, r"a rule of matrix\(\)"),
        ({"rule": miras.zoo.rwkv7()}, "only gates are lr and retain"),
        ({"rule": miras.zoo.mesa_net()}, "only gates are lr and retain"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("name", RULES)
def test_rules_that_would_not_leave_unused_memories_alone_are_refused(name):
    with pytest.raises(ValueError, match=r"MixtureOfMemories needs a rule of matrix\(\)"):
        build(rule=RULES[name])


@pytest.mark.parametrize("conv", [0, 3])
def test_bad_inputs_are_named(conv):
    checks.check_refusals(CASE, build(conv=conv))
