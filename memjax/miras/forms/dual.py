"""The dual form of one head: some tokens of a chunk at once, without weights per token.

Inside a chunk all gradients are taken at the same weights W', so token i reads

    W_i = beta_i W + f_i S - sum_{j <= i} G[i, j] X_j^T D_j       for every linear map,

with X_j its input and D_j the signal at its output on the key side, both at W'. A linear map of the
query side is then three products: with W, with S, and with D under the masked scores Xq X^T.

A run has three steps: `plan` needs the gates only, `write` gives the weights that the next run
waits for, and `read` answers the queries from what `write` has found.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.miras.precision import accumulation_dtype, matmul
from memjax.miras.products import prefix_products, segment_products
from memjax.typing import Array, Bool, Float


class Mixture(NamedTuple):
    """Weights as a sum: `of_weights W + of_momentum S + sum_j of_tokens[j] X_j^T D_j`."""

    of_weights: Float[Array, "*C"] | None  # beta; None = 1
    of_momentum: Float[Array, "*C"] | None  # f; None = no momentum
    of_tokens: Float[Array, "*C"]  # -G


class Plan(NamedTuple):
    """What the gates of a run say about it: nothing here depends on weights, keys or values."""

    reads: Mixture  # at which each token reads: [C, *K], [C, *K], [C, C, *K]
    weights: Mixture  # after the run: [*K], [*K], [C, *K]
    momentum: Mixture | None  # after the run, `of_weights` None standing for 0
    anchor: Float[Array, "*C"] | None  # of W' where each token's gradient is taken; None = 1


def plan(rule, gates, live, document) -> Plan:
    """The coefficients of a run of one head: tokens that are not `live` change nothing.

    Args:
        gates: each [C] (retain also [C, K]).
        live: [C].
        document: number of the token's document [C]; a new one starts from the run's weights again.
    """
    same = document[:, None] == document[None, :]
    first = jnp.diff(document, prepend=document[:1] - 1) != 0
    lr = jnp.where(live, gates.lr, 0)
    eta = None if gates.momentum is None else jnp.where(live, gates.momentum, 1)
    # Tokens that are not live keep the weights and add no momentum to them.
    between, of_velocity = rule.learner.response(eta, same, first)
    lower = same & (jnp.arange(same.shape[0])[:, None] >= jnp.arange(same.shape[0])[None, :])
    by_token = None if between is None else -between * lr
    if gates.retain is None:
        kept, of_weights = lower.astype(lr.dtype), None
    else:
        spread = (slice(None),) + (None,) * (gates.retain.ndim - 1)
        retain = jnp.where(live[spread], gates.retain, 1)
        kept = segment_products(retain, same)
        of_weights = prefix_products(kept, retain, first)
    kept = jnp.where(live[(None, slice(None)) + (None,) * (kept.ndim - 2)], kept, 0)
    if between is None:
        of_tokens = -kept * (lr if kept.ndim == 2 else lr[:, None])
    else:
        of_tokens = jnp.einsum("il...,lj->ij...", kept, by_token)
    of_momentum = None if of_velocity is None else jnp.einsum("il...,l->i...", kept, of_velocity)
    after = Mixture(of_weights, of_momentum, of_tokens)
    return Plan(
        after if rule.read == "after" else _before(after, first),
        jax.tree.map(lambda x: x[-1], after),
        None if of_velocity is None else Mixture(None, of_velocity[-1], by_token[-1]),
        of_weights if rule.retention.first else None,
    )


def write(rule, base, weights, velocity, slow, k, v, plan: Plan):
    """Learns a run of one head: (loss [C], inputs, signals, base, weights, momentum).

    Args:
        base: weights at which gradients are taken; weights, velocity: those to go on from.
        k, v: [C, K], [C, V].
        plan: of these tokens.
    """
    compute = k.dtype
    loss, inputs, signals = _capture(rule, base, slow, k, v, plan.anchor, compute)

    def learned(of_tokens, x, d):
        if of_tokens.ndim == 1:
            return matmul(x.T, of_tokens[:, None] * d, compute=compute)
        return matmul((of_tokens * x).T, d, compute=compute)

    def rows(gate, w):
        return w if gate is None else (gate[:, None] * w if gate.ndim else gate * w)

    new_weights, new_velocity = [], []
    for w, s, x, d in zip(
        weights, velocity or (None,) * len(weights), inputs, signals, strict=True
    ):
        kept = rows(plan.weights.of_weights, w)
        if plan.momentum is not None:
            kept = kept + rows(plan.weights.of_momentum, s)
            learned_momentum = learned(plan.momentum.of_tokens, x, d)
            new_velocity.append(rows(plan.momentum.of_momentum, s) + learned_momentum)
        new_weights.append(kept + learned(plan.weights.of_tokens, x, d))
    if plan.anchor is not None:
        base = tuple(rows(plan.anchor[-1], w) for w in base)
    return loss, inputs, signals, base, tuple(new_weights), tuple(new_velocity)


def _scaled(gate: Float[Array, "C *K"] | None, x: Array, w: Array, compute) -> Array:
    """`x_i (gate_i w)` for every token i; None = 1."""
    if gate is None:
        return matmul(x, w, compute=compute)
    if gate.ndim == 2:
        return matmul(gate * x, w, compute=compute)
    return gate[:, None] * matmul(x, w, compute=compute)


def _capture(rule, base, slow, k, v, anchor, compute):
    """The key side at W': (loss [C], input X of each linear map, signal D at its output)."""
    dtype = accumulation_dtype(base[0].dtype)

    def forward(taps):
        inputs = []

        def linear(i, x):
            inputs.append(x)
            return _scaled(anchor, x, base[i], compute) + taps[i]

        return rule.structure.forward(linear, slow, k.astype(dtype)), tuple(inputs)

    taps = tuple(jnp.zeros((k.shape[0], w.shape[-1]), dtype) for w in base)
    y, pull_back, inputs = jax.vjp(forward, taps, has_aux=True)
    v = v.astype(dtype)
    (signals,) = pull_back(rule.bias.signal(y, v))
    return rule.bias.loss(y, v), inputs, signals


