"""The oracle is judged by central differences and by cases that are worked out on paper."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tests.oracles import miras as oracle

KEY, VALUE, HIDDEN = 4, 5, 7


def make(rule, depth, *, batch=2, length=11, heads=2, value=VALUE, channel=False, seed=0):
    """Random inputs, gates and a start state."""
    random = np.random.default_rng(seed)
    sizes = [KEY] + [HIDDEN] * (depth - 1) + [value]
    fast = [
        random.normal(size=(heads, *pair)) / np.sqrt(pair[0]) for pair in itertools.pairwise(sizes)
    ]
    slow = {}
    if rule.norm:
        slow = {
            "scale": random.uniform(0.5, 1.5, (heads, value)),
            "bias": random.normal(size=(heads, value)),
        }
    q, k = random.normal(size=(2, batch, length, heads, KEY)) / 2
    v = random.normal(size=(batch, length, heads, value))
    shape = (batch, length, heads)
    gates = oracle.Gates(
        lr=random.uniform(0.1, 0.5, shape),
        momentum=random.uniform(0.2, 0.9, shape) if rule.momentum else None,
        retain=random.uniform(0.7, 1.0, (*shape, KEY) if channel else shape),
        scale=random.uniform(0.5, 1.5, shape),
    )
    return oracle.start(rule, fast, slow, batch), q, k, v, gates


def part(gates, start, stop):
    return oracle.Gates(*(None if g is None else g[:, start:stop] for g in gates))


def leaves(state):
    return [*state.base, *state.weights, *state.momentum, state.place, state.segment]


def assert_close(got, want, tolerance=1e-12):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def check_gradient(rule, depth, gradient):
    """`gradient` equals the central differences of the loss, entry by entry."""
    value = KEY if rule.residual else VALUE
    state, _, k, v, _ = make(rule, depth, heads=1, length=1, value=value)
    weights = [w[0, 0] for w in state.base]
    slow = {name: array[0] for name, array in state.slow.items()}
    x, target = k[0, 0, 0], v[0, 0, 0]

    def at(layer, index, step):
        moved = [w.copy() for w in weights]
        moved[layer][index] += step
        return oracle.loss(rule, oracle.forward(rule, moved, slow, x)[0], target)[0]

    _, got = gradient(rule, weights, slow, x, target)
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
    check_gradient(rule, depth, oracle.gradient)


def test_the_gradient_check_can_fail():
    def slightly_off(rule, weights, slow, x, v):
        value, gradients = oracle.gradient(rule, weights, slow, x, v)
        return value, [*gradients[:-1], gradients[-1] * (1 + 1e-4)]

    with pytest.raises(AssertionError):
        check_gradient(oracle.Rule(chunk=1), 2, slightly_off)


def test_activations_at_known_points():
    z = np.array([-1.0, 0.0, 2.0])
    np.testing.assert_allclose(oracle.activate("relu", z)[0], [0, 0, 2])
    np.testing.assert_allclose(oracle.activate("silu", z)[0], z / (1 + np.exp(-z)))
    # the tanh approximation, computed by hand to six places
    np.testing.assert_allclose(oracle.activate("gelu", z)[0], [-0.158808, 0.0, 1.954598], atol=1e-6)


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
        _, (g,) = oracle.gradient(rule, [state.begin[0][h]], {}, k[b, 5, h], v[b, 5, h])
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
