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

from pallas_kernels import decays, sequence
from pallas_kernels.blocks import Blocks
from tests.pallas_kernels import affine
from tests.pallas_kernels.affine import Case, assert_close, assert_zero, call

SINGLE = 1e-5
# Rounding an operand moves each term of a product by at most 2^-8 of itself, each its own way:
# however many terms it sums, the sum moves by about that of its usual size. From an input to a
# result or a gradient there are up to eight products in a row, of two operands each: prediction,
# scores, solution and read, and in the backward pass as many transposed ones.
HALF = 2**-8 * np.sqrt(2 * 8)


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
         blocks=Blocks(32, 1, 4, 2), unit_eps=0.3),
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
        wide = jax.tree.map(affine.wide, (given, by))
        found, gradients = affine.pulled(run, case, *wide)
        given, by, gradients = jax.tree.map(np.asarray, (*wide, gradients))
    assert_close(found, affine.oracle(case, given), 1e-12, str(case))
    random = np.random.default_rng(2)
    for name in affine.Inputs._fields[:7]:
        if getattr(given, name) is None:
            continue
        way = random.normal(size=getattr(given, name).shape)
        way /= np.linalg.norm(way)
        ends = []
        for step in (1e-4, -1e-4):
            moved = given._replace(**{name: getattr(given, name) + step * way})
            ends.append(jax.tree.map(np.vdot, affine.oracle(case, moved), by))
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


def check_given(case, given, half=HALF):
    """`check_equal` for inputs of one's own."""
    given, by = affine.rounded(case, given), affine.cotangents(case)
    found, want = affine.pulled(call, case, given, by), affine.in_float64(case, given, by)
    assert_close(found, want, SINGLE if case.dtype == jnp.float32 else half, str(case))


