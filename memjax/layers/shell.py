"""What the layers around a memory share: sizes, checks, projections, learned W_0, reports."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from memjax import checks, miras
from memjax.layers.conv import CausalConv, ConvState
from memjax.layers.linear import Linear
from memjax.layers.statistics import MemoryStats
from memjax.sharding import constrain
from memjax.typing import Array, Float, Int

State = TypeVar("State")


def head_size(dim: int, heads: int, head_dim: int | None) -> int:
    """`head_dim`, or dim / heads where it is None.

    Raises:
        ValueError: a size that is no integer of at least 1, or heads that do not divide dim, where
            they must.
    """
    check_sizes(dim=dim, heads=heads)
    if head_dim is not None:
        check_sizes(head_dim=head_dim)
        return head_dim
    if dim % heads:
        raise ValueError(
            f"dim {dim} is not a multiple of heads {heads}: change one, or give head_dim"
        )
    return dim // heads


def check_sizes(least: int = 1, **sizes: int) -> None:
    """Raises ValueError where one of these is no integer of at least `least`."""
    for name, size in sizes.items():
        checks.whole(name, size, least)


def check_starts_at_zero(layer: str, rule: miras.Rule) -> None:
    """Raises ValueError where the W_0 of a rule is drawn: the layer has no weights for it."""
    if not rule.structure.starts_at_zero:
        raise ValueError(
            f"{layer} begins at W_0 = 0, but {rule.structure} draws it: use matrix(scale=0.0), or "
            "NeuralMemory, which learns W_0"
        )


def check_inputs(
    x: Array, dim: int, segment_ids: Array | None = None, positions: Array | None = None
) -> None:
    """Raises ValueError where x is no floating [B, T >= 1, dim], or others no integers [B, T]."""
    if x.ndim != 3 or x.shape[-1] != dim or x.shape[1] < 1:
        raise ValueError(f"x has shape {x.shape}; it must be [B, T >= 1, {dim}]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}: it must be floating-point")
    for name, given in (("segment_ids", segment_ids), ("positions", positions)):
        if given is not None and given.shape != x.shape[:2]:
            raise ValueError(f"{name} has shape {given.shape}, must be {x.shape[:2]}")
        if given is not None and not jnp.issubdtype(given.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got {given.dtype}")


def go_on(layer: nnx.Module, state: State | None, kind: type[State], batch: int) -> State:
    """The state that a layer goes on from: the one given, or its start.

    One of a layer with other chunks, of one token here or there, will do (`miras.State.base`).

    Args:
        layer: with a method `start(batch)`.
        state: what it was given; None = `layer.start(batch)`.
        kind: the class of its states.
        batch: B of x.

    Raises:
        TypeError: the state is not of that class.
        ValueError: it is for another batch, or of a layer with other sizes.
    """
    if state is None:
        return layer.start(batch)
    remedy = f"use start({batch})"
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be of type {kind.__name__}, got {type(state).__name__}: {remedy}, or what "
            "the last call returned"
        )
    another = f"the state is of another {type(layer).__name__}"
    expected = jax.eval_shape(lambda: layer.start(batch))
    expected, state = _with_starts_of_chunks(expected, state)
    if jax.tree.structure(state) != jax.tree.structure(expected):
        raise ValueError(f"{another}, with other parts; {remedy}")
    of_another_batch = None
    for (path, ours), array in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(state), strict=True
    ):
        ours, there = ours.shape, jnp.shape(array)
        if ours[1:] != there[1:]:
            part = jax.tree_util.keystr(path).lstrip(".")
            raise ValueError(f"{another}: {part} is {there}, here {ours}; {remedy}")
        if ours != there:
            of_another_batch = there[0] * batch // ours[0]
    if of_another_batch is not None:
        raise ValueError(f"the state is for a batch of {of_another_batch}, x has {batch}; {remedy}")
    return state


def _with_starts_of_chunks(one: State, other: State) -> tuple[State, State]:
    """Both states; what began a memory's chunk is held in both where one of them holds it."""

    def is_memory(x):
        return isinstance(x, miras.State)

    (ones, structure), (others, their) = (
        jax.tree.flatten(state, is_leaf=is_memory) for state in (one, other)
    )
    if structure != their:
        return one, other

    def filled(memory, like):
        fill = is_memory(memory) and is_memory(like) and like.base
        return memory._replace(base=memory.began) if fill else memory

    return (
        structure.unflatten(map(filled, ones, others)),
        structure.unflatten(map(filled, others, ones)),
    )


