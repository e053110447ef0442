"""What every sequence mixer must be, as checks of a case: `check_equations(case)` and its kin.

A layer is compiled once for a length; splits at every place go token by token up to there, then a
block, then token by token again.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.contracts.scenes import float64, quick_jit
from tests.oracles.titans import by_document

# documents of one token, an id that comes back, and one that both rows have
IDS = np.array([[1] * 9 + [2] + [1] * 3, [3, 4, 4, 3, 3, 3, 3, 3, 3, 0, 0, 0, 0]], np.int32)
TIME, BLOCK = IDS.shape[1], 5


@dataclass(frozen=True, eq=False)
class Case:
    """A layer and what it must give.

    Attributes:
        build: () -> the module, of model dimension `dim`.
        expect: (parameters by name, one document [T, dim]) -> [T, dim], in NumPy.
        faults: keywords of `expect` that are wrong.
        precise: parts of names of parameters that bf16 inputs do not round.
        long: tokens of the comparison with the equations; more than a tile of a closed form.
    """

    build: Callable[[], nnx.Module]
    expect: Callable
    faults: tuple[dict, ...] = ()
    dim: int = 6
    precise: tuple[str, ...] = ()
    long: int = TIME

    @functools.cached_property
    def split(self) -> tuple[Any, Any]:
        """The graph, and values [fp32] that are nowhere as they start."""
        graphdef, shapes = nnx.split(nnx.eval_shape(self.build), nnx.Param)
        random = np.random.default_rng(1)

        def draw(w):
            size = 1.0 if w.ndim == 1 else 0.6
            return jnp.asarray(size * random.normal(size=w.shape), jnp.float32)

        return graphdef, jax.tree.map(draw, shapes)

    @property
    def values(self):
        """The parameters, of the dtype of the day."""
        return jax.tree.map(lambda w: w.astype(jnp.zeros(()).dtype), self.split[1])

    @functools.cached_property
    def run(self) -> Callable:
        graphdef, _ = self.split
        return quick_jit(lambda values, x, state, ids: (
            nnx.merge(graphdef, values)(x, state, segment_ids=ids)
        ))  # fmt: skip

    @functools.cached_property
    def gradient(self) -> Callable:
        graphdef, _ = self.split

        @quick_jit
        @functools.partial(jax.grad, argnums=(0, 1))
        def gradient(values, x, ids, cotangent):
            return jnp.vdot(cotangent, nnx.merge(graphdef, values)(x, segment_ids=ids)[0])

        return gradient

    def module(self) -> nnx.Module:
        return nnx.merge(self.split[0], self.values)

    def parameters(self) -> dict[str, np.ndarray]:
        """By name, in float64."""
        return named(self.split[1])

    def want(self, x, ids=None, p=None, **faults):
        p = self.parameters() if p is None else p
        return by_document(functools.partial(self.expect, p, **faults), x, ids)


def named(values) -> dict[str, np.ndarray]:
    return {
        ".".join(map(str, path)): np.asarray(w[...], np.float64)
        for path, w in nnx.to_flat_state(values)
    }


def inputs(case, time=TIME, seed=0):
    return np.random.default_rng(seed).normal(size=(2, time, case.dim))


def ids_for(time):
    """IDS, its last documents drawn out."""
    return np.pad(IDS, ((0, 0), (0, time - TIME)), mode="edge")


def off(actual, expected):
    """The largest difference over the largest value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.abs(actual - expected).max() / np.abs(expected).max()


@float64
def check_equations(case):
    """The oracle's values; others without documents, with a fault or another parameter."""
    x, ids, random = inputs(case, case.long), ids_for(case.long), np.random.default_rng(2)
    y, _ = case.run(case.values, jnp.asarray(x), None, ids)
    assert y.dtype == jnp.float64
    assert off(y, case.want(x, ids)) < 1e-9
    x, ids, y = x[:, :TIME], IDS, y[:, :TIME]
    assert off(y, case.want(x)) > 1e-3
    for fault in case.faults:
        assert off(y, case.want(x, ids, **fault)) > 1e-4, fault
    p = case.parameters()
    for key, value in p.items():
        moved = p | {key: value + 0.1 * random.normal(size=value.shape)}
        assert off(y, case.want(x, ids, moved)) > 1e-5, key


@float64
def check_splits(case):
    """Token by token, and blocks that begin anywhere, with and without documents, are the whole."""
    x, values = jnp.asarray(inputs(case)), case.values
    start, zero = case.module().start(2), functools.partial(jax.tree.map, jnp.zeros_like)
    one = np.ones_like(IDS)
    for ids in (IDS, one):
        want, states, outputs = case.want(x, ids), [start], []

        def go(begin, end, state, ids=ids):
            y, after = case.run(values, x[:, begin:end], state, ids[:, begin:end])
            assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, start)
            return y, after

        for t in range(TIME):
            y, state = go(t, t + 1, states[-1])
            outputs.append(y)
            states.append(state)
        assert off(jnp.concatenate(outputs, axis=1), want) < 1e-9
        for t in range(TIME - BLOCK + 1):
            y, state = go(t, t + BLOCK, states[t])
            assert off(y, want[:, t : t + BLOCK]) < 1e-9, t
            if t + BLOCK < TIME:
                y, _ = go(t + BLOCK, t + BLOCK + 1, state)
                assert off(y, want[:, t + BLOCK : t + BLOCK + 1]) < 1e-9, t
        if ids is one:  # a state that has lost everything is seen
            y, _ = go(2, 2 + BLOCK, zero(states[2]))
            assert off(y, want[:, 2 : 2 + BLOCK]) > 1e-3
    y, _ = case.run(values, x[:, :BLOCK], None, None)  # one document, not named
    assert off(y, want[:, :BLOCK]) < 1e-9


