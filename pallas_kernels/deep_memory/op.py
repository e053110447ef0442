"""A deep memory over a sequence: checks and dispatch."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, sequence
from pallas_kernels.blocks import Blocks
from pallas_kernels.deep_memory import tpu

Pair = tuple[jax.Array, jax.Array]


def deep_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr: jax.Array,
    log_momentum: jax.Array | None,
    log_retain: jax.Array | None,
    weights: Pair,
    velocity: Pair | None,
    norm: Pair | None,
    *,
    chunk: int,
    initial: tuple[jax.Array, ...] | None = None,
    starts: jax.Array | None = None,
    activation: str = "gelu",
    residual: bool = True,
    read: str = "after",
    unit_eps: float | None = None,
    implementation: str | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, Pair, Pair | None]:
    """A two-layer memory that learns by chunks, forward and backward in one kernel each.

        M(x; W) = x + LayerNorm(act(x W_1) W_2)         (norm and residual as asked for)
        g_t = d/dW 1/2 ||M(k_t; W) - v_t||^2            at W = W', of the chunk's start
        S_t = e_t S_{t-1} - lr_t g_t                    e_t = exp(log_momentum_t)
        W_t = a_t W_{t-1} + S_t                         a_t = exp(log_retain_t)
        y_t = M(q_t; W_t)                               (or W_{t-1}: read="before")

    The weights and the momentum stay in VMEM from chunk to chunk.

    Args:
        q, k: queries and keys [B, T, H, K].
        v: values [B, T, H, V].
        lr: rates [B, T, H].
        log_momentum, log_retain: [B, T, H], at most 0, or None: no momentum (e = 0), nothing
            forgotten (a = 1). Sums over a chunk are taken in fp32: a gate of 0 is about -30, and
            -inf makes NaN.
        weights: (W_1 [B, H, K, F], W_2 [B, H, F, V]) before the first token, fp32.
        velocity: S like the weights, or None with no log_momentum.
        norm: (scale, bias) of the layer norm, each [H, V], or None for none.
        chunk: tokens that share their gradients' weights; the first token of the call begins one.
            A power of two of at least 16 for the kernel.
        initial: what documents begin from, like (W_1, W_2, S_1, S_2) without batch axis; only with
            `starts`.
        starts: chunks that documents begin with [B, ceil(T / chunk)] bool; None = none.
        activation: "gelu" (tanh approximation), "silu" or "relu".
        residual: whether the memory adds its input; needs K = V.
        read: "after" or "before" the token is written.
        unit_eps: what keeps norms from 0 where q and k are to be divided by them,
            `x / sqrt(||x||^2 + unit_eps^2)`; None = they come as they are to be.
        implementation: "pallas" (TPU), "xla", or None = "pallas" where the default backend is TPU.
        blocks: chunks and heads of a step (`block` is the chunk); None = of the table of `blocks`.
        interpret: runs the kernel in Pallas' TPU interpreter, on any platform: True or
            `pltpu.InterpretParams(...)`.

    Returns:
        (y [B, T, H, V] in q's dtype, the losses `1/2 ||M(k_t; W') - v_t||^2` [B, T, H] in fp32,
        weights and velocity after the last token). Products take operands in q's dtype and sum in
        fp32.

    Raises:
        ValueError: an argument that does not fit, by name.
    Source: Titans (arXiv:2501.00663), equations 9 to 15; TTT (arXiv:2407.04620), section 2.5, for
        the form without each token's weights.
    """
    _check(q, k, v, lr, log_momentum, log_retain, weights, velocity, norm, initial, starts, chunk)
    if activation not in tpu.ACTIVATIONS:
        raise ValueError(
            f"activation {activation!r} must be one of {', '.join(tpu.ACTIVATIONS)}"
        )  # fmt: skip
    if residual and k.shape != v.shape:
        raise ValueError(f"residual=True adds k {k.shape} to answers like v {v.shape}")
    if read not in ("after", "before"):
        raise ValueError(f'read {read!r} must be "after" or "before"')
    kernel = dispatch.kernel(implementation, interpret)
    if kernel and not fits([w.shape[2:] for w in weights], q.shape[2], chunk, q.dtype):
        raise ValueError(
            f"a head of weights {[w.shape[2:] for w in weights]} at chunk {chunk} in {q.dtype}"
            f' wants more VMEM than {sequence.VMEM >> 20} MiB; use implementation="xla"'
        )
    momentum, decay = log_momentum is not None, log_retain is not None
    tile = functools.partial(
        tpu.tiles,
        momentum=momentum,
        decay=decay,
        activation=activation,
        norm=norm is not None,
        residual=residual,
        after=read == "after",
        unit_eps=unit_eps,
        compute=q.dtype,
    )
    # The table is of chunks of 64 and four times as many hidden units as channels.
    hidden = weights[0].shape[3] / (4 * max(q.shape[3], v.shape[3]))
    larger = max(chunk / 64, 1.0) * max(hidden, 1.0)
    plan = dispatch.plan(
        tile, "deep_memory", q, v, None, blocks, kernel=kernel, interpret=interpret, chunk=chunk,
        larger=larger,
    )  # fmt: skip
    gates = tuple(x for x in (lr, log_momentum, log_retain) if x is not None)
    if q.shape[1] % plan.step:
        gates += (jnp.ones_like(lr),)
    first = () if norm is None else tuple(x[:, None].astype(jnp.float32) for x in norm)
    at = None
    if starts is not None:
        if initial is None:
            initial = tuple(jnp.zeros(x.shape[1:], x.dtype) for x in (*weights, *(velocity or ())))
        first += tuple(initial)
        # Every token of such a chunk is of a document that the state has not seen.
        at = jnp.zeros(q.shape[:2], bool).at[:, ::chunk].set(starts)
    state, (y,), (losses,) = sequence.scan(
        plan, (*weights, *(velocity or ())), first, (q, k, v), gates, at, kernel=kernel
    )
    return y, losses, tuple(state[:2]), tuple(state[2:]) if momentum else None


def fits(maps: Sequence[tuple[int, int]], heads: int, chunk: int, dtype: Any) -> bool:
    """Whether the kernel, forward and backward, has room for the fewest heads of a step.

    Args:
        maps: shapes of a head's weights, (K, F) and (F, V).
        heads: of the memory.
        chunk: tokens a chunk.
        dtype: of q.
    """
    least = dispatch.heads_of_step(heads, (maps[0][0], maps[1][1]), 1)
    return least * tpu.room(maps, chunk, dtype) <= sequence.VMEM


def _check(
    q, k, v, lr, log_momentum, log_retain, weights, velocity, norm, initial, starts, chunk
) -> None:
    if len(weights) != 2 or any(w.ndim != 4 for w in weights):
        raise ValueError("weights must be (W_1 [B, H, K, F], W_2 [B, H, F, V])")
    (batch, heads, dim_k, hidden), dim_v = weights[0].shape, weights[1].shape[-1]
    wanted = (q.shape[0], *q.shape[2:])
    if q.ndim == 4 and (batch, heads, dim_k) != wanted:
        raise ValueError(f"weights {weights[0].shape} must be [B, H, K, F] with B, H, K {wanted}")
    state = jax.ShapeDtypeStruct((batch, heads, dim_k, dim_v), jnp.float32)
    dispatch.check_tokens(q, k, v, state, None, None, "after")
    shapes = ((batch, heads, dim_k, hidden), (batch, heads, hidden, dim_v))
    for name, pair in (("weights", weights), ("velocity", velocity)):
        if pair is not None and len(pair) != 2:
            raise ValueError(f"{name} must be a pair like weights, not {len(pair)} arrays")
        for x, shape in zip(pair or (), shapes, strict=False):
            if x.shape != shape or x.dtype != jnp.float32:
                raise ValueError(f"{name} {x.dtype}{x.shape} must be float32{shape}")
    if (velocity is None) != (log_momentum is None):
        raise ValueError("velocity and log_momentum come together: both or neither")
    for name, gate in (("lr", lr), ("log_momentum", log_momentum), ("log_retain", log_retain)):
        if gate is not None and gate.shape != q.shape[:3]:
            raise ValueError(f"{name} {gate.shape} must be [B, T, H] = {q.shape[:3]}")
    if norm is not None and len(norm) != 2:
        raise ValueError(f"norm must be (scale, bias), not {len(norm)} arrays")
    for x in norm or ():
        if x.shape != (heads, dim_v):
            raise ValueError(f"norm {x.shape} must be scale and bias [H, V] = {(heads, dim_v)}")
    if chunk < 1:
        raise ValueError(f"chunk {chunk} must be at least 1")
    if initial is not None:
        if starts is None:
            raise ValueError("initial is what documents begin from: give starts too")
        wanted = [x.shape[1:] for x in (*weights, *(velocity or ()))]
        if [x.shape for x in initial] != wanted or any(x.dtype != jnp.float32 for x in initial):
            given = [f"{x.dtype}{x.shape}" for x in initial]
            raise ValueError(f"initial {given} must be float32 {wanted}")
    chunks = (batch, -(-q.shape[1] // chunk))
    if starts is not None and (starts.shape != chunks or starts.dtype != jnp.bool_):
        raise ValueError(f"starts {starts.dtype}{starts.shape} must be bool, one a chunk: {chunks}")
