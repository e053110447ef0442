"""Trees as flat dictionaries of arrays, and checks on them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from memjax.typing import Array, PyTree


def _name(path) -> str:
    # nnx ends the path of a parameter with its attribute `value`.
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by name; random keys as the integers that they consist of.

    Args:
      tree: of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      `{"params/norm/scale": ..., "opt_state/0/count": ...}`.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    flat = {_name(path): leaf for path, leaf in leaves}
    for name, leaf in flat.items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                data = jax.eval_shape(jax.random.key_data, leaf)
                flat[name] = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)
            else:
                flat[name] = jax.random.key_data(leaf)
    return flat


def unflatten(flat: Mapping[str, Array], like: PyTree) -> PyTree:
    """The inverse of `flatten`.

    Args:
      flat: arrays by name.
      like: a tree of the structure wanted.

    Returns:
      The tree.
    """

    def leaf(path, template):
        value = flat[_name(path)]
        if jnp.issubdtype(template.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(value)
        return value

    return jax.tree_util.tree_map_with_path(leaf, like)


@jax.jit
def audit(flat: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Whether each array is finite, and a checksum of it.

        checksum(x) = sum of the bits of each element, read as an unsigned integer, modulo 2^32

    A sum of integers does not depend on its order, so it is the same on every mesh.

    Args:
      flat: arrays by name.

    Returns:
      (whether all of it is finite, for the arrays of floating point; checksums of all), by name.
    """

    def checksum(x):
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    finite = {
        name: jnp.all(jnp.isfinite(x))
        for name, x in flat.items()
        if jnp.issubdtype(x.dtype, jnp.floating)
    }
    return finite, {name: checksum(x) for name, x in flat.items()}
