"""Batches of rows on a mesh, over one or several hosts."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from memjax import sharding
from memjax.typing import Array


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch's [B, T] arrays live."""
    return NamedSharding(mesh, sharding.spec(("batch", "time"), mesh))


def place(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """This host's rows as part of the global batch on the mesh.

    Args:
      batch: [B / hosts, T] NumPy arrays.
      mesh: of `sharding.make_mesh`.

    Returns:
      [B, T] arrays, split over the mesh.

    Raises:
      ValueError: rows or tokens that the mesh does not divide.
    """
    placed = batch_sharding(mesh)
    rows, time = next(iter(batch.values())).shape
    shape = (rows * jax.process_count(), time)
    sharding.spec(("batch", "time"), mesh, shape=shape, name="batch")
    return {
        name: jax.make_array_from_process_local_data(placed, np.asarray(x), shape)
        for name, x in batch.items()
    }
