"""Newton-Schulz: reference, XLA form and interpreted kernel against the iteration in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from memjax import sharding
from memjax.miras import newton_schulz as engine
from memjax.miras.newton_schulz import orthogonal
from pallas_kernels import sequence
from pallas_kernels.newton_schulz import newton_schulz, reference, tpu

STEPS = 5
A, B, C = 3.4445, -4.7750, 2.0315
FORMS = {
    "xla": {"implementation": "xla"},
    "kernel": {"interpret": pltpu.InterpretParams(detect_races=True)},
}


def oracle(x, steps=STEPS):
    """One matrix after another, from the equations, always on the left side, in float64."""
    x = np.asarray(x, np.float64)
    result = np.zeros_like(x)
    for at in np.ndindex(x.shape[:-2]):
        y = x[at]
        if not np.any(y):
            continue
        y = y / np.linalg.norm(y)
        for _ in range(steps):
            gram = y @ y.T
            y = A * y + B * gram @ y + C * gram @ gram @ y
        result[at] = y
    return result


def oracle_pull(x, by, steps=STEPS):
    """The cotangent of x by the reference's own derivative, in float64."""
    with jax.enable_x64(True):
        x, by = (jnp.asarray(np.asarray(each, np.float64)) for each in (x, by))
        _, pull = jax.vjp(lambda x: reference.newton_schulz(x, steps), x)
        return np.asarray(pull(by)[0])


def draw(shape, dtype=jnp.float32, count=2):
    return [jnp.asarray(x, dtype) for x in np.random.default_rng(0).normal(size=(count, *shape))]


def check(form, x, by, tolerance, steps=STEPS, **how):
    """Value and gradient of a form: the error of a matrix, by the norm of what it should be."""
    y, pull = jax.vjp(lambda x: newton_schulz(x, steps, **how, **FORMS[form]), x)
    (by_x,) = pull(by)
    for got, want in ((y, oracle(x, steps)), (by_x, oracle_pull(x, by, steps))):
        assert got.shape == x.shape
        assert got.dtype == x.dtype
        error = np.linalg.norm(np.asarray(got, np.float64) - want, axis=(-2, -1))
        assert (error <= tolerance * np.linalg.norm(want, axis=(-2, -1))).all(), error


def bf16_tolerance(shape):
    """2^-8 times the root of the terms summed on the way: three products a step."""
    return 2.0**-8 * np.sqrt(3 * STEPS * max(shape[-2:]))


@pytest.mark.parametrize("shape", [(3, 6, 6), (2, 2, 4, 9), (9, 4), (1, 7), (7, 1)])
def test_the_reference_is_the_iteration(shape):
    x, way = np.random.default_rng(0).normal(size=(2, *shape))
    with jax.enable_x64(True):
        got = reference.newton_schulz(jnp.asarray(x))
        _, slope = jax.jvp(reference.newton_schulz, (jnp.asarray(x),), (jnp.asarray(way),))
    np.testing.assert_allclose(got, oracle(x), rtol=1e-9, atol=1e-12)
    differences = (oracle(x + 1e-6 * way) - oracle(x - 1e-6 * way)) / 2e-6
    np.testing.assert_allclose(slope, differences, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(24, 40), (3, 40, 24), (2, 3, 32, 32), (1, 16, 130), (20, 7)])
def test_fp32(form, shape):
    check(form, *draw(shape), 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(24, 40), (3, 40, 24), (2, 3, 32, 32), (1, 16, 130)])
def test_bf16(form, shape):
    check(form, *draw(shape, jnp.bfloat16), bf16_tolerance(shape))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(24, 40), (3, 40, 24), (3, 16, 16)])
def test_fp32_with_products_in_bf16(form, shape):
    x, by = draw(shape)
    check(form, x, by, bf16_tolerance(shape), compute="bfloat16")
    with pytest.raises(AssertionError):
        check(form, x, by, 1e-5, compute=jnp.bfloat16)
    check(form, x.astype(jnp.bfloat16), by.astype(jnp.bfloat16), 2.0**-7, compute="float32")


@pytest.mark.parametrize("precision", [None, "highest"])
def test_the_engine_takes_it_on_tpu(monkeypatch, precision):
    """Inside `vmap`, as a learner calls it, and not where the compiler still splits the program."""
    x, by = draw((2, 3, 16, 24))
    want, pull = jax.vjp(jax.vmap(jax.vmap(orthogonal)), x)
    asked, op = [], engine.newton_schulz

    def spied(x, steps, *, compute, implementation):
        asked.append((jnp.dtype(compute).name, implementation))
        return op(x, steps, compute=compute, interpret=True)

    monkeypatch.setattr(engine, "newton_schulz", spied)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    with jax.default_matmul_precision(precision):
        y, back = jax.vjp(jax.vmap(jax.vmap(orthogonal)), x)
    assert asked == [("bfloat16" if precision is None else "float32", "pallas")]
    tolerance = bf16_tolerance((16, 24)) if precision is None else 1e-4
    np.testing.assert_allclose(y, want, atol=tolerance)
    np.testing.assert_allclose(back(by)[0], pull(by)[0], atol=tolerance * np.abs(pull(by)[0]).max())
    with jax.set_mesh(sharding.make_mesh(data=2, devices=jax.devices()[:2])):
        jax.eval_shape(orthogonal, x)
    assert len(asked) == 1