@float64
def check_reach(case, reaches=None):
    """Token t of row b depends on tokens up to t of its document in row b, and on nothing else.

    reaches: (t, s <= t), places in the document, -> whether t sees s; None: it always does.
    """
    x, random = jnp.asarray(inputs(case)), np.random.default_rng(3)
    for b, t in np.ndindex(2, TIME):
        cotangent = np.zeros(x.shape)
        cotangent[b, t] = random.normal(size=case.dim)
        _, by_x = case.gradient(case.values, x, IDS, cotangent)
        number = np.cumsum(np.diff(IDS[b], prepend=IDS[b, 0]) != 0)
        first, visible = np.argmax(number == number[t]), np.zeros((2, TIME), bool)
        for s in range(first, t + 1):
            visible[b, s] = reaches is None or reaches(t - first, s - first)
        np.testing.assert_array_equal(np.abs(by_x).max(-1) > 0, visible)
    start = case.module().start(2)
    y, _ = case.run(case.values, x[:, :BLOCK], start, IDS[:, :BLOCK])
    z, _ = case.run(case.values, x.at[1].multiply(-3.0)[:, :BLOCK], start, IDS[:, :BLOCK])
    np.testing.assert_array_equal(y[0], z[0])
    assert np.abs(y[1] - z[1]).max() > 0


@float64
def check_gradients(case):
    """Of every parameter and the input: there, and along one direction the oracle's difference."""
    x, random = inputs(case), np.random.default_rng(4)
    cotangent, p = random.normal(size=x.shape), case.parameters()
    by_values, by_x = case.gradient(case.values, jnp.asarray(x), IDS, cotangent)
    by_values = named(by_values)
    way = {key: random.normal(size=value.shape) for key, value in p.items()}
    x_way = random.normal(size=x.shape)

    def moved(step):
        changed = {key: value + step * way[key] for key, value in p.items()}
        return np.vdot(cotangent, case.want(x + step * x_way, IDS, changed))

    step = 1e-5
    want = (8 * (moved(step) - moved(-step)) - (moved(2 * step) - moved(-2 * step))) / (12 * step)
    got = np.vdot(by_x, x_way) + sum(np.vdot(by_values[key], way[key]) for key in p)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for key, gradient in by_values.items():
        assert np.abs(gradient).max() > 1e-6, key
    for leaf in jax.tree.leaves(case.gradient(case.values, 0 * jnp.asarray(x), IDS, cotangent)):
        assert np.isfinite(leaf).all()  # nothing to normalise


def check_bfloat16(case):
    """bf16 in is bf16 out with a state in fp32, near the equations."""
    x, start = jnp.asarray(inputs(case), jnp.bfloat16), case.module().start(2)
    y, state = case.run(case.values, x, start, IDS)
    assert y.dtype == jnp.bfloat16
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, start)
    assert {a.dtype for a in jax.tree.leaves(state)} <= {np.dtype("float32"), np.dtype("int32")}
    x, exact = np.asarray(x, np.float64), case.parameters()
    rounded = {
        key: value
        if any(part in key for part in case.precise)
        else np.asarray(jnp.asarray(value, jnp.bfloat16), np.float64)
        for key, value in exact.items()
    }
    exact, near = case.want(x, IDS, exact), case.want(x, IDS, rounded)
    tolerance = 4 * off(near, exact)  # a few times what it does to round nothing but the parameters
    assert tolerance < 0.2
    assert off(y, exact) < tolerance
    assert off(1.3 * y, exact) > tolerance


def check_refusals(case, other=None):
    """What does not fit x is named; `other`: a module whose state is not one of this layer."""
    module, call = case.module(), inspect.unwrap(type(case.module()).__call__)
    x = jnp.ones((2, 5, case.dim))

    def refuses(message, *args, error=ValueError, **options):
        with pytest.raises(error, match=message):
            call(module, *args, **options)  # behind the checks of the tests

    refuses(rf"\(2, 5, 4\).*{case.dim}", jnp.ones((2, 5, 4)))
    refuses(rf"\(2, 0, {case.dim}\)", x[:, :0])
    refuses(rf"\(5, {case.dim}\)", x[0])
    refuses("x has dtype int32: it must be floating-point", x.astype(jnp.int32))
    refuses(r"segment_ids.*\(2, 4\).*\(2, 5\)", x, segment_ids=jnp.ones((2, 4), int))
    refuses(r"positions.*\(2, 4\).*\(2, 5\)", x, positions=jnp.ones((2, 4), int))
    refuses(r"segment_ids must be integers, got float", x, segment_ids=jnp.ones((2, 5)))
    refuses(r"batch of 1, x has 2; use start\(2\)", x, module.start(1))
    refuses(r"State, got tuple: use start", x, (1, 2), error=TypeError)
    if other is not None:
        refuses(r"the state is of another \w+[:,] .*use start\(2\)", x, other.start(2))


def check_donation(case):
    """A fresh state shares no memory with the parameters or itself."""
    module, x = case.module(), jnp.asarray(inputs(case, 1), jnp.float32)
    step = jax.jit(lambda x, state: module(x, state), donate_argnums=1)
    _, state = step(x, module.start(2))
    assert np.isfinite(step(x, state)[0]).all()
