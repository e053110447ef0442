"""Titans that modify themselves: their keys, values and gates are answers of memories too."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memjax import checks, documents, miras
from memjax.layers import shell
from memjax.layers.conv import CausalConv, ConvState
from memjax.layers.linear import Linear
from memjax.layers.norm import RMSNorm
from memjax.layers.statistics import MemoryStats
from memjax.miras.features import unit
from memjax.miras.forms.remat import grouped_scan
from memjax.sharding import constrain
from memjax.typing import Array, Bool, Float, Int

SOURCES = 4  # memories that a head's keys, values, rates and retentions come from


class SelfReferentialState(NamedTuple):
    """What `SelfReferentialMemory` carries.

    Attributes:
        projections: the memories that give keys, values and gates; those of a head are neighbours.
        memory: the memories that are read.
        convs: inputs of the convolutions of content and queries.
        stats: means of surprise and gates of `memory` over the tokens of the last call.
    """

    projections: miras.State
    memory: miras.State
    convs: tuple[ConvState, ...]
    stats: MemoryStats


class SelfReferentialMemory(nnx.Module):
    """Titans that modify themselves: keys, values and gates are answers of memories that learn too.

        u, q      = conv(x W_u), unit(conv(x W_q))                               per head
        k, v      = unit(M_k(u)), unit(M_v(u))
        lr, a     = lr_max sigmoid(M_lr(u) . w + b), sigmoid(M_a(u) . w' + b')
        target_m  = M_m(v)                               for m = k, v, lr, a, memory: its own
        M_m       = delta gradient descent on 1/2 ||M_m(k) - target_m||^2 with rate lr, retention a
        y         = (RMSNorm(M_memory(q)) * SiLU(x W_g)) W_o,       M(z) = z + gelu(z W_1) W_2

    v has length 1, or targets would grow with the weights that they train.

    Every M on the right is the memory at the start of its chunk, so all tokens of a chunk are
    computed at once; see `miras.delta_gd` for the step.

    Args:
        dim: model dimension E.
        heads: heads H, of five memories each.
        head_dim: dimension of keys and values (default dim / heads).
        chunk: tokens between two updates of the weights that M_memory's gradients are taken at.
        projection_chunk: the same for the other four (default `chunk`); of the two numbers one
            divides the other.
        expansion: hidden units of a memory over head_dim.
        read: "chunk", "before" or "after", see `miras.zoo.self_referential_titans`.
        conv: width of the depthwise causal convolutions, 0 for none.
        lr_max: the largest inner learning rate.
        rngs: the stream `params` draws the weights.
    Raises:
        ValueError: sizes that do not fit.
    Source: nested learning (arXiv:2512.24695), equations 86 to 91. Heads, W_u and how a memory's
        answer becomes a scalar gate are our choice (docs/deviations.md).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        *,
        chunk: int = 64,
        projection_chunk: int | None = None,
        expansion: int = 4,
        read: str = "chunk",
        conv: int = 4,
        lr_max: float = 0.1,
        rngs: nnx.Rngs,
    ):
        head_dim = shell.head_size(dim, heads, head_dim)
        projection_chunk = chunk if projection_chunk is None else projection_chunk
        shell.check_sizes(chunk=chunk, projection_chunk=projection_chunk)
        shell.check_sizes(0, conv=conv)
        if max(chunk, projection_chunk) % min(chunk, projection_chunk):
            raise ValueError(
                f"of chunk {chunk} and projection_chunk {projection_chunk} one must be a multiple "
                "of the other"
            )
        checks.real("lr_max", lr_max, above=0.0)
        self.dim, self.heads, self.head_dim, self.lr_max = dim, heads, head_dim, lr_max
        make = miras.zoo.self_referential_titans
        self.rule = make(expansion=expansion, chunk=chunk, read=read)
        self.projection_rule = make(expansion=expansion, chunk=projection_chunk)

        def project() -> Linear:
            return Linear(dim, (heads, head_dim), axes=("embed", "heads", "kv"), rngs=rngs)

        self.content, self.query, self.gate = project(), project(), project()
        self.out = Linear((heads, head_dim), dim, axes=("heads", "kv", "embed"), rngs=rngs)
        self.norm = RMSNorm(head_dim, rngs=rngs, axis_name="kv")
        self.convs = nnx.List(
            CausalConv(heads * head_dim, conv, rngs=rngs, axis_name="heads")
            for _ in range(2 if conv else 0)
        )
        self.rate = _Readout(heads, head_dim, initial=0.1, rngs=rngs)
        self.retain = _Readout(heads, head_dim, initial=0.999, rngs=rngs)
        self.projections = shell.InitialWeights(
            self.projection_rule, SOURCES * heads, head_dim, rngs=rngs
        )
        self.memory = shell.InitialWeights(self.rule, heads, head_dim, rngs=rngs)

    def start(self, batch: int) -> SelfReferentialState:
        """The state before the first token.

        Args:
            batch: B.
        """
        projections = miras.start(self.projection_rule, self.projections(), batch)
        memory = miras.start(self.rule, self.memory(), batch)
        convs = tuple(conv.start(batch, memory.weights[0].dtype) for conv in self.convs)
        nothing = jnp.zeros((batch, self.heads))
        stats = MemoryStats(nothing, nothing, None, nothing)
        return jax.tree.map(jnp.copy, SelfReferentialState(projections, memory, convs, stats))

    def __call__(
        self,
        x: Float[Array, "B T E"],
        state: SelfReferentialState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], SelfReferentialState]:
        """Reads and learns x, going on from `state`.

        Args:
            x: [B, T, dim].
            state: what the tokens before left; None = `start(B)`.
            segment_ids: document of each token [B, T]; all memories restart where it changes.
            positions: not used; there for the mixers' one signature.
        Returns:
            [B, T, dim] in the dtype of x, and the state after the last token.
        Raises:
            ValueError: x, the state or segment_ids do not fit.
            TypeError: the state is not one of a `SelfReferentialMemory`.
        """
        shell.check_inputs(x, self.dim, segment_ids, positions)
        fresh = state is None
        state = shell.go_on(self, state, SelfReferentialState, x.shape[0])
        (content, query), convs = shell.project(
            x, (self.content, self.query), self.convs, state.convs, segment_ids, ("heads",) * 2
        )
        tokens = (content, unit(query), segment_ids)
        carry, (y, surprise, lr, retain) = self._in_tiles(
            (state.projections, state.memory), tokens, whole=fresh and segment_ids is None
        )
        y = constrain(y, ("batch", "time", "heads", "kv"))
        y = self.norm(y) * jax.nn.silu(self.gate(x))
        state = SelfReferentialState(*carry, convs, shell.stats(surprise, lr, None, retain))
        return constrain(self.out(y), ("batch", "time", "embed")), state

    def _in_tiles(self, carry, tokens, *, whole: bool):
        """All tokens in tiles of the smaller chunk, and what is left of the last."""
        length = tokens[0].shape[1]
        size = min(self.rule.chunk, self.projection_rule.chunk, length)
        count = length // size
        outputs = []
        if count:
            tiles = jax.tree.map(
                lambda z: jnp.moveaxis(
                    z[:, : count * size].reshape(z.shape[0], count, size, *z.shape[2:]), 1, 0
                ),
                tokens,
            )
            carry, found = grouped_scan(lambda c, t: self._tile(c, t, whole=whole), carry, tiles)
            outputs.append(jax.tree.map(lambda z: _unfold(z, count * size), found))
        if count * size < length:
            rest = jax.tree.map(lambda z: z[:, count * size :], tokens)
            carry, found = self._tile(carry, rest, whole=whole)
            outputs.append(found)
        return carry, jax.tree.map(lambda *z: jnp.concatenate(z, axis=1), *outputs)

    def _tile(self, carry, tokens, *, whole: bool):
        """No more tokens than a chunk has; `whole`: none begins among them but with the first."""
        projections, memory = carry
        ids = tokens[2]
        time = tokens[0].shape[1]
        begins = jnp.zeros(tokens[0].shape[:2], bool)
        if ids is not None:
            begins = documents.starts(ids, memory.segment)

        def inside(carry):
            return self._learn(carry, tokens, begins, inside=True)

        def across(carry):
            return self._learn(carry, tokens, begins, inside=False)

        if whole or time == 1:
            return inside(carry)
        fits = (
            jnp.all(projections.place + time <= self.projection_rule.chunk)
            & jnp.all(memory.place + time <= self.rule.chunk)
            & ~jnp.any(begins[:, 1:])
        )
        return jax.lax.cond(fits, inside, across, carry)

    def _learn(self, carry, tokens, begins: Bool[Array, "B C"], *, inside: bool):
        """A tile: (projections, memory), (y, surprise, lr, retain).

        What the memories give depends on the weights that their chunk began with. Where a chunk
        ends inside the tile, its tokens are learned for that alone, before all are learned.
        """
        content, query, ids = tokens
        projections, memory = carry

        def generate(at):
            """(k, v, gates, targets), with the projections' weights as `at` says."""
            z = at(jnp.repeat(content, SOURCES, axis=2))
            z = z.reshape(*content.shape[:3], SOURCES, self.head_dim)
            k, v = unit(z[..., 0, :]), unit(z[..., 1, :])
            gates = miras.Gates(
                lr=self.lr_max * self.rate(z[..., 2, :]), retain=self.retain(z[..., 3, :])
            )
            return k, v, gates, at(jnp.repeat(v, SOURCES, axis=2))

        def spread(k, gates):
            return jnp.repeat(k, SOURCES, axis=2), jax.tree.map(
                lambda g: jnp.repeat(g, SOURCES, axis=2), gates
            )

        at = _Bases(self.projection_rule, projections, begins, inside)
        k, v, gates, targets = generate(at)
        if not inside:
            keys, rates = spread(k, gates)
            at.learn_chunk(keys, targets, rates)
            k, v, gates, targets = generate(at)
        keys, rates = spread(k, gates)
        options = {"segment_ids": ids, "aligned": inside, "block": k.shape[1]}
        _, _, projections = miras.trace(
            self.projection_rule, projections, keys, keys, targets, rates, loss=False, **options
        )
        at = _Bases(self.rule, memory, begins, inside)
        target = at(v)
        if not inside:
            at.learn_chunk(k, target, gates)
            target = at(v)
        y, surprise, memory = miras.trace(self.rule, memory, query, k, target, gates, **options)
        return (projections, memory), (y, surprise, gates.lr, gates.retain)


