"""The oracle is judged by central differences and by cases that are worked out on paper."""

import itertools
from dataclasses import replace
from math import factorial

import numpy as np
import pytest

from tests.oracles import memories, parts
from tests.oracles import miras as oracle

KEY, VALUE, HIDDEN = 4, 5, 7


def make(rule, depth, *, batch=2, length=11, heads=2, value=VALUE, channel=False, seed=0):
    """Random inputs, gates and a start state."""
    random = np.random.default_rng(seed)
    slow = {}
    if rule.features[:1] == ("polynomial",):
        slow["taylor"] = random.uniform(0.5, 1.5, (heads, rule.features[1] + 1))
    wide = len(memories.features(rule, {name: s[0] for name, s in slow.items()}, np.zeros(KEY)))
    shapes = list(itertools.pairwise([wide] + [HIDDEN] * (depth - 1) + [value]))
    if rule.structure == "gated_mlp":
        shapes = [(wide, HIDDEN), (wide, HIDDEN), (HIDDEN, value)]
    if rule.structure == "vector":
        shapes = [(1, wide)]
    fast = [random.normal(size=(heads, *pair)) / np.sqrt(pair[0]) for pair in shapes]
    if rule.norm:
        slow["scale"] = random.uniform(0.5, 1.5, (heads, value))
        slow["bias"] = random.normal(size=(heads, value))
    q, k = random.normal(size=(2, batch, length, heads, KEY)) / 2
    v = random.normal(size=(batch, length, heads, value))
    shape = (batch, length, heads)
    gates = oracle.Gates(
        lr=random.uniform(0.1, 0.5, shape),
        momentum=random.uniform(0.2, 0.9, shape) if rule.momentum else None,
        retain=random.uniform(0.7, 1.0, (*shape, KEY) if channel else shape),
        scale=random.uniform(0.5, 1.5, shape),
        threshold=random.uniform(0.5, 1.5, shape) if needs_threshold(rule) else None,
        window=random.uniform(0.0, 1.0, (*shape, rule.window)) if rule.window > 1 else None,
    )
    return oracle.start(rule, fast, slow, batch, KEY), q, k, v, gates


def needs_threshold(rule):
    return rule.bias == "robust" or rule.bias.startswith("huber")


def part(gates, start, stop):
    return oracle.Gates(*(None if g is None else g[:, start:stop] for g in gates))


def leaves(state):
    found = [*state.base, *state.weights]
    oracle.at(state.momentum, found.append)
    if state.pairs:
        found += [array for array in state.pairs.values() if array is not None]
    return [*found, state.place, state.segment]


