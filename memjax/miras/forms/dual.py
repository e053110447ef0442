"""The dual form of one head: some tokens of a chunk at once, without weights per token.

Inside a chunk all gradients are taken at the same weights W', so token i reads

    W_i = beta_i W + f_i S - sum_{j <= i} G[i, j] X_j^T D_j       for every linear map,

with X_j its input and D_j the signal at its output on the key side, both at W'. A linear map of the
query side is then three products: with W, with S, and with D under the masked scores Xq X^T. A map
that erases what it gives for its inputs (`delta_gd`) has D_j + X_j W_{j-1} in the place of D_j.

A run has three steps: `plan` needs the gates only, `write` gives the weights that the next run
waits for, and `read` answers the queries from what `write` has found.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.miras.precision import accumulation_dtype, matmul
from memjax.miras.products import prefix_products, segment_products, unit_lower_inverse
from memjax.typing import Array, Bool, Float, Int


class Learned(NamedTuple):
    """Tokens that a run takes gradients of: its own, the last ones here, and those of a window.

    Attributes:
        k, v: [E, K], [E, V], with E the run's tokens and the window - 1 before them.
        threshold: `Gates.threshold` [E], or None.
        document, seen: number of the document of each of the run's tokens [C], and of each of
            these [E]; None where the window is 1.
    """

    k: Float[Array, "*E K"]
    v: Float[Array, "*E V"]
    threshold: Float[Array, "*E"] | None
    document: Int[Array, "*C"] | None
    seen: Int[Array, "*E"] | None


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
    erased: Mixture | None  # before each token, for a learner that erases along its inputs


def fits(rule) -> bool:
    """Whether the weights of this rule's tokens are sums: nothing in it but the memory bends."""
    return rule.retention.linear and rule.learner.linear and not rule.learner.closes


def plan(rule, gates, learned: Learned, live, document) -> Plan:
    """The coefficients of a run of one head: tokens that are not `live` change nothing.

    Args:
        gates: each [C] (retain also [C, K]).
        learned: what gradients are taken of.
        live: [C].
        document: number of the token's document [C]; a new one starts from the run's weights again.
    """
    same = document[:, None] == document[None, :]
    first = jnp.diff(document, prepend=document[:1] - 1) != 0
    gates = of_live(gates, live)
    lr = gates.lr
    # Tokens that are not live add no momentum to the weights.
    between, of_velocity = rule.learner.response(gates.momentum, same, first)
    lower = same & (jnp.arange(same.shape[0])[:, None] >= jnp.arange(same.shape[0])[None, :])
    by_token = None if between is None else -between * lr
    band = shares(rule, gates, learned, live)
    if band is not None:
        by_token = -lr[:, None] * band if by_token is None else by_token @ band
    if gates.retain is None:
        kept, of_weights = lower.astype(lr.dtype), None
    else:
        kept = segment_products(gates.retain, same)
        of_weights = prefix_products(kept, gates.retain, first)
    kept = jnp.where(live[(None, slice(None)) + (None,) * (kept.ndim - 2)], kept, 0)
    if by_token is None:
        of_tokens = -kept * (lr if kept.ndim == 2 else lr[:, None])
    else:
        of_tokens = jnp.einsum("il...,lj->ij...", kept, by_token)
    of_momentum = None if of_velocity is None else jnp.einsum("il...,l->i...", kept, of_velocity)
    after = Mixture(of_weights, of_momentum, of_tokens)
    return Plan(
        _before(after, first) if rule.read == "before" else after,
        jax.tree.map(lambda x: x[-1], after),
        None if of_velocity is None else Mixture(None, of_velocity[-1], by_token[-1]),
        of_weights if rule.retention.first else None,
        _before(after, first) if rule.learner.erases else None,
    )


def of_live(gates, live):
    """The gates, with those by which tokens that are not `live` learn and forget nothing."""

    def elsewhere(gate, value):
        if gate is None:
            return None
        return jnp.where(live.reshape(-1, *[1] * (gate.ndim - 1)), gate, value)

    return gates._replace(
        lr=elsewhere(gates.lr, 0),
        momentum=elsewhere(gates.momentum, 1),
        retain=elsewhere(gates.retain, 1),
    )


def shares(rule, gates, learned: Learned, live) -> Float[Array, "C E"] | None:
    """How much of each learned token's gradient [E] that of each live one [C] has; None = own."""
    window = rule.learner.window
    if window == 1:
        return None
    count = live.shape[0]
    back = jnp.arange(count)[:, None] + window - 1 - jnp.arange(count + window - 1)[None, :]
    inside = (back >= 0) & (back < window) & (learned.document[:, None] == learned.seen[None, :])
    inside &= live[:, None]
    if gates.window is None:
        return inside.astype(gates.lr.dtype)
    share = jnp.take_along_axis(gates.window, jnp.clip(back, 0, window - 1), axis=1)
    return jnp.where(inside, share, 0)


def kept(gate, w, w_0, times=jnp.multiply):
    """What retention leaves of w: `gate w`, or `w_0 + gate (w - w_0)`; gate [], [I] or None = 1."""
    if gate is None:
        return w
    gate = gate[:, None] if gate.ndim else gate
    return times(gate, w) if w_0 is None else w_0 + times(gate, w - w_0)


