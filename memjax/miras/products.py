"""Products of gates between two tokens of a chunk, as the dual and the closed form need them.

They are running products, not differences of logarithms: exact where a gate is 0, with an exact
derivative there, and to one rounding a factor elsewhere (the difference of two long sums of
logarithms loses more: at gates of 0.01 over 64 tokens 2e-5 in single precision).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax.miras.precision import matmul
from memjax.typing import Array, Bool, Float, Int


def segment_products(gate: Float[Array, "C *K"], same: Bool[Array, "C C"]) -> Float[Array, "..."]:
    """`P[i, j] = prod_{j < m <= i} gate_m` for j <= i in one document, else 0.

    Args:
        gate: [C] or channel-wise [C, K].
        same: same[i, j] where i and j belong to one document.
    Returns:
        [C, C] or [C, C, K], lower triangular.
    """
    chunk = gate.shape[0]
    block, wide = 1, 1 << (chunk - 1).bit_length()
    gate = jnp.pad(gate, [(0, wide - chunk)] + [(0, 0)] * (gate.ndim - 1), constant_values=1)
    products = jnp.ones((wide, 1, 1, *gate.shape[1:]), gate.dtype)
    while block < wide:
        # Of two neighbouring blocks, a path from the left to the right is one that ends the left,
        # the right's first gate, and one that begins the right.
        left, right = products[0::2], products[1::2]
        enter = gate[block :: 2 * block][:, None] * right[:, :, 0]
        across = enter[:, :, None] * left[:, -1, None, :]
        above = jnp.concatenate([left, jnp.zeros_like(left)], axis=2)
        products = jnp.concatenate([above, jnp.concatenate([across, right], axis=2)], axis=1)
        block *= 2
    products = products[0, :chunk, :chunk]
    return jnp.where(same[(...,) + (None,) * (gate.ndim - 1)], products, 0)


def prefix_products(
    between: Float[Array, "..."], gate: Float[Array, "C *K"], first: Bool[Array, " C"]
) -> Float[Array, "C *K"]:
    """`p_i = prod gate_m` over the tokens m <= i of i's document, from `segment_products`."""
    return jnp.einsum("ij...,j...->i...", between, gate * first.reshape(-1, *[1] * (gate.ndim - 1)))


def restarting_products(gate: Float[Array, "C *K"], first: Bool[Array, " C"]) -> Array:
    """`p_i = prod gate_m` over the tokens m <= i of i's document, in log2(C) passes.

    Args:
        gate: [C] or [C, K].
        first: the first token of each document, token 0 among them.
    """

    def join(left, right):
        (a, cut), (b, again) = left, right
        keep = again.reshape(-1, *[1] * (b.ndim - 1))
        return jnp.where(keep, b, a * b), cut | again

    return jax.lax.associative_scan(join, (gate, first))[0]


def following_products(gate: Float[Array, "C *K"]) -> Float[Array, "C *K"]:
    """`s_j = prod_{m > j} gate_m`: what the tokens behind j leave of what it wrote."""
    after = jnp.concatenate([gate[1:], jnp.ones_like(gate[:1])])
    return jax.lax.associative_scan(jnp.multiply, after, reverse=True)


class Decayed(NamedTuple):
    """Rows x and y of a tile under decay, for M sets of x and L of y (arrays or sequences of them).

    With `P[i, j] = prod_{j < m <= i} gate_m` (where not inclusive, without m = i) for each channel
    c, and `P[i, 0]` from the beginning of the tile, or of i's document in it:

    Attributes:
        scores: `sum_c x[i, c] P_c[i, j] y[j, c]` for j < i, and j = i where inclusive, in one
            document; what stands elsewhere is not defined.
        reads: `x[i] P[i, 0]`.
        writes: `P[C, j] y[j]`, C the last token, for j in its document; elsewhere not defined.
        kept: `P[C, 0]`.
    """

    scores: Float[Array, "L M C C"]
    reads: Float[Array, "M C K"]
    writes: Float[Array, "L C K"]
    kept: Float[Array, " K"]


