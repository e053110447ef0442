"""The gated delta rule and decayed linear attention: both forms against equations in float64.

`reference.py` is held to a NumPy loop (values) and to its differences (gradients), the kernel in
Pallas' interpreter and the XLA form to `reference.py` in float64; each check rejects a fault.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental import pallas as pl

from pallas_kernels import blocks, blocks_table, decays, dispatch, sequence
from pallas_kernels.blocks import Blocks
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.linear_attention import linear_attention
from tests.pallas_kernels import affine
from tests.pallas_kernels.affine import Case, assert_close, assert_zero, call

SINGLE = 1e-5
# Rounding the operands of a product moves each term by at most 2^-8 of itself, with signs of their
# own: however many terms it sums, the sum moves by about that of its usual size. From an input to a
# result or a gradient there are up to eight products in a row: prediction, scores, inverse,
# solution and read, and in the backward pass as many transposed ones, but for those they share.
HALF = 2**-8 * np.sqrt(8)


@pytest.fixture(autouse=True)
def races(monkeypatch):
    """Fails where the interpreter has seen a race in any kernel of the test; the states it has."""
    states, make = [], interpreter.RaceDetectionState

    def watched(*args, **kwargs):
        states.append(make(*args, **kwargs))
        return states[-1]

    monkeypatch.setattr(interpreter, "RaceDetectionState", watched)
    yield states
    assert not any(state.races_found for state in states), "a race"


# Every kind of decay with every option, head dimension and length, though not with each other; the
# slow test has more.
CASES = (
    Case(),
    Case(read="before", length=130, key=128, blocks=Blocks(64, 2, 2), batch=1),
    Case(packed=True, first=False, length=1, heads=3, key=128, value=128, blocks=Blocks(16, 1, 3)),
    Case(decay="none", packed=True, read="before", length=130, key=256, value=256, heads=1, batch=1,
         blocks=Blocks(64, 1, 1)),
    Case(decay="channel", packed=True, first=False, read="before", value=128, heads=4,
         blocks=Blocks(32, 1, 2)),
    Case(decay="channel", length=130, heads=3, key=128, value=256, batch=1,
         blocks=Blocks(16, 2, 1)),
    Case("linear_attention", "none", read="before", packed=True),
    Case("linear_attention", packed=True, length=130, heads=3, key=128, value=128,
         blocks=Blocks(128, 1, 3)),
    Case("linear_attention", "channel", read="before", value=128, batch=1),
    Case("linear_attention", "channel", packed=True, length=1, heads=1, key=256, value=256,
         blocks=Blocks(16, 1, 1)),
)  # fmt: skip
FORMS = ("xla", "pallas")


def both(*cases):
    """The cases in both forms."""
    return [case._replace(implementation=form) for case in cases for form in FORMS]


def check_reference(case, run=affine.reference):
    """The reference is the loop, and its gradients are its differences."""
    given, by = affine.inputs(case), affine.cotangents(case)
    with jax.enable_x64(True):
        given, by = jax.tree.map(affine.wide, (given, by))
        found, gradients = affine.pulled(run, case, given, by)
    assert_close(found, affine.oracle(case, given), 1e-12, str(case))
    random = np.random.default_rng(2)
    starts = given.starts
    for name in affine.Inputs._fields[:7]:
        if getattr(given, name) is None:
            continue
        way = random.normal(size=getattr(given, name).shape)
        way /= np.linalg.norm(way)
        ends = []
        for step in (1e-4, -1e-4):
            moved = given._replace(starts=starts, **{name: getattr(given, name) + step * way})
            values = affine.oracle(case, jax.tree.map(np.asarray, moved))
            ends.append(jax.tree.map(np.vdot, values, by))
        slope = sum(jax.tree.leaves(jax.tree.map(np.subtract, *ends))) / 2e-4
        assert_close(np.vdot(getattr(gradients, name), way), slope, 1e-6, f"{case} by {name}")


def check_equal(case, run=call):
    """Results and gradients are those of the reference."""
    found = affine.pulled(run, case, affine.inputs(case), affine.cotangents(case))
    plain = Case._field_defaults
    want = affine.expected(
        case._replace(implementation="xla", blocks=plain["blocks"], cores=plain["cores"])
    )
    assert_close(found, want, SINGLE if case.dtype == jnp.float32 else HALF, str(case))


def check_given(case, given, run=call):
    """`check_equal` for inputs of one's own."""
    given, by = affine.rounded(case, given), affine.cotangents(case)
    found, want = affine.pulled(run, case, given, by), affine.in_float64(case, given, by)
    assert_close(found, want, SINGLE if case.dtype == jnp.float32 else HALF, str(case))


