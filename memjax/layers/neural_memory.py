"""A memory that learns at test time, as a layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memjax import checks, miras
from memjax.layers import shell
from memjax.layers.conv import CausalConv, ConvState
from memjax.layers.gates import GateHead, ThresholdHead
from memjax.layers.linear import Linear
from memjax.layers.norm import RMSNorm
from memjax.layers.statistics import MemoryStats
from memjax.miras.features import unit
from memjax.sharding import constrain
from memjax.typing import Array, Float, Int


class NeuralMemoryState(NamedTuple):
    """What `NeuralMemory` carries.

    Attributes:
        memory: the fast weights and where they stand, see `miras.State`.
        convs: inputs of the convolutions of queries, keys and values; () without convolutions.
        stats: means of surprise and gates over the tokens of the last call.
    """

    memory: miras.State
    convs: tuple[ConvState, ...]
    stats: MemoryStats


class NeuralMemory(nnx.Module):
    """Long-term memory as a sequence mixer: it learns the keys and values it sees.

        q, k, v = SiLU(conv(x W_q)), SiLU(conv(x W_k)), SiLU(conv(x W_v))      per head
        q, k    = q / ||q||, k / ||k||
        lr, momentum, retain = lr_max sigmoid(x W_lr + b), sigmoid(x W_e + b), sigmoid(x W_a + b)
        m       = the rule over (q, k, v), see `miras.Rule`
        y       = (RMSNorm(m) * SiLU(x W_g)) W_o

    Three lines to use it, a state to carry on:

        memory = NeuralMemory(dim=256, heads=4, rngs=nnx.Rngs(0))
        y, state = memory(x)             # x [batch, time, dim]
        y, state = memory(more, state)   # goes on where x ended

    Args:
        dim: model dimension E.
        heads: number of memories H, each with its own weights and gates.
        head_dim: dimension of keys and values (default dim / heads).
        rule: the memory (default `miras.zoo.titans()`).
        conv: width of the depthwise causal convolutions, 0 for none.
        persistent: P learned vectors that the memory reads before every document (Titans section
            3.3), as a chunk of their own.
        lr_max: the largest inner learning rate.
        rngs: the stream `params` draws the weights.
    Raises:
        ValueError: sizes that do not fit.
        TypeError: a rule that is none.
    Source: Titans (arXiv:2501.00663), section 4.4; initial gates are our choice: lr = lr_max / 10,
        momentum 0.5, retain 0.999, threshold 1, shares of the window 0.9.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        *,
        rule: miras.Rule | None = None,
        conv: int = 4,
        persistent: int = 0,
        lr_max: float = 0.1,
        rngs: nnx.Rngs,
    ):
        head_dim = shell.head_size(dim, heads, head_dim)
        shell.check_sizes(0, conv=conv, persistent=persistent)
        checks.real("lr_max", lr_max, above=0.0)
        if rule is not None and not isinstance(rule, miras.Rule):
            raise TypeError(
                f"rule must be a miras.Rule, such as miras.zoo.titans() or miras.Rule(structure,"
                f" bias, retention, learner), got {rule!r}"
            )
        self.rule = miras.zoo.titans() if rule is None else rule
        if self.rule.learner.exchanges:
            raise ValueError(
                f"NeuralMemory has no gates for {self.rule.learner}: use layers.RWKV7, or "
                "MatrixMemory with gates of your own"
            )
        self.dim, self.heads, self.head_dim, self.lr_max = dim, heads, head_dim, lr_max

        def project() -> Linear:
            return Linear(dim, (heads, head_dim), axes=("embed", "heads", "kv"), rngs=rngs)

        self.query, self.key, self.value, self.gate = project(), project(), project(), project()
        self.out = Linear((heads, head_dim), dim, axes=("heads", "kv", "embed"), rngs=rngs)
        self.norm = RMSNorm(head_dim, rngs=rngs, axis_name="kv")
        channels = heads * head_dim
        self.convs = nnx.List(
            CausalConv(channels, conv, rngs=rngs, axis_name="heads")
            for _ in range(3 if conv else 0)
        )
        self.lr = GateHead(dim, heads, initial=0.1, rngs=rngs)
        has_momentum, has_retain = (
            self.rule.learner.needs_momentum,
            self.rule.retention.needs_retain,
        )
        self.momentum = GateHead(dim, heads, initial=0.5, rngs=rngs) if has_momentum else None
        self.retain = GateHead(dim, heads, initial=0.999, rngs=rngs) if has_retain else None
        self.threshold = (
            ThresholdHead(dim, heads, rngs=rngs) if self.rule.bias.needs_threshold else None
        )
        window = self.rule.learner.window
        self.window = (
            GateHead(dim, heads, channels=window, initial=0.9, rngs=rngs) if window > 1 else None
        )
        self.fast, self.slow = shell.initial_weights(self.rule, heads, head_dim, rngs=rngs)
        self.persistent = (
            nnx.Param(
                jax.random.normal(rngs.params(), (persistent, dim)), axes=("persistent", "embed")
            )
            if persistent
            else None
        )

    def start(self, batch: int) -> NeuralMemoryState:
        """The state before the first token.

        Args:
            batch: B.
        Returns:
            A `NeuralMemoryState`; its memory has already read the persistent vectors.
        """
        weights = shell.weights(self.rule, self.heads, self.head_dim, self.fast, self.slow)
        dims = self.head_dim, self.head_dim
        memory = miras.start(self.rule, weights, batch, dims=dims)
        if self.persistent is not None:
            row = miras.start(self.rule, weights, 1, dims=dims)
            prefix = self.persistent[...][None]
            q, k, v, _ = self._project(prefix, None, None)
            _, _, row = miras.trace(
                self.rule, row, q, k, v, self._gates(prefix), unit=True, loss=False
            )
            memory = miras.begin_from(self.rule, row, batch)
        convs = tuple(conv.start(batch, memory.weights[0].dtype) for conv in self.convs)
        nothing = jnp.zeros((batch, self.heads))
        stats = MemoryStats(
            nothing,
            nothing,
            None if self.momentum is None else nothing,
            None if self.retain is None else nothing,
        )
        # each its own array, and none of them a parameter: a caller may donate them
        return jax.tree.map(jnp.copy, NeuralMemoryState(memory, convs, stats))

    def __call__(
        self,
        x: Float[Array, "B T E"],
        state: NeuralMemoryState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        aligned: bool = False,
    ) -> tuple[Float[Array, "B T E"], NeuralMemoryState]:
        """Reads and learns x, going on from `state`.

        Args:
            x: [B, T, dim].
            state: what the tokens before left; None = `start(B)`.
            segment_ids: document of each token [B, T]; the memory restarts where it changes.
            positions: not used (a memory has no positions); there for the mixers' one signature.
            aligned: a promise about x that saves compile time, see `miras.trace`.
        Returns:
            [B, T, dim] in the dtype of x, and the state after the last token.
        Raises:
            ValueError: x, the state or segment_ids do not fit.
            TypeError: the state is not one of a `NeuralMemory`.
        """
        shell.check_inputs(x, self.dim, segment_ids, positions)
        aligned = aligned or (state is None and segment_ids is None)
        state = shell.go_on(self, state, NeuralMemoryState, x.shape[0])
        q, k, v, convs = self._project(x, state.convs, segment_ids)
        gates = self._gates(x)
        y, surprise, memory = miras.trace(
            self.rule, state.memory, q, k, v, gates, segment_ids=segment_ids, aligned=aligned,
            unit=True,
        )  # fmt: skip
        y = constrain(y, ("batch", "time", "heads", "kv"))
        y = self.norm(y) * jax.nn.silu(self.gate(x))
        stats = shell.stats(surprise, gates.lr, gates.momentum, gates.retain)
        y = constrain(self.out(y), ("batch", "time", "embed"))
        return y, NeuralMemoryState(memory, convs, stats)

    def recall(
        self, x: Float[Array, "B T E"], state: NeuralMemoryState, fast: tuple[Array, ...]
    ) -> Float[Array, "B T E"]:
        """What the memory answers to x with weights of its past; nothing is written.

            h = RMSNorm(M(q; W)) W_o,   q = unit(SiLU(x W_q)), without convolution and gate

        Args:
            x: [B, T, dim].
            state: of the memory; not changed.
            fast: the fast weights W to read from, each [B, H, ...].
        Returns:
            [B, T, dim] in the dtype of x.
        """
        return self.answer(self.ask(x), state, fast)

    def ask(self, x: Float[Array, "B T E"]) -> Float[Array, "B T H K"]:
        """The queries q of `recall`: what of it does not depend on the memory."""
        return unit(jax.nn.silu(constrain(self.query(x), ("batch", "time", "heads", "kv"))))

    def answer(
        self, q: Float[Array, "B T H K"], state: NeuralMemoryState, fast: tuple[Array, ...]
    ) -> Float[Array, "B T E"]:
        """The rest of `recall`, with `q = ask(x)`."""
        h = miras.read(self.rule, state.memory._replace(weights=fast), q)
        return constrain(self.out(self.norm(h)), ("batch", "time", "embed"))

    def _project(self, x, convs, segment_ids):
        """Queries and keys of x, not yet of unit length, values, and the convolutions' states."""
        projections = (self.query, self.key, self.value)
        (q, k, v), states = shell.project(
            x, projections, self.convs, convs, segment_ids, silu=(True, True, True)
        )
        return q, k, v, states

    def _gates(self, x) -> miras.Gates:
        return miras.Gates(
            lr=self.lr_max * self.lr(x),
            momentum=None if self.momentum is None else self.momentum(x),
            retain=None if self.retain is None else self.retain(x),
            threshold=None if self.threshold is None else self.threshold(x),
            window=None if self.window is None else self.window(x),
        )
