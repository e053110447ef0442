"""What the engine refuses, and what it must not let pass from one document to another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import documents, miras
from tests.contracts.scenes import assert_close, quick_jit

BATCH, TIME, HEADS, DIM = 2, 12, 1, 4


def scene(rule, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (BATCH, TIME, HEADS, DIM), dtype) for key in keys[:3])
    gates = miras.Gates(*(jnp.full((BATCH, TIME, HEADS), value) for value in (0.1, 0.5, 0.9)))
    state = miras.start(rule, rule.init(keys[3], DIM, DIM), BATCH)
    return state, q, k, v, gates


RULE = miras.zoo.titans(depth=1, chunk=4)


def test_documents_start_at_every_change_of_id_also_after_a_negative_one():
    ids = jnp.asarray([[1, 1, -1, -1, 2, 2]])
    starts = documents.starts(ids, jnp.asarray([-1]))
    assert starts.tolist() == [[False, False, True, False, True, False]]
    assert documents.starts(ids, jnp.asarray([3]))[0, 0]


def test_what_is_not_finite_stays_in_its_document():
    state, q, k, v, gates = scene(RULE)
    ids = jnp.asarray([[1] * 6 + [2] * 6] * BATCH)
    spoilt = v.at[:, 5].set(jnp.nan)
    run = jax.jit(lambda v: miras.chunkwise(RULE, state, q, k, v, gates, segment_ids=ids))
    whole, _ = run(v)
    y, after = run(spoilt)
    assert bool(jnp.all(jnp.isnan(y[:, 5])))
    assert jnp.array_equal(y[:, 6:], whole[:, 6:])
    assert all(bool(jnp.all(jnp.isfinite(w))) for w in after.weights)


ONLINE = {
    "linear_attention": (None, None),
    "gla": ("channels", None),
    "gated_delta_net": ("heads", None),
    "longhorn": (None, None),
    "rwkv7": ("channels", "channels"),
    "mesa_net": ("heads", None),
}


@pytest.mark.parametrize("name", ONLINE)
def test_closed_forms_keep_what_is_not_finite_in_its_document(name):
    """In tokens, in the state, in documents that begin inside a tile: as the recurrence has it."""
    rule = getattr(miras.zoo, name)()
    retain, rates = ONLINE[name]
    state, q, k, v, _ = scene(rule)
    channels, heads = jnp.full(k.shape, 0.9), jnp.full(k.shape[:3], 0.5)
    gates = miras.Gates(
        lr=channels * 0.3 if rates else heads,
        retain={None: None, "heads": heads, "channels": channels}[retain],
        write=k * 0.2 if rates else None,
    )
    ids = jnp.asarray([[7] * 3 + [1] * 6 + [2] * 3, [7] * 2 + [3] * 2 + [4] * 8])
    state = state._replace(segment=jnp.asarray([7, 7]))
    lost = state._replace(weights=(state.weights[0].at[1].set(jnp.inf),))
    for given, values in (
        (state, v.at[0, 4].set(jnp.nan)),
        (lost, v),
        (lost, v.at[1, 3, 0, 0].set(jnp.inf)),
    ):
        y, after = miras.chunkwise(rule, given, q, k, values, gates, segment_ids=ids, block=4)
        want, last = miras.recurrent(rule, given, q, k, values, gates, segment_ids=ids)
        finite = jnp.all(jnp.isfinite(want), axis=-1, keepdims=True)
        assert not bool(jnp.all(finite))
        assert jnp.array_equal(jnp.isnan(y), jnp.broadcast_to(~finite, y.shape))
        assert_close(jnp.where(finite, y, 0), jnp.where(finite, want, 0), 1e-5)
        assert_close(after.weights, last.weights, 1e-5)


def test_a_kernel_begins_a_document_anew_whatever_the_state_was():
    rule, shape = miras.zoo.gated_delta_net(), (2, 24, 2, 64)
    q, k, v = (jax.random.normal(key, shape) / 8 for key in jax.random.split(jax.random.key(0), 3))
    state = miras.start(rule, rule.init(jax.random.key(1), 64, 64), 2, 2)
    state = state._replace(segment=jnp.asarray([5, 5]))
    lost = state._replace(weights=(state.weights[0].at[0].set(jnp.nan),))
    gates = miras.Gates(lr=jnp.full(shape[:3], 0.5), retain=jnp.full(shape[:3], 0.9))
    ids = jnp.asarray([[1] * 9 + [2] * 15, [5] * 24])
    options = {"segment_ids": ids, "implementation": "pallas", "interpret": True}
    got = miras.trace(rule, lost, q, k, v, gates, **options)
    want = miras.trace(rule, state, q, k, v, gates, **options)
    assert_close(got, want, 0)


@pytest.mark.parametrize("form", [miras.chunkwise, miras.recurrent])
@pytest.mark.parametrize("step", [miras.momentum(), miras.muon(), miras.chunk_muon()], ids=repr)
def test_what_is_not_finite_in_any_input_stays_in_its_document(step, form):
    """Also where tokens learn those before them again, and weights are formed one by one."""
    retention = miras.none() if step == miras.chunk_muon() else miras.decay()
    rule = miras.Rule(
        miras.mlp(depth=2, expansion=1), miras.robust(), retention, miras.omega(3, step), chunk=4
    )
    state, q, k, v, gates = scene(rule)
    gates = gates._replace(
        retain=None if retention == miras.none() else gates.retain,
        threshold=gates.lr, window=jnp.ones((BATCH, TIME, HEADS, 3)),
    )  # fmt: skip
    ids = jnp.asarray([[1] * 6 + [2] * 6, [1] * 8 + [2] * 4])

    @quick_jit
    def run(state, inputs):
        q, k, v, gates = inputs
        return form(rule, state, q, k, v, gates, segment_ids=ids)

    def spoil(x):
        first = np.reshape(ids == 1, (BATCH, TIME, *[1] * (x.ndim - 2)))
        return np.where(first, np.float32(np.nan), x)

    inputs = jax.tree.map(np.asarray, (q, k, v, gates))
    whole, last = run(state, inputs)
    leaves, structure = jax.tree.flatten(inputs)
    # one by one, and all together
    spoilt = [[spoil(x) if i == j else x for j, x in enumerate(leaves)] for i in range(len(leaves))]
    here = (ids == 2)[..., None, None]
    for some in (*spoilt, [spoil(x) for x in leaves]):
        y, after = run(state, jax.tree.unflatten(structure, some))
        assert_close(jnp.where(here, y, 0), jnp.where(here, whole, 0), 1e-6)
        assert_close(after, last, 1e-6)


def test_a_state_in_a_longer_chunk_ends_it_at_the_next_token():
    """As a chunk that is made smaller finds it; both forms alike."""
    long, short = (miras.zoo.titans(depth=1, chunk=chunk) for chunk in (8, 4))
    state, q, k, v, gates = scene(long)
    cut = lambda x, where: jax.tree.map(lambda x: x[:, where], x)  # noqa: E731
    _, state = miras.recurrent(long, state, *cut((q, k, v, gates), slice(6)))
    rest = cut((q, k, v, gates), slice(6, None))
    y, after = miras.chunkwise(short, state, *rest)
    y_2, after_2 = miras.recurrent(short, state, *rest)
    assert_close((y, after), (y_2, after_2), 1e-5)
    assert after.place.tolist() == [1, 1]  # 1 + 4 + 1 tokens
    _, one = miras.step(short, state, *cut(rest, slice(1)))
    assert one.place.tolist() == [0, 0]
    assert_close(one.base, one.weights, 0)


def test_states_of_one_token_chunks_hold_their_weights_once():
    """What began such a chunk is what there is now; a state that holds it keeps its shape."""
    rule = miras.zoo.gated_delta_net()
    state, q, k, v, gates = scene(rule)
    assert state.base == ()
    assert state.began is state.weights
    tokens = (q, k, v, gates._replace(momentum=None))
    first = jax.tree.map(lambda x: x[:, :1], tokens)
    calls = [(miras.recurrent, tokens), (miras.chunkwise, tokens), (miras.step, first)]
    both = state._replace(base=state.weights)
    for form, args in calls:
        y, after = form(rule, state, *args)
        assert after.base == (), form
        y_2, after_2 = form(rule, both, *args)
        assert_close((y, after.weights), (y_2, after_2.weights), 0)
        assert_close(after_2.base, after_2.weights, 0)


def test_a_state_of_one_token_chunks_begins_a_longer_one():
    """As a memory whose chunk is made larger finds it: from then on it holds the chunk's start."""
    short, long = (miras.zoo.titans(depth=1, chunk=chunk) for chunk in (1, 4))
    state, q, k, v, gates = scene(short)
    _, state = miras.recurrent(short, state, q, k, v, gates)
    y, after = miras.chunkwise(long, state, q, k, v, gates)
    assert state.base == ()
    y_2, after_2 = miras.recurrent(long, state._replace(base=state.weights), q, k, v, gates)
    assert_close((y, after), (y_2, after_2), 1e-5)


