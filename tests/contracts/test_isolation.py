"""What is not finite reaches what comes after it in its document, and nothing else, in any form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import miras
from tests.contracts.scenes import assert_close, quick_jit

TIME, HEADS, DIM, BAD = 12, 2, 4, 4
CUT = slice(BAD + 2), slice(BAD + 2, None)  # inside a chunk
DOCUMENTS = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3])  # three begin in the first chunk
MLP = miras.mlp(depth=2, expansion=1)
RULES = {
    "titans": miras.zoo.titans(chunk=8, expansion=1),
    "titans, read before": miras.zoo.titans(chunk=8, expansion=1, read="before"),
    "read as the chunk began": miras.Rule(
        MLP, miras.l2(), miras.decay(), miras.gd(), chunk=4, read="chunk"
    ),
    "decay first": miras.Rule(
        miras.matrix(), miras.l2(), miras.decay(before="gradient"), miras.gd(), chunk=8
    ),
    "omega": miras.Rule(
        MLP, miras.huber(), miras.decay(), miras.omega(3, miras.momentum()), chunk=8
    ),
    "muon": miras.Rule(miras.matrix(), miras.l2(), miras.decay(), miras.muon(), chunk=8),
    "link": miras.Rule(MLP, miras.l2(), miras.lq(3.0), miras.gd(), chunk=8),
    "chunk_muon": miras.zoo.lact(chunk=4),
    "delta rule": miras.zoo.gated_delta_net(),
}


@functools.cache
def scene(name):
    """A rule's state and inputs, and the forms as functions of state, inputs and documents."""
    rule, keys = RULES[name], jax.random.split(jax.random.key(0), 4)
    shape = (1, TIME, HEADS, DIM)
    q, k, v = (jax.random.normal(key, shape) / 2 for key in keys[:3])
    heads, window = jnp.ones(shape[:3]), getattr(rule.learner, "window", 1)
    gates = miras.Gates(
        lr=heads * 0.1,
        momentum=heads * 0.5 if rule.learner.needs_momentum else None,
        retain=heads * 0.9 if rule.retention.needs_retain else None,
        threshold=heads if rule.bias.needs_threshold else None,
        window=jnp.ones((*shape[:3], window)) if window > 1 else None,
    )
    state = miras.start(rule, rule.init(keys[3], DIM, DIM), 1, HEADS)
    state = state._replace(segment=jnp.zeros_like(state.segment))
    forms = (
        quick_jit(lambda state, inputs, ids, form=form: form(rule, state, *inputs, segment_ids=ids))
        for form in (miras.chunkwise, miras.recurrent, surprise)
    )
    return state, (q, k, v, gates), tuple(forms)


def surprise(rule, state, q, k, v, gates, *, segment_ids):
    return miras.surprise(rule, state, k, v, gates, segment_ids=segment_ids)


@pytest.mark.parametrize("ids", [None, DOCUMENTS[None]], ids=["one document", "documents"])
@pytest.mark.parametrize("name", RULES)
def test_nothing_before_it_and_no_other_document(name, ids):
    state, inputs, (chunkwise, recurrent, losses) = scene(name)
    index = np.arange(TIME)
    reach = index >= BAD
    if ids is not None:
        reach &= DOCUMENTS[BAD] == DOCUMENTS
    whole, last = chunkwise(state, inputs, ids)
    loss = losses(state, inputs, ids)
    leaves, structure = jax.tree.flatten(inputs)
    for field in range(1, len(leaves)):  # of the second head alone
        spoilt = list(leaves)
        spoilt[field] = spoilt[field].at[:, BAD, 1].set(jnp.nan)
        spoilt = jax.tree.unflatten(structure, spoilt)
        y, after = chunkwise(state, spoilt, ids)
        want, wanted = recurrent(state, spoilt, ids)
        touched = np.array(~jnp.all(jnp.isfinite(y), axis=-1))[0]
        assert not touched[:, 0].any()
        assert not (touched[:, 1] & ~reach).any(), np.flatnonzero(touched[:, 1])
        lost = np.array(~jnp.all(jnp.isfinite(want), axis=-1))[0]
        assert (touched >= lost).all(), (np.flatnonzero(touched[:, 1]), np.flatnonzero(lost[:, 1]))
        here = touched[..., None]
        assert_close(jnp.where(here, 0, y), jnp.where(here, 0, whole), 1e-5)
        unlike = np.array(~jnp.isfinite(losses(state, spoilt, ids)))[0]
        assert not (unlike[:, 1] & ~reach).any()
        assert not unlike[:, 0].any()
        assert bool(jnp.isfinite(loss).all())
        if ids is not None:  # the document was over before the end
            assert_close(after, last, 1e-5)
        for w, w_r in zip(after.weights, wanted.weights, strict=True):
            assert bool(jnp.isfinite(w[:, 0]).all())
            assert not jnp.isfinite(w[:, 1]).any() or bool(jnp.isfinite(w_r[:, 1]).all())


@pytest.mark.parametrize("name", RULES)
def test_carried_from_call_to_call(name):
    state, (q, k, v, gates), (chunkwise, *_) = scene(name)
    inputs = q, k, v.at[:, BAD].set(jnp.nan), gates
    whole, last = chunkwise(state, inputs, None)
    first, rest = (jax.tree.map(lambda x, cut=cut: x[:, cut], inputs) for cut in CUT)
    y, middle = chunkwise(state, first, None)
    y_2, after = chunkwise(middle, rest, None)
    assert jnp.array_equal(jnp.isnan(jnp.concatenate([y, y_2], axis=1)), jnp.isnan(whole))
    assert_close(jax.tree.map(jnp.isnan, after.weights), jax.tree.map(jnp.isnan, last.weights), 0)
