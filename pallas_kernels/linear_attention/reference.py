"""Decayed linear attention, token by token: what the kernel must equal."""

import jax
import jax.numpy as jnp


def linear_attention(q, k, v, lr, log_decay, state, *, initial=None, starts=None, read="after"):
    """`W_t = a_t W_{t-1} + lr_t k_t^T v_t`, `y_t = q_t W_t`; see `op.linear_attention`."""
    dtype = state.dtype
    if initial is None:
        initial = jnp.zeros(state.shape[1:], dtype)
    if starts is None:
        starts = jnp.zeros(q.shape[:2], bool)
    if log_decay is None:
        log_decay = jnp.zeros(q.shape[:3], dtype)
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]

    def step(weights, token):
        q, k, v, lr, log_decay, start = token
        weights = jnp.where(start[:, None, None, None], initial, weights)
        new = jnp.exp(log_decay)[..., None] * weights
        new = new + lr[..., None, None] * k[..., :, None] * v[..., None, :]
        return new, jnp.einsum("bhk,bhkv->bhv", q, new if read == "after" else weights)

    tokens = (*(x.astype(dtype) for x in (q, k, v, lr, log_decay)), starts)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    state, y = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(y, 0, 1).astype(q.dtype), state
