"""One optimiser step: loss, accumulated gradients, update, metrics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memjax import models, sharding
from memjax.evaluation import losses
from memjax.evaluation.losses import Batch, Forward, forward
from memjax.evaluation.placement import batch_sharding
from memjax.training.state import TrainState
from memjax.typing import Array, Key, PyTree


def microbatches(batch: Batch, count: int) -> Batch:
    """[B, T] arrays cut into [count, B / count, T], row i going to microbatch i mod count.

    That way the rows of one device stay there. The result of a step does not depend on the cut.
    """
    return {
        name: jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
        for name, x in batch.items()
    }


def gradients(
    graphdef: Any,
    params: PyTree,
    batch: Batch,
    key: Key,
    byte_lengths: Array | np.ndarray,
    *,
    accumulate: int = 1,
    forward: Forward = forward,
) -> tuple[PyTree, dict[str, Array], dict[str, Array]]:
    """Gradients of the mean loss over a batch.

        loss = (sum of w * cross-entropy) / (sum of w) + mean of `statistics["auxiliary_loss"]`,

    sums and mean over all microbatches, so that `accumulate` changes the memory and nothing else,
    whatever the weights.

    Args:
      graphdef: static part of the model.
      params: its parameters.
      batch: tokens, targets, weights, segment_ids, positions, each [B, T].
      key: split over the microbatches, for `forward`.
      byte_lengths: [Q].
      accumulate: number of microbatches, run one after another.
      forward: (model, batch, key) -> (logits, statistics); "auxiliary_loss" among them, where there
        is one, is trained on too.

    Returns:
      (gradients like params, totals of `losses.totals`, statistics averaged over microbatches).
    """
    byte_lengths = jnp.asarray(byte_lengths)
    weight = jnp.sum(batch["weights"].astype(jnp.float32))
    weight = jnp.where(weight > 0, weight, 1.0)

    def loss(params, part, key):
        logits, statistics = forward(nnx.merge(graphdef, params), part, key)
        with jax.named_scope("loss"):
            totals = losses.totals(logits, part, byte_lengths)
        auxiliary = statistics.get(models.AUXILIARY_LOSS, 0.0) / accumulate
        return totals["nats"] / weight + auxiliary, (totals, statistics)

    gradient = jax.grad(loss, has_aux=True)
    if accumulate == 1:
        grads, (totals, statistics) = gradient(params, batch, key)
        return grads, totals, statistics

    def body(sums, xs):
        part, part_key = xs
        part = {name: sharding.constrain(x, ("batch", "time")) for name, x in part.items()}
        grads, aux = gradient(params, part, part_key)
        return jax.tree.map(jnp.add, sums, (grads, aux)), None

    xs = (microbatches(batch, accumulate), jax.random.split(key, accumulate))
    first = jax.tree.map(lambda x: x[0], xs)
    shapes = jax.eval_shape(gradient, params, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, (totals, statistics)), _ = jax.lax.scan(body, zeros, xs)
    return grads, totals, jax.tree.map(lambda x: x / accumulate, statistics)


def make(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    byte_lengths: np.ndarray,
    *,
    accumulate: int = 1,
    forward: Forward = forward,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The training step as a pure function, not yet compiled.

    Args:
      graphdef: static part of the model.
      optimizer: of `optimizer.make`.
      learning_rate: of `optimizer.learning_rate`, for the metrics.
      byte_lengths: [Q], of the tokenizer.
      accumulate: number of microbatches.
      forward: (model, batch, key) -> (logits, statistics).

    Returns:
      step(state, batch) -> (state, metrics). The metrics are fp32 scalars: `nats`, `tokens`,
      `bytes` (sums), `loss` and `bits_per_byte` (of this batch, before the update),
      `gradient_norm` (before clipping), `update_norm`, `parameter_norm` (after the update),
      `learning_rate`, and the model's statistics as `memory/<name>`.
    """
    byte_lengths = np.asarray(byte_lengths)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key, step_key = jax.random.split(state.key)
        grads, totals, statistics = gradients(
            graphdef,
            state.params,
            batch,
            step_key,
            byte_lengths,
            accumulate=accumulate,
            forward=forward,
        )
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {
            **totals,
            "loss": totals["nats"] / jnp.where(totals["tokens"] > 0, totals["tokens"], 1.0),
            "bits_per_byte": totals["nats"]
            / (np.log(2) * jnp.where(totals["bytes"] > 0, totals["bytes"], 1.0)),
            "gradient_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "parameter_norm": optax.tree.norm(params),
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
            **{f"memory/{name}": value for name, value in statistics.items()},
        }
        return TrainState(state.step + 1, params, opt_state, key), metrics

    return step


def compile(
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]],
    abstract: TrainState,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The step under `jax.jit`: the state is donated and stays where it is on the mesh.

    Args:
      step: of `make`.
      abstract: shapes and shardings of the state, of `state.abstract`.
      mesh: call the result under `jax.set_mesh(mesh)`.

    Returns:
      The compiled step.
    """
    placed = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(
        step,
        in_shardings=(placed, batch_sharding(mesh)),
        out_shardings=(placed, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