def read(rule, base, weights, velocity, slow, q, inputs, signals, plan: Plan, scale):
    """M(q_i; W_i) for every token i of a run at once [C, V], W_i by its coefficients.

    Args:
        base, weights, velocity: as for `write`, before the run.
        q: [C, K].
        inputs, signals: of `write`.
        plan: of these tokens.
        scale: `Gates.scale` [C] or None.
    """
    compute, seen = q.dtype, plan.reads

    def linear(i, x):
        if seen.of_tokens.ndim == 2:
            scores = matmul(x, inputs[i].T, compute=compute) * seen.of_tokens
        else:
            scores = jnp.einsum("ik,jk,ijk->ij", x, inputs[i], seen.of_tokens)
        z = _scaled(seen.of_weights, x, weights[i], compute)
        z += matmul(scores, signals[i], compute=compute)
        if seen.of_momentum is not None:
            z += _scaled(seen.of_momentum, x, velocity[i], compute)
        if scale is not None:
            anchor = _scaled(plan.anchor, x, base[i], compute)
            z = anchor + scale[:, None] * (z - anchor)
        return z

    return rule.structure.forward(linear, slow, q.astype(accumulation_dtype(base[0].dtype)))


def _before(after: Mixture, first: Bool[Array, " C"]) -> Mixture:
    """The coefficients before each token's write: of the row above, or none where a run begins."""

    def shift(x, fill):
        above = jnp.concatenate([jnp.full_like(x[:1], fill), x[:-1]])
        return jnp.where(first.reshape(-1, *[1] * (x.ndim - 1)), fill, above)

    return Mixture(
        None if after.of_weights is None else shift(after.of_weights, 1),
        None if after.of_momentum is None else shift(after.of_momentum, 0),
        shift(after.of_tokens, 0),
    )
