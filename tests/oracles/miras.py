"""The oracle of the test-time memories: one row, one head, one token at a time, in float64 NumPy.

For each row and head, with A' what was held when the chunk began and W = link(A) (most retentions
have no link, and A is W):

    a document starts:  A' = A = W_0,  S = S_0,  p = 0,  the window is empty
    A' = a_t A'                           (where the decay comes first)
    g_t = sum_i w_{t,i} grad_W loss(M(k_i; W'), v_i)     over the window, i <= t; mostly t alone
    A_t = a_t A_{t-1} + change_t          (or W_0 + a_t (A_{t-1} - W_0) + change_t)
        gradient descent:  change = -lr_t g_t
        momentum:          change = S_t = e_t S_{t-1} - lr_t g_t
        muon:              change = lr_t NS(S_t),  S_t = e_t S_{t-1} - g_t
        delta momentum:    change = S_t = (e_t - lr_t g_t g_t^T) S_{t-1} - lr_t g_t
        delta gradient:    change = -lr_t (g_t + z_t^T z_t A_{t-1}), z_t the map's input at W'
        by chunk:          change = 0
    y_t = M(q_t; link(A' + c_t (A_t - A')))
    the chunk ends:     A = A' + c_t (A_t - A'),  A' = A,  p = 0
        by chunk:          A + NS(S),  S = mean(e_t) S - sum lr_t g_t over the chunk
        renormalised:      each column to the norm that it has in W_0

The gradients are derived by hand (`memories`, `parts`). Neither JAX nor memjax is imported here.
Source: Titans (arXiv:2501.00663), eqs. 8 to 18; TTT (arXiv:2407.04620), eqs. 1 to 7; Miras
(arXiv:2504.13173), eqs. 11 to 27; ATLAS (arXiv:2505.23735), eqs. 9 to 33; LaCT (arXiv:2505.23884).
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from tests.oracles.memories import forward, gradient
from tests.oracles.parts import kept, link, newton_schulz


@dataclass(frozen=True)
class Rule:
    """The four choices and the chunk; the widths are those of the weights."""

    chunk: int
    structure: str = "mlp"  # mlp, gated_mlp, vector
    features: tuple = ()  # ("polynomial", degree), ("taylor_exp", degree), ("elu1", 0), ("dpfp", n)
    activation: str = "gelu"  # gelu (tanh), silu or relu, between the layers
    norm: bool = False  # a layer norm on what the network gives
    residual: bool = False  # M(x) = x + f(x)
    bias: str = "l2"  # l2, dot, lp, robust, huber coordinate, huber norm, huber switch
    p: float = 3.0
    sharpness: float = 10.0
    retention: str = "decay"  # decay, initial, lq, simplex, elastic_net, renormalise
    q: float = 4.0
    temperature: float = 1.0
    total: float = 1.0
    soft: float = 0.1  # the threshold of elastic_net
    first: bool = False  # W' decays with the weights, before the gradient is taken
    momentum: bool = True
    learner: str = "plain"  # with momentum: plain, muon, delta, by chunk; without: plain, delta
    steps: int = 5  # of Newton-Schulz
    window: int = 1
    implicit: bool = False  # lr / (1 + lr |k|^2) in the place of lr
    read: str = "after"  # after, before, chunk


class Gates(NamedTuple):
    """Each [B, T, H]; retain may be [B, T, H, K]; None reads as 1 (momentum: as not there).

    window [B, T, H, c]: of the token itself first, then of the one before it, and so on.
    """

    lr: Any
    momentum: Any = None
    retain: Any = None
    scale: Any = None
    threshold: Any = None
    window: Any = None


@dataclass(frozen=True)
class State:
    """base, weights: one [B, H, in, out] array a layer; begin...: [H, in, out].

    momentum is a list like weights, or, by chunk, three things: {"before": like weights, "sum":
    like weights, "rate": [B, H]}. pairs is {"k", "v": [B, H, c - 1, .], "threshold": [B, H, c - 1]
    or None, "live": [B, c - 1]}, or None; the last of them is the latest, and what is not live is
    0 (threshold: 1).
    """

    base: list
    weights: list
    momentum: Any
    place: np.ndarray  # [B]
    segment: np.ndarray  # [B], -1: nothing seen
    begin: list  # W_0
    begin_momentum: Any  # S_0, zero unless a prefix was read into it
    slow: dict  # scale, bias: [H, V], taylor: [H, degree + 1], or empty
    pairs: dict | None = None


def start(rule, fast, slow, batch, key=0):
    """The state before the first token; fast: a list of [H, in, out], slow: {name: [H, V]}.

    key: the dimension of keys, where the rule has a window.
    """
    begin = [np.array(w, np.float64) for w in fast]
    heads = len(begin[0])
    still = [np.zeros_like(w) for w in begin] if rule.momentum else []
    if rule.learner == "by chunk":
        still = {"before": still, "sum": [s.copy() for s in still], "rate": np.zeros(heads)}
    rows = [np.stack([w] * batch) for w in begin]
    held = {name: np.array(value, np.float64) for name, value in slow.items()}
    place, segment = np.zeros(batch, np.int64), np.full(batch, -1)
    pairs = None
    if rule.window > 1:
        past = (batch, heads, rule.window - 1)
        needs = rule.bias == "robust" or rule.bias.startswith("huber")
        pairs = {
            "k": np.zeros((*past, key)), "v": np.zeros((*past, begin[-1].shape[-1])),
            "threshold": np.ones(past) if needs else None,
            "live": np.zeros((batch, rule.window - 1), bool),
        }  # fmt: skip
    moving = at(still, lambda s: np.stack([s] * batch))
    return State(rows, [w.copy() for w in rows], moving, place, segment, begin, still, held, pairs)


def at(momentum, take):
    """The momentum with `take` done to every array of it."""
    if isinstance(momentum, dict):
        return {name: at(value, take) for name, value in momentum.items()}
    return [take(s) for s in momentum] if isinstance(momentum, list) else take(momentum)


def put(momentum, b, h, value):
    """Writes one head's momentum into that of all."""
    if isinstance(momentum, dict):
        for name in momentum:
            put(momentum[name], b, h, value[name])
    elif isinstance(momentum, list):
        for s, new in zip(momentum, value, strict=True):
            s[b, h] = new
    else:
        momentum[b, h] = value