def project(
    x: Float[Array, "B T E"],
    projections: Sequence[Linear],
    convs: Sequence[CausalConv],
    states: Sequence[ConvState] | None,
    segment_ids: Int[Array, "B T"] | None,
    axes: Sequence[str | None] = ("heads", "heads", "heads"),
    silu: Sequence[bool] = (False, False, False),
) -> tuple[list[Array], tuple[ConvState, ...]]:
    """`conv_i(x W_i)` for every projection, split over the mesh by heads; with or without SiLU.

    Args:
        x: [B, T, E].
        projections: to [B, T, heads, channels] each.
        convs: a convolution over heads and channels for each of them, or none at all.
        states: what the convolutions go on from; None = their starts.
        segment_ids: document of each token; no convolution sees across a change.
        axes: logical name of the heads of each projection.
        silu: which of the outputs are activated.
    Returns:
        The outputs [B, T, heads, channels], and the convolutions' states.
    """
    outputs, after = [], []
    for i, (projection, axis) in enumerate(zip(projections, axes, strict=True)):
        z = constrain(projection(x), ("batch", "time", axis, "kv"))
        if convs:
            before = None if states is None else states[i]
            flat, state = convs[i](
                z.reshape(*x.shape[:2], -1), before, segment_ids=segment_ids, silu=silu[i]
            )
            after.append(state)
            z = flat.reshape(z.shape)
        elif silu[i]:
            z = jax.nn.silu(z)
        outputs.append(z)
    return outputs, tuple(after)


def initial_weights(
    rule: miras.Rule,
    heads: int,
    head_dim: int,
    *,
    axes: Sequence[Sequence[str | None]] | None = None,
    rngs: nnx.Rngs,
) -> tuple[Sequence[nnx.Param], Mapping[str, nnx.Param]]:
    """The learned W_0 of a memory, drawn for each head, as parameters.

    Args:
        rule: the memory.
        heads: H.
        head_dim: dimension of keys and values.
        axes: logical names of each fast weight; None splits them by heads.
        rngs: the stream `params` draws the weights.
    Returns:
        Fast and slow parameters, each [H, ...]; `weights` reads them. A rule that solves for its
        memory begins at 0, and has no fast ones.
    """
    drawn = _drawn(rule, jax.random.split(rngs.params(), heads), head_dim)
    if rule.learner.solves:
        drawn = drawn._replace(fast=())
    if axes is None:
        axes = [("heads", "memory_in", "memory_out")] * len(drawn.fast)
    fast = nnx.List(nnx.Param(w, axes=names) for w, names in zip(drawn.fast, axes, strict=True))
    return fast, slow_weights(drawn.slow)


def slow_weights(drawn: Mapping[str, Array]) -> Mapping[str, nnx.Param]:
    """The slow weights of a memory as parameters, split over the mesh by heads.

    Args:
        drawn: by name, each [H, ...].
    """

    def axes(name: str, ndim: int) -> tuple[str | None, ...]:
        if name in ("scale", "bias") and ndim == 2:
            return ("heads", "memory_out")  # of the norm of the outputs
        return ("heads", *[None] * (ndim - 1))

    return nnx.Dict({name: nnx.Param(w, axes=axes(name, w.ndim)) for name, w in drawn.items()})


def weights(
    rule: miras.Rule,
    heads: int,
    head_dim: int,
    fast: Sequence[nnx.Param],
    slow: Mapping[str, nnx.Param],
) -> miras.Weights:
    """The arrays of `initial_weights`, as `miras.start` takes them."""
    begin = tuple(w[...] for w in fast)
    if rule.learner.solves:
        keys = jax.random.split(jax.random.key(0), heads)
        like = jax.eval_shape(lambda: _drawn(rule, keys, head_dim)).fast
        begin = tuple(jnp.zeros(w.shape, w.dtype) for w in like)
    return miras.Weights(begin, {name: w[...] for name, w in slow.items()})


def _drawn(rule: miras.Rule, keys: Array, head_dim: int) -> miras.Weights:
    """W_0 for each key, [H, ...]."""
    return jax.vmap(lambda key: rule.init(key, head_dim, head_dim))(keys)


class InitialWeights(nnx.Module):
    """The learned W_0 of one of a layer's memories, for every head.

    Args:
        rule, heads, head_dim, axes, rngs: see `initial_weights`.
    """

    def __init__(
        self,
        rule: miras.Rule,
        heads: int,
        head_dim: int,
        *,
        axes: Sequence[Sequence[str | None]] | None = None,
        rngs: nnx.Rngs,
    ):
        self.rule, self.heads, self.head_dim = rule, heads, head_dim
        self.fast, self.slow = initial_weights(rule, heads, head_dim, axes=axes, rngs=rngs)

    def __call__(self) -> miras.Weights:
        """The arrays, as `miras.start` takes them."""
        return weights(self.rule, self.heads, self.head_dim, self.fast, self.slow)


def stats(
    surprise: Array | None, lr: Array, momentum: Array | None, retain: Array | None
) -> MemoryStats:
    """Means over the tokens of a call, and over channels, without gradients.

    Args:
        surprise, lr, momentum, retain: [B, T, H] or [B, T, H, channels]; None where there is none.
    Returns:
        A `MemoryStats` of [B, H].
    """

    def mean(z: Array | None) -> Array | None:
        if z is None:
            return None
        return jax.lax.stop_gradient(jnp.mean(z, axis=(1, *range(3, z.ndim)), dtype=float))

    return MemoryStats(mean(surprise), mean(lr), mean(momentum), mean(retain))