def check_causality(case, run=call):
    """What y_t has of later tokens, and of other documents, is exactly 0."""
    given, by = affine.inputs(case), affine.cotangents(case)
    pull = affine.compiled(run, case)
    token, document = np.arange(case.length), np.zeros((case.batch, case.length), int)
    if given.starts is not None:
        document = np.cumsum(given.starts, axis=1)
    other = affine.inputs(case, seed=9)
    for t in (0, case.length // 3, case.length - 1):
        only = jax.tree.map(jnp.zeros_like, by)
        only = only._replace(y=only.y.at[:, t].set(by.y[:, t]))
        found, gradients = pull(given, only)
        later = token > t if case.read == "after" else token >= t
        unseen = later | (document != document[:, t : t + 1])
        hidden = {"q": np.broadcast_to(token != t, unseen.shape)}
        hidden |= dict.fromkeys(("k", "v", "lr", "log_decay"), unseen)
        for name, where in hidden.items():
            if (gradient := getattr(gradients, name)) is not None:
                assert_zero(np.asarray(gradient)[where], f"{case} y[{t}] by {name}")
        assert_zero(gradients.state[document[:, t] > 0], f"{case} y[{t}] by state")

        def mixed(a, b, t=t):
            return jnp.concatenate([a[:, : t + 1], b[:, t + 1 :]], axis=1)

        changed = affine.Inputs(*jax.tree.map(mixed, given[:5], other[:5]), *given[5:])
        moved, _ = pull(changed, only)
        assert_zero((moved.y - found.y)[:, : t + 1], f"{case} y up to {t} moved")


# Axes of rows and of heads.
AXES = (
    (affine.Results(0, 0, 0), affine.Inputs(0, 0, 0, 0, 0, 0, None, None)),
    (affine.Results(2, 2, 1), affine.Inputs(2, 2, 2, 2, 2, 1, 0, None)),
)


def check_isolation(case, run=call):
    """No row, and no head, has anything of another."""
    given, by = affine.inputs(case), affine.cotangents(case)
    pull = affine.compiled(run, case)
    found, _ = pull(given, by)
    nothing, other = jax.tree.map(jnp.zeros_like, by), affine.inputs(case, seed=9)
    for of_results, of_inputs in AXES:
        name = f"{case} along {of_results.y}"
        _, gradients = pull(given, joined(by, nothing, of_results))
        assert_zero(cut(gradients, of_inputs, slice(1, None)), f"{name} by the first ")
        moved, _ = pull(joined(given, other, of_inputs), by)
        still = (cut(results, of_results, slice(1)) for results in (moved, found))
        assert_zero(jax.tree.map(jnp.subtract, *still), f"{name} moved ")


def cut(arrays, axes, part):
    """A part of every array that has the axis."""
    return [
        x[(slice(None),) * axis + (part,)]
        for x, axis in zip(arrays, axes, strict=True)
        if x is not None and axis is not None
    ]


def joined(first, others, axes):
    """The first row or head of `first`, the rest of `others`; what lacks the axis stays."""

    def one(x, y, axis):
        if x is None or axis is None:
            return x
        return jnp.concatenate(cut([x], [axis], slice(1)) + cut([y], [axis], slice(1, None)), axis)

    return type(first)(*map(one, first, others, axes))


def part(given, begin, end, state, starts):
    """Some of the tokens, with another state and other documents."""
    tokens = jax.tree.map(lambda x: x[:, begin:end], given[:5])
    return affine.Inputs(*tokens, state, given.initial, starts)


def split(place, carried=lambda state: state):
    """A run in two parts, the state carried from one to the other."""

    def run(case, given):
        starts = (None, None)
        if given.starts is not None:
            starts = given.starts[:, :place], given.starts[:, place:]
        first = call(case, part(given, 0, place, given.state, starts[0]))
        second = call(case, part(given, place, None, carried(first.state), starts[1]))
        both = jax.tree.map(lambda *x: jnp.concatenate(x, 1), first[:2], second[:2])
        return affine.Results(*both, second.state)

    return run


LENGTHS = (7, 1, 16, 16, 5)  # of documents


def check_documents(case, run=call):
    """A document gives what it gives alone, and the last one leaves the state."""
    starts = np.zeros((case.batch, case.length), bool)
    starts[:, np.cumsum(LENGTHS)[:-1]] = True
    given = affine.inputs(case)._replace(starts=jnp.asarray(starts))
    found = run(case, given)
    state, begin = given.state, 0
    for length in LENGTHS:
        end = begin + length
        one = part(given, begin, end, state, None)
        alone = affine.oracle(case._replace(length=length), one)
        here = [None if x is None else x[:, begin:end] for x in found[:2]]
        assert_close(here, list(alone[:2]), SINGLE, f"{case} document of {length}")
        state, begin = jnp.broadcast_to(given.initial, given.state.shape), end
    assert begin == case.length
    assert_close(found.state, alone.state, SINGLE, f"{case} state")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("op", affine.OPS)
def test_reference(op, decay, packed):
    case = Case(op, decay, packed=packed, length=11, heads=1, key=5, value=3)
    case = case._replace(read="before" if packed else "after")
    check_reference(case)
    if op == "delta_rule":
        check_reference(case._replace(first=False, unit_eps=0.3))


@pytest.mark.parametrize("case", both(*CASES), ids=str)
def test_equal(case):
    check_equal(case)


def test_equal_on_two_cores():
    """Which share the rows and the groups of heads."""
    case = Case("linear_attention", implementation="pallas", cores=2)
    found = jax.jit(lambda given: call(case, given))(affine.inputs(case))
    assert_close(found, affine.oracle(case, affine.inputs(case)), SINGLE)


@pytest.mark.parametrize(
    "case",
    [
        *both(Case(packed=True, dtype=jnp.bfloat16)),
        Case(decay="channel", dtype=jnp.bfloat16, length=130, key=128, blocks=Blocks(64, 1, 2)),
        Case("linear_attention", "channel", dtype=jnp.bfloat16, implementation="pallas"),
    ],
    ids=str,
)
def test_equal_in_bfloat16(case):
    check_equal(case)


def sweep():
    """Every op, decay and option; lengths, sizes and dtypes at random."""
    random = np.random.default_rng(0)
    for op, decay, first, read, packed, form in itertools.product(
        affine.OPS, ("none", "head", "channel"), (True, False), ("after", "before"), (True, False),
        FORMS,
    ):  # fmt: skip
        if op == "linear_attention" and not first:
            continue
        key, value = random.choice([64, 128, 256], 2).tolist()
        heads = int(random.choice([2, 4] if 64 in (key, value) else [1, 2, 3]))
        sizes = Blocks(int(random.choice([16, 32, 64])), *random.integers(1, 4, 2).tolist())
        length, batch = int(random.choice([1, 45, 130])), int(random.integers(1, 3))
        dtype = random.choice([jnp.float32, jnp.bfloat16])
        unit_eps = [None, 0.3][random.integers(2)] if op == "delta_rule" else None
        yield Case(
            op, decay, first, read, packed, length, batch, heads, key, value, sizes, dtype, form,
            unit_eps=unit_eps,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", [*sweep()], ids=str)
def test_equal_for_all_options(case):
    check_equal(case)


STREAMS = (
    Case(decay="channel", packed=True, blocks=Blocks(16, 1, 2)),
    Case(read="before", first=False),
    Case("linear_attention", packed=True, read="before"),
)


@pytest.mark.parametrize("case", [*STREAMS, STREAMS[2]._replace(implementation="pallas")], ids=str)
def test_causality(case):
    check_causality(case)


@pytest.mark.parametrize("case", [*STREAMS, STREAMS[2]._replace(implementation="pallas")], ids=str)
def test_isolation(case):
    check_isolation(case)


@pytest.mark.parametrize(
    ("case", "place"),
    [(Case(packed=True, read="before"), 20), (STREAMS[2], 1), (STREAMS[2], 44)],
)
def test_split(case, place):
    check_equal(case, split(place))


def test_split_of_the_kernel():
    check_equal(Case("linear_attention", implementation="pallas"), split(20))


@pytest.mark.parametrize("case", both(STREAMS[0], STREAMS[2]), ids=str)
def test_documents_are_alone(case):
    check_documents(case)


# One fault for each check, that it must reject.


def altered(change, run=call):
    """A run whose inputs are changed first."""
    return lambda case, given: run(case, change(given))


def added(change):
    """A run whose outputs have a trifle added: below rounding, but with a gradient."""

    def run(case, given):
        found = call(case, given)
        return found._replace(y=found.y + 1e-20 * change(given.v))

    return run


def late(case, given):
    return affine.reference(case._replace(first=False), given)


def unwritten(given):
    return given._replace(lr=given.lr.at[:, -1].set(0.0))


def unlearned(given):
    return given._replace(log_decay=jax.lax.stop_gradient(given.log_decay))


def without_last_start(given):
    last = jnp.cumsum(given.starts, axis=1) == jnp.sum(given.starts, axis=1, keepdims=True)
    return given._replace(starts=given.starts & ~last)


def rounded(state):
    return state.astype(jnp.bfloat16).astype(state.dtype)


TINY, PACKED = Case(length=11, key=5, value=3), Case(packed=True)


@pytest.mark.parametrize(
    ("check", "case", "run"),
    [
        (check_reference, TINY, late),
        (check_reference, TINY, altered(unlearned, affine.reference)),
        (check_equal, Case(), altered(unwritten)),
        (check_equal, Case(), altered(unlearned)),
        (check_equal, Case(), split(20, rounded)),
        (check_equal, Case(dtype=jnp.bfloat16), altered(unwritten)),
        (check_causality, Case(), added(lambda v: jnp.roll(v, -1, axis=1))),
        (check_causality, PACKED, added(lambda v: jnp.roll(v, 20, axis=1))),
        (check_isolation, Case(), added(lambda v: v[::-1])),
        (check_isolation, Case(), added(lambda v: v[:, :, ::-1])),
        (check_documents, PACKED, altered(without_last_start)),
    ],
)
def test_faults_are_found(check, case, run):
    with pytest.raises(AssertionError):
        check(case, run)


def test_faults_inside_are_found(monkeypatch):
    """A state that does not decay; a backward kernel that goes through the steps in order."""
    with monkeypatch.context() as patched:
        patched.setattr(decays.HeadDecay, "keep", lambda self, w, at: w)
        with pytest.raises(AssertionError, match="off by"):
            check_equal(Case())
    monkeypatch.setattr(sequence._Specs, "_spec", lambda self, *place: pl.BlockSpec(*place))
    with pytest.raises(AssertionError, match="off by"):
        check_equal(Case("linear_attention", implementation="pallas"))


def test_races_are_found(monkeypatch, races):
    """Two cores that share the steps of one sequence."""
    make = sequence.pltpu.CompilerParams

    def shared(**options):
        return make(**options | {"dimension_semantics": ("parallel",) * 3})

    monkeypatch.setattr(sequence.pltpu, "CompilerParams", shared)
    case = Case("linear_attention", length=64, batch=1, implementation="pallas", cores=2)
    try:
        jax.block_until_ready(call(case, affine.inputs(case)))
    except jax.errors.JaxRuntimeError as error:  # as JAX 0.12 tells it
        assert "RACE DETECTED" in str(error)  # noqa: PT017
    else:
        assert any(state.races_found for state in races)
    races.clear()


# Hard cases.


@pytest.mark.parametrize("rate", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_key_for_all_tokens(dtype, rate):
    """Powers of the system grow beyond any number, its inverse does not.

    All errors add up along the one key, where those of neighbours cancel; their roundings do not:
    in bf16 it is the root of the terms that counts.
    """
    case = Case(decay="none", length=128, blocks=Blocks(128, 1, 2), dtype=dtype)
    given = affine.inputs(case)
    same = jnp.zeros_like(given.k).at[..., 3].set(1.0)
    check_given(
        case,
        given._replace(k=same, lr=jnp.full_like(given.lr, rate)),
        2**-8 * np.sqrt(2 * case.length),
    )


def test_rates_up_to_two():
    """Negative eigenvalues."""
    case = Case(length=130, blocks=Blocks(64, 1, 2))
    given = affine.inputs(case)
    check_given(case, given._replace(lr=2 * given.lr, log_decay=given.log_decay / 100))


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_forgetting_all_and_nothing(decay):
    case = Case(decay=decay, length=130, blocks=Blocks(64, 1, 2))
    given = affine.inputs(case)
    mixed = jnp.where(given.log_decay < np.log(0.9), -30.0, 0.0)
    assert 0.2 < float(jnp.mean(mixed == 0)) < 0.8
    check_given(case, given._replace(log_decay=mixed))


def test_long_strong_decay():
    case = Case(decay="channel", length=500, batch=1, blocks=Blocks(64, 1, 2), dtype=jnp.bfloat16)
    given = affine.inputs(case)
    check_given(case, given._replace(log_decay=10 * given.log_decay))
