"""What is not finite stays in its document, for forms that go through several documents at once.

Their masks multiply, and 0 times what is not finite is not 0: it is taken out before, and put back
where it belongs.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from memjax.documents import beside
from memjax.miras.rule import Gates, Rule, State
from memjax.typing import Array, Bool, Float


def contained(
    go: Callable, rule: Rule, state: State, q: Array, k: Array, v: Array, gates: Gates,
    starts: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"] | None, State]:  # fmt: skip
    """`go(state, q, k, v, gates, starts)`: (y, loss or None, state).

    A token, or a state, that is not finite makes NaN of what its document's tokens answer from
    there on and of the state that they leave. What overflows on the way is not followed.

    Args:
        go: a call of a rule with closed form, or one that solves.
        rule: the memory.
        state: where it stands.
        q, k, v, gates: of the tokens.
        starts: which of them begin documents.
    """
    fields = [x for x in (k, v, gates.lr, gates.retain, gates.write) if x is not None]
    own = functools.reduce(jnp.logical_or, [_not_finite(x, 3) for x in fields])
    lost = functools.reduce(
        jnp.logical_or, [_not_finite(x, 2) for x in (*state.weights, *state.momentum)]
    )

    def clean(x, fill=0.0):
        return None if x is None else jnp.where(beside(own, x), jnp.asarray(fill, x.dtype), x)

    def emptied(arrays):
        return jax.tree.map(lambda x: jnp.where(beside(lost, x), 0, x), arrays)

    y, loss, after = go(
        state._replace(
            base=emptied(state.base),
            weights=emptied(state.weights),
            momentum=emptied(state.momentum),
        ),
        q,
        clean(k),
        clean(v),
        gates._replace(
            lr=clean(gates.lr), retain=clean(gates.retain, 1.0), write=clean(gates.write)
        ),
        starts,
    )

    index = jnp.arange(k.shape[1])[:, None]
    begun = jax.lax.cummax(jnp.where(starts[..., None], index, -1), axis=1)
    last = jax.lax.cummax(jnp.where(own, index, -1), axis=1)

    def reached(last):
        return (last >= jnp.maximum(begun, 0)) | ((begun < 0) & lost[:, None])

    here = reached(last)
    before = reached(jnp.pad(last[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=-1))

    def spoilt(rows, x):
        return jnp.where(beside(rows, x), jnp.asarray(jnp.nan, x.dtype), x)

    def left(arrays):
        return jax.tree.map(lambda x: spoilt(here[:, -1], x), arrays)

    y = spoilt(here if rule.read == "after" else before, y)
    loss = None if loss is None else spoilt(before | own, loss)
    after = after._replace(
        base=left(after.base), weights=left(after.weights), momentum=left(after.momentum)
    )
    return y, loss, after


def begun(state: State, starts: Bool[Array, "B T"]) -> State:
    """The state before a call, at W_0 by selection in rows whose first token begins a document.

    Kernels, and maps of states between devices, mask it by multiplication; so what is not finite
    stays in the calls of its document.
    """

    def rows(now, begin):
        return jax.tree.map(lambda x, x_0: jnp.where(beside(starts[:, 0], x), x_0, x), now, begin)

    weights = rows(state.weights, state.begin.weights)
    return state._replace(
        base=weights, weights=weights, momentum=rows(state.momentum, state.begin.momentum)
    )


def _not_finite(x: Array, axes: int) -> Bool[Array, "*N"]:
    """Whether anything is not finite in x, but for its first axes."""
    return ~jnp.all(jnp.isfinite(x), axis=tuple(range(axes, x.ndim)))
