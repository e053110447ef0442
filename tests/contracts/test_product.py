"""Every choice of a rule beside every other: what `Rule` takes runs, what it does not it refuses.

`test_rules` holds some rules to everything; here all rules are held to one thing: that the fast
form is the definition, over documents, across calls, with whatever gates the rule may have.
"""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import miras
from tests.contracts import faults
from tests.contracts.scenes import FORMS, assert_close, float64, moving, quick_jit

AXES = {
    "structure": (
        miras.vector(1.0), miras.matrix(1.0), miras.matrix(1.0, features=miras.dpfp()),
        miras.mlp(depth=1, norm=True, residual=True), miras.mlp(expansion=1, residual=True),
        miras.gated_mlp(expansion=1, features=miras.polynomial(1)), miras.least_squares(),
    ),
    "bias": (
        miras.l2(), miras.dot(), miras.lp(), miras.robust(),
        *(miras.huber(kind) for kind in ("coordinate", "norm", "switch")),
    ),
    "retention": (
        miras.none(), miras.renormalise(), miras.lq(3.0), miras.simplex(), miras.elastic_net(),
        *(miras.decay(b, to) for b in ("update", "gradient") for to in ("zero", "initial")),
    ),
    "learner": (
        miras.gd(), miras.momentum(), miras.muon(2), miras.delta_momentum(), miras.chunk_muon(2),
        miras.delta_gd(),
        miras.omega(3, miras.gd()), miras.omega(3), miras.omega(6, miras.muon(2)),
        miras.omega(2, miras.chunk_muon(0)), miras.implicit(), miras.exchange(),
        miras.normal_equations(4),
    ),
    "chunk": (1, 4),
    "read": ("after", "before", "chunk"),
}  # fmt: skip
KEEPS = (miras.none(), miras.renormalise())
ALL = [dict(zip(AXES, choice, strict=True)) for choice in itertools.product(*AXES.values())]
BATCH, TIME, HEADS, DIM = 2, 7, 1, 3
IDS = np.array([[[1] * 3 + [2] * 4, [1] * 7], [[2] * 2 + [3] + [4] * 4, [1] * 7]])  # by call


def accepted(parts):
    """The rule, or None where it is refused."""
    try:
        return miras.Rule(**parts)
    except ValueError:
        return None


def covering(rules):
    """Some of these, so that every two choices that go together in one are together in these."""
    seen, found = set(), []
    for rule in rules:
        choices = [(name, getattr(rule, name)) for name in AXES]
        pairs = set(itertools.combinations(choices, 2))
        if not pairs <= seen:
            seen |= pairs
            found.append(rule)
    return found


def sensible(structure, bias, retention, learner, chunk, read):
    """What there is no reason to refuse."""
    step, forgets = getattr(learner, "step", learner), retention not in KEEPS
    solves = isinstance(learner, miras.normal_equations)
    if isinstance(structure, miras.least_squares) and not solves:
        return False  # a ridge that nothing reads
    if isinstance(step, miras.chunk_muon) and forgets:
        return False  # nothing to forget at each token where nothing is written at each token
    if isinstance(learner, miras.omega) and getattr(retention, "before", "") == "gradient":
        return False  # the window's gradients are those of one W'
    if isinstance(learner, miras.delta_gd):  # it erases in W along the input of a linear map
        kept = (miras.none(), miras.decay(), miras.decay(to="initial"))
        return retention in kept and not isinstance(structure, miras.vector)
    if not isinstance(learner, miras.implicit | miras.exchange | miras.normal_equations):
        return True
    plain = isinstance(structure, miras.matrix) and structure.features is None
    decays = retention in (miras.none(), miras.decay(), miras.decay("gradient"))
    if not (plain and bias == miras.l2() and decays and chunk == 1):
        return False  # these are formulas for one memory
    if isinstance(learner, miras.exchange):
        return retention != miras.decay("gradient") and read != "chunk"
    if isinstance(learner, miras.normal_equations):
        return isinstance(structure, miras.least_squares) and read != "chunk"
    return True


def test_what_is_not_sensible_is_refused_by_name():
    assert 0 < len(RULES) < len(ALL)
    for parts in ALL:
        assert (accepted(parts) is not None) == sensible(**parts), parts
    for parts in random.Random(0).sample([p for p in ALL if not sensible(**p)], 500):
        step = getattr(parts["learner"], "step", parts["learner"])
        with pytest.raises(ValueError, match=rf"({type(step).__name__}|omega)\("):
            miras.Rule(**parts)


def draw(rule, seed):
    """Weights and two calls' inputs; which optional gates are given is drawn too."""
    numbers = np.random.default_rng(seed)
    shape = (2, BATCH, TIME, HEADS)
    q, k, v = numbers.normal(size=(3, *shape, DIM))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    learner = rule.learner
    channels = (*shape, DIM) if rule.structure.channelwise and not learner.solves else shape
    plain = not (learner.exchanges or learner.solves)
    gates = miras.Gates(
        lr=numbers.uniform(0.02, 0.1, (*shape, DIM) if learner.exchanges else shape),
        momentum=numbers.uniform(0.2, 0.8, shape) if learner.needs_momentum else None,
        retain=numbers.uniform(0.8, 1.0, channels if seed % 2 else shape),
        scale=numbers.uniform(0.5, 1.5, shape) if plain and seed % 3 == 0 else None,
        threshold=numbers.uniform(0.2, 2.0, shape) if rule.bias.needs_threshold else None,
        window=numbers.uniform(0, 1, (*shape, learner.window)) if learner.window > 1 else None,
        write=0.1 * numbers.normal(size=(*shape, DIM)) if learner.exchanges else None,
    )
    if not rule.retention.needs_retain:
        gates = gates._replace(retain=None)
    return rule.init(jax.random.key(seed), DIM, DIM), (q, k, v, gates)


@float64
def check(forms, rule, seed):
    """The fast form equals the definition, outputs and states, to 1e-9 in float64."""
    weights, calls = draw(rule, seed)
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), weights)
    results = []
    for form in (forms.recurrent, forms.chunkwise):
        run = quick_jit(lambda state, x, ids, form=form: form(rule, state, *x, segment_ids=ids))
        state = miras.start(rule, weights, BATCH, HEADS)
        for call, ids in enumerate(IDS):
            y, state = run(state, jax.tree.map(lambda x, call=call: x[call], calls), ids)
            results.append((y, moving(state)))
    for got, want in zip(results[2:], results[:2], strict=True):
        assert_close(got, want, 1e-9, f"{rule}: ")


RULES = [rule for rule in map(accepted, ALL) if rule is not None]
random.Random(0).shuffle(RULES)
FEW, PAIRS = RULES[:40], covering(RULES)


@pytest.mark.parametrize("some", range(8))
def test_some_rules_of_the_product(some):
    for seed, rule in enumerate(FEW):
        if seed % 8 == some:
            check(FORMS, rule, seed)


@pytest.mark.parametrize(
    "fault", [faults.lr_off, faults.ids_ignored, faults.place_off, faults.pairs_dropped]
)
def test_it_can_fail(fault):
    parts = (miras.matrix(1.0), miras.l2(), miras.decay(), miras.omega(3))
    with pytest.raises(AssertionError):
        check(faults.plant("chunkwise", fault), miras.Rule(*parts, chunk=4), 0)


@pytest.mark.slow
@pytest.mark.parametrize("some", range(64))
def test_all_pairs_of_the_product(some):
    for seed, rule in enumerate(PAIRS):
        if seed % 64 == some:
            check(FORMS, rule, seed)
    jax.clear_caches()
