"""The parts of rules alone: signals, kernels, links, orthogonalisation, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import miras
from memjax.miras import passes
from memjax.miras.newton_schulz import orthogonal
from tests.contracts.scenes import assert_close, float64

HUBER = [miras.huber(kind, sharpness=1e8) for kind in ("coordinate", "norm", "switch")]
BIASES = [miras.l2(), miras.dot(), miras.robust(), *HUBER]


def tokens(bias, count=40):
    """Answers, values, and thresholds on both sides of the errors."""
    random = np.random.default_rng(0)
    y, v = random.normal(size=(2, count, 3))
    d = random.uniform(0.1, 3.0, count)
    return jnp.asarray(y), jnp.asarray(v), ((jnp.asarray(d),) if bias.needs_threshold else ())


@pytest.mark.parametrize("bias", BIASES, ids=repr)
@float64
def test_the_signal_is_the_derivative_of_the_loss(bias):
    """Of huber with tanh(nu r) as good as sign(r)."""
    y, v, more = tokens(bias)
    want = jax.grad(lambda y: jnp.sum(bias.loss(y, v, *more)))(y)
    assert_close(bias.signal(y, v, *more), want, 1e-12)


@float64
def test_the_smooth_signal_of_lp():
    """That of |r|^p, but for the smooth modulus and sign; p = 2 is twice l2."""
    y, v, _ = tokens(miras.lp())
    r = y - v
    for p in (1.0, 1.5, 3.0, 4.0):
        bias = miras.lp(p, sharpness=1e8)
        assert_close(bias.signal(y, v), p * jnp.sign(r) * jnp.abs(r) ** (p - 1), 1e-2)
        away = jnp.where(jnp.abs(r) > 0.1, r, 1.0)  # |r| there is right to 1e-6 / (2 r^2)
        zero = jnp.zeros_like(r)
        want = p * jnp.sign(away) * jnp.abs(away) ** (p - 1)
        assert_close(bias.signal(away, zero), want, 2e-4)
        assert_close(bias.loss(away, zero), jnp.sum(jnp.abs(away) ** p, -1), 2e-4)
    assert_close(miras.lp(2.0, sharpness=1e8).loss(y, v), 2 * miras.l2().loss(y, v), 1e-5)


@pytest.mark.parametrize("bias", [miras.lp(), miras.lp(1.0), *BIASES, miras.huber()], ids=repr)
def test_signals_have_finite_derivatives_where_the_answer_is_right(bias):
    v = jnp.ones((2, 3))
    more = (jnp.ones(2),) if bias.needs_threshold else ()
    signal, by_y = jax.jvp(lambda y: bias.signal(y, v, *more), (v,), (jnp.ones_like(v),))
    assert bool(jnp.isfinite(bias.loss(v, v, *more)).all())
    assert bool(jnp.isfinite(signal).all())
    assert bool(jnp.isfinite(by_y).all())


FEATURES = [miras.polynomial(1), miras.polynomial(3), miras.taylor_exp(2), miras.taylor_exp(4)]


@pytest.mark.parametrize("features", FEATURES, ids=repr)
@float64
def test_polynomial_features_have_the_kernel_of_their_coefficients(features):
    """phi(q) . phi(k) = sum_i c_i^2 (q . k)^i."""
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, 5, 3))
    slow = jax.tree.map(lambda c: jnp.asarray(random.normal(size=c.shape)), features.init())
    fact = np.cumprod([1, *range(1, features.degree + 1)])
    squares = np.square(slow["taylor"]) if slow else 1 / fact
    got = features.apply(slow, jnp.asarray(q)) @ features.apply(slow, jnp.asarray(k)).T
    assert got.shape == (5, 5)
    assert features.apply(slow, jnp.asarray(q)).shape[1] == features.dim(3)
    assert_close(got, sum(c * (q @ k.T) ** i for i, c in enumerate(squares)), 1e-12)


@float64
def test_polynomial_features_begin_as_those_of_exp():
    for degree in (1, 2, 3):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
        polynomial, exp = miras.polynomial(degree), miras.taylor_exp(degree)
        assert_close(polynomial.apply(polynomial.init(), x), exp.apply({}, x), 1e-7)


def test_features_on_paper():
    x = jnp.asarray([[2.0, -3.0]])
    assert_close(miras.elu1().apply({}, x), np.array([[3.0, np.exp(-3.0)]]), 1e-6)
    # u = [2, 0, 0, 3], and turned by one to three places [3, 2, 0, 0], [0, 3, 2, 0], [0, 0, 3, 2]
    assert_close(miras.dpfp(2).apply({}, x), np.array([[6.0, 0, 0, 0, 0, 0, 0, 0]]), 1e-6)
    assert_close(miras.dpfp(3).apply({}, x)[:, 8:], np.array([[0, 0, 0, 6.0]]), 1e-6)
    assert miras.dpfp(3).dim(2) == 12


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6), (1, 5), (5, 1), (2, 3, 4, 5)])
@float64
def test_newton_schulz_brings_singular_values_near_1(shape):
    """Those above 1/50 of the norm, as its authors say of 5 rounds; the vectors stay."""
    x = np.random.default_rng(0).normal(size=shape)
    got = np.asarray(orthogonal(jnp.asarray(x)))
    u, s, v = np.linalg.svd(x, full_matrices=False)
    values = np.einsum("...ki,...kl,...jl->...ij", u, got, v)
    large = s / np.linalg.norm(s, axis=-1, keepdims=True) > 0.02
    diagonal = np.diagonal(values, axis1=-2, axis2=-1)
    assert ((diagonal > 0.68) & (diagonal < 1.21))[large].all(), diagonal
    off = values * (1 - np.eye(values.shape[-1]))
    assert np.abs(off).max() < 1e-10
    assert_close(orthogonal(jnp.asarray(7 * x)), got, 1e-10)  # no matter how long x is


@pytest.mark.parametrize("size", [0.0, 1e-25, 1e-12, 1e15])
def test_newton_schulz_of_any_size_is_finite(size):
    x = size * jnp.eye(3)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(orthogonal(x)))(x)
    assert bool(jnp.isfinite(value))
    assert bool(jnp.isfinite(gradient).all())
    if size == 0:
        assert value == 0
        assert bool((gradient == 0).all())


@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 4), (5, 2), (1, 3)])
@float64
def test_the_derivative_of_newton_schulz_is_that_of_differences(shape):
    x, weights, way = np.random.default_rng(0).normal(size=(3, *shape))

    def value(x):
        return jnp.sum(weights * orthogonal(jnp.asarray(x)))

    gradient, eps = jax.grad(value)(x), 1e-5
    want = (value(x + eps * way) - value(x - eps * way)) / (2 * eps)
    assert_close(jnp.sum(gradient * way), want, 1e-7)
    assert abs(jnp.sum(gradient * way)) > 1e-2


@float64
def test_links_on_paper():
    a = jnp.asarray([[2.0, 0.0], [-1.0, 2.0]])
    assert_close(miras.lq(2.0).link(a), a, 0)
    assert_close(miras.lq(4.0).link(a), a / 33**0.5, 1e-10)
    assert_close(miras.lq(1.5).link(a), a * (2 * 2**1.5 + 1) ** (1 / 3), 1e-7)
    w = miras.simplex(temperature=2.0, total=3.0).link(a)
    assert_close(jnp.sum(w, axis=0), np.full(2, 3.0), 1e-12)
    assert_close(w[0] / w[1], np.exp([1.5, -1.0]), 1e-12)
    # what is added to a column does not show, so that A may stand for log W
    assert_close(miras.simplex().link(a + 5), miras.simplex().link(a), 1e-12)
    assert_close(miras.simplex().link(jnp.log(w / 3)), w / 3, 1e-12)
    net = miras.elastic_net(2.0).link(a)
    assert_close(net, np.array([[1.0, 0.0], [-np.arctan(0.5) * 2 / np.pi, 1.0]]), 1e-9)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e12])
def test_the_link_of_lq_keeps_to_the_range_of_its_dtype(size):
    a = size * jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    exact = np.asarray(a, np.float64)
    want = exact / (exact**4).sum() ** 0.5
    assert_close(miras.lq(4.0).link(a), want, 1e-5)
    by_a = jax.grad(lambda a: jnp.sum(miras.lq(4.0).link(a)))(a)
    assert bool(jnp.isfinite(by_a).all())


@pytest.mark.parametrize("q", [1.5, 4.0, 7.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (48, 4), (61, 2)])
@float64
def test_the_derivative_of_lq_is_that_of_its_equation(q, shape):
    a, by = np.random.default_rng(0).normal(size=(2, 3, *shape))

    def equation(a):
        norm = jnp.sum((a**2) ** (q / 2), axis=(-2, -1), keepdims=True) ** (1 / q)
        return a / norm ** (q - 2)

    got, want = (jax.vjp(link, jnp.asarray(a)) for link in (miras.lq(q).link, equation))
    assert_close(got[0], want[0], 1e-9)
    assert_close(got[1](by)[0], want[1](by)[0], 1e-9)


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 24, 37, 256])
def test_passes_are_reductions(rows):
    x, y = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, rows, 3)), jnp.float32)
    found = passes.total(jnp.multiply, x, y)
    assert_close(found, jnp.sum(x * y, axis=(-2, -1), keepdims=True), 1e-5)
    found = passes.largest(jnp.negative, x)
    assert_close(found, jnp.max(-x, axis=(-2, -1), keepdims=True), 0)
    assert_close(passes.largest_of_columns(x), jnp.max(x, axis=-2, keepdims=True), 0)


@float64
def test_renormalised_columns_have_the_norms_of_the_start():
    random = np.random.default_rng(0)
    a, begin = (jnp.asarray(random.normal(size=(2, 4, 3))) for _ in range(2))
    got = miras.renormalise().close(a, begin)
    assert_close(jnp.linalg.norm(got, axis=1), jnp.linalg.norm(begin, axis=1), 1e-9)
    cosine = jnp.sum(got * a, 1) / jnp.linalg.norm(got, axis=1) / jnp.linalg.norm(a, axis=1)
    assert_close(cosine, np.ones((2, 3)), 1e-12)


@float64
def test_lq_2_is_decay():
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(1, 9, 1, 3))) for _ in range(3))
    gates = miras.Gates(jnp.full((1, 9, 1), 0.2), retain=jnp.full((1, 9, 1), 0.9))
    results = []
    for retention in (miras.lq(2.0), miras.decay()):
        rule = miras.Rule(miras.mlp(expansion=1), miras.l2(), retention, miras.gd(), chunk=4)
        state = miras.start(rule, rule.init(jax.random.key(0), 3, 3), 1)
        y, last = miras.chunkwise(rule, state, q, k, v, gates)
        results.append((y, last.weights))
    assert_close(*results, 1e-12)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: miras.lp(0.5), "lp p 0.5"),
        (lambda: miras.lp(float("inf")), "lp p inf must be a finite number of at least 1"),
        (lambda: miras.lp(3.0, sharpness=0.0), "sharpness 0.0"),
        (lambda: miras.huber("soft"), "huber kind 'soft'"),
        (lambda: miras.huber(sharpness=-1.0), "huber sharpness"),
        (lambda: miras.polynomial(0), "polynomial degree 0"),
        (lambda: miras.taylor_exp(0), "degree 0"),
        (lambda: miras.dpfp(0), "dpfp nu 0"),
        (lambda: miras.decay(to="start"), "decay to 'start'"),
        (lambda: miras.lq(1.0), "lq q 1.0 must be a finite number above 1"),
        (lambda: miras.lq(float("nan")), "lq q nan"),
        (lambda: miras.simplex(temperature=0.0), "temperature 0.0"),
        (lambda: miras.simplex(total=-1.0), "total -1.0"),
        (lambda: miras.elastic_net(0.0), "elastic_net threshold 0.0"),
        (lambda: miras.muon(steps=0), "muon steps 0"),
        (lambda: miras.chunk_muon(steps=-1), "chunk_muon steps -1"),
        (lambda: miras.omega(0), "omega window 0"),
        (lambda: miras.omega(2, miras.omega(2)), "omega step"),
        (lambda: miras.omega(2, miras.implicit()), "omega step"),
        (lambda: miras.gated_mlp(expansion=0), "gated_mlp expansion 0"),
        (lambda: miras.zoo.delta_net().init(jax.random.key(0), 0, 4), "dim_k 0 must be"),
        (lambda: miras.gated_mlp(activation="tanh"), "gated_mlp activation 'tanh'"),
        (lambda: miras.vector().init(jax.random.key(0), 3, 4), "dim_k 3"),
        (
            lambda: miras.gated_mlp(residual=True).init(jax.random.key(0), 3, 4),
            "gated_mlp residual",
        ),
    ],
)
def test_what_parts_refuse(make, what):
    with pytest.raises(ValueError, match=what):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: miras.mlp(expansion=1.5),
        lambda: miras.mlp(expansion=True),
        lambda: miras.mlp(depth=2.0),
        lambda: miras.mlp(depth=True),
        lambda: miras.polynomial(True),
        lambda: miras.zoo.titans(chunk=True),
        lambda: miras.lp("3"),
        lambda: miras.lq(True),
        lambda: miras.mlp(norm="no"),
        lambda: miras.mlp(residual=1),
        lambda: miras.gated_mlp(norm=None),
        lambda: miras.mlp(scale=float("nan")),
        lambda: miras.matrix(scale="a"),
        lambda: miras.matrix(scale=-1.0),
        lambda: miras.vector(scale=float("inf")),
    ],
)
def test_numbers_of_another_kind_are_refused(make):
    with pytest.raises(Exception, match=r"must be|type"):  # in tests the type check may come first
        make()


@dataclasses.dataclass(frozen=True)
class bent(miras.matrix):
    def forward(self, linear, slow, x):
        return jnp.tanh(linear(0, x))


@dataclasses.dataclass(frozen=True)
class twice(miras.l2):
    def loss(self, y, v):
        return 2 * super().loss(y, v)


@dataclasses.dataclass(frozen=True)
class halved(miras.gd):
    linear = False

    def update(self, velocity, gradient, lr, eta):
        return super().update(velocity, gradient, lr / 2, eta)


@dataclasses.dataclass(frozen=True)
class nesterov(miras.momentum):
    linear = False

    def update(self, velocity, gradient, lr, eta):
        velocity, _ = super().update(velocity, gradient, lr, eta)
        step = jax.tree.map(lambda s, g: eta * s - lr * g, velocity, gradient)
        return velocity, step


@dataclasses.dataclass(frozen=True)
class squashed(miras.decay):
    def link(self, a):
        return jnp.tanh(a)


@dataclasses.dataclass(frozen=True)
class rooted(miras.lq):
    def link(self, a):
        return jnp.sign(a) * jnp.log1p(jnp.abs(a))


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({"learner": miras.implicit(), "chunk": 64}, "for chunk=1 alone, not for chunk=64"),
        (
            {"learner": miras.implicit(), "retention": miras.decay(to="initial")},
            r"implicit\(\) has a closed form for decay\(\) or none\(\) alone",
        ),
        ({"learner": miras.implicit(), "bias": twice()}, r"for l2\(\) alone, not for twice"),
        ({"structure": miras.least_squares()}, r"ridge for normal_equations\(\), which gd\(\)"),
        (
            {"learner": miras.normal_equations(), "bias": miras.dot(), "chunk": 64},
            r"least_squares\(\) alone, not for matrix.* l2\(\) alone.* chunk=1 alone",
        ),
        (
            {
                "learner": miras.exchange(),
                "bias": miras.dot(),
                "retention": miras.decay("gradient"),
            },
            r'for l2\(\) alone.* for decay\(before="update"\) or none\(\) alone',
        ),
        (
            {"learner": miras.delta_gd(), "structure": miras.vector()},
            r"same for all keys in vector.* use matrix\(\)",
        ),
        (
            {"learner": miras.delta_gd(), "retention": miras.lq()},
            r'none\(\) or decay\(\) before the "update", not lq',
        ),
        ({"retention": miras.lq(4.0)}, r"lq\(4\) .* W_0 = 0: take matrix\(scale=1.0\), mlp\(\)"),
        ({"retention": miras.lq(2.1), "structure": miras.vector()}, "W_0 = 0"),
        ({"retention": miras.lq(4.0), "structure": miras.mlp(scale=0.0)}, "W_0 = 0"),
        ({"retention": miras.renormalise()}, r"norms of W_0, here to 0.* take matrix"),
    ],
)
def test_the_part_that_does_not_go_with_the_others_is_named(parts, what):
    usual = {
        "structure": miras.matrix(), "bias": miras.l2(), "retention": miras.decay(),
        "learner": miras.gd(), "chunk": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=what):
        miras.Rule(**usual | parts)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize(
    "derived",
    [bent(1.0), twice(), halved(), nesterov(), squashed(), rooted()],
    ids=lambda part: type(part).__name__,
)
@float64
def test_a_part_derived_from_another_leaves_the_forms_of_that(derived, chunk):
    parts = {
        "structure": miras.matrix(1.0), "bias": miras.l2(), "retention": miras.decay(),
        "learner": miras.gd(),
    }  # fmt: skip
    kinds = (miras.matrix, miras.l2, miras.decay | miras.lq, miras.gd | miras.momentum)
    base = next(name for name, kind in zip(parts, kinds, strict=True) if isinstance(derived, kind))
    if not isinstance(derived, type(parts[base])):
        parts[base] = type(derived).__mro__[1]()
    plain, rule = (miras.Rule(**parts | {base: p}, chunk=chunk) for p in (parts[base], derived))
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(2, 9, 1, 3))) for _ in range(3))
    half = jnp.full((2, 9, 1), 0.5)
    gates = miras.Gates(half, half if rule.learner.needs_momentum else None, half)
    state = miras.start(rule, rule.init(jax.random.key(0), 3, 3), 2)
    found, last = miras.chunkwise(rule, state, q, k, v, gates)
    assert_close((found, last), miras.recurrent(rule, state, q, k, v, gates), 1e-12)
    other, _ = miras.recurrent(plain, state, q, k, v, gates)
    assert np.max(np.abs(found - other)) > 1e-2, "what it replaces counts"


def test_a_learner_that_replaces_update_has_to_say_what_it_is_over_a_chunk():
    with pytest.raises(TypeError, match="forgetful defines update: define response too"):

        class forgetful(miras.gd):
            def update(self, velocity, gradient, lr, eta):
                return super().update(velocity, gradient, lr / 2, eta)


def test_features_that_are_not_made():
    for features in (miras.elu1, "elu1"):
        with pytest.raises(Exception, match="features"):  # in tests the type check comes first
            miras.matrix(features=features)


def test_retentions_take_other_starts_and_links_without_a_pole():
    for retention, structure in (
        (miras.lq(4.0), miras.matrix(1.0)),
        (miras.lq(2.0), miras.matrix()),
        (miras.lq(1.5), miras.matrix()),
        (miras.renormalise(), miras.vector(1.0)),
    ):
        _rule(retention=retention, structure=structure)


def test_least_squares_starts_at_zero():
    """Whatever weights the memory is given: G_0 = 0 in the equations."""
    with pytest.raises(TypeError):
        miras.least_squares(scale=1.0)
    rule = miras.zoo.mesa_net()
    fast, slow = rule.init(jax.random.key(0), 3, 2)
    state = miras.start(rule, miras.Weights((fast[0] + 1,), slow), 1)
    assert_close(state.weights, (np.zeros((1, 1, 3, 2)),), 0)
    assert_close(state.begin.weights, (np.zeros((1, 3, 2)),), 0)


def test_a_ridge_never_comes_to_zero():
    rule = miras.zoo.mesa_net(steps=3)
    x = jax.random.normal(jax.random.key(1), (1, 4, 1, 3))
    fast, _ = rule.init(jax.random.key(0), 3, 3)

    def value(ridge):
        state = miras.start(rule, miras.Weights(fast, {"ridge": ridge}), 1)
        gates = miras.Gates(jnp.ones(ROWS), retain=jnp.ones(ROWS))
        return jnp.sum(miras.recurrent(rule, state, x, x, x, gates)[0])

    found, slope = jax.value_and_grad(value)(jnp.full(3, -1e4))
    assert bool(jnp.isfinite(found))
    assert bool(jnp.isfinite(slope).all())


def _rule(**parts):
    given = {
        "structure": miras.matrix(), "bias": miras.l2(), "retention": miras.none(),
        "learner": miras.gd(), "chunk": 2,
    }  # fmt: skip
    return miras.Rule(**given | parts)


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({"learner": miras.chunk_muon(), "retention": miras.decay()}, r"chunk_muon\(\) leaves"),
        ({"learner": miras.omega(2, miras.chunk_muon()), "retention": miras.lq()}, "chunk_muon"),
        ({"learner": miras.omega(), "retention": miras.decay("gradient")}, r"omega\(\) takes all"),
        ({"read": "never"}, "read 'never'"),
    ],
)
def test_what_rules_refuse(parts, what):
    with pytest.raises(ValueError, match=what):
        _rule(**parts)


ROWS = (1, 4, 1)


@pytest.mark.parametrize("form", [miras.chunkwise, miras.recurrent])
@pytest.mark.parametrize(
    ("rule", "gates", "what"),
    [
        (_rule(bias=miras.huber()), {}, "gates.threshold is None"),
        (_rule(), {"threshold": ROWS}, "gates.threshold was given"),
        (_rule(bias=miras.robust()), {"threshold": (1, 4, 2)}, "gates.threshold has shape"),
        (_rule(learner=miras.omega(3, miras.gd())), {"window": (*ROWS, 2)}, "window of 3"),
        (_rule(), {"window": (*ROWS, 1)}, "leave it"),
        (_rule(structure=miras.matrix(1.0), retention=miras.renormalise()), {"retain": ROWS},
         "gates.retain was given"),
        (_rule(learner=miras.muon()), {}, r"gates.momentum is None, but muon\(steps=5\) needs it"),
        (_rule(structure=miras.matrix(features=miras.elu1()), retention=miras.decay()),
         {"retain": (*ROWS, 3)}, "channel-wise"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_gates_that_are_refused(rule, gates, what, form):
    x = jnp.ones((*ROWS, 3))
    state = miras.start(rule, rule.init(jax.random.key(0), 3, 3), 1)
    given = miras.Gates(jnp.ones(ROWS), **{name: jnp.ones(size) for name, size in gates.items()})
    with pytest.raises((ValueError, TypeError), match=what):
        form(rule, state, x, x, x, given)


@pytest.mark.parametrize("form", [miras.chunkwise, miras.recurrent])
@pytest.mark.parametrize(
    ("of", "to", "what"),
    [
        (miras.omega(2), miras.omega(3), "window"),
        (miras.momentum(), miras.omega(3), "window"),
        (miras.omega(3), miras.momentum(), "window"),
        (miras.momentum(), miras.chunk_muon(), "momentum"),
        (miras.chunk_muon(), miras.muon(), "momentum"),
        (miras.gd(), miras.delta_momentum(), "momentum"),
    ],
    ids=repr,
)
def test_states_of_other_learners_are_refused(of, to, what, form):
    x, gate = jnp.ones((*ROWS, 3)), jnp.ones(ROWS)
    rule = _rule(learner=of)
    state = miras.start(rule, rule.init(jax.random.key(0), 3, 3), 1)
    with pytest.raises(ValueError, match=what):
        form(_rule(learner=to), state, x, x, x, miras.Gates(gate, momentum=gate))


@pytest.mark.parametrize("length", [3, 4])
@float64
def test_a_prefix_ends_its_chunk(length):
    """Documents begin behind it with what a memory with chunks of its length has learned."""
    x = jax.random.normal(jax.random.key(1), (3, 1, length, 1, 3))
    gate = jnp.full((1, length, 1), 0.5)
    states = {}
    for chunk in (4, length):
        rule = _rule(
            structure=miras.matrix(1.0), retention=miras.renormalise(),
            learner=miras.chunk_muon(), chunk=chunk,
        )  # fmt: skip
        state = miras.start(rule, rule.init(jax.random.key(0), 3, 3), 1)
        _, state = miras.chunkwise(rule, state, *x, miras.Gates(gate, momentum=gate))
        states[chunk] = miras.begin_from(rule, state, 1)
    assert_close(states[4].begin, states[length].begin, 1e-12)
    assert_close(states[4].begin.momentum["rate"], np.zeros(1), 0)


@pytest.mark.parametrize("form", [miras.chunkwise, miras.recurrent])
@float64
def test_a_chunk_that_is_cut_short_has_the_mean_of_its_gates(form):
    """A chunk of 8 that one of 2 ends at its fourth token: mean momentum of four, in any form."""
    x = jax.random.normal(jax.random.key(1), (3, 1, 6, 1, 3))
    eta = jnp.asarray([0.1, 0.9, 0.5, 0.3, 0.7, 0.2])[None, :, None]
    gates = miras.Gates(jnp.full((1, 6, 1), 0.1), momentum=eta)

    def run(chunk, state, where):
        rule = _rule(structure=miras.matrix(1.0), learner=miras.chunk_muon(0), chunk=chunk)
        state = state or miras.start(rule, rule.init(jax.random.key(0), 3, 3), 1)
        return rule, form(rule, state, *jax.tree.map(lambda x: x[:, where], (*x, gates)))[1]

    _, before = run(2, None, slice(2))
    long, inside = run(8, before, slice(2, 5))
    assert_close(inside.momentum["count"], np.full((1, 1), 3.0), 0)
    begun = miras.begin_from(long, inside, 1)
    _, after = run(2, inside, slice(5, 6))
    assert after.place.tolist() == [0]
    assert_close(after.momentum["count"], np.zeros((1, 1)), 0)
    _, k, v = x[:, 0, 5, 0]  # the last token's gradient is taken at W'
    (sums,), (base,) = inside.momentum["sum"], inside.base
    whole = (sums - 0.1 * jnp.outer(k, k @ base[0, 0] - v),)
    for got, mean, total in (
        (begun.momentum, 1.5 / 3, (sums,)),
        (after.momentum, 1.7 / 4, whole),
    ):
        want = jax.tree.map(lambda s, g, m=mean: m * s + g, before.momentum["before"], total)
        assert_close(got["before"], want, 1e-12)


@dataclasses.dataclass(frozen=True)
class fourier(miras.Features):
    """As many random features, whatever the key's dimension."""

    def dim(self, dim_k):
        return 16

    def apply(self, slow, x):
        return jnp.cos(x @ jax.random.normal(jax.random.key(0), (x.shape[-1], 16)))