def test_forms_agree_where_queries_are_narrower_than_keys():
    state, q, k, v, gates = scene(RULE)
    q = q.astype(jnp.bfloat16)
    y, _ = miras.chunkwise(RULE, state, q, k, v, gates)
    definition, _ = miras.recurrent(RULE, state, q, k, v, gates)
    assert jnp.max(jnp.abs(y - definition)) < 0.05


@pytest.mark.parametrize("form", [miras.chunkwise, miras.recurrent])
def test_states_of_another_rule_and_integers_are_refused(form):
    state, q, k, v, gates = scene(RULE)
    with pytest.raises(ValueError, match="momentum"):
        form(miras.zoo.ttt_linear(), state, q, k, v, miras.Gates(gates.lr))
    with pytest.raises(ValueError, match="slow weights"):
        form(miras.zoo.titans(depth=1, norm=False, residual=False), state, q, k, v, gates)
    with pytest.raises(ValueError, match="fast"):
        form(miras.zoo.titans(depth=2), state, q, k, v, gates)
    wide = miras.zoo.titans(depth=2, expansion=3, chunk=4)
    other = miras.start(wide, wide.init(jax.random.key(0), DIM, DIM), BATCH)
    with pytest.raises(ValueError, match=r"\(4, 12\), \(12, 4\).* has .*\(4, 8\), \(8, 4\)"):
        form(miras.zoo.titans(depth=2, expansion=2, chunk=4), other, q, k, v, gates)
    with pytest.raises(Exception, match=r"gates.lr must be an array|type"):
        form(RULE, state, q, k, v, gates._replace(lr=None))
    for ids in ([[1] * TIME] * BATCH, jnp.ones((BATCH, TIME))):
        with pytest.raises(Exception, match=r"segment_ids must be an array of integers|type"):
            form(RULE, state, q, k, v, gates, segment_ids=ids)
    with pytest.raises((ValueError, TypeError)):  # in tests the type check comes first
        form(RULE, state, q.astype(int), k, v, gates)
    with pytest.raises(ValueError, match="keys of dim 4, but q has 2"):
        miras.read(RULE, state, q[..., :2])
    with pytest.raises(ValueError, match="heads 0"):
        miras.start(RULE, RULE.init(jax.random.key(0), DIM, DIM), BATCH, heads=0)


@pytest.mark.parametrize("form", [miras.chunkwise, miras.recurrent])
def test_a_state_from_narrow_storage_is_widened(form):
    state, q, k, v, gates = scene(RULE)
    narrow = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
    )
    exact = jax.tree.map(lambda x, like: x.astype(like.dtype), narrow, state)
    got, want = (form(RULE, given, q, k, v, gates) for given in (narrow, exact))
    assert_close(got, want, 0)
    assert got[1].weights[0].dtype == jnp.float32
    assert_close(miras.read(RULE, narrow, q), miras.read(RULE, exact, q), 0)
    quantised = state._replace(momentum=jax.tree.map(lambda s: s.astype(jnp.int8), state.momentum))
    with pytest.raises(Exception, match="the state's momentum has dtype int8, which float32"):
        form(RULE, quantised, q, k, v, gates)
