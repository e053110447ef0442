"""Programs in which each device computes its own share, and says itself what it sends to others.

Most of memjax leaves that to the compiler. It cannot split a Pallas kernel, and it does not see
that the rows and the heads of a memory never meet: asked whether any row begins a document, it asks
all devices, in every chunk.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

from memjax.sharding.rules import RULES, resolve
from memjax.typing import PyTree


def compiler_axes() -> dict[str, int]:
    """Devices along each axis of the mesh of `jax.set_mesh` that the compiler manages.

    Empty without a mesh, on one device, and inside `jax.shard_map` over all axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    found = {axis: mesh.shape[axis] for axis, kind in kinds if kind == AxisType.Auto}
    return found if math.prod(found.values()) > 1 else {}


def devices_along(name: str) -> int:
    """How many devices a logical axis of an activation is split over, see `compiler_axes`."""
    mesh = compiler_axes()
    return math.prod(mesh.get(axis, 1) for axis in RULES[name].activation)


def on_each_device(
    run: Callable,
    arguments: tuple,
    axes: PyTree,
    out_axes: PyTree,
    *,
    dims: dict[str, int],
    rest: str = "each",
) -> PyTree:
    """`run(*arguments)`, each device with its rows, heads or tokens of them.

    Where `devices_along` of all axes is 1, that is just the call.

    Args:
        run: arrays to arrays, for any share of the dimensions in `dims`.
        arguments: pytrees of arrays.
        axes: for each argument a pytree prefix of it, whose leaves are `PartitionSpec`s of logical
            names: `PartitionSpec("batch", None, "heads")`.
        out_axes: the same for the result.
        dims: size of each logical axis that is to be split; one that its devices do not divide
            stays whole, and so do names that are not here.
        rest: what becomes of the axes of the mesh that nothing here is split over. "each": every
            device along them computes the same. "compiler": they stay the compiler's, and `run` may
            call this again for them.

    Returns:
        What `run` gives.
    """
    mesh = compiler_axes()
    if not mesh:
        return run(*arguments)
    split = {name for name, size in dims.items() if size % devices_along(name) == 0}
    if rest == "compiler":
        own = {axis for name in split for axis in RULES[name].activation}
        if all(mesh.get(axis, 1) == 1 for axis in own):
            return run(*arguments)
        # A kernel's compiler wants all axes, also those of one device.
        own = {axis for axis, size in mesh.items() if axis in own or size == 1}
    else:
        own = set(mesh)

    def of_mesh(leaf: PartitionSpec) -> PartitionSpec:
        resolved = resolve([name if name in split else None for name in leaf], "activation")
        return PartitionSpec(*(tuple(axis for axis in axes if axis in own) for axes in resolved))

    is_leaf = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    in_specs, out_specs = (jax.tree.map(of_mesh, x, is_leaf=is_leaf) for x in (axes, out_axes))
    mapped = jax.shard_map(
        run, in_specs=in_specs, out_specs=out_specs, axis_names=own, check_vma=False
    )
    return mapped(*arguments)
