"""RWKV-7, mixtures of memories, TNT and gated associative memory as their papers write them.

Each function takes the layer's parameters by name and one document [T, E], in float64 NumPy, and
returns [T, E]; the keywords are sizes, or faults to plant. What the papers leave open is as the
layers' own equations say.
"""

import numpy as np

from tests.layers.matrix_oracle import convolve, outward, softplus
from tests.oracles import miras as engine
from tests.oracles.titans import heads_of, rms_norm, sigmoid, silu, unit


def rwkv7(p, x, root=0.5, order="eraser reads", bonus=True):
    """Section 4, with S [V, K] as there; equation 17 is a product of matrices."""
    before = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
    z = {
        name: x + (before - x) * p[f"shift.{name}"]
        for name in ("receptance", "key", "value", "decay", "rate", "gate")
    }
    r, k, v = (heads_of(z[name], p[f"{name}.weight"]) for name in ("receptance", "key", "value"))

    def low(name, act):
        return heads_of(act(z[name] @ p[f"{name}.down.weight"]), p[f"{name}.up.weight"])

    w = np.exp(-np.exp(-root) * sigmoid(low("decay", np.tanh) + p["decay.offset"]))
    a = sigmoid(low("rate", np.array) + p["rate.offset"])
    removed = unit(k * p["erased"])
    replaced = k * (1 + (a - 1) * p["mixed"])
    y = np.zeros(v.shape)
    for h in range(k.shape[1]):
        s = np.zeros((v.shape[2], k.shape[2]))
        for t in range(len(x)):
            read, put = removed[t, h], a[t, h] * removed[t, h]
            if order != "eraser reads":
                read, put = put, read
            s = s @ (np.diag(w[t, h]) - np.outer(read, put)) + np.outer(v[t, h], replaced[t, h])
            y[t, h] = s @ r[t, h]
    y = rms_norm(y, p["norm.scale"])
    if bonus:
        y += (r * p["bonus"] * replaced).sum(-1, keepdims=True) * v
    return outward(p, y * low("gate", sigmoid))


def shares(p, x, active, scaled=True):
    """The share of every memory [T, 1 + M]; the shared one, 1, is the first."""
    z = x @ p["router.weight"]
    z = np.exp(z - z.max(-1, keepdims=True))
    z /= z.sum(-1, keepdims=True)
    for t in range(len(z)):
        z[t, np.argsort(z[t])[: z.shape[1] - active]] = 0
    if scaled:
        z /= z.sum(-1, keepdims=True)
    return np.concatenate([np.ones((len(x), 1)), z], axis=1)


def mixture_of_memories(p, x, active=2, idle="still", scaled=True, shared=True):
    """Section 3 over the gated delta rule; each memory runs over the tokens routed to it."""
    q, k, v = (heads_of(x, p[f"{name}.weight"]) for name in ("query", "key", "value"))
    if "convs.0.weight" in p:
        q, k, v = (convolve(z, p[f"convs.{i}.weight"]) for i, z in enumerate((q, k, v)))
    heads = q.shape[1]
    q, k, v = unit(silu(q)) / np.sqrt(q.shape[-1]), unit(silu(k)), silu(v)
    share = shares(p, x, active, scaled)
    if not shared:
        share[:, 0] = 0
    rate = sigmoid(x @ p["lr.linear.weight"] + p["lr.linear.bias"])
    step = softplus(x @ p["retain.rates.up.weight"] + p["retain.offset"])
    decay = np.exp(-np.exp(p["retain.log_rate"]) * step)
    y = np.zeros(q.shape)
    for m in range(share.shape[1]):
        for h in range(heads):
            own, s = m * heads + h, np.zeros((v.shape[2], k.shape[2]))
            for t in range(len(x)):
                if share[t, m] == 0:
                    if idle == "decays":
                        s = decay[t, own] * s
                    continue
                s = decay[t, own] * s
                error = v[t, own] - s @ k[t, own]
                s = s + rate[t, own] * np.outer(error, k[t, own])
                y[t, h] += share[t, m] * (s @ q[t, h])
    return outward(p, rms_norm(y, p["norm.scale"]) * silu(heads_of(x, p["gate.weight"])))


def tnt(p, x, chunk, local_chunks, shard, lr_max, turned=True, read="chunk"):
    """Equations 5 to 8; every shard's local memories are memories of a sequence of their own."""
    q, k, v = (heads_of(x, p[f"{name}.weight"]) for name in ("query", "key", "value"))
    if "convs.0.weight" in p:
        q, k, v = (convolve(z, p[f"convs.{i}.weight"]) for i, z in enumerate((q, k, v)))
    q, k, v = unit(silu(q)), unit(silu(k)), silu(v)

    def answers(i, rule, q, k, v, x):
        weights = [p[f"memories.{i}.fast.{layer}"] for layer in range(2)]
        slow = {name: p[f"memories.{i}.slow.{name}"] for name in ("scale", "bias")}
        lr = lr_max * sigmoid(x @ p[f"rates.{i}.linear.weight"] + p[f"rates.{i}.linear.bias"])
        state = engine.start(rule, weights, slow, 1)
        return engine.run(rule, state, q[None], k[None], v[None], engine.Gates(lr[None]))[0][0]

    parts = {"norm": True, "residual": True, "momentum": False}
    y = answers(0, engine.Rule(chunk, read=read, **parts), q, k, v, x)
    for begin in range(0, len(x), shard):
        here = slice(begin, begin + shard)
        q_p = q[here]
        if turned:
            sums = np.cumsum(np.einsum("thi,thj->thij", k[here], k[here]), axis=0)
            q_p = np.einsum("thi,thij->thj", q[here], sums)
        for i, size in enumerate(local_chunks, 1):
            y[here] += answers(i, engine.Rule(size, **parts), q_p, k[here], v[here], x[here])
    return outward(p, rms_norm(y, p["norm.scale"]) * silu(heads_of(x, p["gate.weight"])))


def gated_associative(p, x, scale=None, turned=False):
    """Section 3: causal convolution and slots, each behind its gate."""
    local = convolve(x, p["conv.weight"]) @ p["local.weight"]
    scores = x @ p["bank"].T / (np.sqrt(x.shape[1]) if scale is None else scale)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    found = share / share.sum(-1, keepdims=True) @ p["bank"]
    gates = sigmoid(np.einsum("te,egd->tgd", x, p["gates.weight"]))
    if turned:
        gates = gates[:, ::-1]
    return (gates[:, 0] * local + gates[:, 1] * found) @ p["out.weight"]
