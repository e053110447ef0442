"""The oracle's memories: the networks M(x; W), for one vector x, and their gradients by hand.

`rule` is a `miras.Rule` of this package. Vectors are rows: a layer is `x @ W`, W [in, out].
"""

from itertools import combinations_with_replacement
from math import factorial

import numpy as np

from tests.oracles.parts import loss

EPSILON = 1e-6


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


def features(rule, slow, x):
    """phi(x) [F] of a key or query x [K].

    Of a polynomial, degree i contributes c_i sqrt(i! / (n_1! ... n_K!)) x_1^n_1 ... x_K^n_K.
    """
    name, number = rule.features or (None, 0)
    if name is None:
        return x
    if name == "elu1":
        return np.where(x > 0, x + 1, np.exp(x))
    if name == "dpfp":
        u = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)])
        size = len(u)
        return np.array(
            [u[i] * u[(i - shift) % size] for shift in range(1, number + 1) for i in range(size)]
        )
    found = []
    for degree in range(number + 1):
        c = slow["taylor"][degree] if name == "polynomial" else 1 / np.sqrt(factorial(degree))
        for chosen in combinations_with_replacement(range(len(x)), degree):
            powers = np.bincount(np.array(chosen, int), minlength=len(x))
            ways = factorial(degree) / np.prod([float(factorial(n)) for n in powers])
            found.append(c * np.sqrt(ways) * np.prod(x**powers))
    return np.array(found)


def forward(rule, weights, slow, x):
    """M(x; W) for one vector x [K], and what the gradient needs of the way there."""
    z = features(rule, slow, x)
    if rule.structure == "vector":
        return z * weights[0][0], z
    if rule.structure == "gated_mlp":
        gate, value = z @ weights[0], z @ weights[1]
        opened, slope = activate(rule.activation, gate)
        inputs, aside = [z, z, opened * value], (opened, value, slope)
    else:
        inputs, aside = [z], []
        for w in weights[:-1]:
            h, slope = activate(rule.activation, inputs[-1] @ w)
            inputs.append(h)
            aside.append(slope)
    y = inputs[-1] @ weights[-1]
    unit = deviation = None
    if rule.norm:
        centred = y - y.mean()
        deviation = np.sqrt((centred**2).mean() + EPSILON)
        unit = centred / deviation
        y = unit * slow["scale"] + slow["bias"]
    if rule.residual:
        y = x + y
    return y, (inputs, aside, unit, deviation)


def gradient(rule, weights, slow, x, v, threshold=None):
    """The loss of M(x; W) against v, and its gradient by every weight matrix.

    The gradient is what the bias's signal, in the place of the loss's derivative by y, gives.
    """
    y, way = forward(rule, weights, slow, x)
    value, d = loss(rule, y, v, threshold)
    if rule.structure == "vector":
        return value, [(way * d)[None]]
    inputs, aside, unit, deviation = way
    if rule.norm:
        d = d * slow["scale"]
        d = (d - d.mean() - unit * (d * unit).mean()) / deviation
    if rule.structure == "gated_mlp":
        opened, held, slope = aside
        back = weights[2] @ d
        signals = [back * held * slope, back * opened, d]
        return value, [np.outer(x, d) for x, d in zip(inputs, signals, strict=True)]
    gradients = [None] * len(weights)
    for layer in reversed(range(len(weights))):
        gradients[layer] = np.outer(inputs[layer], d)
        if layer:
            d = (weights[layer] @ d) * aside[layer - 1]
    return value, gradients
