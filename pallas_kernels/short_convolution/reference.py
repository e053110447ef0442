"""The convolution as a sum of shifted inputs: what the kernel must equal, and what XLA runs."""

import jax
import jax.numpy as jnp


def short_convolution(x, weight, before, *, starts=None, silu=False):
    """`y_t = act(sum_s weight_s x_{t-s})` over the tokens of a document; see `op`."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    time, past = x.shape[1], weight.shape[0] - 1
    weight, before = weight.astype(wide), before.astype(wide)
    number = None if starts is None else jnp.cumsum(starts, axis=1, dtype=jnp.int32)

    def back(z, steps, fill):
        """Each token's z of so many steps earlier, `fill` before the call."""
        pad = [(0, 0), (min(steps, time), 0)] + [(0, 0)] * (z.ndim - 2)
        return jnp.pad(z[:, : max(time - steps, 0)], pad, constant_values=fill)

    # Shifted as it comes, and the few tokens that see `before` apart: no wide copy of x.
    y = weight[0] * x.astype(wide)
    early = jnp.zeros((x.shape[0], min(past, time), x.shape[2]), wide)
    for s in range(1, past + 1):
        term, seen = back(x, s, 0).astype(wide), before[:, past - s : past - s + time]
        if number is not None:
            term = jnp.where((back(number, s, -1) == number)[..., None], term, 0)
            seen = jnp.where((number[:, : seen.shape[1]] == 0)[..., None], seen, 0)
        y += weight[s] * term
        early = early.at[:, : seen.shape[1]].add(weight[s] * seen)
    y += jnp.pad(early, ((0, 0), (0, time - early.shape[1]), (0, 0)))
    return (jax.nn.silu(y) if silu else y).astype(x.dtype)