def here(gates, *place):
    """The gates of one token and head."""
    found = {name: getattr(gates, name) for name in Gates._fields}
    return Gates(**{name: None if g is None else g[place] for name, g in found.items()})


def between(base, weights, scale):
    """W' + c (W - W'), matrix by matrix."""
    return [b + scale * (w - b) for b, w in zip(base, weights, strict=True)]


def change(rule, momentum, g, lr, e):
    """A token's new momentum and what is added to its weights, of the gradients g."""
    if not rule.momentum:
        return momentum, [-lr * d for d in g]
    if rule.learner == "by chunk":
        total = [s - lr * d for s, d in zip(momentum["sum"], g, strict=True)]
        moved = momentum | {"sum": total, "rate": momentum["rate"] + e}
        return moved, [np.zeros_like(d) for d in g]
    if rule.learner == "muon":
        moved = [e * s - d for s, d in zip(momentum, g, strict=True)]
        return moved, [lr * newton_schulz(s, rule.steps) for s in moved]
    if rule.learner == "delta":
        moved = [
            e * s - lr * (d @ d.T) @ s - lr * d for s, d in zip(momentum, g, strict=True)
        ]  # fmt: skip
        return moved, moved
    moved = [e * s - lr * d for s, d in zip(momentum, g, strict=True)]
    return moved, moved


def end(rule, momentum, weights, begin):
    """What the end of a chunk makes of momentum and weights."""
    if rule.learner == "by chunk":
        e = momentum["rate"] / rule.chunk
        step = [e * s + g for s, g in zip(momentum["before"], momentum["sum"], strict=True)]
        zero = [np.zeros_like(s) for s in step]
        momentum = {"before": step, "sum": zero, "rate": 0.0}
        if rule.steps:
            step = [newton_schulz(s, rule.steps) for s in step]
        weights = [w + s for w, s in zip(weights, step, strict=True)]
    if rule.retention == "renormalise":
        norm = lambda w: np.sqrt((w**2).sum(axis=0))  # noqa: E731
        weights = [w * norm(w_0) / norm(w) for w, w_0 in zip(weights, begin, strict=True)]
    return momentum, weights