def write(rule, base, weights, velocity, begin, slow, learned: Learned, plan: Plan):
    """Learns a run of one head: (loss [E], inputs, signals, base, weights, momentum).

    Args:
        base: weights at which gradients are taken; weights, velocity: those to go on from.
        begin: what a document starts from.
        learned: what gradients are taken of.
        plan: of these tokens.
    """
    compute = learned.k.dtype
    back = begin.weights if rule.retention.to_initial else (None,) * len(weights)
    loss, inputs, signals = capture(rule, base, back, slow, learned, plan.anchor, compute)
    if plan.erased is not None:
        signals = tuple(
            _with_erased(plan.erased, x, d, w, w_0, compute)
            for x, d, w, w_0 in zip(inputs, signals, weights, back, strict=True)
        )

    def sums(of_tokens, x, d):
        if of_tokens.ndim == 1:
            return matmul(x.T, of_tokens[:, None] * d, compute=compute)
        return matmul((of_tokens * x).T, d, compute=compute)

    new_weights, new_velocity = [], []
    for w, w_0, s, x, d in zip(
        weights, back, velocity or (None,) * len(weights), inputs, signals, strict=True
    ):
        now = kept(plan.weights.of_weights, w, w_0)
        if plan.momentum is not None:
            now = now + kept(plan.weights.of_momentum, s, None)
            moved = kept(plan.momentum.of_momentum, s, None)
            new_velocity.append(moved + sums(plan.momentum.of_tokens, x, d))
        new_weights.append(now + sums(plan.weights.of_tokens, x, d))
    if plan.anchor is not None:
        base = tuple(kept(plan.anchor[-1], w, w_0) for w, w_0 in zip(base, back, strict=True))
    return loss, inputs, signals, base, tuple(new_weights), tuple(new_velocity)


def _scaled(gate: Float[Array, "C *K"] | None, x: Array, w: Array, w_0, compute) -> Array:
    """`x_i kept(gate_i, w, w_0)` for every token i."""
    if gate is not None and w_0 is not None:
        return matmul(x, w_0, compute=compute) + _scaled(gate, x, w - w_0, None, compute)
    if gate is None:
        return matmul(x, w, compute=compute)
    if gate.ndim == 2:
        return matmul(gate * x, w, compute=compute)
    return gate[:, None] * matmul(x, w, compute=compute)


def _with_erased(before: Mixture, x, d, w, w_0, compute):
    """The signals `d_i + x_i W_{i-1}` of a map that erases what it gives for its inputs x.

    W_{i-1} holds the signals of the tokens before: a unit lower triangular system.
    """
    given = _scaled(before.of_weights, x, w, w_0, compute)
    if before.of_tokens.ndim == 2:
        scores = matmul(x, x.T, compute=compute) * before.of_tokens
    else:
        scores = jnp.einsum("ik,jk,ijk->ij", x, x, before.of_tokens)
    return matmul(unit_lower_inverse(-scores), d + given, compute=d.dtype)


def capture(rule, base, back, slow, learned: Learned, anchor, compute):
    """The key side at W': (loss [E], input X of each linear map, signal D at its output).

    Args:
        base: W'; anchor: what is left of it at each token, or None; back: W_0 where it decays
            to that, else None, one for each matrix.
        learned: the tokens.
        compute: dtype of the products' operands.
    """
    dtype = accumulation_dtype(base[0].dtype)

    def forward(taps):
        inputs = [None] * len(base)

        def linear(i, x):
            inputs[i] = x
            return _scaled(anchor, x, base[i], back[i], compute) + taps[i]

        return rule.structure.forward(linear, slow, learned.k.astype(dtype)), tuple(inputs)

    taps = tuple(jnp.zeros((learned.k.shape[0], w.shape[-1]), dtype) for w in base)
    y, pull_back, inputs = jax.vjp(forward, taps, has_aux=True)
    v = learned.v.astype(dtype)
    threshold = () if learned.threshold is None else (learned.threshold.astype(dtype),)
    (signals,) = pull_back(rule.bias.signal(y, v, *threshold))
    return rule.bias.loss(y, v, *threshold), inputs, signals


def read(rule, base, weights, velocity, begin, slow, q, inputs, signals, plan: Plan, scale):
    """M(q_i; W_i) for every token i of a run at once [C, V], W_i by its coefficients.

    Args:
        base, weights, velocity, begin: as for `write`, before the run.
        q: [C, K].
        inputs, signals: of `write`.
        plan: of these tokens.
        scale: `Gates.scale` [C] or None.
    """
    compute, seen = q.dtype, plan.reads
    back = begin.weights if rule.retention.to_initial else (None,) * len(weights)

    def linear(i, x):
        if rule.read == "chunk":
            return _scaled(plan.anchor, x, base[i], back[i], compute)
        if seen.of_tokens.ndim == 2:
            scores = matmul(x, inputs[i].T, compute=compute) * seen.of_tokens
        else:
            scores = jnp.einsum("ik,jk,ijk->ij", x, inputs[i], seen.of_tokens)
        z = _scaled(seen.of_weights, x, weights[i], back[i], compute)
        z += matmul(scores, signals[i], compute=compute)
        if seen.of_momentum is not None:
            z += _scaled(seen.of_momentum, x, velocity[i], None, compute)
        if scale is not None:
            anchor = _scaled(plan.anchor, x, base[i], back[i], compute)
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
