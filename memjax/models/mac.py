"""Memory as context: attention over a segment and over what the memory recalls for it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from memjax import documents, sharding
from memjax.layers import Linear, NeuralMemory, NeuralMemoryState, rotary, shell
from memjax.miras.forms.chunkwise import axes_of
from memjax.miras.forms.remat import grouped_scan
from memjax.models import remat
from memjax.models.combine import Combine
from memjax.sharding import constrain
from memjax.typing import Array, Bool, Float, Int

HEADS = ("batch", "time", "heads", "kv")


class MemoryAsContextState(NamedTuple):
    """What `MemoryAsContext` carries: of constant size.

    Attributes:
        memory: the long-term memory.
        recalled: its fast weights when the segment began, each [B, H, ...].
        keys, values: of the segment so far, recalled tokens first, [B, 2, S, H, D]; 0 where there
            are none.
        slot: tokens of the segment so far, below S, [B].
        segment: id of the last token, -1 when there was none, [B].
        position: position of the next token in its document, [B].
    """

    memory: NeuralMemoryState
    recalled: tuple[Array, ...]
    keys: Float[Array, "B 2 S H D"]
    values: Float[Array, "B 2 S H D"]
    slot: Int[Array, " B"]
    segment: Int[Array, " B"]
    position: Int[Array, " B"]


class MemoryAsContext(nnx.Module):
    """MAC: per segment of S tokens, recall, attend, write, read again.

        h = M_{s-1}(x W_Q)                       the memory as the segment began, nothing written
        y = Attention over [P | h | x]           persistent, recalled and own tokens
        M_s = M_{s-1} written with y
        o = Combine(y, M_s(y))

    Token t sees the persistent tokens, its segment up to itself, and what was recalled for the
    tokens up to itself: h_j depends on token j, so that a full view of h would show the future. A
    recalled token has the rotary position of the token it was recalled for.

    Segments are counted from the beginning of each document. Where documents and calls begin at
    multiples of S (`align` of `memjax.data`; prompts read in such parts), whole segments are
    computed at once; elsewhere the same result comes token by token, which is much slower.

    Args:
        memory: long-term memory.
        dim: model dimension.
        heads: heads of attention.
        head_dim: their dimension (default dim / heads).
        segment: S.
        persistent: P, learned tokens in front of every segment.
        rope_base: of the rotary positions.
        combine: see `Combine`.
        remat: whether the backward pass computes every segment again, and keeps of them only the
            memory as each began and their outputs.
        rngs: the stream `params` draws the weights.
    Raises:
        ValueError: sizes that do not fit.
    Source: Titans (arXiv:2501.00663), section 4.1, equations 21 to 25.
    """

    def __init__(
        self,
        memory: NeuralMemory,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        *,
        segment: int,
        persistent: int = 0,
        rope_base: float = 10000.0,
        combine: str = "gate",
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        head_dim = shell.head_size(dim, heads, head_dim)
        shell.check_sizes(segment=segment)
        shell.check_sizes(0, persistent=persistent)
        self.memory, self.segment, self.rope_base = memory, segment, rope_base
        self.remat = remat
        self.heads, self.head_dim = heads, head_dim
        into = ("embed", "heads", "kv")
        self.query = Linear(dim, (heads, head_dim), axes=into, rngs=rngs)
        self.key = Linear(dim, (heads, head_dim), axes=into, rngs=rngs)
        self.value = Linear(dim, (heads, head_dim), axes=into, rngs=rngs)
        self.output = Linear((heads, head_dim), dim, axes=("heads", "kv", "embed"), rngs=rngs)
        self.combine = Combine(dim, combine, rngs=rngs)
        if persistent:
            tokens = jax.random.normal(rngs.params(), (persistent, dim))
            self.persistent = nnx.Param(tokens, axes=("persistent", "embed"))
        else:
            self.persistent = None

    def start(self, batch: int) -> MemoryAsContextState:
        """The state before the first token."""
        memory = self.memory.start(batch)
        cache = jnp.zeros((batch, 2, self.segment, self.heads, self.head_dim))
        # each its own array: a caller may donate them
        return MemoryAsContextState(
            memory=memory,
            recalled=jax.tree.map(jnp.copy, memory.memory.weights),
            keys=cache,
            values=jnp.copy(cache),
            slot=jnp.zeros(batch, jnp.int32),
            segment=jnp.full(batch, -1, jnp.int32),
            position=jnp.zeros(batch, jnp.int32),
        )

    def __call__(
        self,
        x: Float[Array, "B T E"],
        state: MemoryAsContextState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], MemoryAsContextState]:
        """Mixes the tokens of x, going on from `state`; arguments as for every mixer."""
        shell.check_inputs(x, self.query.inputs[0], segment_ids, positions)
        alone = state is None and segment_ids is None
        state = shell.go_on(self, state, MemoryAsContextState, x.shape[0])
        tokens = self._tokens(x, state, segment_ids, positions)
        if x.shape[1] == 1:
            return self._piece(self._own(tokens), state, self._prefix(x.dtype))
        rows, whole = PartitionSpec("batch"), PartitionSpec()
        memory = NeuralMemoryState(axes_of(state.memory.memory), rows, rows)
        states = MemoryAsContextState(memory, *[rows] * (len(state) - 1))
        aligned = None
        if not alone:  # of all rows: devices that share a row must take one path
            inside = jnp.arange(x.shape[1]) % self.segment != 0
            aligned = jnp.all(state.slot == 0) & ~jnp.any(tokens.new & inside)
        # Each device goes through the segments of its own rows: the weights are gathered, and their
        # gradients added up, once and not for every segment.
        y, state = sharding.on_each_device(
            _read,
            (self, tokens, state, aligned),
            (whole, rows, states, whole),
            (rows, states),
            dims={"batch": x.shape[0]},
            rest="compiler",
        )
        return remat.keep(y), state

    def _tokens(self, x, state, segment_ids, positions) -> "Tokens":
        if positions is None:
            place = documents.follow(segment_ids, state.segment, state.position, x.shape[1])
            positions = place.index
        if segment_ids is None:
            new = jnp.zeros(x.shape[:2], bool)
            segment_ids = jnp.broadcast_to(state.segment[:, None], x.shape[:2])
        else:
            new = documents.starts(segment_ids, state.segment)
        return Tokens(x, new, segment_ids.astype(jnp.int32), positions.astype(jnp.int32))

    def _own(self, tokens: "Tokens") -> "Own":
        """What no segment has to wait for."""
        x, *rest = tokens
        q, k = (rotary(to(x), tokens.positions, self.rope_base) for to in (self.query, self.key))
        return Own(self.memory.ask(x), q, k, self.value(x), *rest)

    def _prefix(self, dtype) -> tuple[Float[Array, "1 P H D"], Float[Array, "1 P H D"]] | None:
        """Keys and values of the persistent tokens."""
        if self.persistent is None:
            return None
        prefix = self.persistent[...].astype(dtype)[None]
        return self.key(prefix), self.value(prefix)

    def _by_segments(self, tokens: "Own", state: MemoryAsContextState, prefix):
        """Tokens from the beginning of a segment on: whole segments, then the rest."""
        length = tokens.q.shape[1]
        whole = length - length % self.segment
        outputs = []
        if whole:

            def fold(z):
                return jnp.moveaxis(
                    z[:, :whole].reshape(z.shape[0], -1, self.segment, *z.shape[2:]), 1, 0
                )

            def body(state, tokens):
                y, state = self._piece(tokens, self._filled(state, given), prefix)
                return self._bare(state), y

            def body_again(state, tokens):
                return jax.checkpoint(body, prevent_cse=False)(remat.keep(state), tokens)

            given = state
            run = body_again if self.remat else body
            state, y = jax.lax.scan(run, self._bare(state), jax.tree.map(fold, tokens))
            state = self._filled(state, given)
            outputs.append(jnp.moveaxis(y, 0, 1).reshape(*y.shape[1:2], whole, y.shape[-1]))
        if whole < length:
            rest = jax.tree.map(lambda z: z[:, whole:], tokens)
            y, state = self._piece(rest, state, prefix)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1), state

    def _bare(self, state: MemoryAsContextState) -> MemoryAsContextState:
        """A state between two segments without what `_filled` puts back."""
        memory = state.memory.memory
        if self.segment % self.memory.rule.chunk == 0:
            memory = memory._replace(base=())
        memory = memory._replace(begin=(), slow={})
        memory = state.memory._replace(memory=memory)
        return state._replace(memory=memory, recalled=(), keys=(), values=())

    def _filled(self, state: MemoryAsContextState, like: MemoryAsContextState):
        """A state as a segment begins, of a `_bare` one; with the parts that `like` has."""
        given = like.memory.memory
        memory = state.memory.memory._replace(begin=given.begin, slow=given.slow)
        shape = (state.slot.shape[0], 2, self.segment, self.heads, self.head_dim)
        if given.base:
            memory = memory._replace(base=memory.began)
        return state._replace(
            memory=state.memory._replace(memory=memory),
            recalled=memory.weights,
            keys=jnp.zeros(shape),
            values=jnp.zeros(shape),
        )

    def _by_tokens(self, tokens: "Own", state: MemoryAsContextState, prefix):
        def body(state, token):
            y, state = self._piece(jax.tree.map(lambda z: z[:, None], token), state, prefix)
            return state, y[:, 0]

        tokens = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), tokens)
        state, y = grouped_scan(body, state, tokens, levels=2)
        return jnp.moveaxis(y, 0, 1), state

    def _piece(self, tokens: "Own", state: MemoryAsContextState, prefix):
        """Tokens of one segment: a single one anywhere in it, or several from its start."""
        asked, q, own_k, own_v, new, ids, positions = tokens
        batch, length = q.shape[:2]
        slot = jnp.where(new[:, 0], 0, state.slot)
        complete = slot + length == self.segment
        # Unless the backward pass computes whole segments again, it does so with what would keep
        # much: masks of every entry, the memory's wide layers, angles, scores.
        again = (lambda run: run) if self.remat else jax.checkpoint
        choose = again(documents.choose)
        recalled = choose(new[:, 0], state.memory.memory.begin.weights, state.recalled)
        h = again(self.memory.answer)(asked, state.memory, recalled)
        turn = again(functools.partial(rotary, base=self.rope_base))
        k, v = (turn(self.key(h), positions), own_k), (self.value(h), own_v)

        # Several tokens begin the segment and see one another; one looks at the cache as well.
        if length == 1:
            here = jnp.arange(self.segment) == slot[:, None]
            keys, values = (
                jnp.where(
                    here[:, None, :, None, None],
                    jnp.stack(z, axis=1).astype(cache.dtype),
                    choose(new[:, 0], jnp.zeros_like(cache), cache),
                )
                for z, cache in ((k, state.keys), (v, state.values))
            )
            visible = jnp.arange(self.segment) <= slot[:, None, None]
            k, v = ((z[:, 0].astype(q.dtype), z[:, 1].astype(q.dtype)) for z in (keys, values))
        else:
            keys, values = (
                cache.at[:, :, :length].set(jnp.stack(z, axis=1).astype(cache.dtype))
                for z, cache in ((k, state.keys), (v, state.values))
            )
            visible = jnp.tril(jnp.ones((length, length), bool))
            visible = jnp.broadcast_to(visible, (batch, length, length))
        y = again(self._attend)(q, k, v, visible, prefix)
        y = constrain(self.output(y), ("batch", "time", "embed"))
        # Chunks are counted from document starts, as segments are.
        aligned = self.segment % self.memory.rule.chunk == 0
        m, memory = self.memory(y, state.memory, segment_ids=ids, aligned=aligned)
        state = MemoryAsContextState(
            memory=memory,
            recalled=choose(complete, memory.memory.weights, recalled),
            keys=choose(complete, jnp.zeros_like(keys), keys),
            values=choose(complete, jnp.zeros_like(values), values),
            slot=(slot + length) % self.segment,
            segment=ids[:, -1],
            position=positions[:, -1] + 1,
        )
        return self.combine(y, m), state

    def _attend(self, q, k, v, visible, prefix):
        """Attention over [P | recalled | own]; `visible` of the recalled and of the own tokens."""
        batch, length = q.shape[:2]
        masks = [visible, visible]
        if prefix is not None:
            first = [jnp.broadcast_to(z, (batch, *z.shape[1:])) for z in prefix]
            k, v = ((p, *z) for p, z in zip(first, (k, v), strict=True))
            masks.insert(0, jnp.ones((batch, length, first[0].shape[1]), bool))
        k, v, mask = (jnp.concatenate(z, axis) for z, axis in ((k, 1), (v, 1), (masks, -1)))
        q, k, v = (constrain(z, HEADS) for z in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def _read(layer: MemoryAsContext, tokens: "Tokens", state: MemoryAsContextState, aligned):
    """Several tokens; `aligned`: whether segments begin where they should, None = they do."""
    own, prefix = layer._own(tokens), layer._prefix(tokens.x.dtype)
    if aligned is None:
        return layer._by_segments(own, state, prefix)
    # What the way not taken would keep for the backward pass is filled with zeros: keep little.
    by_tokens = jax.checkpoint(layer._by_tokens)
    return jax.lax.cond(aligned, layer._by_segments, by_tokens, own, state, prefix)


class Tokens(NamedTuple):
    """Tokens and where documents start; positions count inside documents."""

    x: Float[Array, "B T E"]
    new: Bool[Array, "B T"]
    ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]


class Own(NamedTuple):
    """Tokens as their segments need them: what they ask the memory, and for attention."""

    asked: Float[Array, "B T M K"]
    q: Float[Array, "B T H D"]
    k: Float[Array, "B T H D"]
    v: Float[Array, "B T H D"]
    new: Bool[Array, "B T"]
    ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
