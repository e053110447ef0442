"""The oracle's biases, retentions and Newton-Schulz iteration, for one token, head and matrix."""

import numpy as np

SMOOTH = 1e-6  # |r| stands for sqrt(r^2 + SMOOTH), and ||r|| for sqrt(sum r^2 + SMOOTH)


def loss(rule, y, v, threshold=None):
    """The loss of one token and its signal, the derivative by y; sign(r) stands as tanh(nu r)."""
    name, nu, r, d = rule.bias, rule.sharpness, y - v, threshold
    if name == "dot":
        return -(y * v).sum(), -v
    if name == "l2":
        return 0.5 * (r**2).sum(), r
    if name == "lp":
        size = np.sqrt(r**2 + SMOOTH)
        return (size**rule.p).sum(), rule.p * np.tanh(nu * r) * size ** (rule.p - 1)
    norm = np.sqrt((r**2).sum() + SMOOTH)
    if name == "robust":
        return 0.5 * norm**2 + d * norm + 0.5 * d**2, r + d * r / norm
    if name == "huber coordinate":
        near = np.abs(r) <= d
        parts = np.where(near, 0.5 * r**2, d * np.abs(r) - 0.5 * d**2)
        return parts.sum(), np.where(near, r, d * np.tanh(nu * r))
    if norm <= d:
        return 0.5 * norm**2, r
    if name == "huber norm":
        return d * norm - 0.5 * d**2, d * r / norm
    assert name == "huber switch"
    return d * np.abs(r).sum() - 0.5 * d**2, d * np.tanh(nu * r)


def kept(rule, retain, w, initial):
    """What is left of w: a factor for all, or one a key channel, which is a row of the matrix."""
    if np.ndim(retain):
        retain = retain[:, None]
    if rule.retention == "initial":
        return initial + retain * (w - initial)
    return retain * w


def link(rule, a):
    """The weights of what was accumulated in one matrix."""
    if rule.retention == "lq":
        norm = (np.abs(a) ** rule.q).sum() ** (1 / rule.q)
        return a * norm ** (2 - rule.q)
    if rule.retention == "simplex":
        e = np.exp((a - a.max(axis=0)) / rule.temperature)
        return rule.total * e / e.sum(axis=0)
    if rule.retention == "elastic_net":
        return a * np.arctan(np.sqrt(a**2 + 1e-12) / rule.soft) / (np.pi / 2)
    return a


def newton_schulz(x, steps):
    """The iteration, value by value: X = U s V^T stays U p(p(...s)) V^T, s scaled to norm 1."""
    u, s, v = np.linalg.svd(x, full_matrices=False)
    size = np.sqrt((s**2).sum())
    if size > 0:
        s = s / size
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v
