"""The programs of a run, lowered for the devices of its mesh: what is trained and what decodes."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

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
      (what `jax.jit(f).trace` gives, its arguments by name; see `placed`).

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
    # Nothing lays out what generation carries from token to token but the programs that make it:
    # state and token bear no shardings here, so that the compiler's are theirs (`placed`).
    state = jax.eval_shape(
        lambda params: nnx.merge(run.graphdef, params).start(batch), run.abstract_params
    )
    token = jax.ShapeDtypeStruct((batch,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(run.mesh):
        traced = generation.step.trace(
            run.graphdef, run.abstract_params, state, token, key, generation.GREEDY
        )
    return traced, {"parameters": run.abstract_params, "state": state, "batch": token}


def placed(arguments: dict[str, Any], compiled: Any) -> dict[str, Any]:
    """The arguments of a step with the shardings that it was compiled for.

    Args:
      arguments: of `trace`.
      compiled: what `trace(...)[0].lower().compile()` gives.

    Returns:
      The same with a sharding on every leaf; None in place of a part of the state that the compiled
      step does not read, and so is not passed.
    """
    if "state" not in arguments:
        return arguments  # of training, with shardings from the start
    _, *chosen, _ = compiled.input_shardings[0]

    def place(leaf, sharding):
        if sharding is None:
            return None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    names = ("state", "batch")
    found = jax.tree.map(place, tuple(arguments[name] for name in names), tuple(chosen))
    return {**arguments, **dict(zip(names, found, strict=True))}