@dataclasses.dataclass(frozen=True)
class by_fours(miras.matrix):
    def init(self, key, dim_k, dim_v):
        if dim_k % 4:
            raise ValueError(f"dim_k {dim_k} must be a multiple of 4")
        return super().init(key, dim_k, dim_v)


@dataclasses.dataclass(frozen=True)
class bottleneck(miras.Structure):
    def init(self, key, dim_k, dim_v):
        down = jax.random.normal(key, (dim_k, dim_k // 2))
        return miras.Weights((jnp.zeros((dim_k // 2, dim_v)),), {"down": down})

    def forward(self, linear, slow, x):
        return linear(0, x @ slow["down"])


@dataclasses.dataclass(frozen=True)
class gated(miras.Structure):
    def init(self, key, dim_k, dim_v):
        return miras.Weights((jnp.zeros((dim_k, dim_v)), jnp.ones((dim_k, 1))), {})

    def forward(self, linear, slow, x):
        return linear(0, x) * jax.nn.sigmoid(linear(1, x))


OWN = [miras.matrix(features=fourier()), miras.mlp(features=fourier()), by_fours(), bottleneck()]


@pytest.mark.parametrize("structure", [*OWN, gated()], ids=lambda s: type(s).__name__)
def test_structures_and_features_of_ones_own_need_only_what_is_written(structure):
    """Keys and values give their dimensions; a state for others is refused."""
    key, value, gate = jnp.ones((*ROWS, 8)), jnp.ones((*ROWS, 4)), jnp.ones(ROWS)
    rule = _rule(structure=structure)
    state = miras.start(rule, rule.init(jax.random.key(0), 8, 4), 1)
    gates = miras.Gates(gate)
    for form in (miras.chunkwise, miras.recurrent):
        call = jax.tree_util.Partial(form, rule)
        y, _ = jax.eval_shape(call, state, key, key, value, gates)
        assert y.shape == value.shape
        with pytest.raises(ValueError, match=r"maps dim 8 to 4|fast weights are|multiple of 4"):
            jax.eval_shape(call, state, key[..., :6], key[..., :6], value[..., :3], gates)
    assert miras.read(rule, state, key).shape == value.shape


@float64
def test_forms_agree_on_two_fast_weights_of_ones_own():
    rule = _rule(structure=gated(), retention=miras.decay(), learner=miras.omega(2, miras.gd()))
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(1, 4, 1, d))) for d in (3, 3, 2))
    gates = miras.Gates(jnp.full(ROWS, 0.2), retain=jnp.full(ROWS, 0.9))
    state = miras.start(rule, rule.init(jax.random.key(0), 3, 2), 1)
    found = miras.chunkwise(rule, state, q, k, v, gates)
    assert_close(found, miras.recurrent(rule, state, q, k, v, gates), 1e-12)


def test_a_window_of_keys_whose_dimension_weights_do_not_tell_is_asked_for():
    rule = _rule(structure=miras.matrix(features=fourier()), learner=miras.omega(2, miras.gd()))
    weights, x = rule.init(jax.random.key(0), 3, 2), jnp.ones((*ROWS, 3))
    with pytest.raises(ValueError, match=r"give miras.start dims=\(K, V\)"):
        miras.start(rule, weights, 1)
    state = miras.start(rule, weights, 1, dims=(3, 2))
    assert state.pairs.k.shape == (1, 1, 1, 3)
    assert state.pairs.v.shape == (1, 1, 1, 2)
    args = (x[..., :2], x[..., :2], x[..., :2], miras.Gates(jnp.ones(ROWS)))
    with pytest.raises(
        ValueError, match=r"window is for .* dim 3 and 2, but k and v have \(2, 2\)"
    ):
        miras.recurrent(rule, state, *args)
    with pytest.raises(ValueError, match="fast weights are"):
        miras.start(rule, weights, 1, dims=(3, 4))


@dataclasses.dataclass(frozen=True)
class total(miras.Bias):
    def loss(self, y, v):
        return jnp.sum(jnp.abs(y - v))


@pytest.mark.parametrize("form", [miras.chunkwise, miras.recurrent])
def test_a_loss_that_sums_over_tokens_is_refused(form):
    x, rule = jnp.ones((*ROWS, 3)), _rule(bias=total())
    state = miras.start(rule, rule.init(jax.random.key(0), 3, 3), 1)
    with pytest.raises(Exception, match=r"loss of total\(\) has shape \(\) .* must be \(2,\)"):
        form(rule, state, x, x, x, miras.Gates(jnp.ones(ROWS)))
