"""Linear maps, and how every weight matrix of memjax starts."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from memjax import checks
from memjax.typing import Array, Float, Key


def fan_in_normal(key: Key, shape: Sequence[int], fan_in: int) -> Array:
    """Draws a weight from a normal distribution truncated at two deviations.

    The deviation, after truncation, is `1 / sqrt(fan_in)`: a unit input keeps its size.

    Args:
        key: the random key.
        shape: shape of the weight.
        fan_in: how many inputs each output sums over.

    Returns:
        fp32 array of `shape`.
    """
    # 0.8796...: the deviation of a standard normal truncated to [-2, 2]
    deviation = 1.0 / (0.87962566103423978 * math.sqrt(fan_in))
    return jax.random.truncated_normal(key, -2.0, 2.0, tuple(shape), jnp.float32) * deviation


class Linear(nnx.Module):
    """A linear map of the trailing axes: `y = x W (+ b)`.

    Both sides may have several axes: `Linear(dim, (heads, head_dim), ...)` projects `[..., dim]`
    to `[..., heads, head_dim]`. The weight starts as `fan_in_normal`, the bias at zero; both are
    fp32 and are cast to the dtype of the input.

    Args:
        inputs: size of the input's last axis, or sizes of its last axes.
        outputs: size or sizes that take their place.
        axes: one logical name (or None) per dimension of the weight, inputs first.
        bias: whether to add a bias of shape `outputs`.
        rngs: the stream `params` draws the weight.

    Raises:
        ValueError: a size that is no integer of at least 1, or `axes` of another length than the
            weight has dimensions.
    """

    def __init__(
        self,
        inputs: int | Sequence[int],
        outputs: int | Sequence[int],
        *,
        axes: Sequence[str | None],
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.inputs = tuple(inputs) if isinstance(inputs, Sequence) else (inputs,)
        self.outputs = tuple(outputs) if isinstance(outputs, Sequence) else (outputs,)
        shape = self.inputs + self.outputs
        axes = tuple(axes)
        for name, sizes in (("inputs", self.inputs), ("outputs", self.outputs)):
            for size in sizes:
                checks.whole(name, size)
        if len(axes) != len(shape):
            raise ValueError(
                f"axes {axes} must name each of the {len(shape)} dimensions of the weight "
                f"{shape}; use None for one without a name"
            )
        weight = fan_in_normal(rngs.params(), shape, math.prod(self.inputs))
        self.weight = nnx.Param(weight, axes=axes)
        if bias:
            zeros = jnp.zeros(self.outputs, jnp.float32)
            self.bias = nnx.Param(zeros, axes=axes[len(self.inputs) :])
        else:
            self.bias = None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Applies the map.

        Args:
            x: [..., *inputs].

        Returns:
            [..., *outputs] in the dtype of x.

        Raises:
            ValueError: the last axes of x are not `inputs`.
        """
        n = len(self.inputs)
        if x.shape[-n:] != self.inputs:
            raise ValueError(f"x has shape {x.shape}; its last axes must be {self.inputs}")
        # One axis a side: a product whose result has heads as an axis comes in a layout of its own,
        # and is copied where the heads lie side by side.
        rows = x.reshape(*x.shape[: x.ndim - n], -1)
        weight = self.weight[...].reshape(rows.shape[-1], -1)
        y = jnp.matmul(rows, weight.astype(x.dtype)).reshape(*rows.shape[:-1], *self.outputs)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
