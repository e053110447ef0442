"""Loss, bits per byte and perplexity of a model on a split, and its loss by position."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memjax import sharding
from memjax.evaluation import losses
from memjax.evaluation.placement import place
from memjax.typing import Array, PyTree

Batch = dict[str, Array]


class Result(NamedTuple):
    """What an evaluation found.

    Args:
      loss: mean cross-entropy of a counted token, in nats.
      bits_per_byte: all nats over ln 2, over the bytes of the counted tokens.
      perplexity: exp(loss).
      tokens: how many tokens were counted (the sum of their weights).
      bytes: how many bytes they stand for.
      loss_by_position: [T]; entry p is the mean loss of the tokens predicted from p + 1 tokens of
        their document; nan where there are none.
      tokens_by_position: [T], how many they are.
    """

    loss: float
    bits_per_byte: float
    perplexity: float
    tokens: float
    bytes: float
    loss_by_position: np.ndarray
    tokens_by_position: np.ndarray

    def scalars(self) -> dict[str, float]:
        """The single numbers by name."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, float)}


def make_step(
    graphdef: Any, byte_lengths: np.ndarray, mesh: Mesh | None = None
) -> Callable[[PyTree, Batch], dict[str, Array]]:
    """A compiled step that adds up the losses of one batch.

    Args:
      graphdef: static part of the model, of `nnx.split`.
      byte_lengths: [Q], of the tokenizer.
      mesh: the mesh on which it runs, under `jax.set_mesh`; None for one device.

    Returns:
      step(params, batch) -> the totals of `losses.totals`, with `nats_by_position` and
      `tokens_by_position`, each [T]; on every host.
    """
    byte_lengths = np.asarray(byte_lengths)

    def step(params, batch):
        model = nnx.merge(graphdef, params)
        logits, _ = losses.forward(model, batch, jax.random.key(0))
        weights = batch["weights"].astype(jnp.float32)
        nats = weights * losses.token_losses(logits, batch["targets"])
        positions = losses.context_positions(batch["segment_ids"])
        zeros = jnp.zeros(positions.shape[1], jnp.float32)
        return {
            **losses.totals(logits, batch, jnp.asarray(byte_lengths)),
            "nats_by_position": zeros.at[positions].add(nats),
            "tokens_by_position": zeros.at[positions].add(weights),
        }

    if mesh is None:
        return jax.jit(step)
    return jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))


def run(
    step: Callable[[PyTree, Batch], dict[str, Array]],
    params: PyTree,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    mesh: Mesh,
    limit: int | None = None,
) -> Result:
    """Runs a compiled evaluation step over a split.

    Args:
      step: of `make_step`, for the same mesh.
      params: the parameters on the mesh.
      batches: this host's batches, each of tokens, targets, weights, segment_ids, positions; all
        of one shape, and as many on each host (`data.make_pipeline` sees to both).
      mesh: of `sharding.make_mesh`.
      limit: at most this many batches.

    Returns:
      The result over all hosts; sums are kept in float64.

    Raises:
      ValueError: no counted token.
    """
    sums: dict[str, np.ndarray] = {}
    pending: deque = deque()

    def collect():
        for name, value in jax.device_get(pending.popleft()).items():
            sums[name] = sums.get(name, 0.0) + np.asarray(value, np.float64)

    with jax.set_mesh(mesh):
        for batch in itertools.islice(batches, limit):
            pending.append(step(params, place(batch, mesh)))
            if len(pending) > 2:  # the device works on the next ones meanwhile
                collect()
    while pending:
        collect()
    if not sums or sums["tokens"] == 0:
        raise ValueError(
            "the validation split has no counted token: add files to it, or shorten the context"
        )
    nats, tokens, size = (float(sums[name]) for name in ("nats", "tokens", "bytes"))
    counts = sums["tokens_by_position"]
    by_position = np.where(
        counts > 0, sums["nats_by_position"] / np.where(counts > 0, counts, 1), np.nan
    )
    return Result(
        loss=nats / tokens,
        bits_per_byte=float(nats / np.log(2) / size) if size else float("nan"),
        perplexity=float(np.exp(nats / tokens)),
        tokens=tokens,
        bytes=size,
        loss_by_position=by_position,
        tokens_by_position=counts,
    )


def evaluate(
    model: nnx.Module,
    batches: Iterable[dict[str, np.ndarray]],
    byte_lengths: np.ndarray,
    *,
    limit: int | None = None,
) -> Result:
    """Loss, bits per byte, perplexity and loss by position of a model, on one device.

        evaluate(model, data.make_pipeline(..., split="validation"), tokenizer.byte_lengths)

    Args:
      model: a language model, called as `model(tokens, segment_ids=..., positions=...)`; parameters
        that live on a mesh are copied to its first device.
      batches: batches of tokens, targets, weights, segment_ids, positions, each [B, T].
      byte_lengths: [Q], of the tokenizer.
      limit: at most this many batches.

    Returns:
      The result.

    Raises:
      ValueError: no counted token.
      TypeError: the model is not an `nnx.Module`.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an nnx.Module, got {type(model).__name__}: with run and params of"
            " training.load it is nnx.merge(run.graphdef, params)"
        )
    graphdef, params = nnx.split(model, nnx.Param)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    return run(make_step(graphdef, byte_lengths, mesh), params, batches, mesh=mesh, limit=limit)
