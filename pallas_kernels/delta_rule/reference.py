"""The gated delta rule, token by token: what the kernel must equal."""

import jax
import jax.numpy as jnp


def delta_rule(
    q,
    k,
    v,
    lr,
    log_decay,
    state,
    *,
    initial=None,
    starts=None,
    decay_first=True,
    read="after",
    unit_eps=None,
):
    """`W_t = a_t W_{t-1} + lr_t k_t^T (v_t - k_t Z_t)`, `y_t = q_t W_t`; see `op.delta_rule`."""
    dtype, out = state.dtype, q.dtype
    if unit_eps is not None:
        q, k = (_unit(x.astype(dtype), unit_eps) for x in (q, k))
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
        kept = jnp.exp(log_decay)[..., None] * weights
        errors = v - jnp.einsum("bhk,bhkv->bhv", k, kept if decay_first else weights)
        new = kept + lr[..., None, None] * k[..., :, None] * errors[..., None, :]
        loss = 0.5 * jnp.sum(jnp.square(errors), axis=-1)
        return new, (jnp.einsum("bhk,bhkv->bhv", q, new if read == "after" else weights), loss)

    tokens = (*(x.astype(dtype) for x in (q, k, v, lr, log_decay)), starts)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    state, (y, loss) = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(y, 0, 1).astype(out), jnp.moveaxis(loss, 0, 1), state


def _unit(x, eps):
    return x / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + eps**2)