class _Bases:
    """The weights that the chunk of each token of a tile began with, and what they answer.

    A tile is no longer than a chunk, so there are three: those of the chunk in progress, those
    after it, and those that documents start from.
    """

    def __init__(
        self, rule: miras.Rule, state: miras.State, begins: Bool[Array, "B C"], inside: bool
    ):
        self.rule, self.state, self.inside = rule, state, inside
        started = jnp.cumsum(begins, axis=1) > 0
        index = jnp.arange(begins.shape[1])
        self.ends = ~started & (state.place[:, None] + index < rule.chunk)
        self.started = started
        self.following = state.began

    def __call__(self, x: Float[Array, "B C H D"]) -> Float[Array, "B C H D"]:
        """`M(x; W')` of every token."""
        begin = self.state.begin.weights
        if self.inside:
            return self._read(documents.choose(self.started[:, 0], begin, self.state.began), x)
        found = (self._read(base, x) for base in (self.state.began, self.following))
        first, second = found
        y = jnp.where(self.ends[..., None, None], first, second)
        fresh = documents.choose(jnp.ones_like(self.started[:, 0]), begin, self.state.began)
        return jnp.where(self.started[..., None, None], self._read(fresh, x), y)

    def learn_chunk(self, k, targets, gates: miras.Gates) -> None:
        """Finds the weights after the chunk in progress: its tokens are learned alone."""
        ends = self.ends[..., None]
        gates = gates._replace(
            lr=jnp.where(ends, gates.lr, 0), retain=jnp.where(ends, gates.retain, 1)
        )
        _, _, state = miras.trace(
            self.rule, self.state, k, k, targets, gates, block=k.shape[1], loss=False
        )
        self.following = state.began

    def _read(self, weights, x):
        return miras.read(self.rule, self.state._replace(weights=weights), x)


def _unfold(x, length: int):
    """[N, B, C, ...] to [B, N C, ...]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], length, *x.shape[3:])


class _Readout(nnx.Module):
    """A gate of each head from an answer of its memory: `sigmoid(z . w + b)` in fp32."""

    def __init__(self, heads: int, channels: int, *, initial: float, rngs: nnx.Rngs):
        weight = 0.1 * jax.random.normal(rngs.params(), (heads, channels)) / channels**0.5
        self.weight = nnx.Param(weight, axes=("heads", "kv"))
        offset = jnp.full((heads,), math.log(initial / (1 - initial)), float)
        self.bias = nnx.Param(offset, axes=("heads",))

    def __call__(self, z):
        wide = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        return jax.nn.sigmoid(jnp.sum(wide * self.weight[...], axis=-1) + self.bias[...])