def decayed(
    x: Sequence[Float[Array, "C K"]],
    y: Sequence[Float[Array, "C K"]],
    gate: Float[Array, "C K"],
    inclusive: Sequence[bool],
    document: Int[Array, " C"],
    compute: jnp.dtype,
) -> Decayed:
    """All that a tile with channel-wise decay needs, see `Decayed`.

    By doubling blocks: between two neighbours the decay is that to the end of the left one times
    that from the beginning of the right one, neither above 1, so their scores are one product of
    rows that have been scaled. Nothing of size C C K is formed, and no quotient of gates.

    Args:
        x, y: sets of rows.
        gate: factors in [0, 1].
        inclusive: one for each set of x.
        document: number of each token's document.
        compute: dtype of the operands of the products.
    """
    count = gate.shape[0]
    more = (1 << (count - 1).bit_length()) - count
    own = jnp.stack([jnp.stack([jnp.sum(a * b, axis=-1) for a in x]) for b in y])
    x = jnp.stack([gate * a if last else a for a, last in zip(x, inclusive, strict=True)], axis=1)
    x, y = (jnp.pad(z, ((0, more), (0, 0), (0, 0))) for z in (x, jnp.stack(y, axis=1)))
    gate = jnp.pad(gate, ((0, more), (0, 0)), constant_values=1)
    document = jnp.pad(document, (0, more), mode="edge")
    scores, reads, writes, kept = _decayed(x, y, gate, document, compute)
    scores = jnp.transpose(scores[:count, :, :count], (3, 1, 0, 2))
    scores = jnp.where(jnp.eye(count, dtype=bool), own[..., None], scores)
    reads, writes = (jnp.moveaxis(z[:count], 1, 0) for z in (reads, writes))
    return Decayed(scores, reads, writes, kept)


class _Pairs(NamedTuple):
    """Blocks of 1, 2, 4, ... tokens in pairs, a right one after a left one.

    x is scaled by the gates from the beginning of its block, or of its document there, to the token
    before; y by those behind the token to the end of its block, but for a document that ends there.
    """

    x: Float[Array, "N S M K"]  # of the right one
    y: Float[Array, "N S L K"]  # of the left one
    over: Float[Array, "N 2 1 1 K"]  # product over each, from the last start of a document in it
    same: Bool[Array, "N S 1 1"]  # whether tokens of the right are of the left's last document


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _decayed(
    x: Float[Array, "C M K"],
    y: Float[Array, "C L K"],
    gate: Float[Array, "C K"],
    document: Int[Array, " C"],
    compute: jnp.dtype,
) -> tuple[Array, Array, Array, Array]:
    """(scores [C, M, C, L], reads, writes, kept) for C a power of two, all not inclusive.

    The derivative is written out: one by the rules pads the halves of every level to wholes, and
    sums them up in loops over all levels at once, which takes several times as long.
    """
    levels, reads, writes, kept = _levels(x, y, gate, document)
    scores = jnp.zeros((x.shape[0], 1, x.shape[1], 1, y.shape[1]), x.dtype)
    for pair in levels:
        across = matmul(_rows(pair.x), jnp.swapaxes(_rows(pair.y), 1, 2), compute=compute)
        across = across.reshape(*pair.x.shape[:3], *pair.y.shape[1:3])
        left, right = scores[0::2], scores[1::2]
        top = jnp.concatenate([left, jnp.zeros_like(left)], axis=3)
        below = jnp.concatenate([across, right], axis=3)
        scores = jnp.concatenate([top, below], axis=1)
    return scores[0], reads, writes, kept


def _levels(x, y, gate, document) -> tuple[list[_Pairs], Array, Array, Array]:
    """Every level of blocks, and x, y and the product of gates over the whole."""
    levels, size, over, shapes = [], 1, gate, (x.shape, y.shape)
    while size < gate.shape[0]:
        x, y = (z.reshape(-1, 2, size, *z.shape[-2:]) for z in (x, y))
        over = over.reshape(-1, 2, 1, 1, over.shape[-1])
        number = document.reshape(-1, 2, size, 1, 1)
        same = number[:, 1] == number[:, 0, -1:]
        levels.append(_Pairs(x[:, 1], y[:, 0], over, same))
        # Whole blocks times 1 or the other's product: no halves to put together.
        right = jnp.arange(2)[:, None, None, None] == 1
        x = x * jnp.where(right & same[:, None], over[:, :1], 1)
        y = y * jnp.where(right, 1, over[:, 1:])
        over = over[:, 1] * jnp.where(same[:, -1:], over[:, 0], 1)
        size *= 2
    x, y = (z.reshape(shape) for z, shape in zip((x, y), shapes, strict=True))
    return levels, x, y, over.reshape(-1)


