"""Causal depthwise convolution of a few taps: checks and dispatch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.short_convolution import reference, tpu


def short_convolution(
    x: jax.Array,
    weight: jax.Array,
    before: jax.Array,
    *,
    starts: jax.Array | None = None,
    silu: bool = False,
    implementation: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """A convolution over time of every channel for itself, and SiLU, in one kernel each way.

        y_t = act(sum_{s < W} weight_s x_{t-s}),   act = SiLU or nothing

    over those t - s in the document of t; x_{-1} is the last row of `before`.

    Args:
        x: [B, T, E].
        weight: [W, E], of the token itself first.
        before: the W - 1 inputs before the first token, zeros where there are none, [B, W - 1, E].
        starts: where documents begin [B, T] bool; None = nowhere.
        silu: whether the sum is activated.
        implementation: "pallas" (TPU), "xla", or None = "pallas" where the default backend is TPU
            and the kernel takes these sizes (`misfit`).
        interpret: runs the kernel in Pallas' TPU interpreter, on any platform: True or
            `pltpu.InterpretParams(...)`.

    Returns:
        [B, T, E] in x's dtype; summed and activated in fp32 (float64 of float64).

    Raises:
        ValueError: an argument that does not fit, by name.
    """
    if x.ndim != 3 or min(x.shape[1:]) < 1:
        raise ValueError(f"x {x.shape} must be [B, T >= 1, E >= 1]")
    batch, _, dim = x.shape
    if weight.ndim != 2 or weight.shape[1] != dim or weight.shape[0] < 1:
        raise ValueError(f"weight {weight.shape} must be [W >= 1, {dim}]")
    wanted = (batch, weight.shape[0] - 1, dim)
    if before.shape != wanted:
        raise ValueError(f"before {before.shape} must be {wanted}")
    if starts is not None and (starts.shape != x.shape[:2] or starts.dtype != jnp.bool_):
        raise ValueError(f"starts {starts.dtype}{starts.shape} must be bool{x.shape[:2]}")
    kernel = dispatch.kernel(implementation, interpret)
    if kernel and (reason := misfit(x.dtype, dim, weight.shape[0])) is not None:
        if implementation == "pallas" or interpret:
            raise ValueError(f'{reason}; use implementation="xla"')
        kernel = False
    if not kernel:
        return reference.short_convolution(x, weight, before, starts=starts, silu=silu)
    interpret = pltpu.InterpretParams() if interpret is True else interpret
    return tpu.convolve(tpu.Plan(silu, interpret), x, weight, before, starts)


def misfit(dtype: Any, channels: int, width: int) -> str | None:
    """Why the kernel does not take that dtype, channels of a device and taps; None = it does."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"the kernel takes float32 and bfloat16, not {jnp.dtype(dtype)}"
    if channels % dispatch.LANES:
        return f"{channels} channels do not fill registers of {dispatch.LANES}"
    if width - 1 > tpu.EDGE:
        return f"the kernel has up to {tpu.EDGE + 1} taps, not {width}"
    return None
