"""Every row of the zoo equals an oracle of its own, and what closed forms are made of is exact."""

import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import miras
from memjax.miras import products, zoo
from tests.contracts import scenes, values
from tests.contracts import zoo as table
from tests.contracts.scenes import assert_close, float64

FORMS = ("recurrent", "chunkwise", "step")


def test_every_row_has_an_oracle():
    rows = {name for name in dir(zoo) if inspect.isfunction(getattr(zoo, name)) and name[0] != "_"}
    made = {name for name in rows if getattr(zoo, name).__module__ == zoo.__name__}
    assert made == {*table.MATRIX, *(case.name for case in table.DEEP)}


def test_the_page_lists_every_row():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "zoo.md").read_text()
    for name in (*table.MATRIX, *(case.name for case in table.DEEP)):
        assert f"| `{name}` |" in page, f"{name}: run python -m tests.contracts.zoo > docs/zoo.md"


@pytest.mark.parametrize("form", [*FORMS, "chunkwise 1", "chunkwise 5"])
@pytest.mark.parametrize("name", table.MATRIX)
@float64
def test_the_recurrence_of_the_paper(name, form):
    which, _, block = form.partition(" ")
    got, want = table.matrix_results(name, which, int(block) if block else None)
    assert_close(got, want, 1e-10, f"{name} {form}")


@pytest.mark.parametrize("case", table.DEEP, ids=lambda case: case.name)
class TestDeepRows:
    @pytest.fixture(autouse=True)
    def _forget(self):
        yield
        scenes.forget()

    @pytest.mark.parametrize("which", FORMS)
    def test_equals_the_oracle(self, case, which):
        values.check_oracle(scenes.FORMS, case, which)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 21, 64])
@float64
def test_the_inverse(count):
    random = np.random.default_rng(count)
    lower = np.tril(random.normal(size=(count, count)), -1) / np.sqrt(count)
    inverse = products.unit_lower_inverse(jnp.asarray(lower))
    want = np.linalg.inv(np.eye(count) + lower)
    assert_close(inverse, want, 1e-11)
    weight = random.normal(size=(count, count))
    got = jax.grad(lambda a: jnp.vdot(weight, products.unit_lower_inverse(a)))(jnp.asarray(lower))
    assert_close(got, -np.tril(want.T @ weight @ want.T, -1), 1e-10)


def test_the_inverse_where_powers_grow():
    # (-A)^32 reaches 1e17 on the way to an inverse of entries at most 1: in fp32 a sum of powers
    # would lose every digit
    lower = np.tril(np.ones((64, 64), np.float32), -1)
    inverse = products.unit_lower_inverse(jnp.asarray(lower))
    want = np.eye(64) - np.eye(64, k=-1)
    assert np.abs(np.linalg.matrix_power(lower.astype(np.float64), 32)).max() > 1e17
    assert_close(inverse, want, 1e-6)


def _decayed_rows(count):
    """Sets of rows x and y, gates of which some are 0 and some all but 0, and three documents."""
    random = np.random.default_rng(count)
    x, y = random.normal(size=(2, 2, count, 3))
    gate = random.uniform(0, 1, (count, 3)) * (random.uniform(size=(count, 3)) > 0.1)
    gate[1::5] = np.exp(-20)
    document = np.arange(count) // (count // 3 + 1)
    return x, y, gate, document


def _decayed(x, y, gate, document):
    """What `products.decayed` gives where it is defined, and 0 elsewhere."""
    found = products.decayed(
        tuple(x), tuple(y), gate, (True, False), document, np.dtype(np.float64)
    )
    same = document[:, None] == document[None, :]
    masks = jnp.stack([jnp.tril(same), jnp.tril(same, -1)])
    last = (document == document[-1])[:, None]
    scores, writes = jnp.where(masks, found.scores, 0), jnp.where(last, found.writes, 0)
    return scores, found.reads, writes, found.kept