def check_causality(case, run=call):
    """What y_t has of later tokens, and of other documents, is exactly 0."""
    given, by = affine.inputs(case), affine.cotangents(case)
    pull = affine.compiled(run, case)
    document = np.zeros((case.batch, case.length), int)
    if given.starts is not None:
        document = np.cumsum(given.starts, axis=1)
    token = np.arange(case.length)
    for t in (0, case.length // 3, case.length - 1):
        only = np.zeros_like(by.y)
        only[:, t] = by.y[:, t]
        none = jax.tree.map(jnp.zeros_like, by)
        found, gradients = pull(given, none._replace(y=jnp.asarray(only)))
        unseen = document != document[:, t : t + 1]
        later = unseen | (token > t if case.read == "after" else token >= t)
        for name, hidden in (
            ("q", np.broadcast_to(token != t, later.shape)),
            *((name, later) for name in ("k", "v", "lr", "log_decay")),
        ):
            if (gradient := getattr(gradients, name)) is not None:
                assert_zero(np.asarray(gradient, np.float32)[hidden], f"{case} y[{t}] by {name}")
        assert_zero(gradients.state[document[:, t] > 0], f"{case} y[{t}] by state")
        mixed = jax.tree.map(
            lambda a, b, t=t: jnp.concatenate([a[:, : t + 1], b[:, t + 1 :]], 1),
            given[:4], affine.inputs(case, seed=9)[:4],
        )  # fmt: skip
        moved, _ = pull(given._replace(**dict(zip("q k v lr".split(), mixed, strict=True))), none)
        assert_zero((moved.y - found.y)[:, : t + 1], f"{case} y up to {t} moved")


def check_isolation(case, run=call):
    """No row or head has anything of another."""
    given, by = affine.inputs(case), affine.cotangents(case)
    pull = affine.compiled(run, case)
    found, _ = pull(given, by)
    other = affine.inputs(case, seed=9)
    for axis in (0, 2):  # in states the heads are axis 1, in `initial` axis 0

        def halves(x, of):
            """(the first row or head, the others)."""
            of = of - 2 * (of == 2) * 0
            return jnp.split(jnp.asarray(x), [1], axis=of)

        places = affine.Inputs(*[axis] * 5, min(axis, 1), 0 if axis else None, None)
        places = affine.Results(axis, axis, min(axis, 1)), places

        def only(x, of):
            first, rest = halves(x, of)
            return jnp.concatenate([first, jnp.zeros_like(rest)], axis=of)

        masked = affine.Results(*(x if x is None else only(x, p) for x, p in zip(by, places[0])))
        _, gradients = pull(given, masked)
        for x, place in zip(gradients, places[1], strict=True):
            if x is not None and place is not None:
                assert_zero(halves(x, place)[1], f"{case} along {axis}")
        mixed = affine.Inputs(
            *(
                x if x is None or p is None
                else jnp.concatenate([halves(x, p)[0], halves(y, p)[1]], axis=p)
                for x, y, p in zip(given, other, places[1], strict=True)
            )
        )  # fmt: skip
        moved, _ = pull(mixed, by)
        for x, y, place in zip(moved, found, places[0], strict=True):
            if x is not None:
                assert_zero(halves(x, place)[0] - halves(y, place)[0], f"{case} along {axis}")


def split(place, carried=lambda state: state):
    """A run in two parts, the state carried from one to the other."""

    def run(case, given):
        parts, state = [], given.state
        for tokens in (slice(None, place), slice(place, None)):
            now = jax.tree.map(lambda x: x[:, tokens], given[:5])  # noqa: B023
            starts = None if given.starts is None else given.starts[:, tokens]
            found = call(case, affine.Inputs(*now, state, given.initial, starts))
            parts.append(found)
            state = carried(found.state)
        y, loss = jax.tree.map(lambda *x: jnp.concatenate(x, 1), *(part[:2] for part in parts))
        return affine.Results(y, loss, parts[1].state)

    return run


def check_documents(case, run=call):
    """A document gives what it gives alone, and the last one leaves the state."""
    lengths = (7, 1, 16, 16, 5)
    assert sum(lengths) == case.length
    starts = np.zeros((case.batch, case.length), bool)
    starts[:, np.cumsum(lengths)[:-1]] = True
    given = affine.inputs(case)._replace(starts=jnp.asarray(starts))
    found = run(case, given)
    state, begin = given.state, 0
    for length in lengths:
        tokens = slice(begin, begin + length)
        now = jax.tree.map(lambda x: x[:, tokens], given[:5])  # noqa: B023
        alone = affine.oracle(
            case._replace(length=length), affine.Inputs(*now, state, None, None)
        )  # fmt: skip
        name = f"{case} document of {length}"
        here = jax.tree.map(lambda x: x[:, tokens], found[:2])  # noqa: B023
        assert_close(here, alone[:2], SINGLE, name)
        state, begin = jnp.broadcast_to(given.initial, given.state.shape), begin + length
    assert_close(found.state, alone.state, SINGLE, f"{case} state")
