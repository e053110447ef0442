"""The convolution in strips of rows that stay in registers: x is read once for all taps.

The grid is (rows, blocks of channels, blocks of tokens). A block reads its own tokens, and beside
them `EDGE` rows of the tokens before it; the backward kernel also reads as many of those after it,
with their cotangents. So no step waits for another. Inside a block a loop goes over strips of
`STRIP` rows: shifting by a tap is moving rows between registers. With `z` the sum of the taps and
`d = dy act'(z)`:

    dx_t = sum_s w_s d_{t+s}            dw_s = sum_t d_t x_{t-s}

both over tokens of one document. The backward kernel goes through its strips from the last to the
first, since dx waits for d of later tokens, and adds up dw on its way, eight rows of partial sums
for each tap. `since`, the tokens since a document's start, at most `EDGE`, tells what a tap sees.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import sequence
from pallas_kernels.dispatch import LANES
from pallas_kernels.short_convolution import reference

EDGE = 8  # rows of a register: the most taps that a token sees before its own
STRIP = 16  # rows of a register of 16-bit numbers
BLOCK = 512  # tokens of a step
CHANNELS = 512  # channels of a step, at most


class Plan(NamedTuple):
    """What a call does not differentiate by.

    Attributes:
        silu: the activation, else none.
        interpret: False, or how Pallas interprets the kernel: `pltpu.InterpretParams()`.
    """

    silu: bool
    interpret: Any = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(plan: Plan, x, weight, before, starts):
    """See `op.short_convolution`; x [B, T, E] with E a multiple of `LANES`."""
    return _forward(plan, x, weight, before, starts)


def _convolve_forward(plan, x, weight, before, starts):
    return _forward(plan, x, weight, before, starts), (x, weight, before, starts)


def _convolve_backward(plan, residuals, by):
    x, weight, before, starts = residuals
    by_x, by_weight = _backward(plan, x, weight, before, starts, by)
    # Only the first tokens see what was before the call.
    few = min(EDGE, x.shape[1])
    first = None if starts is None else starts[:, :few]
    _, pull = jax.vjp(
        lambda before: reference.short_convolution(
            x[:, :few], weight, before, starts=first, silu=plan.silu
        ),
        before,
    )
    return by_x, by_weight.astype(weight.dtype), *pull(by[:, :few].astype(x.dtype)), None


convolve.defvjp(_convolve_forward, _convolve_backward)


def _cut(length: int) -> int:
    """Tokens of a step: one block, or blocks of `BLOCK`."""
    return min(BLOCK, -(-length // STRIP) * STRIP)


def _above(x, block: int, before):
    """The `EDGE` rows before every block, [B, N, EDGE, E] in fp32."""
    blocks = x.reshape(x.shape[0], -1, block, x.shape[2])
    first = jnp.pad(before.astype(jnp.float32), ((0, 0), (EDGE - before.shape[1], 0), (0, 0)))
    return jnp.concatenate([first[:, None], blocks[:, :-1, -EDGE:].astype(jnp.float32)], axis=1)


def _below(x, block: int):
    """The `EDGE` rows after every block, zeros after the last, [B, N, EDGE, E] in fp32."""
    blocks = x.reshape(x.shape[0], -1, block, x.shape[2])
    rows = blocks[:, 1:, :EDGE].astype(jnp.float32)
    return jnp.pad(rows, ((0, 0), (0, 1), (0, 0), (0, 0)))


def _since(starts):
    """Tokens since each token's document began, at most `EDGE`; that many in the running one."""
    steps = jnp.arange(starts.shape[1], dtype=jnp.int32)
    begun = lax.cummax(jnp.where(starts, steps, -EDGE), axis=1)
    return jnp.minimum(steps - begun, EDGE)


def _specs(block: int, channels: int, width: int, count: int):
    """Block specs of tokens, edges and weights in the grid (rows, channels, blocks)."""
    tokens = pl.BlockSpec((None, block, channels), lambda b, e, n: (b, n, e))
    edges = pl.BlockSpec((None, None, EDGE, channels), lambda b, e, n: (b, n, 0, e))
    weight = pl.BlockSpec((width, channels), lambda b, e, n: (0, e))
    strips = pl.BlockSpec((None, None, count, STRIP), lambda b, e, n: (b, n, 0, 0))
    return tokens, edges, weight, strips