@pytest.mark.parametrize("count", [1, 2, 7, 16, 33])
@float64
def test_products_of_rows_under_channelwise_decay(count):
    x, y, gate, document = _decayed_rows(count)
    scores, reads = np.zeros((2, 2, count, count)), np.zeros_like(x)
    writes, first = np.zeros_like(y), np.searchsorted(document, document)
    for i in range(count):
        for m, end in enumerate((i + 1, i)):  # with the gate of i and without
            reads[m, i] = x[m, i] * gate[first[i] : end].prod(axis=0)
            for j in range(first[i], end):
                passed = gate[j + 1 : end].prod(axis=0)
                scores[:, m, i, j] = (x[m, i] * passed * y[:, j]).sum(axis=-1)
        if document[i] == document[-1]:
            writes[:, i] = y[:, i] * gate[i + 1 :].prod(axis=0)
    kept = gate[first[-1] :].prod(axis=0)
    got = jax.jit(_decayed)(x, y, gate, document)
    assert_close(got, (scores, reads, writes, kept), 1e-12)


@pytest.mark.parametrize("count", [1, 7, 16])
@float64
def test_derivatives_under_channelwise_decay(count):
    """Exact where a gate is 0, of first and second order: as of plain products in their place."""
    x, y, gate, document = (jnp.asarray(z) for z in _decayed_rows(count))

    def plain(x, y, gate):
        same, first = document[:, None] == document[None, :], jnp.diff(document, prepend=-1) != 0
        between = products.segment_products(gate, same)
        prefix = products.prefix_products(between, gate, first)
        above = jnp.where(first[:, None], 1, jnp.roll(prefix, 1, axis=0))
        earlier = jnp.roll(between, 1, axis=0) * jnp.tril(same, -1)[..., None]
        scores = jnp.stack(
            [jnp.einsum("ik,ijk,ljk->lij", *z, y) for z in ((x[0], between), (x[1], earlier))], 1
        )
        return scores, jnp.stack([prefix, above]) * x, between[-1] * y, prefix[-1]

    random = np.random.default_rng(0)
    weights = [jnp.asarray(random.normal(size=z.shape)) for z in plain(x, y, gate)]
    along = [jnp.asarray(random.normal(size=z.shape)) for z in (x, y, gate)]

    def derivatives(form):
        def total(*rows):
            return sum(jnp.vdot(w, z**2) for w, z in zip(weights, form(*rows), strict=True))

        def slope(*rows):
            found = jax.grad(total, argnums=(0, 1, 2))(*rows)
            return sum(jnp.vdot(a, b) for a, b in zip(along, found, strict=True)), found

        second, first = jax.jit(jax.grad(slope, argnums=(0, 1, 2), has_aux=True))(x, y, gate)
        return first, second

    got = derivatives(lambda x, y, gate: _decayed(x, y, gate, document))
    assert_close(got, derivatives(plain), 1e-11)


@pytest.mark.parametrize("name", ["gated_delta_net", "kda", "gla"])
def test_long_and_hard_decay(name):
    """Decays down to exactly 0 over 4,096 tokens: values and gradients finite, in fp32."""
    time, dim = 4096, 8
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(z, jnp.float32) for z in random.normal(size=(3, 1, time, 1, dim)))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    shape = (1, time, 1, dim) if name != "gated_delta_net" else (1, time, 1)
    retain = random.uniform(0, 1, shape) ** 20
    retain[:, ::7] = 0
    gates = miras.Gates(jnp.ones((1, time, 1)), retain=jnp.asarray(retain, jnp.float32))
    rule = getattr(zoo, name)()

    def loss(form, q, k, v, gates):
        state = miras.start(rule, rule.init(jax.random.key(0), dim, dim), 1)
        return jnp.sum(form(rule, state, q, k, v, gates)[0] ** 2)

    results = [
        jax.jit(jax.value_and_grad(lambda *a, f=form: loss(f, *a), argnums=(0, 1, 2, 3)))(
            q, k, v, gates
        )
        for form in (miras.recurrent, miras.chunkwise)
    ]
    assert_close(results[1], results[0], 2e-5)


@pytest.mark.parametrize(
    "parts",
    [
        (miras.mlp(depth=1), miras.l2(), 1),
        (miras.matrix(), miras.dot(), 1),
        (miras.matrix(), miras.l2(), 2),
    ],
)
def test_implicit_says_what_it_needs(parts):
    structure, bias, chunk = parts
    with pytest.raises(ValueError, match="implicit"):
        miras.Rule(structure, bias, miras.none(), miras.implicit(), chunk=chunk)


def test_decay_before_what():
    with pytest.raises(ValueError, match="before"):
        miras.decay(before="step")
