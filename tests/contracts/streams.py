"""Checks of what may depend on what: time, rows, heads, documents, and where a sequence is cut."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.contracts import scenes
from tests.contracts.scenes import (
    assert_close,
    assert_zero,
    cast,
    cut,
    float64,
    moving,
    pull,
    run,
)  # fmt: skip
from tests.oracles import miras as oracle


@float64
def check_causality(forms, case, which):
    """y_t has a gradient of exactly 0 by every later input, and does not move when they change.

    Where the memory is read before the write, or as its chunk began, the key, value and gates of t
    itself count as later, but for the scale, which belongs to the read.
    """
    for kind in ("carried", "aligned"):
        _causality(forms, case, which, scenes.scene(case, kind))


def _causality(forms, case, which, scene):
    state, stream, ids = scene
    form = scenes.forms_of(forms)[which]
    y_like, state_like = scenes.cotangent(case, state)
    nothing = jax.tree.map(np.zeros_like, state_like)
    state = cast(state, jnp.float64)
    before = case.oracle.read in ("before", "chunk")
    for t in range(scenes.LENGTH):
        ct = np.zeros_like(y_like)
        ct[:, t] = y_like[:, t]
        _, gradient = pull(form, case, state, stream, ids, (ct, nothing))
        got = gradient["stream"]
        name = f"{case.name} {which} y[{t}] by later "
        assert_zero(cut(got, t + 1, None), name)
        if before:
            held = (got.k, got.v, got.gates._replace(scale=None))
            assert_zero(cut(held, t, None), name)
    y, _ = run(form, case, state, stream, ids)
    other = scenes.stream(case, seed=50)
    for t in range(scenes.LENGTH - 1):

        def changed(a, b, t=t):
            return np.concatenate([a[:, : t + 1], b[:, t + 1 :]], 1)

        mixed = jax.tree.map(changed, stream, other)
        name = f"{case.name} {which}: y up to {t} when what is later changes"
        moved, _ = run(form, case, state, mixed, ids)
        assert_zero((moved - y)[:, : t + 1], name)
        # Other documents may take another path through a form: the same up to rounding.
        moved, _ = run(form, case, state, mixed, changed(ids, np.full_like(ids, 77)))
        assert_close(moved[:, : t + 1], y[:, : t + 1], 1e-12, name)


@float64
def check_isolation(forms, case, which):
    """A row, and a head, sees no other: gradients are exactly 0 and nothing moves."""
    state, stream, ids = scenes.scene(case)
    form = scenes.forms_of(forms)[which]
    ct_y, ct_state = scenes.cotangent(case, state)
    other, other_ids = scenes.stream(case, seed=50), ids.copy()
    other_ids[1] = 9
    state = cast(state, jnp.float64)
    y, last = run(form, case, state, stream, ids)
    name = f"{case.name} {which}: "

    def only(a, b, axis):
        """The first row (axis 0) or head (axis 2, in states 1) of a, the rest of b."""
        kept = np.arange(a.shape[axis]) == 0
        return np.where(kept.reshape(-1, *[1] * (a.ndim - axis - 1)), a, b)

    first = jax.tree.map(lambda a: only(a, np.zeros_like(a), 0), (ct_y, ct_state))
    _, gradient = pull(form, case, state, stream, ids, first)
    rows = {k: gradient["state"][k] for k in ct_state}
    assert_zero(jax.tree.map(lambda a: a[1:], (rows, gradient["stream"])), name + "rows by row 0 ")
    mixed = jax.tree.map(lambda a, b: only(a, b, 0), stream, other)
    moved = run(form, case, state, mixed, ids)
    assert_zero(_change(moved, (y, last), 0), name + "row 0 moves with row 1 ")
    moved = run(form, case, state, mixed, other_ids)
    assert_close(moved[0][:1], y[:1], 1e-12, name + "row 0 moves with the documents of row 1 ")

    if case.heads == 1:
        return
    first = (
        only(ct_y, np.zeros_like(ct_y), 2),
        jax.tree.map(lambda a: only(a, np.zeros_like(a), 1), ct_state),
    )
    _, gradient = pull(form, case, state, stream, ids, first)
    own = {k: gradient["state"][k] for k in ("begin", "slow")}
    rows = {k: gradient["state"][k] for k in ct_state}
    assert_zero(jax.tree.map(lambda a: a[:, :, 1:], gradient["stream"]), name + "heads by head 0 ")
    assert_zero(jax.tree.map(lambda a: a[:, 1:], rows), name + "heads by head 0 ")
    assert_zero(jax.tree.map(lambda a: a[1:], own), name + "heads by head 0 ")
    mixed = jax.tree.map(lambda a, b: only(a, b, 2), stream, other)
    moved = run(form, case, state, mixed, ids)
    assert_zero(_change(moved, (y, last), 1), name + "head 0 moves with head 1 ")


def _change(moved, still, axis):
    """How the first row (axis 0) or head (axis 1) of outputs and states differs."""
    sides = []
    for y, state in (moved, still):
        arrays = (jnp.swapaxes(y, 1, 2), scenes.held(state))
        sides.append(jax.tree.map(lambda a: a[:1] if axis == 0 else a[:, :1], arrays))
    return jax.tree.map(jnp.subtract, *sides)


PACKINGS = (
    [(1, 1), (2, 12)],
    [(1, 2), (2, 3), (3, 8)],
    [(1, 4), (2, 4), (3, 5)],
    [(1, 5), (2, 7), (0, 1)],
    [(1, 9), (2, 1), (3, 1), (4, 2)],
    [(i, 1) for i in range(1, 14)],
)


@float64
def check_documents(forms, case, which):
    """A document packed into a row gives what it gives alone, wherever it lies.

    Odd offsets, several short documents in a row, and rows that follow other rows' states.
    """
    form = scenes.forms_of(forms)[which]
    ids = scenes.ids_of(*PACKINGS)
    stream = scenes.stream(case, batch=len(PACKINGS), seed=3)
    state = scenes.fresh(case, forms, batch=len(PACKINGS))
    y, last = run(form, case, state, stream, ids)
    name = f"{case.name} {which}: "
    start = scenes.to_oracle(scenes.fresh(case, batch=1))
    for row, packing in enumerate(PACKINGS):
        begin = 0
        for _, length in packing:
            tokens = slice(begin, begin + length)
            here = jax.tree.map(lambda a, row=row, tokens=tokens: a[row : row + 1, tokens], stream)
            want, _, end = oracle.run(case.oracle, start, *here)
            assert_close(y[row : row + 1, tokens], want, 1e-10, f"{name}row {row}, token {begin}: ")
            begin += length
        got = jax.tree.map(lambda a, row=row: a[row : row + 1], moving(last))
        want = moving(end) | {"segment": ids[row, -1:]}
        assert_close(got, want, 1e-10, f"{name}row {row}: ")
    # Behind a carried state, new documents give the same again; padding goes on.
    again, _ = run(form, case, last, stream, np.where(ids == 0, 0, ids + 20))
    held = (ids != 0)[:, :, None, None]
    assert_close(again * held, y * held, 1e-10, name + "new documents behind a carried state: ")
    # The form against itself: row 0's second document, moved to the front of a fresh row.
    moved = jax.tree.map(lambda a: np.roll(a, -1, axis=1), stream)
    alone, _ = run(form, case, state, moved, np.ones_like(ids))
    assert_close(alone[0, :-1], y[0, 1:], 1e-10, name + "alone: ")


SPLIT = 9  # two chunks and a token, documents in them


def _short(case):
    state, stream, ids = scenes.scene(case)
    return cast(state, jnp.float64), cut(stream, 0, SPLIT), ids[:, :SPLIT]


@float64
def check_split(forms, case, which):
    """Cut anywhere, the state carried, `which` form after `which`: outputs and state as whole."""
    state, stream, ids = _short(case)
    form = scenes.forms_of(forms)[which]
    y, last = run(form, case, state, stream, ids)
    for at in range(1, SPLIT):
        left, middle = run(form, case, state, cut(stream, 0, at), ids[:, :at])
        right, end = run(form, case, middle, cut(stream, at, None), ids[:, at:])
        got = (jnp.concatenate([left, right], 1), moving(end))
        assert_close(got, (y, moving(last)), 1e-10, f"{case.name} {which} cut at {at}: ")


@float64
def check_mixed_split(forms, case):
    """Cut anywhere: chunkwise then step, step then chunkwise, and step alone, as whole."""
    state, stream, ids = _short(case)
    y, last = run(forms.chunkwise, case, state, stream, ids)
    name = f"{case.name} cut at "
    stepped, states = _steps(forms, case, state, stream, ids)
    assert_close((stepped, moving(states[-1])), (y, moving(last)), 1e-10, name + "every token: ")
    for at in range(1, SPLIT):
        left, middle = run(forms.chunkwise, case, state, cut(stream, 0, at), ids[:, :at])
        rest, ends = _steps(forms, case, middle, cut(stream, at, None), ids[:, at:])
        got = (jnp.concatenate([left, rest], 1), moving(ends[-1]))
        assert_close(got, (y, moving(last)), 1e-10, f"{name}{at}, step behind chunkwise: ")
        right, end = run(forms.chunkwise, case, states[at], cut(stream, at, None), ids[:, at:])
        got = (jnp.concatenate([stepped[:, :at], right], 1), moving(end))
        assert_close(got, (y, moving(last)), 1e-10, f"{name}{at}, chunkwise behind step: ")


def _steps(forms, case, state, stream, ids):
    """Outputs of `step` along a stream, and the state before each token and at the end."""
    outs, states = [], [state]
    for t in range(ids.shape[1]):
        y, state = run(forms.step, case, state, cut(stream, t, t + 1), ids[:, t : t + 1])
        outs.append(y)
        states.append(state)
    return jnp.concatenate(outs, 1), states
