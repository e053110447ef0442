"""HOPE's memories against NumPy, at float64, and through what every mixer is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.layers import ContinuumMemory, Hope, SelfReferentialMemory
from tests.contracts.scenes import float64
from tests.layers import hope_oracle as oracle
from tests.layers import mixer_checks as checks

DIM, HEADS = 6, 2
SIZES = {"chunk": 4, "projection_chunk": 2}


def self_referential(**changes):
    options = {"heads": HEADS, "expansion": 2, "conv": 2, "lr_max": 1.0} | SIZES | changes
    return SelfReferentialMemory(DIM, **options, rngs=nnx.Rngs(0))


def continuum(**changes):
    options = {"periods": (3, 5), "expansion": 2, "lr_max": 1.0} | changes
    return ContinuumMemory(DIM, **options, rngs=nnx.Rngs(0))


def hope():
    return Hope(self_referential(), continuum())


def self_referential_case(faults=(), **changes):
    sizes = SIZES | {"lr_max": 1.0}
    sizes |= {name: changes[name] for name in (*sizes, "read") if name in changes}
    expect = functools.partial(oracle.self_referential, **sizes)
    build = functools.partial(self_referential, **changes)
    return checks.Case(build, expect, faults, precise=("rate", "retain"))


SELF_REFERENTIAL = self_referential_case(
    (
        {"chunk": 2}, {"projection_chunk": 4}, {"lr_max": 1.1}, {"read": "before"},
        {"own": False}, {"erases": False}, {"adapts": False},
    )
)  # fmt: skip
CONTINUUM = checks.Case(
    continuum,
    functools.partial(oracle.continuum, periods=(3, 5), lr_max=1.0),
    ({"periods": (5, 3)}, {"lr_max": 1.1}, {"learns": False}, {"chained": False}),
    precise=("rate",),
)
HOPE = checks.Case(
    hope,
    functools.partial(oracle.hope, periods=(3, 5), lr_max=1.0, inner_lr_max=1.0, **SIZES),
    ({"periods": (3, 4)}, {"chunk": 2}),
    precise=("rate", "retain"),
)
CASES = {"self_referential": SELF_REFERENTIAL, "continuum": CONTINUUM, "hope": HOPE}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "check",
    [
        checks.check_equations, checks.check_splits, checks.check_gradients, checks.check_bfloat16,
        checks.check_donation,
    ],
)  # fmt: skip
def test_is_its_equations(check, name):
    check(CASES[name])


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk": 2, "projection_chunk": 6},
        {"chunk": 1, "projection_chunk": 1, "conv": 0, "lr_max": 0.03},
        {"chunk": 4, "projection_chunk": 4},
        {"read": "before"},
    ],
)
@float64
def test_other_chunks_and_reads(changes):
    checks.check_equations(self_referential_case(**changes))


@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_stays_finite_as_it_is_drawn(chunk):
    """Values and weights over many chunks, with the defaults."""
    module = SelfReferentialMemory(16, 2, chunk=chunk, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 256 if chunk == 1 else 2048, 16))
    y, state = jax.jit(module.__call__)(x)
    assert np.isfinite(y).all()
    for w in (*state.memory.weights, *state.projections.weights):
        assert np.abs(w).max() < 10


def seen(t, s, *, chunk, projection_chunk):
    """Through the convolution of 2 tokens, or a finished chunk of what is read."""
    return t - s < 2 or s < t // chunk * chunk


def test_sees_finished_chunks():
    checks.check_reach(SELF_REFERENTIAL, functools.partial(seen, **SIZES))


def test_the_continuum_sees_finished_periods():
    checks.check_reach(CONTINUUM, lambda t, s: t == s or s < t // 3 * 3 or s < t // 5 * 5)


@float64
def test_a_level_before_its_first_step_is_a_feed_forward_layer():
    case = checks.Case(
        functools.partial(continuum, periods=(100,)),
        functools.partial(oracle.continuum, periods=(100,), lr_max=1.0, learns=False),
    )
    x = checks.inputs(case)
    y, _ = case.run(case.values, x, None, checks.IDS)
    assert checks.off(y, case.want(x, checks.IDS)) < 1e-12


def axes(build):
    flat = nnx.to_flat_state(nnx.state(nnx.eval_shape(build), nnx.Param))
    return {".".join(map(str, path)): p.axes for path, p in flat}


def test_parameters_name_their_axes():
    into, fast = ("embed", "heads", "kv"), ("heads", "memory_in", "memory_out")
    assert axes(self_referential) == {
        **{f"{name}.weight": into for name in ("content", "query", "gate")},
        "out.weight": ("heads", "kv", "embed"),
        "norm.scale": ("kv",),
        **{f"convs.{i}.weight": ("conv", "heads") for i in range(2)},
        **{f"{name}.weight": ("heads", "kv") for name in ("rate", "retain")},
        **{f"{name}.bias": ("heads",) for name in ("rate", "retain")},
        **{f"{name}.fast.{i}": fast for name in ("projections", "memory") for i in range(2)},
    }
    assert axes(functools.partial(continuum, periods=(3,))) == {
        "levels.0.norm.scale": ("embed",),
        **{f"levels.0.{name}.weight": ("embed", None) for name in ("key", "value")},
        "levels.0.rate.linear.weight": ("embed", None),
        "levels.0.rate.linear.bias": (None,),
        "levels.0.weights.fast.0": (None, "embed", "memory_hidden"),
        "levels.0.weights.fast.1": (None, "memory_hidden", "embed"),
    }


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (self_referential, {"heads": 4}, "dim 6 is not a multiple of heads 4"),
        (self_referential, {"heads": 0}, "heads 0"),
        (self_referential, {"head_dim": 0}, "head_dim 0"),
        (self_referential, {"chunk": 0}, "chunk 0"),
        (self_referential, {"projection_chunk": 0}, "projection_chunk 0"),
        (self_referential, {"projection_chunk": 3}, "chunk 4 and projection_chunk 3"),
        (self_referential, {"conv": -1}, "conv -1"),
        (self_referential, {"lr_max": 0.0}, r"lr_max 0\.0 must be .* above 0"),
        (self_referential, {"expansion": 0}, "expansion 0 must be an integer of at least 1"),
        (self_referential, {"read": "now"}, "read 'now'"),
        (continuum, {"periods": ()}, r"periods \(\) must"),
        (continuum, {"periods": (3, 0)}, r"periods\[1\] 0 must be an integer of at least 1"),
        (continuum, {"lr_max": np.inf}, r"lr_max inf must be a finite number above 0"),
        (continuum, {"lr_max": 0.0}, r"lr_max 0\.0 must be .* above 0"),
    ],
)
def test_bad_options_are_named(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_two_parts_of_other_dims_are_refused():
    other = ContinuumMemory(8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="dim 6, the continuum 8"):
        Hope(self_referential(), other)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("self_referential", functools.partial(self_referential, conv=0)),
        ("self_referential", functools.partial(self_referential, conv=3)),
        ("continuum", functools.partial(continuum, periods=(3,))),
        ("hope", lambda: Hope(self_referential(), continuum(periods=(3,)))),
    ],
)
def test_bad_inputs_are_named(name, other):
    checks.check_refusals(CASES[name], other())


def test_statistics_are_means_over_the_call():
    x = jnp.asarray(checks.inputs(SELF_REFERENTIAL), jnp.float32)
    _, state = SELF_REFERENTIAL.module()(x)
    assert state.stats.surprise.shape == (2, HEADS)
    assert np.all(np.asarray(state.stats.lr) > 0)
    assert np.all(np.asarray(state.stats.lr) < 1)
    assert np.all(np.asarray(state.stats.retain) < 1)
