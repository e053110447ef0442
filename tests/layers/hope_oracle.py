"""HOPE's memories as nested learning writes them, token by token.

Each function takes the layer's parameters by name and one document [T, E], in float64 NumPy, and
returns [T, E]; the keywords are sizes, or faults to plant. What the paper leaves open (heads, how a
memory's answer becomes a gate, what a level of the continuum learns) is as the layers' own
equations say.
"""

import numpy as np

from tests.layers.matrix_oracle import convolve, outward
from tests.oracles.memories import forward, gradient
from tests.oracles.miras import Rule
from tests.oracles.titans import heads_of, rms_norm, sigmoid, silu, unit

SOURCES = ("k", "v", "eta", "alpha")


def self_referential(
    p, x, chunk, projection_chunk, lr_max, read="chunk", own=True, erases=True, adapts=True
):
    """Equations 86 to 91, one head after the other."""
    rule = Rule(chunk=1, residual=True)
    u, q = (heads_of(x, p[f"{name}.weight"]) for name in ("content", "query"))
    if "convs.0.weight" in p:
        u, q = (convolve(z, p[f"convs.{i}.weight"]) for i, z in enumerate((u, q)))
    q = unit(q)
    y = np.zeros(u.shape)

    def answer(weights, z):
        return forward(rule, weights, {}, z)[0]

    def learned(now, base, k, target, lr, a):
        _, g = gradient(rule, base, {}, k, target)
        inputs = forward(rule, base, {}, k)[1][0]
        new = []
        for w, d, z in zip(now, g, inputs, strict=True):
            kept = a * w - lr * np.outer(z, z @ w) if erases else a * w
            new.append(kept - lr * d)
        return new

    for h in range(u.shape[1]):
        now = {
            name: [p[f"projections.fast.{i}"][4 * h + place] for i in range(2)]
            for place, name in enumerate(SOURCES)
        }
        now["memory"] = [p[f"memory.fast.{i}"][h] for i in range(2)]
        base = dict(now)
        for t in range(len(x)):
            for name in base:
                if t % (chunk if name == "memory" else projection_chunk) == 0:
                    base[name] = now[name]
            z = u[t, h]
            k, v = unit(answer(base["k"], z)), unit(answer(base["v"], z))
            lr = answer(base["eta"], z) @ p["rate.weight"][h] + p["rate.bias"][h]
            a = answer(base["alpha"], z) @ p["retain.weight"][h] + p["retain.bias"][h]
            lr, a = lr_max * sigmoid(lr), sigmoid(a)
            y[t, h] = answer(base["memory"] if read == "chunk" else now["memory"], q[t, h])
            for name in now:
                if adapts or name == "memory":
                    target = answer(base[name], v) if own else v
                    now[name] = learned(now[name], base[name], k, target, lr, a)
    return outward(p, rms_norm(y, p["norm.scale"]) * silu(heads_of(x, p["gate.weight"])))


def continuum(p, x, periods, lr_max, learns=True, chained=True):
    """Equations 70 and 71: what the levels add to x."""
    rule, h = Rule(chunk=1, momentum=False), x
    for level, period in enumerate(periods):
        z = rms_norm(h if chained else x, p[f"levels.{level}.norm.scale"])
        size = np.sqrt(x.shape[1])
        k = size * unit(z @ p[f"levels.{level}.key.weight"])
        v = z @ p[f"levels.{level}.value.weight"]
        name = f"levels.{level}.rate.linear"
        lr = sigmoid(z @ p[f"{name}.weight"] + p[f"{name}.bias"])[:, 0]
        lr = lr_max * lr / (period * x.shape[1])
        weights = [p[f"levels.{level}.weights.fast.{i}"][0] for i in range(2)]
        found = np.zeros(x.shape)
        for begin in range(0, len(x), period):
            here = range(begin, min(begin + period, len(x)))
            total = [np.zeros_like(w) for w in weights]
            for t in here:
                found[t] = forward(rule, weights, {}, z[t])[0]
                _, g = gradient(rule, weights, {}, k[t], v[t])
                total = [s + lr[t] * d for s, d in zip(total, g, strict=True)]
            if learns:
                weights = [w - s for w, s in zip(weights, total, strict=True)]
        h = h + found
    return h - x


def hope(p, x, periods, lr_max, inner_lr_max, **options):
    """Equations 94 to 97: the continuum after the self-referential memory."""

    def under(name):
        return {key[len(name) + 1 :]: w for key, w in p.items() if key.startswith(f"{name}.")}

    o = self_referential(under("titans"), x, lr_max=lr_max, **options)
    return o + continuum(under("continuum"), o, periods, inner_lr_max)
