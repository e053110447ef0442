"""A sequence in tiles, one after another, with the memory's state resident in VMEM.

An op of this package is a function of a few neighbouring tiles,

    tiles(state, initial, wide, gates, document) -> (state, outputs, numbers)

and `scan` runs it over all tiles of every row and head: on TPU as a Pallas kernel whose grid is
(rows, groups of heads, steps), the last one in order; elsewhere as `jax.lax.scan` over the same
function. The gradient is taken of that function too, inside the backward kernel, which goes through
the steps in reverse from the states that the forward kernel has left at their beginnings.

Matrix units want work that does not wait: a step takes several heads, and several tiles, whose
preparation is independent of the state, at once.

Arrays come as `[batch, time, heads, dim]` and are read as `[batch, time, heads * dim]`, which is
the same memory: nothing is transposed in HBM.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Arrays = tuple[jax.Array, ...]
Tiles = Callable[[Arrays, Arrays, Arrays, Arrays, jax.Array | None], tuple[Arrays, Arrays, Arrays]]

VMEM = 64 * 2**20  # bytes that a kernel may ask for, where the chip has them


class Plan(NamedTuple):
    """What a scan does not differentiate by.

    Attributes:
        tile: what a step does: state [heads, I, J], initial [heads, I, J], wide [heads, tiles, C,
            D], gates [heads * tiles, C], document [tiles, C] or None -> (state, outputs
            [heads, tiles, C, .], numbers [heads * tiles, C]). Hashable.
        name: of the kernel in compiled programs and profiles; the backward one's ends in
            `_backward`.
        block: C, the tokens of a tile.
        tiles: tiles of a step.
        heads: heads of a step, a divisor of all.
        backward_heads: heads of a step of the backward kernel.
        compute: dtype of the operands of products, and of what the forward pass keeps.
        vmem: bytes that the kernel may use.
        interpret: False, or how Pallas interprets the kernel: `pltpu.InterpretParams()`.
    """

    tile: Tiles
    name: str
    block: int
    tiles: int
    heads: int
    backward_heads: int
    compute: Any
    vmem: int = VMEM
    interpret: Any = False

    @property
    def step(self) -> int:
        """Tokens of a step."""
        return self.block * self.tiles


def scan(
    plan: Plan,
    state: Arrays,
    initial: Arrays,
    wide: Arrays,
    gates: Arrays,
    starts: jax.Array | None,
    *,
    kernel: bool,
) -> tuple[Arrays, Arrays, Arrays]:
    """Runs a tile function over a sequence.

    Args:
        plan: how.
        state: of every row and head, each [B, H, I, J] in fp32.
        initial: what documents begin from, each [H, I, J] in fp32; or none.
        wide: what every token and head has, each [B, T, H, D].
        gates: numbers of every token and head, each [B, T, H]. Zeros must change no state: where T
            is not a multiple of a step, tokens of zeros are added.
        starts: where documents begin [B, T], or None = nowhere.
        kernel: whether to run the Pallas kernel, else `jax.lax.scan`.

    Returns:
        (state after the last token, outputs [B, T, H, .] in the dtype of `plan.compute`, numbers
        [B, T, H] in fp32).
    """
    length = wide[0].shape[1]
    more = -length % plan.step

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)) if more else x

    wide, gates = tuple(map(pad, wide)), tuple(pad(x.astype(jnp.float32)) for x in gates)
    document = None
    if starts is not None:
        tiles = pad(starts).reshape(starts.shape[0], -1, plan.tiles, plan.block)
        document = jnp.cumsum(tiles, axis=3, dtype=jnp.int32)
    run = _run if kernel else _loop
    state, *found = run(plan, state, initial, wide, gates, document)
    return state, *(tuple(y[:, :length] for y in ys) for ys in found)


def _loop(plan: Plan, state, initial, wide, gates, document):
    """`jax.lax.scan` over the steps, computed again in the backward pass."""
    batch, length, heads = gates[0].shape

    def cut(x):  # [B, T, H, ...] -> [N, B, H, tiles, C, ...]
        x = x.reshape(batch, -1, plan.step, *x.shape[2:])
        x = jnp.moveaxis(x, (1, 3), (0, 2))
        return x.reshape(*x.shape[:3], plan.tiles, plan.block, *x.shape[4:])

    # One for each row: to sum the rows' gradients in the product that has them is a product in bf16
    # that XLA refuses on CPU.
    initial = tuple(jnp.broadcast_to(x, (batch, *x.shape)) for x in initial)

    def step(state, now):
        def run(state, initial, wide, gates, document):
            gates = tuple(x.reshape(-1, plan.block) for x in gates)
            return plan.tile(state, initial, wide, gates, document)

        state, *found = jax.vmap(run)(state, initial, *now)
        return state, tuple(found)

    wide = tuple(cut(x.astype(jnp.float32)) for x in wide)
    document = None if document is None else jnp.moveaxis(document, 1, 0)
    steps = (wide, tuple(map(cut, gates)), document)
    run = jax.checkpoint(step, prevent_cse=False)
    state, (outputs, numbers) = jax.lax.scan(run, state, steps)

    def join(y):  # [N, B, H, tiles, C, D] -> [B, T, H, D]
        y = y.reshape(-1, batch, heads, plan.step, y.shape[-1])
        return jnp.moveaxis(y, (0, 2), (1, 3)).reshape(batch, length, heads, -1)

    return (
        state,
        tuple(join(y).astype(plan.compute) for y in outputs),
        tuple(join(x[..., None])[..., 0] for x in numbers),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan: Plan, state, initial, wide, gates, document):
    return _forward_call(plan, state, initial, wide, gates, document, keep=False)[0]


def _run_forward(plan, state, initial, wide, gates, document):
    results, kept = _forward_call(plan, state, initial, wide, gates, document, keep=True)
    return results, (kept, initial, wide, gates, document)


def _run_backward(plan, residuals, cotangents):
    kept, initial, wide, gates, document = residuals
    plan = plan._replace(heads=plan.backward_heads)
    return (*_backward_call(plan, kept, initial, wide, gates, document, *cotangents), None)


_run.defvjp(_run_forward, _run_backward)


class _Tokens(NamedTuple):
    """What a tile takes of the sequence, as the kernel reads it.

    Attributes:
        wide: each [B, T, H * D], in blocks [tiles * C, heads * D].
        gates: each [B, N, groups, heads * tiles, C], in blocks [heads * tiles, C].
        document: () or one [B, N, tiles, C], in blocks [tiles, C].
    """

    wide: Any
    gates: Any
    document: Any


def _folded(plan: Plan, wide, gates, document) -> _Tokens:
    batch, length, heads = wide[0].shape[:3]
    groups, steps = heads // plan.heads, length // plan.step
    cut = (batch, steps, plan.tiles, plan.block, groups, plan.heads)
    whole = (batch, steps, groups, plan.heads * plan.tiles, plan.block)
    return _Tokens(
        tuple(x.reshape(batch, length, -1) for x in wide),
        tuple(jnp.transpose(x.reshape(cut), (0, 1, 4, 5, 2, 3)).reshape(whole) for x in gates),
        () if document is None else (document,),
    )


def _unfolded_gate(plan: Plan, x):
    """[B, N, groups, heads * tiles, C] -> [B, T, H]."""
    batch, steps, groups, _, block = x.shape
    x = x.reshape(batch, steps, groups, plan.heads, plan.tiles, block)
    x = jnp.transpose(x, (0, 1, 4, 5, 2, 3))
    return x.reshape(batch, steps * plan.step, groups * plan.heads)


class _Specs:
    """Blocks of arrays in the grid (rows, groups of heads, steps), the steps forward or back."""

    def __init__(self, plan: Plan, groups: int, steps: int, *, reverse: bool):
        self.plan, self.groups, self.steps, self.reverse = plan, groups, steps, reverse

    def _spec(self, shape, index):
        def place(b, h, n):
            return index(b, h, self.steps - 1 - n if self.reverse else n)

        return pl.BlockSpec(shape, place)

    def tokens(self, tokens: _Tokens) -> _Tokens:
        plan = self.plan

        def wide(x):
            shape = (None, plan.step, x.shape[-1] // self.groups)
            return self._spec(shape, lambda b, h, n: (b, n, h))

        rows = plan.heads * plan.tiles
        gate = self._spec((None, None, None, rows, plan.block), lambda b, h, n: (b, n, h, 0, 0))
        document = self._spec((None, None, plan.tiles, plan.block), lambda b, h, n: (b, n, 0, 0))
        return _Tokens(
            tuple(map(wide, tokens.wide)),
            tuple(gate for _ in tokens.gates),
            tuple(document for _ in tokens.document),
        )

    def states(self, states):
        """Of [B, H, I, J]: one block for all steps, so that the state stays in VMEM."""
        return tuple(
            self._spec((None, self.plan.heads, *x.shape[-2:]), lambda b, h, n: (b, h, 0, 0))
            for x in states
        )

    def initial(self, initial):
        """Of [H, I, J]."""
        return tuple(
            self._spec((self.plan.heads, *x.shape[-2:]), lambda b, h, n: (h, 0, 0)) for x in initial
        )

    def kept(self, states):
        """Of [B, N, H, I, J]: the state that each step begins with."""
        return tuple(
            self._spec(
                (None, None, self.plan.heads, *x.shape[-2:]), lambda b, h, n: (b, n, h, 0, 0)
            )
            for x in states
        )


def _load(plan: Plan, tokens: _Tokens):
    """(wide [heads, tiles, C, D] in fp32, gates [heads * tiles, C], document or None) of a step."""

    def wide(ref):
        size = ref.shape[-1] // plan.heads
        parts = [ref[:, h * size : (h + 1) * size].astype(jnp.float32) for h in range(plan.heads)]
        return jnp.stack(parts).reshape(plan.heads, plan.tiles, plan.block, size)

    document = tokens.document[0][...] if tokens.document else None
    return tuple(map(wide, tokens.wide)), tuple(x[...] for x in tokens.gates), document


def _store(plan: Plan, refs, arrays) -> None:
    """[heads, tiles, C, D] each into VMEM as [tiles * C, heads * D]."""
    for ref, x in zip(refs, arrays, strict=True):
        size = x.shape[-1]
        x = x.reshape(plan.heads, plan.step, size)
        for h in range(plan.heads):
            ref[:, h * size : (h + 1) * size] = x[h].astype(ref.dtype)


def _copy(refs, arrays) -> None:
    for ref, x in zip(refs, arrays, strict=True):
        ref[...] = x[...].astype(ref.dtype)


def _call(plan: Plan, kernel, name: str, grid, in_specs, out_specs, out_shape):
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=plan.vmem,
        ),
        interpret=plan.interpret,
        name=name,
    )


def _forward_call(plan: Plan, state, initial, wide, gates, document, *, keep: bool):
    """((state, outputs, numbers), the states that steps begin with) by the forward kernel."""
    batch, length, heads = gates[0].shape
    groups, steps = heads // plan.heads, length // plan.step
    tokens = _folded(plan, wide, gates, document)

    def kernel(begin, first, tokens, carried, outputs, numbers, kept):
        @pl.when(pl.program_id(2) == 0)
        def _():
            _copy(carried, begin)

        now = tuple(x[...] for x in carried)
        if keep:
            _copy(kept, now)
        after, *found = plan.tile(now, tuple(x[...] for x in first), *_load(plan, tokens))
        _copy(carried, after)
        _store(plan, outputs, found[0])
        _copy(numbers, found[1])

    specs = _Specs(plan, groups, steps, reverse=False)
    outputs, numbers = _tile_outputs(plan, state, initial, wide, gates, document)
    outputs = tuple(
        jax.ShapeDtypeStruct((batch, length, heads * y.shape[-1]), plan.compute) for y in outputs
    )
    numbers = _like(tokens.gates[:1] * len(numbers))
    kept = tuple(
        jax.ShapeDtypeStruct((batch, steps, *x.shape[1:]), plan.compute) for x in state
    )  # fmt: skip
    run = _call(
        plan,
        kernel,
        plan.name,
        (batch, groups, steps),
        (specs.states(state), specs.initial(initial), specs.tokens(tokens)),
        (
            specs.states(state),
            specs.tokens(tokens._replace(wide=outputs)).wide,
            specs.tokens(tokens).gates[:1] * len(numbers),
            specs.kept(state) if keep else (),
        ),
        (_like(state), outputs, numbers, kept if keep else ()),
    )
    after, outputs, numbers, kept = run(state, initial, tokens)
    outputs = tuple(y.reshape(batch, length, heads, -1) for y in outputs)
    return (after, outputs, tuple(_unfolded_gate(plan, x) for x in numbers)), kept


def _backward_call(
    plan: Plan, kept, initial, wide, gates, document, by_state, by_outputs, by_numbers
):
    """Cotangents of state, initial, wide and gates by the backward kernel."""
    batch, length, heads = gates[0].shape
    groups, steps = heads // plan.heads, length // plan.step
    tokens = _folded(plan, wide, gates, document)
    given = _folded(plan, by_outputs, by_numbers, None)

    def kernel(kept, first, tokens, by_last, given, by_state, by_first, by_wide, by_gates):
        @pl.when(pl.program_id(2) == 0)
        def _():
            _copy(by_state, by_last)
            for x in by_first:
                x[...] = jnp.zeros_like(x)

        *numbers, document = _load(plan, tokens)
        *by_found, _ = _load(plan, given)

        def tile(*arguments):
            return plan.tile(*arguments, document)

        begin = tuple(x[...].astype(jnp.float32) for x in kept)
        _, pull = jax.vjp(tile, begin, tuple(x[...] for x in first), *numbers)
        found = pull((tuple(x[...] for x in by_state), *by_found))
        _copy(by_state, found[0])
        for ref, x in zip(by_first, found[1], strict=True):
            ref[...] += x
        _store(plan, by_wide, found[2])
        _copy(by_gates, found[3])

    specs = _Specs(plan, groups, steps, reverse=True)
    in_specs, per_row = specs.tokens(tokens), specs.states(initial)
    run = _call(
        plan,
        kernel,
        f"{plan.name}_backward",
        (batch, groups, steps),
        (
            specs.kept(by_state),
            specs.initial(initial),
            in_specs,
            specs.states(by_state),
            specs.tokens(given),
        ),
        (specs.states(by_state), per_row, in_specs.wide, in_specs.gates),
        (
            _like(by_state),
            tuple(jax.ShapeDtypeStruct((batch, *x.shape), jnp.float32) for x in initial),
            _like(tokens.wide),
            _like(tokens.gates),
        ),
    )
    by_state, by_initial, by_wide, by_gates = run(kept, initial, tokens, by_state, given)
    return (
        by_state,
        tuple(jnp.sum(x, axis=0) for x in by_initial),
        tuple(x.reshape(y.shape) for x, y in zip(by_wide, wide, strict=True)),
        tuple(_unfolded_gate(plan, x) for x in by_gates),
    )


def _like(arrays):
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)


def _tile_outputs(plan: Plan, state, initial, wide, gates, document):
    """Shapes of what a step of one group of heads gives."""

    def shape(*sizes):
        return jax.ShapeDtypeStruct((plan.heads, *sizes), jnp.float32)

    return jax.eval_shape(
        plan.tile,
        tuple(shape(*x.shape[-2:]) for x in state),
        tuple(shape(*x.shape[-2:]) for x in initial),
        tuple(shape(plan.tiles, plan.block, x.shape[-1]) for x in wide),
        tuple(
            jax.ShapeDtypeStruct((plan.heads * plan.tiles, plan.block), jnp.float32) for _ in gates
        ),
        None if document is None else jax.ShapeDtypeStruct((plan.tiles, plan.block), jnp.int32),
    )[1:]
