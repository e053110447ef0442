"""Depthwise causal convolution with a carried state."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from memjax import documents
from memjax.layers.linear import fan_in_normal
from memjax.typing import Array, Float, Int


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
        ValueError: dim or width below 1.
    """

    def __init__(
        self,
        dim: int,
        width: int = 4,
        *,
        rngs: nnx.Rngs,
        axis_name: str | None = "embed",
    ):
        if dim < 1 or width < 1:
            raise ValueError(f"CausalConv dim {dim} and width {width} must be at least 1")
        self.dim, self.width = dim, width
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
    ) -> tuple[Float[Array, "B T E"], ConvState]:
        """Convolves x, going on from `state`.

        Args:
            x: [B, T, dim].
            state: what the tokens before left; None = `start(B)`.
            segment_ids: [B, T]; no output sees across a change. None = one document.

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
        past, before = self.width - 1, state.inputs.astype(wide)
        weight = self.weight[...].astype(wide)
        number = place.number  # what comes before the call belongs to document 0 of it

        def back(z, steps, fill):
            """Each token's z of so many steps earlier, `fill` before the call."""
            pad = [(0, 0), (min(steps, time), 0)] + [(0, 0)] * (z.ndim - 2)
            return jnp.pad(z[:, : max(time - steps, 0)], pad, constant_values=fill)

        # Shifted as it comes, and the few tokens that see the state apart: no wide copy of x.
        y = weight[0] * x.astype(wide)
        early = jnp.zeros((batch, min(past, time), dim), wide)
        for s in range(1, self.width):
            term, seen = back(x, s, 0).astype(wide), before[:, past - s : past - s + time]
            if segment_ids is not None:
                term = jnp.where((back(number, s, -1) == number)[..., None], term, 0)
                seen = jnp.where((number[:, : seen.shape[1]] == 0)[..., None], seen, 0)
            y += weight[s] * term
            early = early.at[:, : seen.shape[1]].add(weight[s] * seen)
        y += jnp.pad(early, ((0, 0), (0, time - early.shape[1]), (0, 0)))

        inputs = jnp.concatenate([before, x[:, max(time - past, 0) :].astype(wide)], axis=1)
        history = inputs[:, inputs.shape[1] - past :]
        if segment_ids is not None:
            number = jnp.pad(number[:, max(time - past, 0) :], ((0, 0), (past, 0)))
            ours = number[:, number.shape[1] - past :] == place.number[:, -1:]
            history = jnp.where(ours[..., None], history, 0)
        return y.astype(x.dtype), ConvState(history.astype(state.inputs.dtype), place.last)
