"""Newton-Schulz orthogonalisation with the whole iteration in VMEM: several matrices a grid step.

With `X [I, J]`, I <= J (a taller matrix is turned when it is in VMEM, once on the way in and once
on the way out), and `A = X X^T`, `H = b A + c A A`, both symmetric:

    X' = a X + H X

and, for the cotangent G of X', with `S = G X^T + X G^T`:

    dX = a G + H G + (b S + c (A S + S A)) X

The backward kernel has x alone from the forward one: it iterates again, keeps X, A and H of every
step in VMEM as the operands that they are, and goes back through them.

A product waits for the one before it, so that matrix units are busy only if there are several
matrices at once. Matrices of fewer columns than a register has lanes go side by side, `[X1 | X2]`,
and their products are those with block diagonals: `[A1 | A2] diag(B1, B2) = [A1 B1 | A2 B2]`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import sequence
from pallas_kernels.dispatch import LANES
from pallas_kernels.newton_schulz.reference import COEFFICIENTS
from pallas_kernels.tiles import dot


class Plan(NamedTuple):
    """What a call does not differentiate by.

    Attributes:
        steps: iterations.
        compute: dtype of the operands of products.
        kernel: whether to run the Pallas kernel, else `jax.lax.scan` over the same functions.
        interpret: False, or how Pallas interprets the kernel: `pltpu.InterpretParams()`.
    """

    steps: int
    compute: Any
    kernel: bool
    interpret: Any = False


class Sizes(NamedTuple):
    """How a kernel cuts its work.

    Attributes:
        matrices: of a grid step, a multiple of `together`.
        together: matrices side by side.
        unroll: whether the iterations are one straight line of instructions.
    """

    matrices: int
    together: int
    unroll: bool


ROWS = 1024  # of all matrices of a step, that keep the matrix units busy: for 16-bit operands
LINE = 16_000  # cycles up to which the forward kernel is one straight line; the backward has twice


def sizes(count: int, shape: tuple[int, int], dtype, compute, steps: int) -> Sizes:
    """As many matrices a step as keep the matrix units of a chip busy, in steps of equal size.

    From schedules compiled for v5p: between iterations of a loop the units run empty, for some 300
    to 700 cycles; what is short enough is unrolled.
    """
    short, long = sorted(shape)
    blocks = -(-short // LANES)
    passes = 6 if jnp.dtype(compute).itemsize > 2 else 1  # of the matrix unit: fp32 takes six
    together = LANES // long if short % 16 == 0 and LANES % long == 0 else 1
    most = ROWS // (max(short, 16) * blocks)
    most = (most if together == 1 else 2 * most) // (1 if passes == 1 else 4)
    most = max(min(most, sequence.VMEM // 2 // room(shape, dtype, compute, steps)), 1)
    matrices = -(-count // -(-count // most))
    matrices = -(-matrices // together) * together
    cycles = 32 * passes * short * blocks * (2 * -(-long // LANES) + blocks) / LANES
    return Sizes(matrices, together, steps * matrices * cycles <= LINE)


def room(shape: tuple[int, int], dtype, compute, steps: int) -> int:
    """Bytes of VMEM that the backward kernel wants for a matrix, about."""
    size = jnp.dtype(compute).itemsize
    short, long = sorted(shape)
    given, whole, square = (
        -(-rows // 16) * 16 * -(-columns // LANES) * LANES
        for rows, columns in (shape, (short, long), (short, short))
    )
    spilled = 32 if size > 2 else 8  # a product in fp32 splits its operands
    windows = 3 * 2 * jnp.dtype(dtype).itemsize * given
    return windows + (8 + steps * size + spilled) * whole + (2 * steps * size + spilled) * square


class Work(NamedTuple):
    """How products are made.

    Attributes:
        compute: dtype of their operands.
        together: matrices side by side: X is [N / together, I, together * J].
    """

    compute: Any
    together: int = 1


def _product(a, b, kind, work: Work):
    """`tiles.dot` of every matrix of a with its own of b."""
    b, count = b.astype(work.compute), work.together
    if count > 1:
        size = b.shape[2] // count
        lane = lax.broadcasted_iota(jnp.int32, b.shape, 2)
        places = [(lane >= n * size) & (lane < (n + 1) * size) for n in range(count)]
        b = jnp.concatenate([jnp.where(at, b, jnp.zeros_like(b)) for at in places], axis=1)
    return dot(a, b, kind, work.compute)


def _product_and_transposed(a, b, kind, work: Work):
    """`P + P^T` of a product P that is P^T with a and b exchanged: `a b^T`, or `a b` of symmetric
    ones. To turn P is cheaper than a second product, but not where matrices are side by side."""
    found = _product(a, b, kind, work)
    if work.together > 1:
        return found + _product(b, a, kind, work)
    return found + jnp.swapaxes(found, 1, 2)


def scale(x: jax.Array) -> jax.Array:
    """`1 / ||x||_F` of every matrix [N, 1, 1], and 0 of one that is 0."""
    square = jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True)
    tiny = jnp.finfo(x.dtype).tiny
    return jnp.where(square > tiny, 1 / jnp.sqrt(jnp.maximum(square, tiny)), 0.0)


def scale_backward(x: jax.Array, by_unit: jax.Array) -> jax.Array:
    """The cotangent of x from that of `scale(x) x`."""
    size = scale(x)
    unit = x * size
    return size * (by_unit - unit * jnp.sum(unit * by_unit, axis=(1, 2), keepdims=True))


def symmetric(x: jax.Array, work: Work) -> tuple[jax.Array, jax.Array]:
    """A and H of X."""
    _, b, c = COEFFICIENTS
    gram = _product(x, x, "nt", work)
    return gram, b * gram + c * _product(gram, gram, "nn", work)


def iterate(x: jax.Array, polynomial: jax.Array, work: Work) -> jax.Array:
    """X' of X and its H."""
    return COEFFICIENTS[0] * x + _product(polynomial, x, "nn", work)