@pytest.mark.parametrize("shape", [(3, 16, 16), (5, 64, 16), (1, 32, 64)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_small_matrices_side_by_side(shape, dtype):
    assert tpu.sizes(shape[0], shape[1:], dtype, dtype, STEPS).together > 1
    tolerance = 1e-5 if dtype == jnp.float32 else bf16_tolerance(shape)
    check("kernel", *draw(shape, dtype), tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps(form, steps):
    check(form, *draw((3, 8, 16)), 1e-5, steps)


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("shape", [(5, 16, 24), (24, 16)])
def test_matrices_that_fill_no_step_and_loops(monkeypatch, unroll, shape):
    monkeypatch.setattr(tpu, "sizes", lambda *_: tpu.Sizes(2, 1, unroll))
    check("kernel", *draw(shape), 1e-5)


def test_a_batch_that_is_no_multiple():
    count = 5
    shape = (64, 136)
    assert count % tpu.sizes(count, shape, jnp.float32, jnp.float32, STEPS).matrices
    check("kernel", *draw((count, *shape)), 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 8, 24), (3, 16, 16)])
def test_zeros_stay_zeros_beside_others(form, shape):
    x, by = draw(shape)
    x = x.at[1].set(0)
    y, pull = jax.vjp(lambda x: newton_schulz(x, **FORMS[form]), x)
    (by_x,) = pull(by)
    assert not y[1].any()
    assert not by_x[1].any()
    check(form, x, by.at[1].set(0), 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_the_size_of_x_counts_for_nothing(form, size):
    x, by = draw((2, 8, 24))
    y, pull = jax.vjp(lambda x: newton_schulz(size * x, **FORMS[form]), x)
    np.testing.assert_allclose(y, oracle(x), atol=1e-5)
    np.testing.assert_allclose(pull(by)[0], oracle_pull(x, by), atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_vmap_joins_the_matrices(form, monkeypatch):
    counts = []
    sizes = tpu.sizes
    monkeypatch.setattr(
        tpu, "sizes", lambda count, *more: counts.append(count) or sizes(count, *more)
    )

    def run(x):
        return newton_schulz(x, **FORMS[form])

    x, by = draw((2, 3, 16, 24))
    y, pull = jax.vjp(run, x)
    mapped, mapped_pull = jax.vjp(jax.vmap(jax.vmap(run)), x)
    np.testing.assert_allclose(mapped, y, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(mapped_pull(by)[0], pull(by)[0], rtol=1e-5, atol=1e-5)
    (one,) = jax.vmap(jax.vjp(run, x[0, 0])[1])(by[0])  # many cotangents of one matrix
    want = oracle_pull(jnp.stack([x[0, 0]] * 3), by[0])
    np.testing.assert_allclose(one, want, rtol=1e-4, atol=1e-4)
    if form == "kernel":
        assert counts.count(6) == 4, counts


def test_the_check_rejects_a_backward_pass_without_its_second_turn(monkeypatch):
    """2 A S in the place of A S + S A: the two are one only where A and S commute."""

    def faulty(a, b, kind, work):
        product = tpu.dot(a, b, kind, work.compute)
        return 2 * product if kind == "nn" else product + jnp.swapaxes(product, 1, 2)

    monkeypatch.setattr(tpu, "_product_and_transposed", faulty)
    for form in FORMS:
        with pytest.raises(AssertionError):
            check(form, *draw((2, 8, 24)), 1e-5)
    with pytest.raises(AssertionError):
        check("kernel", *draw((2, 8, 24), jnp.bfloat16), bf16_tolerance((8, 24)))


def test_the_check_rejects_another_coefficient(monkeypatch):
    monkeypatch.setattr(tpu, "COEFFICIENTS", (A, B, C + 1e-3))
    for form in FORMS:
        with pytest.raises(AssertionError):
            check(form, *draw((2, 8, 24)), 1e-5)


@pytest.mark.parametrize("shape", [(0, 8, 16), (2, 0, 8, 16)])
def test_no_matrices_are_no_matrices(shape):
    assert newton_schulz(jnp.zeros(shape), implementation="xla").shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros(3)}, r"x \(3,\) must be"),
        ({"x": jnp.zeros((2, 0, 3))}, r"x \(2, 0, 3\) must be"),
        ({"x": jnp.zeros((2, 3), jnp.float16)}, "x float16 must be float32 or bfloat16"),
        ({"x": jnp.zeros((2, 3), jnp.int32)}, "x int32 must be"),
        ({"compute": jnp.float16}, "compute float16 must be"),
        ({"steps": 0}, "steps 0 must be"),
        ({"steps": True}, "steps True must be"),
        ({"implementation": "triton"}, "implementation 'triton' must be"),
        ({"implementation": "xla", "interpret": True}, "interpret is of the kernel"),
        ({"x": jnp.zeros((4096, 2048)), "interpret": True}, "MiB of VMEM"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        newton_schulz(**{"x": jnp.zeros((2, 3, 4))} | change)


@pytest.mark.parametrize("dtypes", [("bfloat16",) * 2, ("float32",) * 2, ("float32", "bfloat16")])
@pytest.mark.parametrize("count", [1, 7, 64, 1000])
def test_steps_are_full_and_fit(dtypes, count):
    for short in (1, 16, 48, 64, 128, 200, 256, 512):
        for shape in ((short, short), (short, 512), (512, short)):
            matrices, together, _ = tpu.sizes(count, shape, *dtypes, STEPS)
            assert matrices % together == 0
            assert 1 <= matrices < count + together
            assert -count % matrices < together * -(-count // matrices)
            assert matrices * tpu.room(shape, *dtypes, STEPS) <= sequence.VMEM
