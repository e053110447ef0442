"""What is not finite stays in its document, for forms that go through several tokens at once.

Their masks multiply, and 0 times what is not finite is not 0: it is taken out before, and put back
where it belongs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.documents import beside, choose
from memjax.miras.rule import Gates, Rule, State
from memjax.typing import Array, Bool, Float, Int, PyTree

# What stands for a gate that is not finite.
NEUTRAL = Gates(lr=0.0, momentum=0.0, retain=1.0, scale=1.0, threshold=1.0, window=0.0, write=0.0)


def contained(
    go: Callable, rule: Rule, state: State, q: Array, k: Array, v: Array, gates: Gates,
    starts: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"] | None, State]:  # fmt: skip
    """`go(state, q, k, v, gates, starts)`: (y, loss or None, state).

    A token, or a state, that is not finite makes NaN of its document's weights from there on, and
    of the answers, losses and the state that come of those. What overflows on the way is not
    followed.

    Args:
        go: a call of a rule.
        rule: the memory.
        state: where it stands.
        q, k, v, gates: of the tokens.
        starts: which of them begin documents; None: none.
    """
    own = _bad((k, v, gates), 3)
    lost = _bad((state.weights, state.momentum, state.pairs), 2)
    lost_base = _bad(state.base, 2) if state.base else lost

    def cleared(mask, x, fill=0.0):
        return None if x is None else jnp.where(beside(mask, x), jnp.asarray(fill, x.dtype), x)

    begin, pairs = state.begin, state.pairs
    if pairs:
        k_0, v_0 = cleared(lost, pairs.k), cleared(lost, pairs.v)
        pairs = pairs._replace(k=k_0, v=v_0, threshold=cleared(lost, pairs.threshold, 1.0))
    clean = functools.partial(cleared, own)
    y, loss, after = go(
        state._replace(
            base=choose(lost_base, begin.weights, state.base) if state.base else (),
            weights=choose(lost, begin.weights, state.weights),
            momentum=choose(lost, begin.momentum, state.momentum),
            pairs=pairs,
        ),
        q,
        clean(k),
        clean(v),
        Gates(*map(clean, gates, NEUTRAL)),
        starts,
    )

    reach = _reach(rule, own, lost, lost_base, starts, state.place)
    read = {"after": reach.now, "before": reach.before, "chunk": reach.base}[rule.read]
    y = _spoilt(read[:, :-1], y)
    loss = None if loss is None else _spoilt(reach.base[:, :-1] | own, loss)
    left = functools.partial(_spoilt, reach.before[:, -1])
    after = after._replace(
        base=_spoilt(reach.base[:, -1], after.base),
        weights=left(after.weights),
        momentum=left(after.momentum),
        pairs=left(after.pairs),
    )
    return y, loss, after


class _Reach(NamedTuple):
    """Where weights come from what is not finite, for each token and for one after the last."""

    before: Bool[Array, "B N H"]  # W_{t-1}
    now: Bool[Array, "B N H"]  # W_t
    base: Bool[Array, "B N H"]  # W', as the token's chunk began


def _reach(
    rule: Rule,
    own: Bool[Array, "B T H"],
    lost: Bool[Array, "B H"],
    lost_base: Bool[Array, "B H"],
    starts: Bool[Array, "B T"] | None,
    place: Int[Array, " B"],
) -> _Reach:
    time = own.shape[1]
    index = jnp.arange(time + 1)
    if starts is None:
        starts = jnp.zeros(own.shape[:2], bool)
    starts = jnp.pad(starts, ((0, 0), (0, 1)))
    begun = jax.lax.cummax(jnp.where(starts, index, -1), axis=1)  # -1: before this call
    last = jax.lax.cummax(jnp.where(own, index[:-1, None], -1), axis=1)
    last = jnp.pad(last, ((0, 0), (1, 0), (0, 0)), constant_values=-1)  # of the tokens before
    carried = (begun < 0)[..., None]

    def until(end):
        """Whether weights after tokens 0 to end - 1 are reached, of the document of each token."""
        found = jnp.take_along_axis(last, jnp.maximum(end, 0)[..., None], axis=1)
        return (found >= jnp.maximum(begun, 0)[..., None]) | (carried & lost[:, None])

    before = until(jnp.broadcast_to(index, begun.shape))
    now = until(jnp.broadcast_to(jnp.minimum(index + 1, time), begun.shape))
    if rule.retention.first:
        return _Reach(before, now, now)  # W' decays with every token
    opened = index - jnp.where(begun < 0, place[:, None] + index, index - begun) % rule.chunk
    base = jnp.where((opened < 0)[..., None], lost_base[:, None], until(opened))
    return _Reach(before, now, base)


def _bad(tree: PyTree, axes: int) -> Bool[Array, "*N"]:
    """Whether anything is not finite in these arrays, but for their first axes."""
    arrays = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    bad = [~jnp.all(jnp.isfinite(x), axis=tuple(range(axes, x.ndim))) for x in arrays]
    return functools.reduce(jnp.logical_or, bad)


def _spoilt(mask: Bool[Array, "*N"], tree: PyTree) -> PyTree:
    """NaN where the mask says, in floating-point arrays."""

    def spoilt(x):
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.where(beside(mask, x), jnp.asarray(jnp.nan, x.dtype), x) if floating else x

    return jax.tree.map(spoilt, tree)


def begun(state: State, starts: Bool[Array, "B T"]) -> State:
    """The state before a call, at W_0 by selection in rows whose first token begins a document.

    Kernels, and maps of states between devices, mask it by multiplication; so what is not finite
    stays in the calls of its document.
    """

    weights = choose(starts[:, 0], state.begin.weights, state.weights)
    momentum = choose(starts[:, 0], state.begin.momentum, state.momentum)
    return state._replace(base=weights, weights=weights, momentum=momentum)
