"""TNT's global and local memories against NumPy, at float64, and through what every mixer is."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.layers import TNTMemory
from tests.contracts.scenes import float64
from tests.layers import mixer_checks as checks
from tests.layers import mixer_oracle as oracle

DIM, HEADS = 6, 2
SIZES = {"chunk": 3, "local_chunks": (2, 4), "shard": 4}


def build(**changes):
    options = {"heads": HEADS, "expansion": 2, "conv": 2, "lr_max": 0.3} | SIZES | changes
    return TNTMemory(DIM, **options, rngs=nnx.Rngs(0))


def case(faults=(), **changes):
    sizes = {name: changes.get(name, size) for name, size in SIZES.items()}
    expect = functools.partial(oracle.tnt, **sizes, lr_max=0.3)
    return checks.Case(
        functools.partial(build, **changes), expect, faults, precise=("rates", "memories")
    )


CASE = case(
    (
        {"chunk": 4}, {"local_chunks": (2, 2)}, {"local_chunks": (4, 2)}, {"shard": 8},
        {"lr_max": 0.31}, {"turned": False}, {"read": "after"},
    )
)  # fmt: skip


@pytest.mark.parametrize(
    "check",
    [
        checks.check_equations, checks.check_splits, checks.check_gradients, checks.check_bfloat16,
        checks.check_donation,
    ],
)  # fmt: skip
def test_is_its_equations(check):
    check(CASE)


def reaches(t, s, *, chunk, shard):
    """Through the convolution of 2 tokens, a finished global chunk, or the shard."""
    near = t - s < 2
    return near or s < t // chunk * chunk or (s + 1) // shard == t // shard


def test_sees_its_shard_and_finished_chunks():
    checks.check_reach(CASE, functools.partial(reaches, chunk=3, shard=4))


@pytest.mark.parametrize(
    "changes", [{"local_chunks": ()}, {"local_chunks": (1,), "shard": 1, "conv": 0, "chunk": 1}]
)
@float64
def test_no_local_memory_and_shards_of_one_token(changes):
    checks.check_equations(case(**changes))


@float64
def test_stage_two_goes_on_with_the_parameters_and_where_a_shard_begins_the_state():
    first, second = CASE, case(local_chunks=(1, 2))
    values = [nnx.to_flat_state(one.split[1]) for one in (first, second)]
    assert [(path, w.shape, w.axes) for path, w in values[0]] == [
        (path, w.shape, w.axes) for path, w in values[1]
    ]
    x = checks.inputs(CASE)
    state, one = first.module().start(2), np.ones((2, 1), np.int32)
    for t in range(4):
        _, state = first.run(first.values, jnp.asarray(x[:, t : t + 1]), state, one)
    y, _ = second.run(first.values, jnp.asarray(x[:, 4:]), state, np.repeat(one, 9, axis=1))
    want = second.want(x, p=first.parameters())
    assert checks.off(y, want[:, 4:]) < 1e-9
    assert checks.off(y, first.want(x)[:, 4:]) > 1e-3


def test_parameters_name_their_axes():
    flat = nnx.to_flat_state(nnx.state(nnx.eval_shape(build), nnx.Param))
    into = ("embed", "heads", "kv")
    assert {".".join(map(str, path)): p.axes for path, p in flat} == {
        **{f"{name}.weight": into for name in ("query", "key", "value", "gate")},
        "out.weight": ("heads", "kv", "embed"),
        "norm.scale": ("kv",),
        **{f"convs.{i}.weight": ("conv", "heads") for i in range(3)},
        **{f"rates.{i}.linear.weight": ("embed", "heads") for i in range(3)},
        **{f"rates.{i}.linear.bias": ("heads",) for i in range(3)},
        **{
            f"memories.{i}.fast.{layer}": ("heads", "memory_in", "memory_out")
            for i in range(3)
            for layer in range(2)
        },
        **{
            f"memories.{i}.slow.{name}": ("heads", "memory_out")
            for i in range(3)
            for name in ("scale", "bias")
        },
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4}, "dim 6 is not a multiple of heads 4"),
        ({"heads": 0}, "heads 0"),
        ({"head_dim": 0}, "head_dim 0"),
        ({"chunk": 0}, "chunk 0"),
        ({"shard": 0}, "shard 0"),
        ({"conv": -1}, "conv -1"),
        ({"local_chunks": (2, 0)}, r"local_chunks\[1\] 0 must be an integer of at least 1"),
        ({"local_chunks": (2, 3)}, r"shard 4 must be a multiple of each of \(2, 3\)"),
        ({"expansion": 0}, "expansion 0 must be an integer of at least 1"),
        ({"lr_max": 0.0}, r"lr_max 0\.0 must be .* above 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("other", [{"conv": 0}, {"conv": 3}, {"local_chunks": (2,)}])
def test_bad_inputs_are_named(other):
    checks.check_refusals(CASE, build(**other))
