"""Newton-Schulz orthogonalisation with the whole iteration in VMEM: several matrices a grid step.

With `X [I, J]`, I <= J (a taller matrix is turned when it is in VMEM, once on the way in and once
on the way out), and `A = X X^T`, `H = b A + c A A`, both symmetric:

    X' = a X + H X

and, for the cotangent G of X', with `S = G X^T + X G^T`:

    dX = a G + H G + (b S + c (A S + S A)) X

The backward kernel has x alone from the forward one: it iterates again, keeps X, A and H of every
step in VMEM as the operands that they are, and goes back through them. A product waits for the one
before it, so that matrix units are busy only if there are several matrices at once.
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
from pallas_kernels.newton_schulz.reference import COEFFICIENTS
from pallas_kernels.tiles import dot


class Plan(NamedTuple):
    """What a call does not differentiate by.

    Attributes:
        steps: iterations.
        kernel: whether to run the Pallas kernel, else `jax.lax.scan` over the same functions.
        interpret: False, or how Pallas interprets the kernel: `pltpu.InterpretParams()`.
    """

    steps: int
    kernel: bool
    interpret: Any = False


class Sizes(NamedTuple):
    """How a kernel cuts its work.

    Attributes:
        matrices: of a grid step.
        unroll: whether the iterations are one straight line of instructions.
    """

    matrices: int
    unroll: bool


def sizes(count: int, shape: tuple[int, int], steps: int) -> Sizes:
    return Sizes(min(count, 8), True)


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


def symmetric(x: jax.Array, compute) -> tuple[jax.Array, jax.Array]:
    """A and H of X [N, I, J], both [N, I, I]."""
    _, b, c = COEFFICIENTS
    gram = dot(x, x, "nt", compute)
    return gram, b * gram + c * dot(gram, gram, "nn", compute)


def iterate(x: jax.Array, polynomial: jax.Array, compute) -> jax.Array:
    """X' of X and its H."""
    return COEFFICIENTS[0] * x + dot(polynomial, x, "nn", compute)


def iterate_backward(by_next, x, gram, polynomial, compute) -> jax.Array:
    """The cotangent of X from that of X': four products."""
    a, b, c = COEFFICIENTS
    narrow = by_next.astype(compute)
    s = dot(narrow, x, "nt", compute)
    s += jnp.swapaxes(s, 1, 2)
    both = dot(gram, s, "nn", compute)
    by_gram = b * s + c * (both + jnp.swapaxes(both, 1, 2))
    return a * by_next + dot(polynomial, narrow, "nn", compute) + dot(by_gram, x, "nn", compute)


def _turned(x):
    return jnp.swapaxes(x, -1, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def orthogonal(plan: Plan, x: jax.Array) -> jax.Array:
    """Newton-Schulz of x [..., I, J], whose dtype the operands of products have."""
    return (_forward_call if plan.kernel else _forward_scan)(plan, x)


def _forward(plan, x):
    return orthogonal(plan, x), x


def _backward(plan, x, by):
    return ((_backward_call if plan.kernel else _backward_scan)(plan, x, by),)


orthogonal.defvjp(_forward, _backward)


def _turn(x, given):
    """X [., short, long] from x of the shape of the given matrices, and back."""
    return jnp.swapaxes(x, 1, 2) if given.shape[1] > given.shape[2] else x


def _scan(plan: Plan, given):
    """(X of every step, the last X), for x [N, I, J]."""
    x = given.astype(jnp.float32)

    def step(x, _):
        return iterate(x, symmetric(x, given.dtype)[1], given.dtype), x

    last, xs = lax.scan(step, _turn(x * scale(x), given), length=plan.steps)
    return xs, last


def _forward_scan(plan: Plan, x):
    given = x.reshape(-1, *x.shape[-2:])
    _, last = _scan(plan, given)
    return _turn(last, given).astype(x.dtype).reshape(x.shape)


def _backward_scan(plan: Plan, x, by):
    given, by = (x.reshape(-1, *x.shape[-2:]) for x in (x, by))
    xs, _ = _scan(plan, given)

    def back(by, x):
        return iterate_backward(by, x, *symmetric(x, given.dtype), given.dtype), None

    by, _ = lax.scan(back, _turn(by.astype(jnp.float32), given), xs, reverse=True)
    by = scale_backward(given.astype(jnp.float32), _turn(by, given))
    return by.astype(x.dtype).reshape(x.shape)


def _forward_call(plan: Plan, x):
    compute = x.dtype

    def kernel(cut, given, found, now):
        x = given[...].astype(jnp.float32)
        now[...] = _turn(x * scale(x), given)

        def step(_, __):
            x = now[...]
            now[...] = iterate(x, symmetric(x, compute)[1], compute)

        lax.fori_loop(0, plan.steps, step, None, unroll=cut.unroll)
        found[...] = _turn(now[...], given).astype(found.dtype)

    def scratch(whole, square):
        return (pltpu.VMEM(whole, jnp.float32),)

    return _call(plan, kernel, "newton_schulz", scratch, x)


def _backward_call(plan: Plan, x, by):
    compute = x.dtype

    def kernel(cut, given, by, found, now, by_now, xs, grams, polynomials):
        x = given[...].astype(jnp.float32)
        now[...] = _turn(x * scale(x), given)

        def keep(n):
            x = now[...]
            gram, polynomial = symmetric(x, compute)
            for kept, value in ((xs, x), (grams, gram), (polynomials, polynomial)):
                kept[n] = value.astype(compute)
            return x, polynomial

        def step(n, _):
            now[...] = iterate(*keep(n), compute)

        def back(n, _):
            n = plan.steps - 1 - n
            by_now[...] = iterate_backward(by_now[...], xs[n], grams[n], polynomials[n], compute)

        lax.fori_loop(0, plan.steps - 1, step, None, unroll=cut.unroll)
        keep(plan.steps - 1)
        by_now[...] = _turn(by[...].astype(jnp.float32), given)
        lax.fori_loop(0, plan.steps, back, None, unroll=cut.unroll)
        x = given[...].astype(jnp.float32)
        found[...] = scale_backward(x, _turn(by_now[...], given)).astype(found.dtype)

    def scratch(whole, square):
        kept = ((plan.steps, *shape) for shape in (whole, square, square))
        return (
            *(pltpu.VMEM(whole, jnp.float32) for _ in range(2)),
            *(pltpu.VMEM(shape, compute) for shape in kept),
        )

    return _call(plan, kernel, "newton_schulz_backward", scratch, x, by)


def _call(plan: Plan, kernel, name: str, scratch, *arrays):
    """Runs a kernel over [..., I, J], the axes of `vmap` among the leading ones."""

    @custom_vmap
    def run(*arrays):
        x, *_ = arrays
        count, shape = math.prod(x.shape[:-2]), x.shape[-2:]
        cut = sizes(count, shape, plan.steps)
        more = ((0, -count % cut.matrices), (0, 0), (0, 0))
        arrays = [jnp.pad(x.reshape(-1, *shape), more) for x in arrays]
        block = pl.BlockSpec((cut.matrices, *shape), lambda n: (n, 0, 0))
        short, long = sorted(shape)
        found = pl.pallas_call(
            functools.partial(kernel, cut),
            grid=(arrays[0].shape[0] // cut.matrices,),
            in_specs=[block] * len(arrays),
            out_specs=block,
            out_shape=jax.ShapeDtypeStruct(arrays[0].shape, x.dtype),
            scratch_shapes=scratch((cut.matrices, short, long), (cut.matrices, short, short)),
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
