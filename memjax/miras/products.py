"""Products of gates between two tokens of a chunk, as the dual and the closed form need them.

They are running products, not differences of logarithms: exact where a gate is 0, with an exact
derivative there, and to one rounding a factor elsewhere (the difference of two long sums of
logarithms loses more: at gates of 0.01 over 64 tokens 2e-5 in single precision).
"""

import functools

import jax
import jax.numpy as jnp

from memjax.miras.precision import matmul
from memjax.typing import Array, Bool, Float


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


def decayed_scores(
    x: Float[Array, "C K"],
    y: Float[Array, "C K"],
    gate: Float[Array, "C K"],
    inclusive: bool,
    compute: jnp.dtype,
) -> Float[Array, "C C"]:
    """`s[i, j] = sum_c x[i, c] P_c[i, j] y[j, c]` with channel-wise decay, j < i (and j = i).

    By doubling blocks: between two neighbours the decay is that to the end of the left one times
    that from the beginning of the right one, neither above 1, so their scores are one product of
    rows that have been scaled. Nothing of size C C K is formed, and no quotient of gates.

    Args:
        x, y: rows.
        gate: factors in [0, 1].
        inclusive: whether `P[i, j] = prod_{j < m <= i} gate_m`, or the same without m = i (then
            s[i, i] is not defined).
        compute: dtype of the operands of the products.
    Returns:
        [C, C]; zero above the diagonal.
    """
    count, channels = x.shape
    wide = 1 << (count - 1).bit_length()
    pad = ((0, wide - count), (0, 0))
    x, y = jnp.pad(x, pad), jnp.pad(y, pad)
    gate = jnp.pad(gate, pad, constant_values=1)
    scores = jnp.sum(x * y, axis=-1)[:, None, None]
    # Of each token, the decay from the beginning of its block and to the end of it; over the block.
    into = gate if inclusive else jnp.ones_like(gate)
    out, over = jnp.ones_like(gate), gate
    size = 1
    while size < wide:
        halves = (-1, 2, size, channels)
        x_right, y_left = x.reshape(halves)[:, 1], y.reshape(halves)[:, 0]
        into, out, over = into.reshape(halves), out.reshape(halves), over.reshape(-1, 2, channels)
        across = _scores(x_right * into[:, 1], y_left * out[:, 0], compute)
        left, right = scores[0::2], scores[1::2]
        top = jnp.concatenate([left, jnp.zeros_like(left)], axis=2)
        scores = jnp.concatenate([top, jnp.concatenate([across, right], axis=2)], axis=1)
        ones = jnp.ones_like(over[:, 0])
        into = into * jnp.stack([ones, over[:, 0]], axis=1)[:, :, None]
        out = out * jnp.stack([over[:, 1], ones], axis=1)[:, :, None]
        over = over[:, 0] * over[:, 1]
        size *= 2
    return scores[0, :count, :count]


def _scores(x: Float[Array, "N S K"], y: Float[Array, "N S K"], compute) -> Float[Array, "N S S"]:
    """Products of rows; of few rows as sums, which compile to plain loops."""
    if x.shape[1] <= 2:
        rounded = x.astype(compute).astype(x.dtype), y.astype(compute).astype(y.dtype)
        return jnp.sum(rounded[0][:, :, None] * rounded[1][:, None], axis=-1)
    return matmul(x, jnp.swapaxes(y, -1, -2), compute=compute)


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
