"""From logical axis names to mesh axes: one table, and the functions that read it.

A mesh has four axes, always in this order and always present (most of them of size 1):

| mesh axis | what is split over it |
|---|---|
| `data` | the batch |
| `fsdp` | the batch, and parameters by their embed dimension (gathered when they are used) |
| `tensor` | heads, feed-forward hidden units, vocabulary |
| `sequence` | the time axis of activations |

Parameters carry their logical axes as `nnx.Param(value, axes=("embed", "heads"))`, activations are
annotated with `constrain(x, ("batch", "time", "embed"))`. Nothing else in memjax names a mesh axis.
"""

import difflib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from memjax.typing import Array, PyTree

MESH_AXES = ("data", "fsdp", "tensor", "sequence")


class Rule(NamedTuple):
    """The mesh axes that one logical axis is split over, in parameters and in activations."""

    parameter: tuple[str, ...] = ()
    activation: tuple[str, ...] = ()


# `embed` is the one name with two readings: splitting it over fsdp saves parameter memory, but in
# an activation fsdp already splits the batch.
RULES: dict[str, Rule] = {
    "batch": Rule(("data", "fsdp"), ("data", "fsdp")),
    "time": Rule(("sequence",), ("sequence",)),
    "embed": Rule(("fsdp",), ()),
    "vocab": Rule(("tensor",), ("tensor",)),
    "heads": Rule(("tensor",), ("tensor",)),
    "mlp": Rule(("tensor",), ("tensor",)),
    "memory_hidden": Rule(("tensor",), ("tensor",)),  # of a memory that has no heads axis
    "memory_in": Rule(),
    "memory_out": Rule(),
    "kv": Rule(),
    "state": Rule(),
    "layers": Rule(),
    "persistent": Rule(),
    "conv": Rule(),
}

# What a step happens to be given, not what the model is: a decode step has one token, a single
# prompt a batch of one. Where these do not divide, an activation stays whole.
_ELASTIC = ("batch", "time")

Axes = Sequence[str | None]


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes data, fsdp, tensor and sequence, for `jax.set_mesh`.

    Args:
      data, fsdp, tensor, sequence: the sizes; at most one is -1, "the remaining devices".
      devices: the devices to use, by default all. One process may use the first few of them, a run
        of several processes uses all.

    Returns:
      A `jax.sharding.Mesh` whose axis types are `AxisType.Auto`.

    Raises:
      ValueError: a size below 1 (other than -1), two sizes of -1, or sizes that do not fit.
    """
    sizes = dict(zip(MESH_AXES, (data, fsdp, tensor, sequence), strict=True))
    devices = list(jax.devices() if devices is None else devices)
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh axis {name}={size} must be at least 1, or -1 for the rest")
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"only one mesh axis can be -1 (the remaining devices), not {rest}")
    known = math.prod(size for size in sizes.values() if size != -1)
    if rest:
        if len(devices) % known:
            raise ValueError(
                f"{len(devices)} devices cannot be split by {_sizes(sizes)}: the other axes"
                f" multiply to {known}, which must divide {len(devices)}"
            )
        sizes[rest[0]] = len(devices) // known
    total = math.prod(sizes.values())
    if total > len(devices) or (total < len(devices) and jax.process_count() > 1):
        raise ValueError(
            f"mesh {_sizes(sizes)} is for {total} devices but there are {len(devices)};"
            " set one axis to -1 to take what remains"
        )
    shape, devices = tuple(sizes.values()), devices[:total]
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # a slice none of whose axes' products are these sizes
        placed = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except AssertionError:  # no box of a slice, which has no better order than theirs
        placed = np.array(devices).reshape(shape)
    return Mesh(placed, MESH_AXES, axis_types=types)


def _sizes(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in sizes.items())


def resolve(axes: Axes, column: str) -> list[tuple[str, ...]]:
    """Mesh axes of each dimension, in full; raises on unknown names and collisions."""
    used: dict[str, str] = {}
    resolved = []
    for name in axes:
        if name is not None and name not in RULES:
            near = difflib.get_close_matches(name, RULES, n=3) or list(RULES)
            raise ValueError(
                f"unknown logical axis {name!r} in {tuple(axes)}; did you mean one of {near}?"
            )
        mesh_axes = () if name is None else getattr(RULES[name], column)
        for mesh_axis in mesh_axes:
            if mesh_axis in used:
                raise ValueError(
                    f"axes {tuple(axes)} collide: {used[mesh_axis]!r} and {name!r} are both split"
                    f" over the mesh axis {mesh_axis!r}; name one of the two dimensions None"
                )
            used[mesh_axis] = name
        resolved.append(mesh_axes)
    return resolved


def spec(
    axes: Axes,
    mesh: Mesh | AbstractMesh,
    *,
    shape: Sequence[int] | None = None,
    name: str = "array",
) -> PartitionSpec:
    """The `PartitionSpec` of an array with these logical axes.

        spec(("embed", "heads"), mesh) == PartitionSpec("fsdp", "tensor")

    Args:
      axes: one logical name (a key of `RULES`) or None for each dimension.
      mesh: the mesh; rules for axes that it does not have are dropped.
      shape: when given, checked: every dimension must be a multiple of its share of the mesh.
      name: how an error calls the array.

    Raises:
      ValueError: an unknown logical name, two dimensions on one mesh axis, a number of axes that is
        not that of the dimensions, or a dimension that the mesh does not divide.
    """
    resolved = resolve(axes, "parameter")
    if shape is not None and len(shape) != len(axes):
        raise ValueError(f"{name} has shape {tuple(shape)} but the axes {tuple(axes)}")
    entries = []
    for dimension, mesh_axes in enumerate(resolved):
        mesh_axes = tuple(axis for axis in mesh_axes if axis in mesh.shape)
        parts = math.prod(mesh.shape[axis] for axis in mesh_axes)
        if shape is not None and shape[dimension] % parts:
            raise ValueError(_indivisible(name, axes, shape, dimension, mesh_axes, parts))
        entries.append(_entry(mesh_axes))
    return PartitionSpec(*entries)


def _indivisible(name, axes, shape, dimension, mesh_axes, parts) -> str:
    over, axis, size = " x ".join(mesh_axes), axes[dimension], shape[dimension]
    return (
        f"{name} {tuple(shape)}: dimension {dimension} ({axis!r}, size {size}) cannot be split over"
        f" the mesh axis {over} of size {parts}; make {over} a divisor of {size}, or {axis!r} a"
        f" multiple of {parts}"
    )


def _entry(mesh_axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    if not mesh_axes:
        return None
    return mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes


def platform() -> str:
    """What the program is traced for: "cpu", "gpu" or "tpu".

    That of the mesh of `jax.set_mesh`, which may be of a slice that is not there (`memjax.tpu`);
    without a mesh, JAX's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def constrain(x: Array, axes: Axes) -> Array:
    """The activation x, laid out as its logical axes say under the mesh of `jax.set_mesh`.

    Without a mesh, on a mesh with one device, and over mesh axes that are manual (inside
    `jax.shard_map`) it does nothing. A batch or time dimension that the mesh does not divide stays
    whole (one token of a decode step).

    Args:
      x: any array.
      axes: one logical name (a key of `RULES`) or None for each dimension of x.

    Returns:
      x, the same values.

    Raises:
      ValueError: as `spec`.
    """
    return _constrain(x, axes, "activation", "activation")


