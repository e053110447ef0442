"""Documents inside packed rows: where each token stands in its own document."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.typing import Array, Bool, Int, PyTree


class Documents(NamedTuple):
    """Where the tokens of one call stand in their documents.

    Args:
        number: which document of the call a token belongs to; 0 is the one that the state carries.
        index: how many tokens of its document came before it, those of earlier calls included.
        last: the id of the last token, to carry on; unchanged where no ids were given.
        seen: tokens of the last document so far, to carry on.
    """

    number: Int[Array, "B T"]
    index: Int[Array, "B T"]
    last: Int[Array, "B"]
    seen: Int[Array, "B"]


def starts(segment_ids: Int[Array, "B T"], last: Int[Array, "B"]) -> Array:
    """Tells which tokens start a document.

    `starts[t] = segment_ids[t] != segment_ids[t - 1]`, with `last` before the first token.
    Ids are compared as int32, as states carry them.

    Args:
        segment_ids: [B, T], one id per token, at least 0: a call that ends on an id of -1 leaves
            a state that has seen nothing.
        last: [B], the id of the token before; -1 = nothing seen yet, which starts nothing.

    Returns:
        Bool [B, T].
    """
    segment_ids = segment_ids.astype(jnp.int32)
    first = (segment_ids[:, :1] != last[:, None]) & (last[:, None] != -1)
    return jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)


def follow(
    segment_ids: Int[Array, "B T"] | None,
    last: Int[Array, "B"],
    seen: Int[Array, "B"],
    time: int,
) -> Documents:
    """Places the next `time` tokens in their documents.

    `index[t] = 0` where a document starts, else `index[t - 1] + 1`, with `seen - 1` before the
    first token.

    Args:
        segment_ids: [B, T], or None: every token continues the document of the state.
        last: [B], the id of the token before the call; -1 = nothing seen yet.
        seen: [B], tokens of that document before the call.
        time: T.

    Returns:
        The `Documents` of these tokens.
    """
    steps = jnp.arange(time, dtype=jnp.int32)
    if segment_ids is None:
        index = seen[:, None] + steps
        return Documents(jnp.zeros_like(index), index, last, seen + time)
    new = starts(segment_ids, last)
    number = jnp.cumsum(new, axis=1, dtype=jnp.int32)
    index = steps - jax.lax.cummax(jnp.where(new, steps, -seen[:, None]), axis=1)
    return Documents(number, index, segment_ids[:, -1].astype(jnp.int32), index[:, -1] + 1)


def beside(mask: Bool[Array, "*N"], x: Array) -> Bool[Array, "*M"]:
    """A mask of rows, or of tokens, with axes of size 1 for what else x has behind them."""
    return mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))


def choose(mask: Bool[Array, "*N"], yes: PyTree, no: PyTree) -> PyTree:
    """`yes` where a mask of rows, or of tokens, says so, else `no`; dtypes are those of `no`."""

    def chosen(y, n):
        return jnp.where(beside(mask, n), y.astype(n.dtype), n)

    return jax.tree.map(chosen, yes, no)
