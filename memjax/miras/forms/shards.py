"""A sequence whose time axis is split over devices, for memories whose update is affine.

Over the tokens of one device such a memory maps what it begins with to `W' = M W + N`. Each device
finds its M and N by itself, by going through its tokens from the identity without values and from
zero with them; all are gathered, `K (K + V)` numbers a head from each device, and give every device
the weights that it begins with. Tokens stay where they are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from memjax import documents
from memjax.miras.forms import isolation
from memjax.miras.rule import Begin, State
from memjax.typing import Array

AXIS = "sequence"  # of the mesh


def run(
    go: Callable, state: State, q: Array, k: Array, v: Array, gates, segment_ids: Array | None
) -> tuple[Array, Array | None, State]:
    """`go(state, q, k, v, gates, starts)` on each device's tokens, inside `jax.shard_map`.

    Args:
        go: an affine rule's call: (y, loss or None, state).
        state: before the first token of all.
        q, k, v, gates, segment_ids: of this device's tokens.
    Returns:
        (y and loss of these tokens, the state after the last token of all).
    """
    starts, last = None, state.segment
    if segment_ids is not None:
        ends = jax.lax.all_gather(segment_ids[:, jnp.array([0, -1])], AXIS)
        ids = ends[:, :, 1].astype(state.segment.dtype)
        before = jnp.concatenate([state.segment[None], ids[:-1]])
        starts = documents.starts(segment_ids, before[jax.lax.axis_index(AXIS)])
        state = isolation.begun(state, documents.starts(ends[0, :, :1], state.segment))
        last = ids[-1]
    (weights,), (begin,) = state.weights, state.begin.weights
    size, dtype = weights.shape[-2], weights.dtype

    def end(start, begin, v):
        start, begin = start.astype(dtype), begin.astype(dtype)
        from_here = state._replace(
            base=(start,), weights=(start,), begin=Begin((begin,), state.begin.momentum)
        )
        return go(from_here, q, k, v, gates, starts)[2].weights[0]

    whole = jnp.broadcast_to(jnp.eye(size), (*weights.shape[:2], size, size))
    nothing = jnp.zeros((*v.shape[:3], size), v.dtype)
    maps = end(whole, jnp.zeros((begin.shape[0], size, size)), nothing)
    sums = end(jnp.zeros_like(weights), begin, v)
    maps, sums = (jax.lax.all_gather(x, AXIS) for x in (maps, sums))

    def after(weights, device):
        exact = jax.lax.Precision.HIGHEST
        return jnp.matmul(device[0], weights, precision=exact) + device[1], weights

    final, begins = jax.lax.scan(after, weights, (maps, sums))
    start = begins[jax.lax.axis_index(AXIS)]
    y, loss, state_here = go(
        state._replace(base=(start,), weights=(start,)), q, k, v, gates, starts
    )  # fmt: skip
    state = state_here._replace(base=(final,), weights=(final,), segment=last)
    return y, loss, state