def iterate_backward(by_next, x, gram, polynomial, work: Work) -> jax.Array:
    """The cotangent of X from that of X'."""
    a, b, c = COEFFICIENTS
    narrow = by_next.astype(work.compute)
    s = _product_and_transposed(narrow, x, "nt", work)
    by_gram = b * s + c * _product_and_transposed(gram, s, "nn", work)
    by_x = a * by_next + _product(polynomial, narrow, "nn", work)
    return by_x + _product(by_gram, x, "nn", work)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def orthogonal(plan: Plan, x: jax.Array) -> jax.Array:
    """Newton-Schulz of x [..., I, J]."""
    return (_forward_call if plan.kernel else _forward_scan)(plan, x)


def _forward(plan, x):
    return orthogonal(plan, x), x


def _backward(plan, x, by):
    return ((_backward_call if plan.kernel else _backward_scan)(plan, x, by),)


orthogonal.defvjp(_forward, _backward)


def _enter(x, shape, together: int = 1):
    """X from x [N, *shape]: its rows the shorter axis, matrices side by side."""
    x = jnp.swapaxes(x, 1, 2) if shape[0] > shape[1] else x
    return x if together == 1 else jnp.concatenate(jnp.split(x, together, axis=0), axis=2)


def _leave(x, shape, together: int = 1):
    """The reverse of `_enter`."""
    x = x if together == 1 else jnp.concatenate(jnp.split(x, together, axis=2), axis=0)
    return jnp.swapaxes(x, 1, 2) if shape[0] > shape[1] else x


def _scan(plan: Plan, x, work: Work):
    """(X of every step, the last X), for x [N, I, J]."""

    def step(x, _):
        return iterate(x, symmetric(x, work)[1], work), x

    last, xs = lax.scan(step, _enter(x * scale(x), x.shape[1:]), length=plan.steps)
    return xs, last


def _forward_scan(plan: Plan, given):
    shape = given.shape[-2:]
    x = given.reshape(-1, *shape).astype(jnp.float32)
    _, last = _scan(plan, x, Work(plan.compute))
    return _leave(last, shape).astype(given.dtype).reshape(given.shape)


