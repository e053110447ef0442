"""The attention mixer: projections, rotary positions, persistent tokens and a cache."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from memjax import checks, documents
from memjax.attention import backends
from memjax.attention import window as windows
from memjax.layers import shell
from memjax.layers.linear import Linear, fan_in_normal
from memjax.layers.norm import RMSNorm
from memjax.layers.rotary import rotary
from memjax.sharding import constrain
from memjax.typing import Array, Float, Int


class AttentionState(NamedTuple):
    """What `Attention` carries; its size does not depend on the position.

    Args:
        cache: keys and values that later tokens may still see.
        position: [B], position of the next token in the running document.
    """

    cache: windows.Cache
    position: Int[Array, "B"]


class Attention(nnx.Module):
    """Causal attention over the last tokens of a document, with sinks and persistent tokens.

        y = softmax(q k^T / sqrt(D)) v W_o,    over [persistent | sinks | window]

    A token sees itself and the `window - 1` tokens before it in its document; with window=None the
    last `context` tokens. All sizes are the same whether a sequence comes whole or in parts.

    Persistent tokens are learned inputs that stand before every document (Titans, equation 26):
    vectors of the model dimension, through the same key and value projections, at position 0, so
    that rotation leaves them as they are. They start at unit deviation, as normalised inputs have.

    Args:
        dim: model dimension E.
        heads: H, heads of queries.
        head_dim: D; None = dim / heads.
        window: tokens that a token sees, itself included; None = `context`.
        context: the capacity of the cache where window is None; unused otherwise.
        sinks: first tokens of each document that stay visible to all of it.
        persistent: P, learned tokens that every token sees.
        kv_heads: heads of keys and values, each shared by heads / kv_heads; None = heads.
        rope_base: base of the rotary wavelengths.
        qk_norm: whether queries and keys are RMS-normalised per head before rotation.
        implementation: None, "xla", "splash" or "cudnn"; see `memjax.attention.backends.choose`.
        rngs: the stream `params` draws the weights.

    Raises:
        ValueError: sizes below 1, heads that do not divide, an odd head_dim, neither window nor
            context, an unknown implementation.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        *,
        window: int | None = None,
        context: int | None = None,
        sinks: int = 0,
        persistent: int = 0,
        kv_heads: int | None = None,
        rope_base: float = 10000.0,
        qk_norm: bool = False,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        kv_heads = heads if kv_heads is None else kv_heads
        head_dim = shell.head_size(dim, heads, head_dim)
        shell.check_sizes(kv_heads=kv_heads)
        if heads % kv_heads:
            raise ValueError(f"heads {heads} must be a multiple of kv_heads {kv_heads}")
        if head_dim % 2:
            raise ValueError(f"head_dim {head_dim} must be even: rotary positions pair features")
        if window is None and context is None:
            raise ValueError("Attention needs a window, or a context (capacity of its cache)")
        self.window = context if window is None else window
        checks.whole("context" if window is None else "window", self.window)
        shell.check_sizes(0, sinks=sinks, persistent=persistent)
        if implementation not in (None, *backends.IMPLEMENTATIONS):
            raise ValueError(
                f"implementation {implementation!r} must be None or one of "
                f"{backends.IMPLEMENTATIONS}"
            )
        self.kv_heads, self.head_dim, self.sinks = kv_heads, head_dim, sinks
        self.rope_base, self.implementation = rope_base, implementation
        into = ("embed", "heads", "kv")
        self.query = Linear(dim, (heads, head_dim), axes=into, rngs=rngs)
        self.key = Linear(dim, (kv_heads, head_dim), axes=into, rngs=rngs)
        self.value = Linear(dim, (kv_heads, head_dim), axes=into, rngs=rngs)
        self.output = Linear((heads, head_dim), dim, axes=("heads", "kv", "embed"), rngs=rngs)
        self.query_norm = RMSNorm(head_dim, axis_name="kv", rngs=rngs) if qk_norm else None
        self.key_norm = RMSNorm(head_dim, axis_name="kv", rngs=rngs) if qk_norm else None
        if persistent:
            tokens = fan_in_normal(rngs.params(), (persistent, dim), 1)
            self.persistent = nnx.Param(tokens, axes=("persistent", "embed"))
        else:
            self.persistent = None

    def start(self, batch: int, dtype: DTypeLike = jnp.float32) -> AttentionState:
        """The state before the first token.

        Args:
            batch: B.
            dtype: of the cached keys and values; a call keeps the dtype of the state it is given,
                so that bfloat16 halves the cache of a bfloat16 model at no loss.

        Returns:
            An `AttentionState`.
        """
        cache = windows.start(
            batch,
            self.kv_heads,
            self.head_dim,
            window=self.window,
            sinks=self.sinks,
            dtype=dtype,
        )
        return AttentionState(cache, jnp.zeros((batch,), jnp.int32))

    def __call__(
        self,
        x: Float[Array, "B T E"],
        state: AttentionState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], AttentionState]:
        """Mixes the tokens of x, going on from `state`.

        Args:
            x: [B, T, E].
            state: what the tokens before left; None = `start(B)`, known to be empty, which
                skips the cache.
            segment_ids: [B, T]; a change starts a document. None = one document.
            positions: [B, T], for rotation only; None = counted on from the state, from 0 in each
                document.

        Returns:
            [B, T, E] in the dtype of x, and the state after the last token.

        Raises:
            ValueError: x or the state do not fit, or the implementation cannot compute the call.
            TypeError: the state is not one of an `Attention`.
        """
        shell.check_inputs(x, self.query.inputs[0], segment_ids, positions)
        before = shell.go_on(self, state, AttentionState, x.shape[0])
        if positions is None:
            cache = before.cache
            place = documents.follow(segment_ids, cache.segment, before.position, x.shape[1])
            positions = place.index
        q, k = self._queries(x), self._keys(x)
        q = rotary(q, positions, self.rope_base)
        k = rotary(k, positions, self.rope_base)
        heads = ("batch", "time", "heads", "kv")
        y, cache = windows.attend(
            constrain(q, heads),
            constrain(k, heads),
            constrain(self.value(x), heads),
            None if state is None else state.cache,
            window=self.window,
            sinks=self.sinks,
            prefix=self._prefix(x.dtype),
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        y = constrain(self.output(constrain(y, heads)), ("batch", "time", "embed"))
        return y, AttentionState(cache, positions[:, -1].astype(jnp.int32) + 1)

    def _queries(self, x: Array) -> Array:
        q = self.query(x)
        return q if self.query_norm is None else self.query_norm(q)

    def _keys(self, x: Array) -> Array:
        k = self.key(x)
        return k if self.key_norm is None else self.key_norm(k)

    def _prefix(self, dtype) -> windows.Prefix | None:
        if self.persistent is None:
            return None
        tokens = self.persistent[...].astype(dtype)
        return windows.Prefix(self._keys(tokens), self.value(tokens))
