"""The gated delta rule over a sequence: checks and dispatch."""

import functools
from typing import Any

import jax

from pallas_kernels import dispatch, sequence
from pallas_kernels.blocks import Blocks
from pallas_kernels.delta_rule import tpu


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr: jax.Array,
    log_decay: jax.Array | None,
    state: jax.Array,
    *,
    initial: jax.Array | None = None,
    starts: jax.Array | None = None,
    decay_first: bool = True,
    read: str = "after",
    unit_eps: float | None = None,
    surprise: bool = False,
    implementation: str | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """The delta rule with decay, forward and backward in one kernel each.

        Z_t = a_t W_{t-1}                       (or W_{t-1}: decay_first=False)
        W_t = a_t W_{t-1} + lr_t k_t^T (v_t - k_t Z_t)
        y_t = q_t W_t                           (or q_t W_{t-1}: read="before")

    with `a_t = exp(log_decay_t)`, one for a head, one for each channel of k, or 1. DeltaNet, Gated
    DeltaNet, KDA and Longhorn are this, each with rates and decays of its own.

    Args:
        q, k: queries and keys [B, T, H, K].
        v: values [B, T, H, V].
        lr: rates [B, T, H].
        log_decay: [B, T, H], [B, T, H, K] or None; at most 0. Sums over a tile of some hundred
            tokens are taken in fp32: a gate of 0 is about -30, and -inf makes NaN.
        state: W before the first token [B, H, K, V], fp32.
        initial: what documents begin from [H, K, V], fp32; None = zeros. Only with `starts`.
        starts: where documents begin [B, T] bool; None = nowhere.
        decay_first: whether a token's decay comes before its prediction.
        read: "after" or "before" the token is written.
        surprise: whether the losses are wanted.
        unit_eps: what keeps norms from 0 where q and k are to be divided by them,
            `x / sqrt(||x||^2 + unit_eps^2)`; None = they come as they are to be.
        implementation: "pallas" (TPU), "xla", or None = "pallas" where the default backend is TPU.
        blocks: tokens a tile, tiles and heads a step; None = of the table of `blocks`.
        interpret: runs the kernel in Pallas' TPU interpreter, on any platform: True or
            `pltpu.InterpretParams(...)`.

    Returns:
        (y [B, T, H, V] in q's dtype, the losses `1/2 ||v_t - k_t Z_t||^2` [B, T, H] in fp32 or
        None, the state after the last token [B, H, K, V] in fp32). Products take operands in q's
        dtype and sum in fp32.

    Raises:
        ValueError: an argument that does not fit, by name.
    Source: Gated DeltaNet (arXiv:2412.06464), equation 10; the form in tiles arXiv:2406.06484.
    """
    dispatch.check_tokens(q, k, v, state, initial, starts, read)
    dispatch.check_gates(q, lr=lr, log_decay=log_decay)
    kernel = dispatch.kernel(implementation, interpret)
    tile = functools.partial(
        tpu.tiles,
        first=decay_first,
        after=read == "after",
        surprise=surprise,
        unit_eps=unit_eps,
        compute=q.dtype,
    )
    plan = dispatch.plan(
        tile, "delta_rule", q, v, log_decay, blocks, kernel=kernel, interpret=interpret
    )
    (state,), (y,), losses = sequence.scan(
        plan,
        (state,),
        dispatch.initial(initial, state, starts),
        *dispatch.split((q, k, v), (lr,), log_decay),
        starts,
        kernel=kernel,
    )
    return y, losses[0] if surprise else None, state
