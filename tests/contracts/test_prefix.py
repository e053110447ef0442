"""A prefix that every document starts from: the chunk in progress ends with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import miras
from tests.contracts.scenes import assert_close, float64

DIM = 4


def _rule(chunk, steps=0):
    learner = miras.chunk_muon(steps)
    return miras.Rule(
        miras.gated_mlp(), miras.dot(), miras.renormalise(), learner, chunk=chunk, read="chunk"
    )


def _prefix(length):
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(1, 4, 1, DIM)))[:, :length] for _ in range(3))
    lr, momentum = (jnp.asarray(random.uniform(0.1, 0.9, (1, 4, 1)))[:, :length] for _ in range(2))
    return q, k, v, miras.Gates(lr=lr, momentum=momentum)


@pytest.mark.parametrize("length", [1, 3])
@float64
def test_a_learner_by_chunk_takes_the_step_of_a_shorter_chunk(length):
    weights = _rule(4).init(jax.random.key(0), DIM, DIM)
    weights = jax.tree.map(lambda w: w.astype(jnp.float64), weights)
    _, part = miras.chunkwise(_rule(4), miras.start(_rule(4), weights, 1), *_prefix(length))
    short = _rule(length)
    _, whole = miras.chunkwise(short, miras.start(short, weights, 1), *_prefix(length))
    begun = miras.begin_from(_rule(4), part, 2)
    for row in range(2):
        got = jax.tree.map(lambda x, row=row: x[row], (begun.weights, begun.momentum))
        want = jax.tree.map(lambda x: x[0], (whole.weights, whole.momentum))
        assert_close(got, want, 1e-12)
    assert begun.place.tolist() == [0, 0]


@float64
def test_a_prefix_that_fills_its_chunks_is_as_it_was_left():
    weights = _rule(2).init(jax.random.key(0), DIM, DIM)
    _, state = miras.chunkwise(_rule(2), miras.start(_rule(2), weights, 1), *_prefix(4))
    begun = miras.begin_from(_rule(2), state, 1)
    assert_close((begun.weights, begun.momentum), (state.weights, state.momentum), 0)


def test_the_window_does_not_reach_into_the_prefix():
    rule = miras.Rule(miras.matrix(), miras.l2(), miras.none(), miras.omega(3, miras.gd()), chunk=4)
    state = miras.start(rule, rule.init(jax.random.key(0), DIM, DIM), 1)
    q, k, v, gates = (jax.tree.map(lambda x: x.astype(jnp.float32), part) for part in _prefix(3))
    _, state = miras.chunkwise(rule, state, q, k, v, gates._replace(momentum=None))
    assert state.pairs.live.all()
    assert not miras.begin_from(rule, state, 2).pairs.live.any()


def test_more_rows_than_one_are_refused():
    state = miras.start(_rule(2), _rule(2).init(jax.random.key(0), DIM, DIM), 2)
    with pytest.raises(ValueError, match="1 row, got 2"):
        miras.begin_from(_rule(2), state, 2)
