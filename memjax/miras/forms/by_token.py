"""Runs of tokens whose weights cannot be written as a sum: one set of weights at a time.

Where a learner's step is not linear in the gradients (Newton-Schulz), or a retention has a link
(q-norm, softmax), the weights of every token must be formed. Inside a chunk all gradients are still
taken at W', so they come from one pass over all tokens, as the inputs and signals of `dual`; then a
loop goes through the tokens with one set of weights in hand.
"""

import functools

import jax
import jax.numpy as jnp

from memjax.miras import passes
from memjax.miras.forms import dual
from memjax.miras.precision import accumulation_dtype, matmul
from memjax.miras.products import restarting_products
from memjax.miras.state import scaled
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
    document: Int[Array, " C"] | None,
):
    """One run of one head: (y [C, V], loss [E], base, weights, momentum), see `dual`.

    `document` None: all tokens are of one.
    """
    compute, dtype = q.dtype, accumulation_dtype(base[0].dtype)
    first = jnp.arange(q.shape[0]) == 0
    if document is not None:
        first = jnp.diff(document, prepend=document[:1] - 1) != 0
    # Tokens that are not live have no gradient, and keep weights and momentum.
    gates = dual.of_live(gates, live)
    anchor, retain, eta = None, gates.retain, gates.momentum
    if retain is not None and rule.retention.first:
        anchor = restarting_products(retain, first)
    back = begin.weights if rule.retention.to_initial else (None,) * len(base)
    linked = tuple(rule.retention.link(w) for w in base)
    loss, inputs, signals = dual.capture(rule, linked, back, slow, learned, anchor, compute)
    band = dual.shares(rule, gates, learned, live)
    # Where changes are linear, rates and signs go with the signals: no pass over the weights.
    linear = rule.learner.linear
    share = -gates.lr if linear else jnp.ones_like(gates.lr)
    if band is None:
        signals = tuple(jnp.where(live[:, None], share[:, None] * d, 0) for d in signals)
    else:
        band = share[:, None] * band
    still = linear and not velocity  # no gradient, no change

    def gradient(t):
        """Of token t, matrix by matrix."""
        if band is None:
            return tuple(_outer(x[t], d[t]) for x, d in zip(inputs, signals, strict=True))
        share = jax.lax.dynamic_slice_in_dim(band[t], t, rule.learner.window)[:, None]
        found = []
        for x, d in zip(inputs, signals, strict=True):
            x, d = (jax.lax.dynamic_slice_in_dim(z, t, rule.learner.window) for z in (x, d))
            found.append(matmul(x.T, share * d, compute=compute))
        return tuple(found)

    def decayed(gate, now):
        times = jnp.multiply if gate is None or gate.ndim else _times
        return tuple(dual.kept(gate, w, w_0, times) for w, w_0 in zip(now, back, strict=True))

    def token(carry, t):
        if document is not None:
            begun = (weights, velocity)
            carry = jax.tree.map(lambda yes, no: jnp.where(first[t], yes, no), begun, carry)
        held, moving = carry
        lr = jnp.asarray(-1, gates.lr.dtype) if linear else gates.lr[t]
        moving, change = rule.learner.update(
            moving, gradient(t), lr, None if eta is None else eta[t]
        )
        kept = decayed(None if retain is None else retain[t], held)
        written = tuple(
            w + (c if still else live[t] * c) for w, c in zip(kept, change, strict=True)
        )
        taken = decayed(None if anchor is None else anchor[t], base)
        seen = {"after": written, "before": held, "chunk": taken}[rule.read]
        seen = scaled(taken, seen, None if gates.scale is None else gates.scale[t])

        def product(x, w):
            return passes.result(_product(compute, x, w))

        def product_with(i, x):
            return rule.retention.answer(product, x, seen[i])

        y = rule.structure.forward(product_with, slow, q[t][None].astype(dtype))
        return (written, moving), y[0]

    token = jax.checkpoint(token, prevent_cse=False, policy=passes.keep_results)
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
    document: Int[Array, " C"] | None,
):
    """As `run`, for a learner that acts at the ends of chunks: inside one, the memory is W'."""
    compute, dtype = q.dtype, accumulation_dtype(base[0].dtype)
    linked = tuple(rule.retention.link(w) for w in base)
    none = (None,) * len(base)
    loss, inputs, signals = dual.capture(rule, linked, none, slow, learned, None, compute)
    band = dual.shares(rule, gates, learned, live)
    own = live if document is None else live & (document == document[-1])
    lr = jnp.where(own, gates.lr, 0)
    lr = lr if band is None else lr @ band
    total = tuple(
        -matmul(x.T, lr[:, None] * d, compute=compute) for x, d in zip(inputs, signals, strict=True)
    )
    rate, count = jnp.sum(jnp.where(own, gates.momentum, 0)), jnp.sum(own, dtype=dtype)
    velocity = rule.learner.gather(velocity, total, rate, count)
    y = rule.structure.forward(
        lambda i, x: matmul(x, linked[i], compute=compute), slow, q.astype(dtype)
    )
    return y, loss, base, weights, velocity


@jax.custom_vjp
def _times(gate: Float[Array, ""], w: Float[Array, "I O"]) -> Float[Array, "I O"]:
    """`gate w`, whose derivative by the gate is one pass."""
    return gate * w


def _times_forward(gate, w):
    return gate * w, (gate, w)


def _times_backward(operands, by):
    gate, w = operands
    return passes.total(jnp.multiply, by, w)[0, 0], gate * by


_times.defvjp(_times_forward, _times_backward)


@jax.custom_vjp
def _outer(x: Float[Array, " I"], d: Float[Array, " O"]) -> Float[Array, "I O"]:
    """`x d^T`, whose derivative is two products, not two reductions."""
    return x[:, None] * d


def _outer_forward(x, d):
    return _outer(x, d), (x, d)


def _outer_backward(operands, by):
    x, d = operands
    return by @ d, x @ by


_outer.defvjp(_outer_forward, _outer_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(compute, x: Float[Array, "C I"], w: Float[Array, "I O"]) -> Float[Array, "C O"]:
    """`x w`, whose derivative by w is not made the other way round."""
    return matmul(x, w, compute=compute)


def _product_forward(compute, x, w):
    return _product(compute, x, w), (x, w)


def _product_backward(compute, operands, by):
    x, w = operands
    by_x = matmul(by, w.T, compute=compute)
    return by_x.astype(x.dtype), matmul(x.T, by, compute=compute).astype(w.dtype)


_product.defvjp(_product_forward, _product_backward)
