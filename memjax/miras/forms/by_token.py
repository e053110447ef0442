"""Runs of tokens whose weights cannot be written as a sum: one set of weights at a time.

Where a learner's step is not linear in the gradients (Newton-Schulz), or a retention has a link
(q-norm, softmax), the weights of every token must be formed. Inside a chunk all gradients are still
taken at W', so they come from one pass over all tokens, as the inputs and signals of `dual`; then a
loop goes through the tokens with one set of weights in hand.
"""

import jax
import jax.numpy as jnp

from memjax.miras.forms import dual
from memjax.miras.precision import accumulation_dtype, matmul
from memjax.miras.products import restarting_products
from memjax.miras.rule import scaled
from memjax.typing import Array, Bool, Float, Int


def run(
    rule,
    base: tuple[Array, ...],
    weights: tuple[Array, ...],
    velocity,
    begin,
    slow: dict[str, Array],
    q: Float[Array, "C K"],
    learned: dual.Learned,
    gates,
    live: Bool[Array, " C"],
    document: Int[Array, " C"],
):
    """One run of one head: (y [C, V], loss [E], base, weights, momentum), see `dual`."""
    compute, dtype = q.dtype, accumulation_dtype(base[0].dtype)
    first = jnp.diff(document, prepend=document[:1] - 1) != 0
    anchor, retain = None, gates.retain
    if retain is not None:
        retain = jnp.where(live.reshape(-1, *[1] * (retain.ndim - 1)), retain, 1)
        if rule.retention.first:
            anchor = restarting_products(retain, first)
    back = begin.weights if rule.retention.to_initial else (None,) * len(base)
    linked = tuple(rule.retention.link(w) for w in base)
    loss, inputs, signals = dual.capture(rule, linked, back, slow, learned, anchor, compute)
    band = dual.shares(rule, gates, learned, live)

    def gradient(t):
        """Of token t, matrix by matrix."""
        found = []
        for x, d in zip(inputs, signals, strict=True):
            if band is None:
                x, d = x[t][None], d[t][None]
            else:
                x, d = (jax.lax.dynamic_slice_in_dim(z, t, rule.learner.window) for z in (x, d))
                share = jax.lax.dynamic_slice_in_dim(band[t], t, rule.learner.window)
                d = share[:, None] * d
            found.append(matmul(x.T, d, compute=compute))
        return tuple(found)

    def decayed(gate, now):
        return tuple(dual.kept(gate, w, w_0) for w, w_0 in zip(now, back, strict=True))

    def choose(which, yes, no):
        return jax.tree.map(lambda yes, no: jnp.where(which, yes, no), yes, no)

    def token(carry, t):
        held, moving = choose(first[t], (weights, velocity), carry)
        lr = gates.lr[t]
        eta = None if gates.momentum is None else gates.momentum[t]
        new_moving, change = rule.learner.update(moving, gradient(t), lr, eta)
        written = jax.tree.map(
            jnp.add, decayed(None if retain is None else retain[t], held), change
        )
        taken = decayed(None if anchor is None else anchor[t], base)
        seen = {"after": written, "before": held, "chunk": taken}[rule.read]
        seen = scaled(taken, seen, None if gates.scale is None else gates.scale[t])
        seen = tuple(rule.retention.link(w) for w in seen)
        y = rule.structure.forward(
            lambda i, x: matmul(x, seen[i], compute=compute), slow, q[t][None].astype(dtype)
        )
        return choose(live[t], (written, new_moving), (held, moving)), y[0]

    token = jax.checkpoint(token, prevent_cse=False)
    (held, moving), y = jax.lax.scan(token, (weights, velocity), jnp.arange(q.shape[0]))
    return y, loss, decayed(None if anchor is None else anchor[-1], base), held, moving


def gather(
    rule,
    base: tuple[Array, ...],
    weights: tuple[Array, ...],
    velocity,
    begin,
    slow: dict[str, Array],
    q: Float[Array, "C K"],
    learned: dual.Learned,
    gates,
    live: Bool[Array, " C"],
    document: Int[Array, " C"],
):
    """As `run`, for a learner that acts at the ends of chunks: inside one, the memory is W'."""
    compute, dtype = q.dtype, accumulation_dtype(base[0].dtype)
    linked = tuple(rule.retention.link(w) for w in base)
    none = (None,) * len(base)
    loss, inputs, signals = dual.capture(rule, linked, none, slow, learned, None, compute)
    band = dual.shares(rule, gates, learned, live)
    own = live & (document == document[-1])
    lr = jnp.where(own, gates.lr, 0)
    lr = lr if band is None else lr @ band
    total = tuple(
        -matmul(x.T, lr[:, None] * d, compute=compute) for x, d in zip(inputs, signals, strict=True)
    )
    velocity = rule.learner.gather(velocity, total, jnp.sum(jnp.where(own, gates.momentum, 0)))
    y = rule.structure.forward(
        lambda i, x: matmul(x, linked[i], compute=compute), slow, q.astype(dtype)
    )
    return y, loss, base, weights, velocity
