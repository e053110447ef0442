"""Depthwise causal convolution with a carried state."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from memjax import checks, documents, sharding
from memjax.layers.linear import fan_in_normal
from memjax.typing import Array, Float, Int
from pallas_kernels.short_convolution import misfit, short_convolution


class ConvState(NamedTuple):
    """What `CausalConv` carries.

    Args:
        inputs: the last width - 1 inputs of the running document, zero where there are none.
        segment: id of the last token; -1 = nothing seen yet.
    """

    inputs: Float[Array, "B W E"]
    segment: Int[Array, "B"]


class CausalConv(nnx.Module):
    """Mixes each channel over the last `width` tokens of its document.

    `y[t] = sum_{s < width} weight[s] * x[t - s]`, over those t - s in the document of t. Summed in
    fp32; the weight starts as `fan_in_normal` with fan-in `width`.

    Args:
        dim: channels.
        width: tokens that an output sees, its own included.
        rngs: the stream `params` draws the weight.
        axis_name: logical name of the channels.

    Raises:
        ValueError: dim or width is no integer of at least 1.
    """

    def __init__(
        self,
        dim: int,
        width: int = 4,
        *,
        rngs: nnx.Rngs,
        axis_name: str | None = "embed",
    ):
        checks.whole("dim", dim)
        checks.whole("width", width)
        self.dim, self.width, self.axis_name = dim, width, axis_name
        weight = fan_in_normal(rngs.params(), (width, dim), width)
        self.weight = nnx.Param(weight, axes=("conv", axis_name))

    def start(self, batch: int, dtype: DTypeLike = jnp.float32) -> ConvState:
        """The state before the first token: no inputs, nothing seen.

        Args:
            batch: B.
            dtype: of the carried inputs; a call keeps the dtype of the state it is given.

        Returns:
            A `ConvState`.
        """
        inputs = jnp.zeros((batch, self.width - 1, self.dim), dtype)
        return ConvState(inputs, jnp.full((batch,), -1, jnp.int32))

    def __call__(
        self,
        x: Float[Array, "B T E"],
        state: ConvState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        silu: bool = False,
    ) -> tuple[Float[Array, "B T E"], ConvState]:
        """Convolves x, going on from `state`.

        Args:
            x: [B, T, dim].
            state: what the tokens before left; None = `start(B)`.
            segment_ids: [B, T]; no output sees across a change. None = one document.
            silu: whether SiLU follows, in the same kernel where there is one.

        Returns:
            [B, T, dim] in the dtype of x, and the state after the last token.

        Raises:
            ValueError: x or the state do not fit.
        """
        batch, time, dim = x.shape
        if dim != self.dim or time < 1:
            raise ValueError(f"x has shape {x.shape}; it must be [B, T >= 1, {self.dim}]")
        wide = jnp.promote_types(x.dtype, jnp.float32)
        if state is None:
            state = self.start(batch, wide)
        if state.inputs.shape[0] != batch:
            raise ValueError(
                f"the state is for a batch of {state.inputs.shape[0]}, x has {batch}; "
                f"use start({batch})"
            )
        place = documents.follow(segment_ids, state.segment, jnp.zeros_like(state.segment), time)
        starts = None if segment_ids is None else documents.starts(segment_ids, state.segment)
        y = self._convolve(x, state.inputs, starts, silu)

        past, before = self.width - 1, state.inputs.astype(wide)
        inputs = jnp.concatenate([before, x[:, max(time - past, 0) :].astype(wide)], axis=1)
        history = inputs[:, inputs.shape[1] - past :]
        if segment_ids is not None:
            # what comes before the call belongs to document 0 of it
            number = jnp.pad(place.number[:, max(time - past, 0) :], ((0, 0), (past, 0)))
            ours = number[:, number.shape[1] - past :] == place.number[:, -1:]
            history = jnp.where(ours[..., None], history, 0)
        return y, ConvState(history.astype(state.inputs.dtype), place.last)

    def _convolve(self, x, before, starts, silu):
        """By the kernel on TPU, where it takes the channels of a device and sees all tokens."""
        weight, axis = self.weight[...], self.axis_name
        dims = {"batch": x.shape[0]} | ({} if axis is None else {axis: self.dim})
        along = 1 if axis is None else sharding.devices_along(axis)
        channels = self.dim if self.dim % along else self.dim // along  # of a device
        fits = misfit(x.dtype, channels, self.width) is None
        fits &= sharding.devices_along("time") == 1
        kernel = x.shape[1] > 1 and sharding.platform() == "tpu" and fits

        def run(x, weight, before, starts):
            return short_convolution(
                x, weight, before, starts=starts, silu=silu,
                implementation="pallas" if kernel else "xla",
            )  # fmt: skip

        if not kernel:
            return run(x, weight, before, starts)
        tokens = PartitionSpec("batch", None, axis)
        return sharding.on_each_device(
            run,
            (x, weight, before, starts),
            (tokens, PartitionSpec(None, axis), tokens, PartitionSpec("batch")),
            tokens,
            dims=dims,
        )
