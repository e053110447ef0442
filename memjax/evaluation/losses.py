"""Next-token losses, and how they are counted: per token, per byte, by position."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from memjax import documents, models
from memjax.typing import Array, Float, Int, Key

Batch = dict[str, Array]
Forward = Callable[[nnx.Module, Batch, Key], tuple[Array, dict[str, Array]]]


def forward(
    model: nnx.Module, batch: Batch, key: Key
) -> tuple[Float[Array, "B T Q"], dict[str, Array]]:
    """The model on a batch of rows, each read from the start.

    Args:
      model: called as `model(tokens, segment_ids=..., positions=...) -> (logits, state)`.
      batch: tokens, segment_ids and positions, each [B, T].
      key: not used here; a `forward` of your own may draw from it (dropout).

    Returns:
      (logits, statistics of the final state: scalars by name).
    """
    del key
    logits, state = model(
        batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"]
    )
    return logits, models.statistics(state)


def token_losses(logits: Float[Array, "B T Q"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """The cross-entropy of each target, in nats and fp32.

        loss[b, t] = logsumexp(logits[b, t]) - logits[b, t, targets[b, t]]

    Args:
      logits: [B, T, Q].
      targets: [B, T], the token that follows.

    Returns:
      [B, T] fp32.
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def context_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many earlier tokens of the same document the model has seen in this row.

        [1, 1, 1, 2, 2, 0] -> [0, 1, 2, 0, 1, 0]

    Args:
      segment_ids: [B, T].

    Returns:
      [B, T], from 0.
    """
    batch, time = segment_ids.shape
    unseen = jnp.full((batch,), -1, jnp.int32)
    return documents.follow(segment_ids, unseen, jnp.zeros_like(unseen), time).index


def totals(
    logits: Float[Array, "B T Q"], batch: Batch, byte_lengths: Int[Array, " Q"]
) -> dict[str, Array]:
    """Weighted sums over a batch, which add up over batches and hosts.

    Args:
      logits: [B, T, Q].
      batch: `targets` [B, T], `weights` [B, T].
      byte_lengths: [Q], the bytes that each token stands for.

    Returns:
      fp32 scalars: `nats` sum of w * loss, `tokens` sum of w, `bytes` sum of w * bytes of target.
    """
    weights = batch["weights"].astype(jnp.float32)
    return {
        "nats": jnp.sum(weights * token_losses(logits, batch["targets"])),
        "tokens": jnp.sum(weights),
        "bytes": jnp.sum(weights * byte_lengths[batch["targets"]]),
    }