def _backward_scan(plan: Plan, given, by):
    shape, work = given.shape[-2:], Work(plan.compute)
    x, by = (x.reshape(-1, *shape).astype(jnp.float32) for x in (given, by))
    xs, _ = _scan(plan, x, work)

    def back(by, x):
        return iterate_backward(by, x, *symmetric(x, work), work), None

    by, _ = lax.scan(back, _enter(by, shape), xs, reverse=True)
    return scale_backward(x, _leave(by, shape)).astype(given.dtype).reshape(given.shape)


def _forward_call(plan: Plan, x):
    shape = x.shape[-2:]

    def kernel(cut, given, found, now):
        work = Work(plan.compute, cut.together)
        x = given[...].astype(jnp.float32)
        now[...] = _enter(x * scale(x), shape, cut.together)

        def step(_, __):
            x = now[...]
            now[...] = iterate(x, symmetric(x, work)[1], work)

        lax.fori_loop(0, plan.steps, step, None, unroll=cut.unroll)
        found[...] = _leave(now[...], shape, cut.together).astype(found.dtype)

    def scratch(whole, square):
        return (pltpu.VMEM(whole, jnp.float32),)

    return _call(plan, kernel, "newton_schulz", scratch, x)


def _backward_call(plan: Plan, x, by):
    shape, compute = x.shape[-2:], plan.compute

    def kernel(cut, given, by, found, now, by_now, xs, grams, polynomials):
        work = Work(compute, cut.together)
        x = given[...].astype(jnp.float32)
        now[...] = _enter(x * scale(x), shape, cut.together)

        def keep(n):
            x = now[...]
            gram, polynomial = symmetric(x, work)
            for kept, value in ((xs, x), (grams, gram), (polynomials, polynomial)):
                kept[n] = value.astype(compute)
            return x, polynomial

        def step(n, _):
            now[...] = iterate(*keep(n), work)

        def back(n, _):
            n = plan.steps - 1 - n
            by_now[...] = iterate_backward(by_now[...], xs[n], grams[n], polynomials[n], work)

        lax.fori_loop(0, plan.steps - 1, step, None, unroll=cut.unroll)
        keep(plan.steps - 1)
        by_now[...] = _enter(by[...].astype(jnp.float32), shape, cut.together)
        lax.fori_loop(0, plan.steps, back, None, unroll=cut.unroll)
        x, by_unit = given[...].astype(jnp.float32), _leave(by_now[...], shape, cut.together)
        found[...] = scale_backward(x, by_unit).astype(found.dtype)

    def scratch(whole, square):
        kept = ((plan.steps, *one) for one in (whole, square, square))
        return (
            *(pltpu.VMEM(whole, jnp.float32) for _ in range(2)),
            *(pltpu.VMEM(one, compute) for one in kept),
        )

    return _call(plan, kernel, "newton_schulz_backward", scratch, x, by)


def _call(plan: Plan, kernel, name: str, scratch, *arrays):
    """Runs a kernel over [..., I, J], the axes of `vmap` among the leading ones."""

    @custom_vmap
    def run(*arrays):
        x, *_ = arrays
        count, shape = math.prod(x.shape[:-2]), x.shape[-2:]
        cut = sizes(count, shape, x.dtype, plan.compute, plan.steps)
        more = ((0, -count % cut.matrices), (0, 0), (0, 0))
        arrays = [jnp.pad(x.reshape(-1, *shape), more) for x in arrays]
        block = pl.BlockSpec((cut.matrices, *shape), lambda n: (n, 0, 0))
        short, long = sorted(shape)
        packed = cut.matrices // cut.together, short
        found = pl.pallas_call(
            functools.partial(kernel, cut),
            grid=(arrays[0].shape[0] // cut.matrices,),
            in_specs=[block] * len(arrays),
            out_specs=block,
            out_shape=jax.ShapeDtypeStruct(arrays[0].shape, x.dtype),
            scratch_shapes=scratch((*packed, cut.together * long), (*packed, cut.together * short)),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",), vmem_limit_bytes=sequence.VMEM
            ),
            interpret=plan.interpret,
            name=name,
        )(*arrays)
        return found[:count].reshape(x.shape)

    @run.def_vmap
    def _(size, mapped, *arrays):
        arrays = (
            x if has else jnp.broadcast_to(x, (size, *x.shape))
            for x, has in zip(arrays, mapped, strict=True)
        )
        return run(*arrays), True

    return run(*arrays)