def _constrain(x: Array, axes: Axes, column: str, name: str) -> Array:
    if len(axes) != x.ndim:
        raise ValueError(f"{name} has shape {x.shape} but the axes {tuple(axes)}")
    resolved = resolve(axes, column)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    auto = {axis for axis, kind in kinds if kind == AxisType.Auto}
    if math.prod(mesh.shape[axis] for axis in auto) == 1:
        return x
    entries = []
    for dimension, mesh_axes in enumerate(resolved):
        mesh_axes = tuple(axis for axis in mesh_axes if axis in auto)
        parts = math.prod(mesh.shape[axis] for axis in mesh_axes)
        if x.shape[dimension] % parts:
            if axes[dimension] not in _ELASTIC:
                raise ValueError(_indivisible(name, axes, x.shape, dimension, mesh_axes, parts))
            mesh_axes = ()
        entries.append(_entry(mesh_axes))
    return _pin(x, PartitionSpec(*entries))


# Under jit for the sake of eager calls, where a constraint takes no array that lives on one device.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def _pin(x, partition):
    return jax.lax.with_sharding_constraint(x, partition)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _axes_of(path, variable: nnx.Variable) -> tuple[str | None, ...]:
    axes = variable.get_metadata().get("axes")
    name = jax.tree_util.keystr(path)
    if axes is None:
        raise ValueError(
            f"parameter {name} names no logical axes; create it as nnx.Param(value, axes=(...))"
        )
    shape = getattr(variable.get_value(), "shape", None)
    if shape is not None and len(shape) != len(axes):
        raise ValueError(f"parameter {name} has shape {shape} but the axes {axes}")
    return tuple(axes)


def param_axes(params: PyTree) -> PyTree:
    """The logical axes of every parameter: the tree of params with a tuple of names as each leaf.

    Args:
      params: `nnx.State` (of `nnx.split`) or any tree of `nnx.Variable`, of arrays or of shapes.

    Raises:
      ValueError: a parameter without axes, or with another number of axes than dimensions.
    """
    return jax.tree_util.tree_map_with_path(_axes_of, params, is_leaf=_is_variable)


def constrain_params(params: PyTree) -> PyTree:
    """The parameters, laid out as their own logical axes say, and so are their gradients.

    A model calls it where it uses its parameters, inside the scan over layers: each layer is
    gathered when its turn comes, and its gradient is split before it is added up.

    Args:
        params: `nnx.Variable`s or a tree of them.

    Returns:
        The same tree, the same values; no change where `constrain` makes none.

    Raises:
        ValueError: a parameter that the mesh does not divide, or without axes.
    """

    def pin(path, variable):
        axes, name = _axes_of(path, variable), f"parameter {jax.tree_util.keystr(path)}"
        return jax.tree.map(lambda x: _constrain(x, axes, "parameter", name), variable)

    return jax.tree_util.tree_map_with_path(pin, params, is_leaf=_is_variable)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Where every array of a tree lives on the mesh, for `jax.device_put` and `out_shardings`.

    Parameters (and what optax keeps beside them, which inherits their axes) are split as `RULES`
    says; arrays that are no parameters are replicated.

    Args:
      tree: of `nnx.Variable` and plain leaves; arrays or `jax.ShapeDtypeStruct`.
      mesh: of `make_mesh`.

    Returns:
      The same tree with a `NamedSharding` in place of each array.

    Raises:
      ValueError: a parameter that the mesh does not divide, and what `spec` and `param_axes` raise.
    """

    def place(path, leaf):
        if not _is_variable(leaf):
            return NamedSharding(mesh, PartitionSpec())
        axes = _axes_of(path, leaf)
        name = f"parameter {jax.tree_util.keystr(path)}"
        placed = NamedSharding(mesh, spec(axes, mesh, shape=leaf.get_value().shape, name=name))
        return jax.tree.map(lambda _: placed, leaf)

    return jax.tree_util.tree_map_with_path(place, tree, is_leaf=_is_variable)
