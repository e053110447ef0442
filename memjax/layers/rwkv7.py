"""RWKV-7's time mixing: the exchange rule in the shell of its paper."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memjax import documents, miras
from memjax.layers import shell
from memjax.layers.conv import ConvState
from memjax.layers.linear import Linear
from memjax.layers.norm import RMSNorm
from memjax.layers.statistics import MemoryStats
from memjax.miras.features import unit
from memjax.sharding import constrain
from memjax.typing import Array, Float, Int

_MIXED = ("receptance", "key", "value", "decay", "rate", "gate")
DECAY = math.exp(-0.5)  # the decay is exp(-DECAY sigmoid(.)), never below 0.545


class RWKV7State(NamedTuple):
    """What `RWKV7` carries.

    Attributes:
        memory: the matrices and where they stand, see `miras.State`.
        last: the token before, for the shift.
        stats: means of surprise and gates over the tokens of the last call.
    """

    memory: miras.State
    last: ConvState
    stats: MemoryStats


class RWKV7(nnx.Module):
    """RWKV-7: a matrix per head that erases along one key and writes along another.

        z_r .. z_g = x_t + (x_{t-1} - x_t) o mu_r .. mu_g                       token shift
        r, k, v    = z_r W_r, z_k W_k, z_v W_v
        a          = exp(-e^(-1/2) sigmoid(low(z_d)))                           decay per channel
        b          = sigmoid(low(z_a))                                          rate per channel
        erased     = unit(k o xi),     written = k o (1 + (b - 1) o alpha)
        W_t        = diag(a) W_{t-1} - (b o erased)^T (erased W_{t-1}) + written^T v
        y          = ((norm(r W_t) + (r . (rho o written)) v) o low(z_g)) W_o

    Args:
        dim: model dimension E.
        heads: number of memories H.
        head_dim: dimension of keys and values (default dim / heads).
        rank: of the low-rank maps of decay, rate and gate (default head_dim / 2, at least 8).
        rngs: the stream `params` draws the weights.
    Raises:
        ValueError: sizes that do not fit.
    Source: RWKV-7 (arXiv:2503.14456), section 4; without the value residual across layers, and
        with RMSNorm per head for its group norm (docs/deviations.md).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        *,
        rank: int | None = None,
        rngs: nnx.Rngs,
    ):
        head_dim = shell.head_size(dim, heads, head_dim)
        rank = max(8, head_dim // 2) if rank is None else rank
        shell.check_sizes(rank=rank)
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.rule = miras.zoo.rwkv7()

        def project() -> Linear:
            return Linear(dim, (heads, head_dim), axes=("embed", "heads", "kv"), rngs=rngs)

        def vector(value: float) -> nnx.Param:
            return nnx.Param(jnp.full((heads, head_dim), value, float), axes=("heads", "kv"))

        self.shift = nnx.Dict(
            {name: nnx.Param(jnp.full((dim,), 0.5, float), axes=("embed",)) for name in _MIXED}
        )
        self.receptance, self.key, self.value = project(), project(), project()
        self.out = Linear((heads, head_dim), dim, axes=("heads", "kv", "embed"), rngs=rngs)
        self.decay = _Low(dim, heads, head_dim, rank, jnp.tanh, -1.0, rngs=rngs)
        self.rate = _Low(dim, heads, head_dim, rank, lambda z: z, 0.0, rngs=rngs)
        self.gate = _Low(dim, heads, head_dim, rank, jax.nn.sigmoid, None, rngs=rngs)
        self.erased, self.mixed, self.bonus = vector(1.0), vector(1.0), vector(0.1)
        self.norm = RMSNorm(head_dim, rngs=rngs, axis_name="kv")

    def start(self, batch: int) -> RWKV7State:
        """The state before the first token.

        Args:
            batch: B.
        """
        plain = self.rule.init(jax.random.key(0), self.head_dim, self.head_dim)
        memory = miras.start(self.rule, plain, batch, self.heads)
        last = ConvState(jnp.zeros((batch, 1, self.dim)), jnp.full((batch,), -1, jnp.int32))
        nothing = jnp.zeros((batch, self.heads))
        stats = MemoryStats(nothing, nothing, None, nothing)
        return jax.tree.map(jnp.copy, RWKV7State(memory, last, stats))

    def __call__(
        self,
        x: Float[Array, "B T E"],
        state: RWKV7State | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], RWKV7State]:
        """Reads and learns x, going on from `state`.

        Args:
            x: [B, T, dim].
            state: what the tokens before left; None = `start(B)`.
            segment_ids: document of each token [B, T]; the memory restarts where it changes.
            positions: not used; there for the mixers' one signature.
        Returns:
            [B, T, dim] in the dtype of x, and the state after the last token.
        Raises:
            ValueError: x, the state or segment_ids do not fit.
            TypeError: the state is not one of an `RWKV7`.
        """
        shell.check_inputs(x, self.dim, segment_ids, positions)
        state = shell.go_on(self, state, RWKV7State, x.shape[0])
        before, last = self._before(x, state.last, segment_ids)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        z = {name: x + (before - x) * mu[...].astype(x.dtype) for name, mu in self.shift.items()}
        r, k, v = (
            constrain(project(z[name]), ("batch", "time", "heads", "kv"))
            for project, name in (
                (self.receptance, "receptance"), (self.key, "key"), (self.value, "value"),
            )
        )  # fmt: skip
        retain = jnp.exp(-DECAY * jax.nn.sigmoid(self.decay(z["decay"])))
        rate = jax.nn.sigmoid(self.rate(z["rate"]))
        erased = unit(k * self.erased[...].astype(k.dtype))
        written = k.astype(wide) * (1 + (rate - 1) * self.mixed[...])
        gates = miras.Gates(lr=rate, retain=retain, write=written)
        m, surprise, memory = miras.trace(
            self.rule, state.memory, r, erased, v, gates, segment_ids=segment_ids
        )
        bonus = jnp.sum(r.astype(wide) * self.bonus[...] * written, axis=-1, keepdims=True)
        m = self.norm(m) + (bonus * v).astype(x.dtype)
        m = constrain(m * self.gate(z["gate"]).astype(x.dtype), ("batch", "time", "heads", "kv"))
        y = constrain(self.out(m), ("batch", "time", "embed"))
        return y, RWKV7State(memory, last, shell.stats(surprise, rate, None, retain))

    def _before(self, x, last: ConvState, segment_ids):
        """The token before each in its document (zero where there is none), and the new last."""
        nothing = jnp.zeros_like(last.segment)
        place = documents.follow(segment_ids, last.segment, nothing, x.shape[1])
        before = jnp.concatenate([last.inputs.astype(x.dtype), x[:, :-1]], axis=1)
        if segment_ids is not None:
            number = jnp.pad(place.number, ((0, 0), (1, 0)))
            same = number[:, 1:] == number[:, :-1]
            before = jnp.where(same[..., None], before, 0)
        return before, ConvState(x[:, -1:].astype(last.inputs.dtype), place.last)


class _Low(nnx.Module):
    """`act(x W_1) W_2 + b` per head and channel, in fp32; without b where `offset` is None."""

    def __init__(self, dim, heads, channels, rank, activation, offset, *, rngs: nnx.Rngs):
        self.down = Linear(dim, rank, axes=("embed", None), rngs=rngs)
        self.up = Linear(rank, (heads, channels), axes=(None, "heads", "kv"), rngs=rngs)
        self.activation = activation
        self.offset = (
            None
            if offset is None
            else nnx.Param(jnp.full((heads, channels), offset, float), axes=("heads", "kv"))
        )

    def __call__(self, x):
        y = self.up(self.activation(self.down(x.astype(jnp.promote_types(x.dtype, jnp.float32)))))
        return y if self.offset is None else y + self.offset[...]
