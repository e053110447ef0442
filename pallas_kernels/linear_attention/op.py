"""Decayed linear attention over a sequence: checks and dispatch."""

import functools
from typing import Any

import jax

from pallas_kernels import dispatch, sequence
from pallas_kernels.blocks import Blocks
from pallas_kernels.linear_attention import tpu


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr: jax.Array,
    log_decay: jax.Array | None,
    state: jax.Array,
    *,
    initial: jax.Array | None = None,
    starts: jax.Array | None = None,
    read: str = "after",
    implementation: str | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Linear attention with decay, forward and backward in one kernel each.

        W_t = a_t W_{t-1} + lr_t k_t^T v_t
        y_t = q_t W_t                           (or q_t W_{t-1}: read="before")

    with `a_t = exp(log_decay_t)`, one for a head, one for each channel of k, or 1. Linear
    attention, RetNet, GLA and Mamba-2 are this.

    Args:
        q, k: queries and keys [B, T, H, K].
        v: values [B, T, H, V].
        lr: weights of the tokens [B, T, H].
        log_decay: [B, T, H], [B, T, H, K] or None; at most 0. Sums over a tile of some hundred
            tokens are taken in fp32: a gate of 0 is about -30, and -inf makes NaN.
        state: W before the first token [B, H, K, V], fp32.
        initial: what documents begin from [H, K, V], fp32; None = zeros. Only with `starts`.
        starts: where documents begin [B, T] bool; None = nowhere.
        read: "after" or "before" the token is written.
        implementation: "pallas" (TPU), "xla", or None = "pallas" where the default backend is TPU.
        blocks: tokens a tile, tiles and heads a step; None = of the table of `blocks`.
        interpret: runs the kernel in Pallas' TPU interpreter, on any platform: True or
            `pltpu.InterpretParams(...)`.

    Returns:
        (y [B, T, H, V] in q's dtype, the state after the last token [B, H, K, V] in fp32). Products
        take operands in q's dtype and sum in fp32.

    Raises:
        ValueError: an argument that does not fit, by name.
    Source: Katharopoulos et al. (arXiv:2006.16236); RetNet (arXiv:2307.08621), equation 6; GLA
        (arXiv:2312.06635), equation 3.
    """
    dispatch.check_tokens(q, k, v, state, initial, starts, read)
    dispatch.check_gates(q, lr=lr, log_decay=log_decay)
    kernel = dispatch.kernel(implementation, interpret)
    tile = functools.partial(tpu.tiles, after=read == "after", compute=q.dtype)
    plan = dispatch.plan(
        tile, "linear_attention", q, v, log_decay, blocks, kernel=kernel, interpret=interpret
    )
    (state,), (y,), _ = sequence.scan(
        plan,
        (state,),
        dispatch.initial(initial, state, starts),
        *dispatch.split((q, k, v), (lr,), log_decay),
        starts,
        kernel=kernel,
    )
    return y, state
