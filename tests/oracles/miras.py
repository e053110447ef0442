"""The oracle of the test-time memories: one row, one head, one token at a time, in float64 NumPy.

For each row and head, with W' the weights held when the chunk began:

    a document starts:  W' = W = W_0,  S = S_0,  p = 0
    W' = a_t W'                           (where the decay comes first)
    g_t = grad_W loss(M(k_t; W'), v_t)
    S_t = e_t S_{t-1} - lr_t g_t          W_t = a_t W_{t-1} + S_t        (momentum)
                                          W_t = a_t W_{t-1} - lr_t g_t   (gradient descent)
    y_t = M(q_t; W' + c_t (W_t - W'))
    the chunk ends:     W = W' + c_t (W_t - W'),  W' = W,  p = 0

The gradients are derived by hand. Neither JAX nor memjax is imported here.
Source: Titans (arXiv:2501.00663), eqs. 8 to 18; TTT (arXiv:2407.04620), eqs. 1 to 7.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

EPSILON = 1e-6


@dataclass(frozen=True)
class Rule:
    """The four choices and the chunk; the widths are those of the weights."""

    chunk: int
    activation: str = "gelu"  # gelu (tanh), silu or relu, between the layers
    norm: bool = False  # a layer norm on what the network gives
    residual: bool = False  # M(x) = x + f(x)
    bias: str = "l2"  # l2: 1/2 |y - v|^2; dot: -<y, v>
    momentum: bool = True
    read: str = "after"
    first: bool = False  # W' decays with the weights, before the gradient is taken
    implicit: bool = False  # lr / (1 + lr |k|^2) in the place of lr


class Gates(NamedTuple):
    """Each [B, T, H]; retain may be [B, T, H, K]; None reads as 1 (momentum: as not there)."""

    lr: Any
    momentum: Any = None
    retain: Any = None
    scale: Any = None


@dataclass(frozen=True)
class State:
    """base, weights, momentum: one [B, H, in, out] array a layer; begin...: [H, in, out]."""

    base: list
    weights: list
    momentum: list
    place: np.ndarray  # [B]
    segment: np.ndarray  # [B], -1: nothing seen
    begin: list  # W_0
    begin_momentum: list  # S_0, zero unless a prefix was read into it
    slow: dict  # scale, bias: [H, V], or empty


def start(rule, fast, slow, batch):
    """The state before the first token; fast: a list of [H, in, out], slow: {name: [H, V]}."""
    begin = [np.array(w, np.float64) for w in fast]
    still = [np.zeros_like(w) for w in begin] if rule.momentum else []
    rows, momentum = ([np.stack([w] * batch) for w in part] for part in (begin, still))
    held = {name: np.array(value, np.float64) for name, value in slow.items()}
    place, segment = np.zeros(batch, np.int64), np.full(batch, -1)
    return State(rows, [w.copy() for w in rows], momentum, place, segment, begin, still, held)


def activate(name, z):
    """The activation and its derivative at z."""
    if name == "relu":
        return np.maximum(z, 0.0), (z > 0).astype(z.dtype)
    if name == "silu":
        s = 1.0 / (1.0 + np.exp(-z))
        return z * s, s * (1.0 + z * (1.0 - s))
    c = np.sqrt(2.0 / np.pi)
    t = np.tanh(c * (z + 0.044715 * z**3))
    slope = c * (1.0 + 3 * 0.044715 * z**2)
    return 0.5 * z * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t**2) * slope


def forward(rule, weights, slow, x):
    """M(x; W) for one vector x [K], and what the gradient needs of the way there."""
    inputs, slopes = [x], []
    for w in weights[:-1]:
        h, slope = activate(rule.activation, inputs[-1] @ w)
        inputs.append(h)
        slopes.append(slope)
    y = inputs[-1] @ weights[-1]
    unit = deviation = None
    if rule.norm:
        centred = y - y.mean()
        deviation = np.sqrt((centred**2).mean() + EPSILON)
        unit = centred / deviation
        y = unit * slow["scale"] + slow["bias"]
    if rule.residual:
        y = x + y
    return y, (inputs, slopes, unit, deviation)


def loss(rule, y, v):
    """The loss of one token and its derivative by y."""
    if rule.bias == "dot":
        return -(y * v).sum(), -v
    return 0.5 * ((y - v) ** 2).sum(), y - v


def gradient(rule, weights, slow, x, v):
    """The loss of M(x; W) against v and its gradient by every weight matrix."""
    y, (inputs, slopes, unit, deviation) = forward(rule, weights, slow, x)
    value, d = loss(rule, y, v)
    if rule.norm:
        d = d * slow["scale"]
        d = (d - d.mean() - unit * (d * unit).mean()) / deviation
    gradients = [None] * len(weights)
    for layer in reversed(range(len(weights))):
        gradients[layer] = np.outer(inputs[layer], d)
        if layer:
            d = (weights[layer] @ d) * slopes[layer - 1]
    return value, gradients


def between(base, weights, scale):
    """W' + c (W - W'), matrix by matrix."""
    return [b + scale * (w - b) for b, w in zip(base, weights, strict=True)]


def run(rule, state, q, k, v, gates, segment_ids=None):
    """Outputs [B, T, H, V], losses at the chunk-start weights [B, T, H], and the last state."""
    batch, length, heads, _ = q.shape
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    losses = np.zeros(q.shape[:3])
    place, segment = state.place.copy(), state.segment.copy()
    base = [w.copy() for w in state.base]
    weights = [w.copy() for w in state.weights]
    momentum = [s.copy() for s in state.momentum]
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
            for h in range(heads):
                slow = {name: value[h] for name, value in state.slow.items()}
                if begins:
                    held, now = [w[h] for w in state.begin], [w[h] for w in state.begin]
                    moving = [s[h] for s in state.begin_momentum]
                else:
                    held, now = [w[b, h] for w in base], [w[b, h] for w in weights]
                    moving = [s[b, h] for s in momentum]
                lr = gates.lr[b, t, h]
                retain = 1.0 if gates.retain is None else gates.retain[b, t, h]
                scale = 1.0 if gates.scale is None else gates.scale[b, t, h]
                if np.ndim(retain):
                    retain = retain[:, None]  # one factor a key channel, a row of the matrix
                before = now
                if rule.first:
                    held = [retain * w for w in held]
                if rule.implicit:
                    lr = lr / (1.0 + lr * (k[b, t, h] ** 2).sum())
                losses[b, t, h], g = gradient(rule, held, slow, k[b, t, h], v[b, t, h])
                if rule.momentum:
                    e = gates.momentum[b, t, h]
                    moving = [e * s - lr * d for s, d in zip(moving, g, strict=True)]
                    now = [retain * w + s for w, s in zip(now, moving, strict=True)]
                else:
                    now = [retain * w - lr * d for w, d in zip(now, g, strict=True)]
                seen = between(held, before if rule.read == "before" else now, scale)
                y[b, t, h] = forward(rule, seen, slow, q[b, t, h])[0]
                if ends:
                    now = between(held, now, scale)
                    held = now
                for layer in range(len(base)):
                    base[layer][b, h], weights[layer][b, h] = held[layer], now[layer]
                    if rule.momentum:
                        momentum[layer][b, h] = moving[layer]
    last = replace(
        state, base=base, weights=weights, momentum=momentum, place=place, segment=segment
    )
    return y, losses, last


def read(rule, state, q):
    """M(q; W) at the state's weights, without a write; q [B, T, H, K]."""
    batch, length, heads, _ = q.shape
    y = np.zeros((batch, length, heads, state.weights[-1].shape[-1]))
    for b, t, h in np.ndindex(batch, length, heads):
        slow = {name: value[h] for name, value in state.slow.items()}
        y[b, t, h] = forward(rule, [w[b, h] for w in state.weights], slow, q[b, t, h])[0]
    return y