def run(rule, state, q, k, v, gates, segment_ids=None):
    """Outputs [B, T, H, V], losses at the chunk-start weights [B, T, H], and the last state."""
    batch, length, heads, _ = q.shape
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    losses = np.zeros(q.shape[:3])
    place, segment = state.place.copy(), state.segment.copy()
    base = [w.copy() for w in state.base]
    weights = [w.copy() for w in state.weights]
    momentum = at(state.momentum, np.copy)
    pairs = state.pairs and {n: None if p is None else p.copy() for n, p in state.pairs.items()}
    for b in range(batch):
        for t in range(length):
            begins = False
            if segment_ids is not None:
                begins = segment[b] != -1 and segment_ids[b, t] != segment[b]
                segment[b] = segment_ids[b, t]
            if begins:
                place[b] = 0
            place[b] += 1
            ends = place[b] == rule.chunk
            if ends:
                place[b] = 0
            if pairs and begins:
                forget(pairs, b)
            for h in range(heads):
                gate = here(gates, b, t, h)
                slow = {name: value[h] for name, value in state.slow.items()}
                begin = [w[h] for w in state.begin]
                if begins:
                    held, now = begin, begin
                    moving = at(state.begin_momentum, lambda s, h=h: s[h])
                else:
                    held, now = [w[b, h] for w in base], [w[b, h] for w in weights]
                    moving = at(momentum, lambda s, b=b, h=h: s[b, h])

                def decayed(arrays, gate=gate, begin=begin):
                    if gate.retain is None:
                        return arrays
                    pair = zip(arrays, begin, strict=True)
                    return [kept(rule, gate.retain, w, w_0) for w, w_0 in pair]

                def linked(arrays):
                    return [link(rule, w) for w in arrays]

                lr, before = gate.lr, now
                scale = 1.0 if gate.scale is None else gate.scale
                if rule.first:
                    held = decayed(held)
                if rule.implicit:
                    lr = lr / (1.0 + lr * (k[b, t, h] ** 2).sum())
                anchor = linked(held)
                losses[b, t, h], g = gradient(
                    rule, anchor, slow, k[b, t, h], v[b, t, h], gate.threshold
                )
                if rule.learner == "delta" and not rule.momentum:
                    inputs = forward(rule, anchor, slow, k[b, t, h])[1][0]
                    g = [d + np.outer(z, z @ w) for d, z, w in zip(g, inputs, now, strict=True)]
                if rule.window > 1:
                    g = over_window(rule, pairs, b, h, anchor, slow, g, gate.window)
                moving, added = change(rule, moving, g, lr, gate.momentum)
                now = [w + d for w, d in zip(decayed(now), added, strict=True)]
                seen = {"after": now, "before": before, "chunk": held}[rule.read]
                seen = linked(between(held, seen, scale))
                y[b, t, h] = forward(rule, seen, slow, q[b, t, h])[0]
                if ends:
                    moving, now = end(rule, moving, between(held, now, scale), begin)
                    held = now
                for layer in range(len(base)):
                    base[layer][b, h], weights[layer][b, h] = held[layer], now[layer]
                put(momentum, b, h, moving)
            if pairs:
                remember(pairs, b, k[b, t], v[b, t], gates.threshold, t)
    last = replace(
        state, base=base, weights=weights, momentum=momentum, place=place, segment=segment,
        pairs=pairs,
    )  # fmt: skip
    return y, losses, last


def over_window(rule, pairs, b, h, weights, slow, own, shares):
    """The gradient of a token, `own` its own, with those of the live pairs before it."""
    total = [d if shares is None else shares[0] * d for d in own]
    for back in range(1, rule.window):
        if not pairs["live"][b, -back]:
            continue
        key, value = pairs["k"][b, h, -back], pairs["v"][b, h, -back]
        threshold = None if pairs["threshold"] is None else pairs["threshold"][b, h, -back]
        _, g = gradient(rule, weights, slow, key, value, threshold)
        share = 1.0 if shares is None else shares[back]
        total = [s + share * d for s, d in zip(total, g, strict=True)]
    return total


def forget(pairs, b):
    """Empties the window of a row."""
    for name, array in pairs.items():
        if array is not None:
            array[b] = 1 if name == "threshold" else 0


def remember(pairs, b, k, v, threshold, t):
    """Puts a token last into the window of a row; the first falls out."""
    new = {"k": k, "v": v, "live": True}
    if threshold is not None:
        new["threshold"] = threshold[b, t]
    for name, value in new.items():
        if name == "live":
            pairs[name][b] = np.append(pairs[name][b, 1:], value)
        else:
            pairs[name][b] = np.concatenate([pairs[name][b][:, 1:], value[:, None]], axis=1)


def read(rule, state, q):
    """M(q; W) at the state's weights, without a write; q [B, T, H, K]."""
    batch, length, heads, _ = q.shape
    y = np.zeros((batch, length, heads, state.weights[-1].shape[-1]))
    for b, t, h in np.ndindex(batch, length, heads):
        slow = {name: value[h] for name, value in state.slow.items()}
        now = [link(rule, w[b, h]) for w in state.weights]
        y[b, t, h] = forward(rule, now, slow, q[b, t, h])[0]
    return y