def _prepared(x, weight, before, starts):
    """Sizes, x in whole blocks, its edges, and of each strip of a block what its taps see."""
    length = x.shape[1]
    block = _cut(length)
    more = -length % block
    x = jnp.pad(x, ((0, 0), (0, more), (0, 0))) if more else x
    channels = max(c for c in range(LANES, CHANNELS + 1, LANES) if x.shape[2] % c == 0)
    since = None
    if starts is not None:
        since = jnp.pad(_since(starts), ((0, 0), (0, more)))  # what is added sees nothing
        since = since.reshape(x.shape[0], -1, block // STRIP, STRIP).astype(jnp.float32)
    return block, channels, more, x, _above(x, block, before), since


def _call(kernel, name, plan, x, block, channels, *, last: str, **how):
    grid = (x.shape[0], x.shape[2] // channels, x.shape[1] // block)
    return pl.pallas_call(
        kernel,
        grid=grid,
        name=name,
        interpret=plan.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", last), vmem_limit_bytes=sequence.VMEM
        ),
        **how,
    )


def _forward(plan: Plan, x, weight, before, starts):
    length = x.shape[1]
    block, channels, _, x, edges, since = _prepared(x, weight, before, starts)
    tokens, edge, of_weight, strips = _specs(block, channels, weight.shape[0], block // STRIP)
    y = _call(
        functools.partial(_forward_kernel, plan, since is not None),
        "short_convolution", plan, x, block, channels, last="parallel",
        in_specs=[tokens, edge, of_weight, *([strips] if since is not None else [])],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    )(x, edges, weight.astype(jnp.float32), *([] if since is None else [since]))  # fmt: skip
    return y[:, :length]


def _backward(plan: Plan, x, weight, before, starts, by):
    length, width = x.shape[1], weight.shape[0]
    block, channels, more, x, edges, since = _prepared(x, weight, before, starts)
    by = jnp.pad(by.astype(x.dtype), ((0, 0), (0, more), (0, 0)))
    later = _below(x, block), _below(by, block)
    documents = []
    if since is not None:
        first = since[:, 1:, :1, :EDGE]  # of the rows after each block
        ends = jnp.zeros((x.shape[0], 1, 1, EDGE), jnp.float32)
        documents = [since, jnp.concatenate([first, ends], axis=1)]
    tokens, edge, of_weight, strips = _specs(block, channels, width, block // STRIP)
    after = pl.BlockSpec((None, None, 1, EDGE), lambda b, e, n: (b, n, 0, 0))
    sums = pl.BlockSpec((None, width * EDGE, channels), lambda b, e, n: (b, 0, e))
    by_x, by_weight = _call(
        functools.partial(_backward_kernel, plan, bool(documents)),
        "short_convolution_backward", plan, x, block, channels, last="arbitrary",
        in_specs=[
            tokens, edge, of_weight, tokens, edge, edge, *([strips, after] if documents else [])
        ],
        out_specs=(tokens, sums),
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((x.shape[0], width * EDGE, x.shape[2]), jnp.float32),
        ),
    )(x, edges, weight.astype(jnp.float32), by, *later, *documents)  # fmt: skip
    by_weight = by_weight.reshape(x.shape[0], width, EDGE, x.shape[2])
    return by_x[:, :length], jnp.sum(by_weight, axis=(0, 2))


def _rows(strip):
    """The rows of a strip, in a loop."""
    return pl.ds(pl.multiple_of(strip * STRIP, STRIP), STRIP)


def _taps(x, width: int):
    """`x[EDGE - s :]`, for every tap s: x with its `EDGE` rows before, [EDGE + R, E]."""
    count = x.shape[0] - EDGE
    return [x[EDGE - s : EDGE - s + count] for s in range(width)]


def _seen(since, width: int):
    """Of every tap whether it sees a token of its document, None = always: of [1, R], [R, 1]."""
    if since is None:
        return [None] * width
    since = jnp.swapaxes(since, 0, 1)
    return [None, *(since >= s for s in range(1, width))]


def _where(seen, rows):
    """The rows of every tap, zeros where it does not see: not a product, which keeps a NaN."""
    pairs = zip(seen, rows, strict=True)
    return [x if mask is None else jnp.where(mask, x, 0.0) for mask, x in pairs]


def _sum(taps, weight):
    return functools.reduce(jnp.add, [weight[s : s + 1] * tap for s, tap in enumerate(taps)])


def _sigmoid(z):
    return 0.5 + 0.5 * jnp.tanh(0.5 * z)  # no division


def _forward_kernel(plan: Plan, documents: bool, x_ref, edge_ref, weight_ref, *refs):
    *since_ref, y_ref = refs
    weight = weight_ref[...]

    def strip(i, above):
        x = x_ref[_rows(i), :].astype(jnp.float32)
        since = since_ref[0][pl.ds(i, 1), :] if documents else None
        taps = _taps(jnp.concatenate([above, x]), weight.shape[0])
        z = _sum(_where(_seen(since, weight.shape[0]), taps), weight)
        y_ref[_rows(i), :] = (z * _sigmoid(z) if plan.silu else z).astype(y_ref.dtype)
        return x[STRIP - EDGE :]

    lax.fori_loop(0, x_ref.shape[0] // STRIP, strip, edge_ref[...], unroll=True)


def _backward_kernel(
    plan: Plan, documents: bool, x_ref, edge_ref, weight_ref, by_ref, later_ref, later_by_ref,
    *refs,
):  # fmt: skip
    *since_refs, by_x_ref, by_weight_ref = refs
    weight = weight_ref[...]
    width, strips = weight.shape[0], x_ref.shape[0] // STRIP

    @pl.when(pl.program_id(2) == 0)
    def _():
        by_weight_ref[...] = jnp.zeros_like(by_weight_ref)

    def inner(taps, by):
        """`d` of some rows."""
        if not plan.silu:
            return by
        z = _sum(taps, weight)
        s = _sigmoid(z)
        return by * (s * (1.0 + z * (1.0 - s)))

    def last(rows):
        return x_ref[rows, :].astype(jnp.float32)[STRIP - EDGE :]

    ends = _rows(strips - 1)
    seen = _seen(since_refs[1][...] if documents else None, width)
    taps = _where(seen, _taps(jnp.concatenate([last(ends), later_ref[...]]), width))
    below = _where(seen, [inner(taps, later_by_ref[...])] * width)

    def strip(back, carry):
        below, sums = carry
        i = strips - 1 - back
        x, by = (ref[_rows(i), :].astype(jnp.float32) for ref in (x_ref, by_ref))
        above = jnp.where(i == 0, edge_ref[...], last(_rows(jnp.maximum(i - 1, 0))))
        seen = _seen(since_refs[0][pl.ds(i, 1), :] if documents else None, width)
        taps = _where(seen, _taps(jnp.concatenate([above, x]), width))
        ours = _where(seen, [inner(taps, by)] * width)
        terms = [
            weight[s : s + 1] * jnp.concatenate([d, later])[s : s + STRIP]
            for s, (d, later) in enumerate(zip(ours, below, strict=True))
        ]
        by_x_ref[_rows(i), :] = functools.reduce(jnp.add, terms).astype(by_x_ref.dtype)
        found = [
            jnp.sum((d * tap).reshape(STRIP // EDGE, EDGE, -1), axis=0)
            for d, tap in zip(ours, taps, strict=True)
        ]
        sums = tuple(a + b for a, b in zip(sums, found, strict=True))
        return tuple(d[:EDGE] for d in ours), sums

    zeros = tuple(jnp.zeros((EDGE, x_ref.shape[1]), jnp.float32) for _ in range(width))
    _, sums = lax.fori_loop(0, strips, strip, (tuple(below), zeros), unroll=True)
    by_weight_ref[...] += jnp.concatenate(sums)