def _rows(x: Float[Array, "N S M K"]) -> Float[Array, "N S*M K"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _decayed_forward(x, y, gate, document, compute):
    return _decayed(x, y, gate, document, compute), (x, y, gate, document)


def _decayed_backward(compute, residuals, cotangents):
    x, y, gate, document = residuals
    # From the whole to its halves: by x, y and over as each level has scaled them.
    by_scores, by_x, by_y, by_over = (z[None] for z in cotangents)
    for pair in reversed(_levels(x, y, gate, document)[0]):
        pairs, size, sets, _ = pair.x.shape
        across = by_scores[:, size:, :, :size].reshape(pairs, size * sets, -1)
        halves = by_scores[:, :size, :, :size], by_scores[:, size:, :, size:]
        by_scores = jnp.stack(halves, axis=1).reshape(-1, *halves[0].shape[1:])
        by_x, by_y = (z.reshape(pairs, 2, size, *z.shape[-2:]) for z in (by_x, by_y))
        by_over = by_over.reshape(pairs, 1, 1, -1)
        left, right = pair.over[:, 0], pair.over[:, 1]
        into = jnp.where(pair.same, left, 1)
        by_left = jnp.sum(jnp.where(pair.same, by_x[:, 1] * pair.x, 0), (1, 2), keepdims=True)
        by_left += jnp.where(pair.same[:, -1:], by_over * right, 0)
        by_right = jnp.sum(by_y[:, 0] * pair.y, axis=(1, 2), keepdims=True)
        by_right += by_over * into[:, -1:]
        by_over = jnp.stack([by_left, by_right], axis=1)
        found = matmul(across, _rows(pair.y), compute=compute).reshape(pair.x.shape)
        by_x = jnp.stack([by_x[:, 0], by_x[:, 1] * into + found], axis=1)
        found = matmul(jnp.swapaxes(across, 1, 2), _rows(pair.x), compute=compute)
        by_y = jnp.stack([by_y[:, 0] * right + found.reshape(pair.y.shape), by_y[:, 1]], axis=1)
    return by_x.reshape(x.shape), by_y.reshape(y.shape), by_over.reshape(gate.shape), None


_decayed.defvjp(_decayed_forward, _decayed_backward)


@jax.custom_vjp
def unit_lower_inverse(lower: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """`(I + A)^-1` for a strictly lower triangular A, by doubling blocks.

    Of two neighbouring blocks with inverses P and Q and what is below the first, `-Q A_21 P` is the
    inverse's: log2(C) rounds of products, no solve row by row, and no powers of A, which grow where
    the inverse does not.
    """
    count = lower.shape[0]
    wide = 1 << (count - 1).bit_length()
    lower = jnp.pad(lower, ((0, wide - count),) * 2)
    inverse = jnp.ones((wide, 1, 1), lower.dtype)
    size = 1
    while size < wide:
        pairs = wide // (2 * size)
        blocks = lower.reshape(pairs, 2, size, pairs, 2, size)
        below = jnp.moveaxis(jnp.diagonal(blocks[:, 1, :, :, 0], axis1=0, axis2=2), -1, 0)
        left, right = inverse[0::2], inverse[1::2]
        across = -_product(_product(right, below), left)
        top = jnp.concatenate([left, jnp.zeros_like(left)], axis=2)
        inverse = jnp.concatenate([top, jnp.concatenate([across, right], axis=2)], axis=1)
        size *= 2
    return inverse[0, :count, :count]


def _product(a: Float[Array, "N S S"], b: Float[Array, "N S S"]) -> Float[Array, "N S S"]:
    """Batched products at full precision; tiny ones as sums, which compile to plain loops."""
    if a.shape[-1] <= 4:
        return sum(a[:, :, m, None] * b[:, None, m, :] for m in range(a.shape[-1]))
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _inverse_forward(lower):
    inverse = unit_lower_inverse(lower)
    return inverse, inverse


def _inverse_backward(inverse, cotangent):
    # d(I + A)^-1 = -(I + A)^-1 dA (I + A)^-1
    turned = inverse.T
    full = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return (-jnp.tril(full(full(turned, cotangent), turned), -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)
