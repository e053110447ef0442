"""Mixture of memories: a router decides which of several matrix memories a token is written to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memjax import checks, miras
from memjax.layers import shell
from memjax.layers.conv import CausalConv, ConvState
from memjax.layers.gates import GateHead, SoftplusDecay
from memjax.layers.linear import Linear
from memjax.layers.norm import RMSNorm
from memjax.layers.statistics import Auxiliary, MemoryStats
from memjax.miras.features import unit
from memjax.sharding import constrain
from memjax.typing import Array, Float, Int


class MixtureOfMemoriesState(NamedTuple):
    """What `MixtureOfMemories` carries.

    Attributes:
        memory: the matrices of all memories; heads are memory by memory.
        convs: inputs of the convolutions of queries, keys and values.
        stats: means of surprise and gates over the tokens of the last call, by head.
        balance: the balancing loss of the last call; None where the layer has none.
    """

    memory: miras.State
    convs: tuple[ConvState, ...]
    stats: MemoryStats
    balance: Auxiliary | None


class MixtureOfMemories(nnx.Module):
    """Several memories of which each token uses a few, and one that all tokens use.

        p        = softmax(x W_r),  the `active` largest kept and scaled to sum to 1
        q        = unit(SiLU(conv(x W_q))) / sqrt(head_dim)
        k_m, v_m = unit(SiLU(conv(x W_k,m))), SiLU(conv(x W_v,m))       of memory m = 0 .. M
        W_m      = the rule over (k_m, v_m) at tokens routed to m; at others W_m stays as it is
        y        = (norm(q (W_0 + sum_m p_m W_m)) o SiLU(x W_g)) W_o

    Memory 0 is the shared one. What a token does not use neither learns from it nor decays, so
    memories interfere less. All memories are computed for all tokens, with rate 0 and decay 1
    where they are not used. The router is kept from sending all tokens to a few memories by

        loss += balance M sum_m f_m mean_t p_{t,m}      f_m = tokens routed to m / (active T)

    of each row, m = 1 .. M, p before the others are dropped: `balance` where all are used alike. It
    is in the state, and `memjax.training` adds it (see `memjax.models.statistics`).

    Args:
        dim: model dimension E.
        heads: heads H of each memory.
        head_dim: dimension of keys and values (default dim / heads).
        memories: M, those that are routed to.
        active: memories that a token uses besides the shared one. Where it is 1 the share is 1
            whatever the router says: nothing but the balancing loss trains the router.
        balance: coefficient of the balancing loss, 0 for none.
        conv: width of the depthwise causal convolutions, 0 for none.
        rule: of every memory (default `miras.zoo.gated_delta_net()`); structure `matrix()`, scalar
            decay, a rate per token, W_0 = 0.
        rngs: the stream `params` draws the weights.
    Raises:
        ValueError: sizes or a rule that do not fit.
    Source: Mixture-of-Memories (arXiv:2502.13685), section 3; the loss is that of Switch
        Transformers (arXiv:2101.03961), section 2.2, for several memories a token.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        *,
        memories: int = 4,
        active: int = 2,
        balance: float | int = 0.01,
        conv: int = 4,
        rule: miras.Rule | None = None,
        rngs: nnx.Rngs,
    ):
        head_dim = shell.head_size(dim, heads, head_dim)
        shell.check_sizes(memories=memories, active=active)
        shell.check_sizes(0, conv=conv)
        if active > memories:
            raise ValueError(f"active {active} must be between 1 and memories {memories}")
        checks.real("balance", balance, least=0.0)
        rule = miras.zoo.gated_delta_net() if rule is None else rule
        learner = rule.learner
        if (
            not isinstance(rule.structure, miras.matrix)
            or learner.needs_momentum
            or learner.exchanges
            or learner.solves
            or rule.bias.needs_threshold
            or learner.window > 1
            or rule.retention.closes
            or rule.init(jax.random.key(0), head_dim, head_dim).slow
        ):
            raise ValueError(
                "MixtureOfMemories needs a rule of matrix() whose only gates are lr and retain, "
                "without learned features, that leaves a memory alone where lr is 0 and retain 1, "
                f"not {rule}"
            )
        shell.check_starts_at_zero("MixtureOfMemories", rule)
        self.dim, self.heads, self.head_dim, self.rule = dim, heads, head_dim, rule
        self.memories, self.active, self.balance = memories, active, balance
        every = memories + 1

        def project(count: int) -> Linear:
            return Linear(dim, (count, head_dim), axes=("embed", "heads", "kv"), rngs=rngs)

        self.query, self.gate = project(heads), project(heads)
        self.key, self.value = project(every * heads), project(every * heads)
        self.router = Linear(dim, memories, axes=("embed", None), rngs=rngs)
        self.out = Linear((heads, head_dim), dim, axes=("heads", "kv", "embed"), rngs=rngs)
        self.norm = RMSNorm(head_dim, rngs=rngs, axis_name="kv")
        widths = (heads * head_dim, every * heads * head_dim, every * heads * head_dim)
        self.convs = nnx.List(
            CausalConv(width, conv, rngs=rngs, axis_name="heads") for width in widths if conv
        )
        self.lr = GateHead(dim, every * heads, initial=0.5, rngs=rngs)
        self.retain = (
            SoftplusDecay(dim, every * heads, rngs=rngs) if rule.retention.needs_retain else None
        )

    def start(self, batch: int) -> MixtureOfMemoriesState:
        """The state before the first token.

        Args:
            batch: B.
        """
        plain = self.rule.init(jax.random.key(0), self.head_dim, self.head_dim)
        heads = (self.memories + 1) * self.heads
        memory = miras.start(self.rule, plain, batch, heads)
        convs = tuple(conv.start(batch, memory.weights[0].dtype) for conv in self.convs)
        nothing = jnp.zeros((batch, heads))
        stats = MemoryStats(None, nothing, None, None if self.retain is None else nothing)
        balance = Auxiliary(jnp.zeros(batch)) if self.balance else None
        return jax.tree.map(jnp.copy, MixtureOfMemoriesState(memory, convs, stats, balance))

    def __call__(
        self,
        x: Float[Array, "B T E"],
        state: MixtureOfMemoriesState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], MixtureOfMemoriesState]:
        """Reads and learns x, going on from `state`.

        Args:
            x: [B, T, dim].
            state: what the tokens before left; None = `start(B)`.
            segment_ids: document of each token [B, T]; the memories restart where it changes.
            positions: not used; there for the mixers' one signature.
        Returns:
            [B, T, dim] in the dtype of x, and the state after the last token.
        Raises:
            ValueError: x, the state or segment_ids do not fit.
            TypeError: the state is not one of a `MixtureOfMemories`.
        """
        shell.check_inputs(x, self.dim, segment_ids, positions)
        state = shell.go_on(self, state, MixtureOfMemoriesState, x.shape[0])
        q, k, v, convs = self._project(x, state.convs, segment_ids)
        share, chosen, balance = self._route(x)
        used = jnp.repeat(chosen, self.heads, axis=-1)
        lr = jnp.where(used, self.lr(x), 0)
        retain = None if self.retain is None else jnp.where(used, self.retain(x), 1)
        every = self.memories + 1
        m, _, memory = miras.trace(
            self.rule, state.memory, jnp.tile(q, (1, 1, every, 1)), k, v,
            miras.Gates(lr=lr, retain=retain), segment_ids=segment_ids, loss=False,
        )  # fmt: skip
        m = m.reshape(*x.shape[:2], every, self.heads, self.head_dim)
        m = jnp.einsum("btmhd,btm->bthd", m, share.astype(m.dtype))
        m = self.norm(m) * jax.nn.silu(self.gate(x))
        y = constrain(
            self.out(constrain(m, ("batch", "time", "heads", "kv"))), ("batch", "time", "embed")
        )
        stats = shell.stats(None, lr, None, retain)
        return y, MixtureOfMemoriesState(memory, convs, stats, balance)

    def route(self, x: Float[Array, "B T E"]) -> Float[Array, "B T M"]:
        """The share of each memory in what a token reads, [B, T, M + 1] in fp32, the shared first.

        Args:
            x: [B, T, dim].
        """
        return self._route(x)[0]

    def _route(self, x):
        """`route`, which memories are used [B, T, M + 1], and the balancing loss of each row."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        logits = self.router(wide)
        _, which = jax.lax.top_k(logits, self.active)
        chosen = jnp.any(jax.nn.one_hot(which, self.memories, dtype=bool), axis=-2)
        kept = jax.nn.softmax(logits, axis=-1, where=chosen)
        # a share may underflow to 0: that its memory is used stands in `chosen` alone
        share, used = (
            jnp.concatenate([jnp.ones_like(z[..., :1]), z], axis=-1) for z in (kept, chosen)
        )
        if not self.balance:
            return share, used, None
        p = jax.nn.softmax(logits, axis=-1)
        load = jnp.mean(chosen, axis=1, dtype=p.dtype) / self.active
        unequal = self.memories * jnp.sum(load * jnp.mean(p, axis=1), axis=-1)
        return share, used, Auxiliary((self.balance * unequal).astype(float))

    def _project(self, x, convs, segment_ids):
        """Queries, keys and values of x, and the convolutions' states."""
        projections = (self.query, self.key, self.value)
        (q, k, v), states = shell.project(
            x, projections, self.convs, convs, segment_ids, silu=(True, True, True)
        )
        q = (self.head_dim**-0.5 * unit(q)).astype(q.dtype)
        return q, unit(k), v, states
