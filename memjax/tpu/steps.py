"""The programs of a run, lowered for the devices of its mesh: what is trained and what decodes."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from memjax import sharding
from memjax.models import generation
from memjax.training import Run

KINDS = ("train", "decode")


def trace(run: Run, kind: str, *, batch: int | None = None) -> tuple[Any, dict[str, Any]]:
    """A step, traced with shapes alone.

    Args:
      run: of `training.build(config, devices=target.devices(topology))`.
      kind: "train", the step that `experiments/train.py` runs; "decode", a token of each row that
        `models.generate` makes, greedily.
      batch: rows to decode; by default those of a training step.

    Returns:
      (what `jax.jit(f).trace` gives, its arguments by name).

    Raises:
      ValueError: an unknown kind, or rows that the mesh does not divide.
    """
    if kind == "train":
        step, state, rows = run.compiled_step(), run.abstract_state, run.abstract_batch
        with jax.set_mesh(run.mesh):
            traced = step.trace(state, rows)
        return traced, {"parameters": state.params, "optimiser": state.opt_state, "batch": rows}
    if kind == "decode":
        return _decode(run, run.train.batch if batch is None else batch)
    raise ValueError(f"kind {kind!r} must be one of {KINDS}")


def _decode(run: Run, batch: int) -> tuple[Any, dict[str, Any]]:
    run.check_rows("batch", batch)
    rows = sharding.spec(("batch",), run.mesh)[0]

    def place(path, leaf):
        # the states of blocks are stacked by layer; what else there is begins with the rows
        stacked = "blocks" in jax.tree_util.keystr(path)
        axis = 1 if stacked else 0
        split = leaf.ndim > axis and leaf.shape[axis] == batch
        axes = [rows if split and i == axis else None for i in range(leaf.ndim)]
        placed = NamedSharding(run.mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    state = jax.eval_shape(
        lambda params: nnx.merge(run.graphdef, params).start(batch), run.abstract_params
    )
    state = jax.tree_util.tree_map_with_path(place, state)
    token = jax.ShapeDtypeStruct(
        (batch,), jnp.int32, sharding=NamedSharding(run.mesh, PartitionSpec(rows))
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(
        key.shape, key.dtype, sharding=NamedSharding(run.mesh, PartitionSpec())
    )
    with jax.set_mesh(run.mesh):
        traced = generation.step.trace(
            run.graphdef, run.abstract_params, state, token, key, generation.GREEDY
        )
    return traced, {"parameters": run.abstract_params, "state": state, "batch": token}
