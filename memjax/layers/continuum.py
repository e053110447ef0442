"""A continuum of memories: MLPs that learn at test time, each less often than the one before."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memjax import checks, miras
from memjax.layers import shell
from memjax.layers.gates import GateHead
from memjax.layers.linear import Linear
from memjax.layers.norm import RMSNorm
from memjax.layers.statistics import MemoryStats
from memjax.miras.features import unit
from memjax.sharding import constrain
from memjax.typing import Array, Float, Int


class ContinuumState(NamedTuple):
    """What `ContinuumMemory` carries.

    Attributes:
        levels: the MLP of each level.
        stats: means of surprise and rates of the first level over the tokens of the last call.
    """

    levels: tuple[miras.State, ...]
    stats: MemoryStats


class ContinuumMemory(nnx.Module):
    """A chain of MLPs that learn at test time, each less often than the one before it.

        h_0 = x,    z = RMSNorm(h_{l-1}),    h_l = h_{l-1} + M_l(z),    M(z) = gelu(z W_1) W_2
        y   = h_L - x                                               (a block adds it to x)

    and after every `periods[l]` tokens of a document, one step with the sum over them,

        W <- W - sum_t lr_t grad 1/2 ||M(k_t; W) - v_t||^2
        k = sqrt(E) unit(z W_k),    v = z W_v,    lr = lr_max sigmoid(z w + b) / (C E)

    Before its first step a level is a plain MLP; it takes the place of a feed-forward layer.

    Args:
        dim: model dimension E.
        periods: tokens C between two steps of each level.
        expansion: hidden units over dim.
        lr_max: the largest inner learning rate, of the mean over the period.
        rngs: the stream `params` draws the weights.
    Raises:
        ValueError: sizes that do not fit.
    Source: nested learning (arXiv:2512.24695), equations 70 and 71. The paper takes the gradient of
        the whole model's loss; a layer has its own, that of its keys and values
        (docs/deviations.md).
    """

    def __init__(
        self,
        dim: int,
        *,
        periods: tuple[int, ...] = (512, 2048),
        expansion: int = 4,
        lr_max: float = 1.0,
        rngs: nnx.Rngs,
    ):
        shell.check_sizes(dim=dim)
        if not isinstance(periods, Sequence) or not periods:
            raise ValueError(f"periods {periods!r} must be a tuple, of an integer for each level")
        for i, period in enumerate(periods):
            checks.whole(f"periods[{i}]", period)
        checks.real("lr_max", lr_max, above=0.0)
        self.dim = dim
        self.levels = nnx.List(
            _Level(dim, period, expansion, lr_max, rngs=rngs) for period in periods
        )

    def start(self, batch: int) -> ContinuumState:
        """The state before the first token.

        Args:
            batch: B.
        """
        levels = tuple(level.start(batch) for level in self.levels)
        nothing = jnp.zeros((batch, 1))
        state = ContinuumState(levels, MemoryStats(nothing, nothing, None, None))
        return jax.tree.map(jnp.copy, state)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        state: ContinuumState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], ContinuumState]:
        """Reads and learns x, going on from `state`.

        Args:
            x: [B, T, dim].
            state: what the tokens before left; None = `start(B)`.
            segment_ids: document of each token [B, T]; all levels restart where it changes.
            positions: not used; there for the mixers' one signature.
        Returns:
            [B, T, dim] in the dtype of x, and the state after the last token.
        Raises:
            ValueError: x, the state or segment_ids do not fit.
            TypeError: the state is not one of a `ContinuumMemory`.
        """
        shell.check_inputs(x, self.dim, segment_ids, positions)
        state = shell.go_on(self, state, ContinuumState, x.shape[0])
        y, after, stats = jnp.zeros_like(x), [], state.stats
        for i, (level, before) in enumerate(zip(self.levels, state.levels, strict=True)):
            found, surprise, lr, memory = level(x + y, before, segment_ids)
            y = constrain(y + found, ("batch", "time", "embed"))
            after.append(memory)
            if i == 0:
                stats = shell.stats(surprise, lr, None, None)
        return y, ContinuumState(tuple(after), stats)


class _Level(nnx.Module):
    """One level of a `ContinuumMemory`."""

    def __init__(self, dim: int, period: int, expansion: int, lr_max: float, *, rngs: nnx.Rngs):
        self.rule = miras.zoo.continuum(expansion=expansion, chunk=period)
        self.scale = lr_max / (period * dim)
        self.norm = RMSNorm(dim, rngs=rngs)
        self.key = Linear(dim, dim, axes=("embed", None), rngs=rngs)
        self.value = Linear(dim, dim, axes=("embed", None), rngs=rngs)
        self.rate = GateHead(dim, 1, initial=0.1, axis=None, rngs=rngs)
        axes = (None, "embed", "memory_hidden"), (None, "memory_hidden", "embed")
        self.weights = shell.InitialWeights(self.rule, 1, dim, axes=axes, rngs=rngs)

    def start(self, batch: int) -> miras.State:
        return miras.start(self.rule, self.weights(), batch)

    def __call__(self, x, state: miras.State, segment_ids):
        z = self.norm(x)
        k = (x.shape[-1] ** 0.5 * unit(self.key(z))).astype(z.dtype)
        v, lr = self.value(z), self.scale * self.rate(z)
        heads = (a[:, :, None] for a in (z, k, v))
        gates = miras.Gates(lr=lr)
        y, surprise, state = miras.trace(self.rule, state, *heads, gates, segment_ids=segment_ids)
        return y[:, :, 0], surprise, lr, state
