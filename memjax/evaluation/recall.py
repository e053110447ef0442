"""How well a model does a synthetic task: accuracy at its scored positions."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memjax.data.tasks import Task, TaskBatch
from memjax.evaluation import losses
from memjax.evaluation.losses import Batch
from memjax.models import LanguageModel, LanguageModelConfig, auxiliary_loss
from memjax.typing import Array, Float, Key, PyTree


class Score(NamedTuple):
    """What an evaluation found.

    Args:
      accuracy: the share of scored positions where the likeliest token is the target.
      exact: the share of rows with all of them right.
      loss: mean cross-entropy of a scored position, in nats.
      rows: how many rows were read.
    """

    accuracy: float
    exact: float
    loss: float
    rows: int


def gather(batch: TaskBatch, scored: int) -> Batch:
    """A task's rows with the scored positions drawn together, so that only they need logits.

    With a vocabulary of thousands the logits are most of the work, and most positions of a recall
    task are not scored.

    Args:
      batch: of a task, [B, T].
      scored: K, at least the scored positions of any row.

    Returns:
      tokens, segment_ids (one document a row) and positions, each [B, T]; `places` [B, K], the
      positions that are scored, with targets and weights [B, K] of them. Rows that have fewer get
      others with weight 0.
    """
    weights, places = jax.lax.top_k(batch.weights, scored)
    return {
        "tokens": batch.tokens,
        "segment_ids": jnp.ones_like(batch.tokens),
        "positions": jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape),
        "places": places,
        "targets": jnp.take_along_axis(batch.targets, places, axis=1),
        "weights": weights,
    }


def forward(
    model: nnx.Module, batch: Batch, key: Key
) -> tuple[Float[Array, "B K Q"], dict[str, Array]]:
    """The model on rows of `gather`: its logits at the scored positions.

    Args:
      model: a `LanguageModel`, or what has its `hidden` and `head`.
      batch: of `gather`.
      key: not used.

    Returns:
      (logits [B, K, Q], of the statistics the auxiliary loss where there is one).
    """
    del key
    x, state = model.hidden(
        batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"]
    )
    logits = model.head(jnp.take_along_axis(x, batch["places"][..., None], axis=1))
    return logits, auxiliary_loss(state)


def totals(
    graphdef: Any, params: PyTree, task: Task, key: Key, size: int
) -> dict[str, Float[Array, ""]]:
    """Sums over one batch of a task.

    Args:
      graphdef, params: of `nnx.split(model, nnx.Param)`.
      task: its tokens must be below the model's vocabulary.
      key: decides the rows.
      size: B.

    Returns:
      fp32 scalars: `right` scored positions, `tokens` of them in all, `exact` rows, `rows`, `nats`.
    """
    batch = gather(task.batch(key, size), task.scored)
    logits, _ = forward(nnx.merge(graphdef, params), batch, key)
    weights = batch["weights"]
    wrong = weights * (jnp.argmax(logits, axis=-1) != batch["targets"])
    return {
        "right": jnp.sum(weights) - jnp.sum(wrong),
        "tokens": jnp.sum(weights),
        "exact": jnp.sum(~jnp.any(wrong > 0, axis=1), dtype=jnp.float32),
        "rows": jnp.float32(size),
        "nats": jnp.sum(weights * losses.token_losses(logits, batch["targets"])),
    }


def run(step: Callable[[PyTree, Key], dict[str, Array]], params: PyTree, batches: int) -> Score:
    """Runs a compiled `totals` over the test rows of a task: always the same ones.

    Args:
      step: (params, key) -> what `totals` gives.
      params: the parameters.
      batches: how many keys to call it with.

    Returns:
      The score; sums are kept in float64.
    """
    sums: dict[str, float] = {}
    for i in range(batches):
        for name, value in jax.device_get(step(params, held_out_key(i))).items():
            sums[name] = sums.get(name, 0.0) + float(np.float64(value))
    return Score(
        accuracy=sums["right"] / sums["tokens"],
        exact=sums["exact"] / sums["rows"],
        loss=sums["nats"] / sums["tokens"],
        rows=int(sums["rows"]),
    )


def held_out_key(number: int) -> Key:
    """The key of test batch `number`, which training never uses."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0x7E57), number)


def evaluate(model: nnx.Module, task: Task, *, rows: int = 1024, batch: int = 64) -> Score:
    """A model on the test rows of a task.

        evaluate(model, tasks.MQAR(vocabulary=256))

    Args:
      model: a `LanguageModel`, or what has its `hidden`, `head` and `config.vocab`.
      task: its vocabulary must not be above the model's.
      rows: at least this many.
      batch: rows at once.

    Returns:
      The score.

    Raises:
      ValueError: the task has tokens that the model does not know.
    """
    if task.vocabulary > model.config.vocab:
        raise ValueError(
            f"the task has {task.vocabulary} tokens and the model {model.config.vocab}; build it"
            f" with vocab={task.vocabulary}"
        )
    graphdef, params = nnx.split(model, nnx.Param)
    step = jax.jit(lambda params, key: totals(graphdef, params, task, key, batch))
    return run(step, params, math.ceil(rows / batch))


def state_bytes(config: LanguageModelConfig) -> int:
    """The size of what a model carries from token to token, for one row.

    What each further row adds to `LanguageModel.start(rows).blocks`, counted on shapes: keys and
    values of attention up to its window or `config.context`, fast weights, momentum, the last
    inputs of convolutions, not what rows share (W_0). A memory whose chunks have more than one
    token holds the weights of its chunk's start besides the current ones, and they count too.

    Args:
      config: of the model.

    Returns:
      Bytes.
    """

    def start():
        model = LanguageModel(config, rngs=nnx.Rngs(0))
        return [model.start(rows).blocks for rows in (1, 2)]

    one, two = (
        sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(blocks))
        for blocks in jax.eval_shape(start)
    )
    return two - one
