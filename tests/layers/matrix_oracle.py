"""The layers of `matrix_memory` as their papers write them: one document, in float64 NumPy.

Each function takes the layer's parameters by name and one document [T, E], and returns [T, E]; the
keywords are faults to plant. The recurrences are those of `tests.oracles.recurrences`; linear
attention and RetNet stand here in their parallel forms. What the papers leave open is as in
docs/deviations.md.
"""

import numpy as np

from tests.oracles import recurrences
from tests.oracles.titans import heads_of, rms_norm, sigmoid, silu, unit


def softplus(z):
    return np.logaddexp(0, z)


def convolve(z, weight):
    """Each channel of z [T, H, D] over the last tokens; weight [C, H * D]."""
    flat, y = z.reshape(len(z), -1), np.zeros((len(z), z[0].size))
    for t in range(len(z)):
        for s in range(min(len(weight), t + 1)):
            y[t] += weight[s] * flat[t - s]
    return y.reshape(z.shape)


def projected(p, x):
    """x W_q, x W_k, x W_v, each [T, H, D]."""
    return [heads_of(x, p[f"{name}.weight"]) for name in ("query", "key", "value")]


def convolved(p, x):
    """SiLU(conv(.)) of the three."""
    return [silu(convolve(z, p[f"convs.{i}.weight"])) for i, z in enumerate(projected(p, x))]


def by_head(recurrence, q, k, v, *rates):
    """The recurrence of one head for each, from S = 0; rates [H] or [T, H, ...]."""
    out = np.zeros(v.shape)
    for h in range(v.shape[1]):
        own = [rate[:, h] if rate.ndim > 1 else rate[h] for rate in rates]
        start = np.zeros((v.shape[2], k.shape[2]))
        out[:, h], _ = recurrence(q[:, h], k[:, h], v[:, h], *own, start)
    return out


def outward(p, y):
    return np.einsum("thd,hde->te", y, p["out.weight"])


def normalised(p, y):
    """RMSNorm of each head."""
    return rms_norm(y, p["norm.scale"])


def gate_of(p, x):
    """x W_g, [T, H, V]."""
    return heads_of(x, p["gate.weight"])


def head_gate(p, x):
    """sigmoid(x W + b), [T, H]."""
    return sigmoid(x @ p["gates.rate.linear.weight"] + p["gates.rate.linear.bias"])


def linear_attention(p, x, divided=True):
    """sum_j (phi(q_t) . phi(k_j)) v_j / sum_j phi(q_t) . phi(k_j) over j <= t; equations 4, 7."""
    q, k, v = projected(p, x)
    q, k = (np.where(z > 0, z + 1, np.exp(np.minimum(z, 0))) for z in (q, k))
    scores = np.einsum("ihd,jhd->hij", q, k) * np.tri(len(x))
    y = np.einsum("hij,jhd->ihd", scores, v)
    return outward(p, y / (scores.sum(-1).T[:, :, None] + 1e-6) if divided else y)


def retnet(p, x, base=10000.0):
    """(Q K^H * D) V / sqrt(K) with D = g^(n - m) and Q, K turned as complex numbers; 5 and 8."""
    q, k, v = projected(p, x)
    n, half = np.arange(len(x)), q.shape[-1] // 2
    turn = np.exp(1j * n[:, None] * base ** (-np.arange(half) / half))[:, None]
    q, k = ((z[..., :half] + 1j * z[..., half:]) * turn for z in (q, k))
    scores = np.einsum("ihd,jhd->hij", q, k.conj()).real / np.sqrt(2 * half)
    gamma = 1 - 2.0 ** (-5 - np.arange(q.shape[1]))
    apart = n[:, None] - n
    decay = np.where(apart >= 0, gamma[:, None, None] ** np.maximum(apart, 0), 0)
    y = normalised(p, np.einsum("hij,jhd->ihd", scores * decay, v))
    return outward(p, silu(gate_of(p, x)) * y)


def gla(p, x, temperature=16):
    """Section 4.4: a = sigmoid(x W_1 W_2 + b)^(1 / 16)."""
    q, k, v = projected(p, x)
    a = heads_of(x @ p["gates.decay.rates.down.weight"], p["gates.decay.rates.up.weight"])
    a = sigmoid(a + p["gates.decay.offset"]) ** (1 / temperature)
    y = by_head(recurrences.gla, q / np.sqrt(q.shape[-1]), k, v, a)
    return outward(p, normalised(p, y) * silu(gate_of(p, x)))


def mamba2(p, x, gate_first=True, scale=1.0):
    """Figure 6: (C, B, x) = SiLU(conv(.)), y = SSM + D x, RMSNorm(y * SiLU(z)) W_o."""
    c, b, v = convolved(p, x)
    shared = v.shape[1] // b.shape[1]
    c, b = (np.repeat(z, shared, axis=1) for z in (scale * c, b))
    step = softplus(x @ p["gates.linear.weight"] + p["gates.offset"])
    y = by_head(recurrences.mamba2, c, b, v, step, np.exp(p["gates.log_rate"]))
    y, gate = y + p["skip"][:, None] * v, silu(gate_of(p, x))
    flat = (y * gate if gate_first else y).reshape(len(x), -1)
    y = rms_norm(flat, p["norm.scale"]).reshape(y.shape)
    return outward(p, y if gate_first else y * gate)


