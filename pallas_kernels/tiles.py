"""What the tile functions are made of, for arrays [heads, C, .] of one tile in VMEM."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Which axes of a and b a product sums over: a b, a b^T, a^T b.
_CONTRACTED = {"nn": ((2,), (1,)), "nt": ((2,), (2,)), "tn": ((1,), (1,))}


def dot(a: jax.Array, b: jax.Array, kind: str, compute) -> jax.Array:
    """A product for each head: "nn" a b, "nt" a b^T, "tn" a^T b, summed in fp32.

    In 16-bit dtypes the operands, and in its derivative the cotangent too, are rounded to
    `compute`; in fp32 the product is exact to fp32.

    Args:
        a, b: [heads, ., .].
        kind: which of the three.
        compute: dtype of the operands.
    """
    return _dot(a, b, kind, jnp.dtype(compute))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot(a, b, kind, compute):
    wide = compute.itemsize > 2
    return lax.dot_general(
        a.astype(compute),
        b.astype(compute),
        (_CONTRACTED[kind], ((0,), (0,))),
        precision=lax.Precision.HIGHEST if wide else None,
        preferred_element_type=jnp.float32,
    )


def _dot_forward(a, b, kind, compute):
    return _dot(a, b, kind, compute), (a, b)


def _dot_backward(kind, compute, residuals, by):
    return _derivatives(functools.partial(dot, compute=compute), kind, *residuals, by)


def _derivatives(product, kind: str, a, b, by):
    """Cotangents of a and b, as products of the same sort."""
    if kind == "nn":
        return product(by, b, "nt"), product(a, by, "tn")
    if kind == "nt":
        return product(by, b, "nn"), product(by, a, "tn")
    return product(b, by, "nt"), product(a, by, "nn")


_dot.defvjp(_dot_forward, _dot_backward)


BANDS = 4  # rows of a block up to which it is multiplied diagonal by diagonal


def order(count: int) -> tuple[jax.Array, jax.Array]:
    """(row, column) numbers of [C, C]."""
    return tuple(lax.broadcasted_iota(jnp.int32, (count, count), axis) for axis in (0, 1))


def unit(x: jax.Array, eps: float | None) -> jax.Array:
    """`x / sqrt(||x||^2 + eps^2)` over the last axis; x where eps is None."""
    if eps is None:
        return x
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps**2)


def column(x: jax.Array) -> jax.Array:
    """[heads, C] along lanes as [heads, C, 1] along sublanes."""
    turned = jnp.swapaxes(x, 0, 1)
    return jnp.stack([turned[:, h : h + 1] for h in range(x.shape[0])])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def exact(a: jax.Array, b: jax.Array, kind: str) -> jax.Array:
    """`dot` to 16 bits of the operands' mantissas: three products of halves in bf16.

    Args:
        a, b: [heads, ., .] in fp32.
        kind: as for `dot`.
    """
    halves = []
    for x in (a, b):
        high = x.astype(jnp.bfloat16)
        halves.append((high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)))
    (a, a_low), (b, b_low) = halves

    def product(a, b):
        return _dot(a, b, kind, jnp.dtype(jnp.bfloat16))

    return product(a, b) + (product(a, b_low) + product(a_low, b))


def _exact_forward(a, b, kind):
    return exact(a, b, kind), (a, b)


def _exact_backward(kind, residuals, by):
    return _derivatives(exact, kind, *residuals, by)


exact.defvjp(_exact_forward, _exact_backward)


def solve(lower: jax.Array, inverse: jax.Array, right: jax.Array, compute) -> jax.Array:
    """`E = (I + A)^-1 R`, with the inverse at hand.

    Its derivative is `dR = (I + A)^-T dE` and `dA = -dR E^T`; the inverse has none of its own.

    Args:
        lower: A [heads, C, C], zeros above the diagonal, which is not read.
        inverse: `unit_lower_inverse(A)`.
        right: R [heads, C, V].
        compute: dtype of the operands.
    """
    return _solve(lower, lax.stop_gradient(inverse), right, jnp.dtype(compute))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _solve(lower, inverse, right, compute):
    return _dot(inverse, right, "nn", compute)


def _solve_forward(lower, inverse, right, compute):
    found = _dot(inverse, right, "nn", compute)
    return found, (inverse, found)


def _solve_backward(compute, residuals, by):
    inverse, found = residuals
    by_right = _dot(inverse, by, "tn", compute)
    row, col = order(found.shape[1])
    by_lower = jnp.where(row > col, -_dot(by_right, found, "nt", compute), 0.0)
    return by_lower, jnp.zeros_like(inverse), by_right


_solve.defvjp(_solve_forward, _solve_backward)


def unit_lower_inverse(lower: jax.Array, compute) -> jax.Array:
    """`(I + A)^-1`, by doubling blocks: of two neighbours with inverses P and Q, the block below
    the first is `-Q A_21 P`. No solve row by row, and no powers of A, which grow where the inverse
    does not. Not for derivatives, which `solve` has.

    Args:
        lower: A [heads, C, C], strictly lower triangular; C a power of two.
        compute: of what the inverse is for: below fp32 its products keep 16 bits.
    """
    count = lower.shape[-1]
    row, col = order(count)
    product = exact if jnp.dtype(compute).itemsize < 4 else functools.partial(dot, compute=compute)
    inverse = jnp.where(row == col, 1.0, jnp.where(row >> 1 == col >> 1, -lower, 0.0))
    for level in range(1, count.bit_length() - 1):
        size = 1 << level
        across = (row >> level + 1 == col >> level + 1) & (row >> level != col >> level)
        across = jnp.where(across, lower, 0.0)
        if size <= BANDS:
            inverse = inverse - _banded(inverse, across, size)
            continue
        # Only the rows of right blocks change: whole registers, as a block has 8 rows or more.
        pairs = inverse.reshape(-1, count // (2 * size), 2, size, count)
        right = pairs[:, :, 1].reshape(-1, count // 2, count)
        below = product(product(right, across, "nn"), inverse, "nn")
        right = (right - below).reshape(pairs[:, :, 1].shape)
        inverse = jnp.stack([pairs[:, :, 0], right], axis=2).reshape(lower.shape)
    return inverse


def _banded(inverse: jax.Array, across: jax.Array, size: int) -> jax.Array:
    """`T X T` for T of blocks of so few rows that its diagonals times shifted rows cost less than a
    product of matrices."""
    row, col = order(inverse.shape[-1])
    diagonals = [jnp.where(row - col == back, inverse, 0.0) for back in range(1, size)]
    found = across
    for back, diagonal in enumerate(diagonals, 1):
        weight = jnp.sum(diagonal, axis=2, keepdims=True)
        found = found + weight * jnp.roll(across, back, axis=1)
    result = found
    for back, diagonal in enumerate(diagonals, 1):
        weight = jnp.sum(diagonal, axis=1, keepdims=True)
        result = result + weight * jnp.roll(found, -back, axis=2)
    return result


def of_tile(tile: int, count: int):
    """Picks one of `count` tiles of every head: [heads * count, ...] -> [heads, ...]."""
    return lambda x: x.reshape(-1, count, *x.shape[1:])[:, tile]