def assert_close(got, want, tolerance=1e-12):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def check_gradient(rule, depth, gradient, threshold=None):
    """`gradient` equals the central differences of the loss, entry by entry."""
    value = KEY if rule.residual or rule.structure == "vector" else VALUE
    state, _, k, v, _ = make(rule, depth, heads=1, length=1, value=value)
    weights = [w[0, 0] for w in state.base]
    slow = {name: array[0] for name, array in state.slow.items()}
    x, target = k[0, 0, 0], v[0, 0, 0]

    def at(layer, index, step):
        moved = [w.copy() for w in weights]
        moved[layer][index] += step
        return parts.loss(rule, memories.forward(rule, moved, slow, x)[0], target, threshold)[0]

    _, got = gradient(rule, weights, slow, x, target, threshold)
    step = 1e-5
    for layer, w in enumerate(weights):
        want = np.zeros_like(w)
        for index in np.ndindex(*w.shape):
            want[index] = (at(layer, index, step) - at(layer, index, -step)) / (2 * step)
        np.testing.assert_allclose(got[layer], want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("bias", ["l2", "dot"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_gradient_equals_central_differences(depth, activation, bias, norm, residual):
    rule = oracle.Rule(chunk=1, activation=activation, bias=bias, norm=norm, residual=residual)
    check_gradient(rule, depth, memories.gradient)


@pytest.mark.parametrize(
    "features", [(), ("polynomial", 3), ("taylor_exp", 2), ("elu1", 0), ("dpfp", 2)], ids=str
)
@pytest.mark.parametrize(
    ("structure", "depth", "options"),
    [("mlp", 2, {"residual": True}), ("gated_mlp", 1, {"norm": True, "residual": True}),
     ("gated_mlp", 1, {"activation": "silu"})],
    ids=str,
)  # fmt: skip
def test_gradient_behind_features(structure, depth, options, features):
    rule = oracle.Rule(chunk=1, structure=structure, features=features, **options)
    check_gradient(rule, depth, memories.gradient)


def test_gradient_of_a_vector():
    check_gradient(oracle.Rule(chunk=1, structure="vector"), 1, memories.gradient)
    elu = oracle.Rule(chunk=1, structure="vector", features=("elu1", 0))
    check_gradient(elu, 1, memories.gradient)


@pytest.mark.parametrize("threshold", [0.2, 0.9, 9.0])
@pytest.mark.parametrize("bias", ["robust", "huber coordinate", "huber norm", "huber switch"])
def test_gradient_of_losses_with_a_kink(bias, threshold):
    """Where tanh(nu r) is sign(r), the signal is the derivative of the loss (of lp, about)."""
    rule = oracle.Rule(chunk=1, bias=bias, sharpness=1e6, norm=True)
    check_gradient(rule, 2, memories.gradient, threshold)


def test_signals_on_paper():
    r, nothing = np.array([3.0, -4.0, 0.0]), np.zeros(3)

    def signal(bias, threshold=None, **options):
        return parts.loss(oracle.Rule(1, bias=bias, **options), r, nothing, threshold)

    value, got = signal("lp", p=3.0)
    np.testing.assert_allclose(value, 27 + 64, rtol=1e-6)
    np.testing.assert_allclose(got, [27, -48, 0], rtol=1e-6)
    for bias, want in {
        "huber coordinate": [3, -3.5, 0], "huber norm": [2.1, -2.8, 0],
        "huber switch": [3.5, -3.5, 0], "robust": [3 * 1.7, -4 * 1.7, 0],
    }.items():  # fmt: skip
        np.testing.assert_allclose(signal(bias, 3.5)[1], want, rtol=1e-6)
    for kind in ("coordinate", "norm", "switch"):  # 1/2 |r|^2 is 12.5, of a norm of 5
        value, got = signal("huber " + kind, 5.1)
        np.testing.assert_allclose(value, 12.5, rtol=1e-6)
        np.testing.assert_allclose(got, r)
    np.testing.assert_allclose(signal("huber norm", 2.0)[0], 2 * 5 - 2, rtol=1e-6)
    np.testing.assert_allclose(signal("huber coordinate", 3.5)[0], 4.5 + 14 - 6.125, rtol=1e-6)
    np.testing.assert_allclose(signal("robust", 2.0)[0], 0.5 * 7**2, rtol=1e-6)


def test_links_on_paper():
    a = np.array([[2.0, 0.0], [-1.0, 2.0]])  # of norms 3 (q = 2) and 33^(1/4) (q = 4)

    def link(retention, **options):
        return parts.link(oracle.Rule(1, retention=retention, **options), a)

    np.testing.assert_allclose(link("lq", q=4.0), a / 33**0.5)
    np.testing.assert_allclose(link("lq", q=3.0), a / 17 ** (1 / 3))
    np.testing.assert_allclose(link("lq", q=2.0), a)
    soft = link("simplex", temperature=2.0, total=3.0)
    np.testing.assert_allclose(soft.sum(axis=0), 3)
    np.testing.assert_allclose(soft[0] / soft[1], np.exp([1.5, -1.0]))
    net = link("elastic_net", soft=2.0)
    np.testing.assert_allclose(net, [[1.0, 0], [-np.arctan(0.5) * 2 / np.pi, 1.0]], atol=1e-9)


@pytest.mark.parametrize(("name", "degree"), [("polynomial", 3), ("taylor_exp", 2)])
def test_the_kernel_of_polynomial_features(name, degree):
    random = np.random.default_rng(0)
    q, k, c = random.normal(size=4), random.normal(size=4), random.normal(size=4)
    rule = oracle.Rule(1, features=(name, degree))
    got = memories.features(rule, {"taylor": c}, q) @ memories.features(rule, {"taylor": c}, k)
    if name == "taylor_exp":
        c = [factorial(i) ** -0.5 for i in range(4)]
    np.testing.assert_allclose(got, sum(c[i] ** 2 * (q @ k) ** i for i in range(degree + 1)))


def test_newton_schulz_is_its_iteration():
    x = np.random.default_rng(0).normal(size=(5, 3))
    want = x / np.linalg.norm(x)
    for _ in range(2):
        gram = want @ want.T
        want = 3.4445 * want - 4.7750 * gram @ want + 2.0315 * gram @ gram @ want
    np.testing.assert_allclose(parts.newton_schulz(x, 2), want)
    np.testing.assert_array_equal(parts.newton_schulz(np.zeros((2, 3)), 5), 0)


def test_the_gradient_check_can_fail():
    def slightly_off(rule, weights, slow, x, v, threshold):
        value, gradients = memories.gradient(rule, weights, slow, x, v, threshold)
        return value, [*gradients[:-1], gradients[-1] * (1 + 1e-4)]

    with pytest.raises(AssertionError):
        check_gradient(oracle.Rule(chunk=1), 2, slightly_off)


def test_activations_at_known_points():
    z = np.array([-1.0, 0.0, 2.0])
    np.testing.assert_allclose(memories.activate("relu", z)[0], [0, 0, 2])
    np.testing.assert_allclose(memories.activate("silu", z)[0], z / (1 + np.exp(-z)))
    # the tanh approximation, computed by hand to six places
    np.testing.assert_allclose(
        memories.activate("gelu", z)[0], [-0.158808, 0.0, 1.954598], atol=1e-6
    )


def test_online_matrix_memory_is_the_delta_rule():
    rule = oracle.Rule(chunk=1, momentum=False)
    state, q, k, v, gates = make(rule, 1)
    gates = gates._replace(scale=None)
    y, losses, last = oracle.run(rule, state, q, k, v, gates)
    for b, h in np.ndindex(2, 2):
        w = state.begin[0][h]
        for t in range(q.shape[1]):
            key, lr, a = k[b, t, h], gates.lr[b, t, h], gates.retain[b, t, h]
            np.testing.assert_allclose(losses[b, t, h], 0.5 * ((v[b, t, h] - key @ w) ** 2).sum())
            w = (a * np.eye(KEY) - lr * np.outer(key, key)) @ w + lr * np.outer(key, v[b, t, h])
            np.testing.assert_allclose(y[b, t, h], q[b, t, h] @ w)
        np.testing.assert_allclose(last.weights[0][b, h], w)


@pytest.mark.parametrize("chunk", [1, 4, 20])
@pytest.mark.parametrize("channel", [False, True])
def test_dot_bias_is_gated_linear_attention_with_momentum(chunk, channel):
    """With the dot bias the gradient holds no weights, so the sums unroll whatever the chunk."""
    rule = oracle.Rule(chunk=chunk, bias="dot")
    state, q, k, v, gates = make(rule, 1, channel=channel)
    gates = gates._replace(scale=None)
    y, _, last = oracle.run(rule, state, q, k, v, gates)
    length = q.shape[1]
    for b, h in np.ndindex(2, 2):
        retain = gates.retain[b, :, h] if channel else gates.retain[b, :, h, None]
        for t in range(length):
            w = np.prod(retain[: t + 1], axis=0)[:, None] * state.begin[0][h]
            for s in range(t + 1):
                for j in range(s + 1):
                    weight = np.prod(gates.momentum[b, j + 1 : s + 1, h]) * gates.lr[b, j, h]
                    kept = np.prod(retain[s + 1 : t + 1], axis=0)[:, None]
                    w = w + kept * weight * np.outer(k[b, j, h], v[b, j, h])
            np.testing.assert_allclose(y[b, t, h], q[b, t, h] @ w)
        np.testing.assert_allclose(last.weights[0][b, h], w)


def test_inside_a_chunk_the_gradients_are_those_of_its_start():
    rule = oracle.Rule(chunk=20, momentum=False)
    state, q, k, v, gates = make(rule, 1)
    gates = gates._replace(retain=None)
    y, _, last = oracle.run(rule, state, q, k, v, gates)
    for b, h in np.ndindex(2, 2):
        w0 = state.begin[0][h]
        errors = k[b, :, h] @ w0 - v[b, :, h]
        written = -(k[b, :, h] * gates.lr[b, :, h, None]).T @ errors
        t = q.shape[1] - 1
        want = q[b, t, h] @ (w0 + gates.scale[b, t, h] * written)
        np.testing.assert_allclose(y[b, t, h], want)
        np.testing.assert_allclose(last.base[0][b, h], w0)
        np.testing.assert_allclose(last.weights[0][b, h], w0 + written)


def test_reading_before_is_reading_after_the_token_before():
    after = oracle.Rule(chunk=4, norm=True)
    before = oracle.Rule(chunk=4, norm=True, read="before")
    state, q, k, v, gates = make(after, 2)
    gates = gates._replace(scale=None)
    same = np.repeat(q[:, :1], q.shape[1], axis=1)
    late, _, end = oracle.run(after, state, same, k, v, gates)
    early, _, other = oracle.run(before, state, same, k, v, gates)
    np.testing.assert_allclose(early[:, 1:], late[:, :-1])
    np.testing.assert_allclose(early[:, :1], oracle.read(before, state, same[:, :1]))
    assert_close(leaves(end), leaves(other))


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("read", ["after", "before"])
def test_split_anywhere(momentum, read):
    rule = oracle.Rule(chunk=4, momentum=momentum, read=read, norm=True)
    state, q, k, v, gates = make(rule, 2)
    ids = np.array([[1] * 6 + [2] * 5, [1] * 3 + [2] + [3] * 5 + [0] * 2])
    y, losses, last = oracle.run(rule, state, q, k, v, gates, ids)
    for cut in range(1, q.shape[1]):
        outs, middle = [], state
        for a, b in ((0, cut), (cut, q.shape[1])):
            *out, middle = oracle.run(
                rule, middle, q[:, a:b], k[:, a:b], v[:, a:b], part(gates, a, b), ids[:, a:b]
            )
            outs.append(out)
        assert_close([np.concatenate(p, 1) for p in zip(*outs, strict=True)], [y, losses], 0)
        assert_close(leaves(middle), leaves(last), 0)


@pytest.mark.parametrize("begin", [1, 3, 4, 7])
def test_a_packed_document_gives_what_it_gives_alone(begin):
    rule = oracle.Rule(chunk=4)
    state, q, k, v, gates = make(rule, 2)
    ids = np.where(np.arange(q.shape[1]) < begin, 1, 2)[None].repeat(2, 0)
    y, losses, last = oracle.run(rule, state, q, k, v, gates, ids)
    alone = oracle.run(
        rule, state, q[:, begin:], k[:, begin:], v[:, begin:], part(gates, begin, None),
        ids[:, begin:],
    )  # fmt: skip
    assert_close([y[:, begin:], losses[:, begin:]], alone[:2], 0)
    assert_close(leaves(last), leaves(alone[2]), 0)
    ignored, _, _ = oracle.run(rule, state, q, k, v, gates)
    assert np.abs(ignored[:, begin:] - y[:, begin:]).max() > 1e-3


def test_a_document_starts_with_the_momentum_of_the_prefix():
    rule = oracle.Rule(chunk=4)
    state, q, k, v, gates = make(rule, 1)
    start = [np.random.default_rng(3).normal(size=w.shape) for w in state.begin]
    ids = np.where(np.arange(q.shape[1]) < 5, 1, 2)[None].repeat(2, 0)
    _, _, last = oracle.run(
        rule, replace(state, begin_momentum=start), q[:, :6], k[:, :6], v[:, :6],
        part(gates, 0, 6), ids[:, :6],
    )  # fmt: skip
    for b, h in np.ndindex(2, 2):
        _, (g,) = memories.gradient(rule, [state.begin[0][h]], {}, k[b, 5, h], v[b, 5, h])
        want = gates.momentum[b, 5, h] * start[0][h] - gates.lr[b, 5, h] * g
        np.testing.assert_allclose(last.momentum[0][b, h], want)


def test_the_first_token_of_a_fresh_state_is_no_reset_and_a_carried_document_is_one():
    rule = oracle.Rule(chunk=4)
    state, q, k, v, gates = make(rule, 1)
    ids = np.full(q.shape[:2], 3)
    _, _, plain = oracle.run(rule, state, q, k, v, gates)
    _, _, named = oracle.run(rule, state, q, k, v, gates, ids)
    assert_close(leaves(plain)[:-1], leaves(named)[:-1], 0)
    assert (plain.segment == -1).all()
    assert (named.segment == 3).all()
    again, _, fresh = oracle.run(rule, named, q, k, v, gates, ids + 1)
    first, _, _ = oracle.run(rule, state, q, k, v, gates)
    assert_close([again, *leaves(fresh)[:-1]], [first, *leaves(plain)[:-1]], 0)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_window_of_all_tokens_unrolls(chunk):
    """Token by token, the sum of the shares times the gradients at the chunk's start."""
    rule = oracle.Rule(chunk=chunk, momentum=False, window=20)
    state, q, k, v, gates = make(rule, 1)
    gates = gates._replace(scale=None)
    y, _, last = oracle.run(rule, state, q, k, v, gates)
    for b, h in np.ndindex(2, 2):
        now = state.begin[0][h]
        for t in range(q.shape[1]):
            if t % chunk == 0:
                anchor = now
            errors = k[b, : t + 1, h] @ anchor - v[b, : t + 1, h]
            shares = gates.window[b, t, h, : t + 1][::-1]
            g = (shares[:, None] * k[b, : t + 1, h]).T @ errors
            now = gates.retain[b, t, h] * now - gates.lr[b, t, h] * g
            np.testing.assert_allclose(y[b, t, h], q[b, t, h] @ now)
        np.testing.assert_allclose(last.weights[0][b, h], now)
        np.testing.assert_array_equal(last.pairs["k"][b, h, -11:], k[b, :, h])
    assert last.pairs["live"].sum(axis=1).tolist() == [11, 11]


def test_decay_to_the_initial_weights_is_decay_of_what_was_learned():
    """With W_0 = 0 in the place of the distance from W_0: dot has no weights in its gradient."""
    rule = oracle.Rule(chunk=4, bias="dot", retention="initial", learner="delta")
    state, q, k, v, gates = make(rule, 1)
    gates = gates._replace(scale=None)
    zero = [np.zeros_like(w) for w in state.begin]
    y, _, _ = oracle.run(rule, state, q, k, v, gates)
    plain = oracle.start(replace(rule, retention="decay"), zero, {}, 2)
    moved, _, _ = oracle.run(replace(rule, retention="decay"), plain, q, k, v, gates)
    still = np.einsum("bthk,hkv->bthv", q, state.begin[0])
    np.testing.assert_allclose(y, moved + still)


def test_momentum_with_a_delta_rule_forgets_what_comes_again():
    """With lr |g|^2 = e and one key and value, S = -lr g each time: nothing is left of before."""
    rule = oracle.Rule(chunk=20, bias="dot", learner="delta")
    state, q, k, v, gates = make(rule, 1)
    k, v = (np.repeat(x[:, :1], 11, axis=1) for x in (k, v))
    size = (k**2).sum(-1)  # g = -k v^T, and with |v| = 1 g g^T = k k^T
    v = v / np.linalg.norm(v, axis=-1, keepdims=True)
    gates = gates._replace(lr=0.5 / size, momentum=np.full_like(size, 0.5))
    _, _, last = oracle.run(rule, state, q, k, v, gates)
    g = np.einsum("bhk,bhv->bhkv", -k[:, 0], v[:, 0])
    np.testing.assert_allclose(last.momentum[0], -gates.lr[:, 0, :, None, None] * g)


def test_a_step_a_chunk():
    """Without Newton-Schulz: momentum over whole chunks, and nothing is read within one."""
    rule = oracle.Rule(chunk=4, learner="by chunk", steps=0, bias="dot")
    state, q, k, v, gates = make(rule, 1)
    gates = gates._replace(scale=None, retain=None)
    y, _, last = oracle.run(rule, state, q, k, v, gates)
    for b, h in np.ndindex(2, 2):
        w, s = state.begin[0][h], 0.0
        for begin in (0, 4, 8):
            t = slice(begin, min(begin + 4, 11))
            np.testing.assert_allclose(y[b, t, h], q[b, t, h] @ w)
            total = (gates.lr[b, t, h, None] * k[b, t, h]).T @ v[b, t, h]
            if begin < 8:
                s = gates.momentum[b, t, h].mean() * s + total
                w = w + s
        np.testing.assert_allclose(last.weights[0][b, h], w)
        np.testing.assert_allclose(last.momentum["before"][0][b, h], s)
        np.testing.assert_allclose(last.momentum["sum"][0][b, h], total)
        np.testing.assert_allclose(last.momentum["rate"][b, h], gates.momentum[b, 8:, h].sum())


def test_muon_steps_by_lr_along_an_orthogonal_matrix():
    rule = oracle.Rule(chunk=20, learner="muon", bias="dot")
    state, q, k, v, gates = make(rule, 1)
    _, _, last = oracle.run(rule, state, *(x[:, :1] for x in (q, k, v)), part(gates, 0, 1))
    for b, h in np.ndindex(2, 2):
        step = last.weights[0][b, h] - gates.retain[b, 0, h] * state.begin[0][h]
        value = np.linalg.svd(step / gates.lr[b, 0, h])[1]
        assert 0.68 < value[0] < 1.13  # the range of the iteration's fifth round from 1
        np.testing.assert_allclose(value[1:], 0, atol=1e-12)
        align = k[b, 0, h] @ step @ v[b, 0, h]
        assert align > 0  # towards the value


def test_columns_return_to_their_norms():
    rule = oracle.Rule(chunk=4, retention="renormalise")
    state, q, k, v, gates = make(rule, 2)
    gates = gates._replace(retain=None)
    _, _, last = oracle.run(
        rule, state, q[:, :8], k[:, :8], v[:, :8], part(gates, 0, 8)
    )  # fmt: skip
    for now, begin in zip(last.weights, state.begin, strict=True):
        want = np.linalg.norm(begin, axis=1)[None].repeat(2, 0)
        np.testing.assert_allclose(np.linalg.norm(now, axis=2), want)


@pytest.mark.parametrize("rule", [
    oracle.Rule(chunk=4, window=3, learner="muon", bias="huber norm", retention="lq"),
    oracle.Rule(chunk=2, window=6, learner="by chunk", bias="robust", retention="renormalise"),
], ids=["muon", "by chunk"])  # fmt: skip
def test_split_and_packed_with_a_window(rule):
    state, q, k, v, gates = make(rule, 2)
    gates = gates._replace(retain=None)
    ids = np.array([[1] * 6 + [2] * 5, [1] * 3 + [2] + [3] * 5 + [0] * 2])
    y, losses, last = oracle.run(rule, state, q, k, v, gates, ids)
    for cut in (1, 4, 5, 9):
        outs, middle = [], state
        for a, b in ((0, cut), (cut, q.shape[1])):
            *out, middle = oracle.run(
                rule, middle, q[:, a:b], k[:, a:b], v[:, a:b], part(gates, a, b), ids[:, a:b]
            )
            outs.append(out)
        assert_close([np.concatenate(p, 1) for p in zip(*outs, strict=True)], [y, losses], 0)
        assert_close(leaves(middle), leaves(last), 0)
    alone = oracle.run(
        rule, state, q[:, 6:], k[:, 6:], v[:, 6:], part(gates, 6, None), ids[:, 6:]
    )  # fmt: skip
    assert_close([y[:1, 6:], losses[:1, 6:]], [a[:1] for a in alone[:2]], 0)