def delta_net(p, x, most=1.0, conv=True, keys=unit):
    """Section 3: unit queries and keys behind convolution and SiLU; norm, no gate."""
    q, k, v = convolved(p, x) if conv else projected(p, x)
    if not conv:
        q, k = silu(q), silu(k)
    q, k = keys(q) / np.sqrt(q.shape[-1]), keys(k)
    y = by_head(recurrences.delta_net, q, k, v, most * head_gate(p, x))
    return outward(p, normalised(p, y))


def after_the_step(q, k, v, beta, decay, state):
    """S_t = S_{t-1} (diag(a) - b k k^T) + b v k^T: predicts from what has not decayed, a fault."""
    outputs = []
    for q_t, k_t, v_t, b, a in zip(q, k, v, beta, decay, strict=True):
        held = state @ (a * np.eye(len(k_t)) - b * np.outer(k_t, k_t))
        state = held + b * np.outer(v_t, k_t)
        outputs.append(state @ q_t)
    return np.array(outputs), state


def gated_delta_net(p, x, most=1.0, recurrence=recurrences.gated_delta_net):
    """Equation 10 and section 3.4: a = exp(-exp(A) softplus(x W + b))."""
    q, k, v = convolved(p, x)
    step = softplus(x @ p["gates.decay.rates.up.weight"] + p["gates.decay.offset"])
    a = np.exp(-np.exp(p["gates.decay.log_rate"]) * step)
    q, k = unit(q) / np.sqrt(q.shape[-1]), unit(k)
    y = by_head(recurrence, q, k, v, most * head_gate(p, x), a)
    return outward(p, normalised(p, y) * silu(gate_of(p, x)))


def kda_decay(p, x):
    """Equation 1's alpha: per channel, its projection of low rank."""
    low = x @ p["gates.decay.rates.down.weight"]
    step = softplus(heads_of(low, p["gates.decay.rates.up.weight"]) + p["gates.decay.offset"])
    return np.exp(-np.exp(p["gates.decay.log_rate"])[:, None] * step)


def kda(p, x, most=1.0, recurrence=recurrences.kda):
    """Equation 1 and section 4: decay per channel, low-rank sigmoid gate."""
    q, k, v = convolved(p, x)
    q, k = unit(q) / np.sqrt(q.shape[-1]), unit(k)
    y = by_head(recurrence, q, k, v, most * head_gate(p, x), kda_decay(p, x))
    gate = sigmoid(heads_of(x @ p["gate_down.weight"], p["gate.weight"]))
    return outward(p, normalised(p, y) * gate)


def kda_losses(p, x):
    """1/2 ||S diag(a_t) k_t - v_t||^2 of each token before it is written, [T, H]."""
    _, k, v = convolved(p, x)
    k, a, beta = unit(k), kda_decay(p, x), head_gate(p, x)
    losses, states = np.zeros(k.shape[:2]), np.zeros((k.shape[1], v.shape[2], k.shape[2]))
    for t, h in np.ndindex(losses.shape):
        states[h] = states[h] * a[t, h]
        error = states[h] @ k[t, h] - v[t, h]
        losses[t, h] = (error**2).sum() / 2
        states[h] -= beta[t, h] * np.outer(error, k[t, h])
    return losses


def longhorn(p, x, diagonal=False):
    """Theorem 3.1 as the minimum it comes from; `diagonal`: the paper's approximation."""
    q, k, v = convolved(p, x)

    def approximate(q, k, v, th, s):
        outputs = []
        for q_t, k_t, v_t, th_t in zip(q, k, v, th, strict=True):
            d = th_t / (1 + th_t * k_t @ k_t)
            s = s * (1 - d * k_t**2) + d * np.outer(v_t, k_t)
            outputs.append(s @ q_t)
        return np.array(outputs), s

    rule = approximate if diagonal else recurrences.longhorn
    y = by_head(rule, q / np.sqrt(q.shape[-1]), k, v, head_gate(p, x))
    return outward(p, normalised(p, y) * silu(gate_of(p, x)))


def mesa_net(p, x, ridged=True, decayed=True):
    """Equation 6 as a regression: all pairs so far, weighted, and the ridge as more rows."""
    q, k, v = convolved(p, x)
    q, k, beta = unit(q), unit(k), head_gate(p, x)
    gamma = sigmoid(x @ p["gates.decay.linear.weight"] + p["gates.decay.linear.bias"])
    ridge = softplus(p["slow.ridge"]) if ridged else np.ones_like(p["slow.ridge"])
    y, nothing = np.zeros(v.shape), np.zeros((k.shape[2], v.shape[2]))
    for t, h in np.ndindex(v.shape[:2]):
        since = [gamma[i + 1 : t + 1, h].prod() if decayed else 1.0 for i in range(t + 1)]
        root = np.sqrt(since * beta[: t + 1, h])[:, None]
        keys = np.concatenate([root * k[: t + 1, h], np.diag(np.sqrt(ridge[h]))])
        values = np.concatenate([root * v[: t + 1, h], nothing])
        y[t, h] = q[t, h] @ np.linalg.lstsq(keys, values, rcond=None)[0]
    return outward(p, normalised(p, y))
