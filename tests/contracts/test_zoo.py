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


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("count", [1, 2, 7, 16, 33])
@float64
def test_the_decayed_scores(count, inclusive):
    random = np.random.default_rng(count)
    x, y = random.normal(size=(2, count, 3))
    gate = random.uniform(0, 1, (count, 3)) * (random.uniform(size=(count, 3)) > 0.1)  # some are 0
    got = products.decayed_scores(
        jnp.asarray(x), jnp.asarray(y), jnp.asarray(gate), inclusive, np.dtype(np.float64)
    )
    want = np.zeros((count, count))
    for i in range(count):
        for j in range(i + inclusive):
            passed = gate[j + 1 : i + inclusive].prod(axis=0)
            want[i, j] = (x[i] * passed * y[j]).sum()
    if not inclusive:
        got = jnp.tril(got, -1)
    assert_close(got, want, 1e-12)


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
