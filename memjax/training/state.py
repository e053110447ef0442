"""What a training step takes and gives back, made in place on a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from memjax import sharding
from memjax.typing import Array, Key, PyTree


class TrainState(NamedTuple):
    """Everything that a run's future depends on, apart from its data.

    Args:
      step: int32 scalar, optimiser steps taken.
      params: the trained parameters, as `nnx.split(model, nnx.Param)` gives them.
      opt_state: the optimiser's state.
      key: the random key that the next step splits.
    """

    step: Array
    params: PyTree
    opt_state: PyTree
    key: Array


def describe(make_model: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Any, PyTree]:
    """A model's static part and the shapes of its parameters, without computing anything.

    Args:
      make_model: builds the model from its random streams.

    Returns:
      (graphdef, parameters as `jax.ShapeDtypeStruct`).
    """
    return nnx.split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))), nnx.Param)


def _initial(make_model, optimizer: optax.GradientTransformation, key: Key) -> TrainState:
    model_key, step_key = jax.random.split(key)
    _, params = nnx.split(make_model(nnx.Rngs(model_key)), nnx.Param)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), step_key)


def _shardings(shapes: TrainState, mesh: Mesh) -> TrainState:
    def place(leaf):
        # optax.masked leaves variables without an array, for which there is nothing to place.
        return sharding.shardings(leaf, mesh) if jax.tree.leaves(leaf) else leaf

    params = sharding.shardings(shapes.params, mesh)  # first: its errors name the parameter
    return jax.tree.map(
        place,
        shapes._replace(params=None),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )._replace(params=params)


def abstract(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """The shapes of a run's state and where each array lives: what a checkpoint is restored into.

    Args:
      make_model: builds the model from its random streams.
      optimizer: of `optimizer.make`.
      mesh: of `sharding.make_mesh`.

    Returns:
      A `TrainState` of `jax.ShapeDtypeStruct` with shardings.

    Raises:
      ValueError: a parameter that the mesh does not divide.
    """
    shapes = jax.eval_shape(lambda: _initial(make_model, optimizer, jax.random.key(0)))
    return jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        shapes,
        _shardings(shapes, mesh),
    )


def start(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    key: Key,
) -> TrainState:
    """A new run's state, each part made on the devices that hold it.

    Args:
      make_model: builds the model from its random streams.
      optimizer: of `optimizer.make`.
      mesh: of `sharding.make_mesh`.
      key: the seed of the run; the parameters are drawn from it, the same ones on every mesh.

    Returns:
      The state at step 0.

    Raises:
      ValueError: a parameter that the mesh does not divide.
    """
    placed = jax.tree.map(lambda x: x.sharding, abstract(make_model, optimizer, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(lambda key: _initial(make_model, optimizer, key), out_shardings=placed)(key)
