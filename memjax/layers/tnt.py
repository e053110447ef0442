"""TNT: a memory over everything in large chunks, and memories of short shards in small ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memjax import checks, documents, miras
from memjax.layers import shell
from memjax.layers.conv import CausalConv, ConvState
from memjax.layers.gates import GateHead
from memjax.layers.linear import Linear
from memjax.layers.norm import RMSNorm
from memjax.layers.statistics import MemoryStats
from memjax.miras.features import unit
from memjax.sharding import constrain
from memjax.typing import Array, Float, Int


class TNTState(NamedTuple):
    """What `TNTMemory` carries.

    Attributes:
        overall: the global memory.
        local: the local memories.
        keys: the sum of k k^T since each shard began, as a matrix memory.
        convs: inputs of the convolutions of queries, keys and values.
        segment: document of the last token, -1 when there was none, [B].
        seen: tokens of the document so far, [B].
        stats: means of surprise and gates of the global memory over the last call.
    """

    overall: miras.State
    local: tuple[miras.State, ...]
    keys: miras.State
    convs: tuple[ConvState, ...]
    segment: Int[Array, " B"]
    seen: Int[Array, " B"]
    stats: MemoryStats


class TNTMemory(nnx.Module):
    """A global deep memory and local ones that restart at every shard.

        y_t = M(q_t; W at the global chunk's start) + sum_i M(q_t P_t; W^i_t),
        P_t = sum of k k^T since the shard began (k of unit length)

    The global memory changes once in `chunk` tokens; local memory i takes its gradients every
    `local_chunks[i]` tokens and begins anew, from weights of its own that are learned, every
    `shard` tokens of a document. So shards depend on each other through the global memory alone.
    A row is read in order here; its shards are not spread over devices.

    Stage 1 trains with chunks that the hardware likes. Stage 2 goes on for a few steps with smaller
    `local_chunks`: the parameters are the same, so a checkpoint of the one is one of the other (and
    a state too, where a shard begins).

    Args:
        dim: model dimension E.
        heads: heads H.
        head_dim: dimension of keys and values (default dim / heads).
        chunk: tokens between two steps of the global memory.
        local_chunks: chunk of each local memory; () for none.
        shard: tokens after which local memories begin anew.
        expansion: of the memory networks `x + LN(gelu(x W_1) W_2)`.
        conv: width of the depthwise causal convolutions, 0 for none.
        lr_max: the largest inner learning rate.
        rngs: the stream `params` draws the weights.
    Raises:
        ValueError: sizes that do not fit.
    Source: TNT (arXiv:2511.07343), equations 5 to 8; no momentum and no decay, as there.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        *,
        chunk: int = 2048,
        local_chunks: tuple[int, ...] = (8, 16),
        shard: int = 2048,
        expansion: int = 4,
        conv: int = 4,
        lr_max: float = 0.1,
        rngs: nnx.Rngs,
    ):
        head_dim = shell.head_size(dim, heads, head_dim)
        shell.check_sizes(chunk=chunk, shard=shard)
        shell.check_sizes(0, conv=conv)
        for i, size in enumerate(local_chunks):
            checks.whole(f"local_chunks[{i}]", size)
        if any(shard % size for size in local_chunks):
            raise ValueError(f"shard {shard} must be a multiple of each of {local_chunks}")
        checks.real("lr_max", lr_max, above=0.0)
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.shard, self.lr_max = shard, lr_max
        structure = miras.mlp(expansion=expansion, norm=True, residual=True)
        parts = (structure, miras.l2(), miras.none(), miras.gd())
        self.rule = miras.Rule(*parts, chunk=chunk, read="chunk")
        self.local_rules = tuple(miras.Rule(*parts, chunk=size) for size in local_chunks)

        def project() -> Linear:
            return Linear(dim, (heads, head_dim), axes=("embed", "heads", "kv"), rngs=rngs)

        self.query, self.key, self.value, self.gate = project(), project(), project(), project()
        self.out = Linear((heads, head_dim), dim, axes=("heads", "kv", "embed"), rngs=rngs)
        self.norm = RMSNorm(head_dim, rngs=rngs, axis_name="kv")
        self.convs = nnx.List(
            CausalConv(heads * head_dim, conv, rngs=rngs, axis_name="heads")
            for _ in range(3 if conv else 0)
        )
        self.rates = nnx.List(
            GateHead(dim, heads, initial=0.1, rngs=rngs) for _ in range(1 + len(local_chunks))
        )
        self.memories = nnx.List(
            shell.InitialWeights(self.rule, heads, head_dim, rngs=rngs)
            for _ in range(1 + len(local_chunks))
        )

    def start(self, batch: int) -> TNTState:
        """The state before the first token.

        Args:
            batch: B.
        """
        rules = (self.rule, *self.local_rules)
        overall, *local = (
            miras.start(rule, weights(), batch, dims=(self.head_dim, self.head_dim))
            for rule, weights in zip(rules, self.memories, strict=True)
        )
        square = miras.zoo.linear_attention()
        plain = square.init(jax.random.key(0), self.head_dim, self.head_dim)
        keys = miras.start(square, plain, batch, self.heads)
        convs = tuple(conv.start(batch, overall.weights[0].dtype) for conv in self.convs)
        nothing = jnp.zeros((batch, self.heads))
        stats = MemoryStats(nothing, nothing, None, None)
        fresh, seen = jnp.full((batch,), -1, jnp.int32), jnp.zeros((batch,), jnp.int32)
        state = TNTState(overall, tuple(local), keys, convs, fresh, seen, stats)
        return jax.tree.map(jnp.copy, state)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        state: TNTState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], TNTState]:
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
            TypeError: the state is not one of a `TNTMemory`.
        """
        shell.check_inputs(x, self.dim, segment_ids, positions)
        state = shell.go_on(self, state, TNTState, x.shape[0])
        q, k, v, convs = self._project(x, state.convs, segment_ids)
        place = documents.follow(segment_ids, state.segment, state.seen, x.shape[1])
        shards = self._shards(place)
        lr = [self.lr_max * rate(x) for rate in self.rates]
        y, surprise, overall = miras.trace(
            self.rule, state.overall, q, k, v, miras.Gates(lr=lr[0]), segment_ids=segment_ids
        )
        ones = miras.Gates(lr=jnp.ones_like(lr[0]))
        turned, keys = miras.chunkwise(
            miras.zoo.linear_attention(),
            self._joined(state.keys),
            q,
            k,
            k,
            ones,
            segment_ids=shards,
        )
        local = []
        for rule, before, rate in zip(self.local_rules, state.local, lr[1:], strict=True):
            found, after = miras.chunkwise(
                rule, self._joined(before), turned, k, v, miras.Gates(lr=rate), segment_ids=shards
            )
            y = y + found
            local.append(after)
        y = self.norm(y) * jax.nn.silu(self.gate(x))
        y = self.out(constrain(y, ("batch", "time", "heads", "kv")))
        state = TNTState(
            overall, tuple(local), keys, convs, place.last, place.seen,
            shell.stats(surprise, lr[0], None, None),
        )  # fmt: skip
        return constrain(y, ("batch", "time", "embed")), state

    def _shards(self, place: documents.Documents) -> Int[Array, "B T"]:
        """A number for every shard of the call, 0 for the one in progress."""
        begins = (place.index % self.shard == 0) & (place.index > 0)
        first = jnp.diff(place.number, prepend=0, axis=1) != 0
        return jnp.cumsum(begins | first, axis=1, dtype=jnp.int32)

    @staticmethod
    def _joined(state: miras.State) -> miras.State:
        """The state as one of shard 0 of this call."""
        return state._replace(segment=jnp.zeros_like(state.segment))

    def _project(self, x, convs, segment_ids):
        """Queries, keys and values of x, and the convolutions' states."""
        projections = (self.query, self.key, self.value)
        (q, k, v), states = shell.project(
            x, projections, self.convs, convs, segment_ids, silu=(True, True, True)
        )
        return unit(q), unit(k), v, states
