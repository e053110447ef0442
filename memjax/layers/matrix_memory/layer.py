"""The layer that the papers on matrix memories share, with what each of them chooses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memjax import documents, miras
from memjax.layers import shell
from memjax.layers.conv import CausalConv, ConvState
from memjax.layers.linear import Linear
from memjax.layers.norm import RMSNorm
from memjax.layers.rotary import rotary
from memjax.layers.statistics import MemoryStats
from memjax.miras.features import unit
from memjax.sharding import constrain
from memjax.typing import Array, Float, Int

FEATURES = ("none", "silu", "elu+1")


class MatrixMemoryState(NamedTuple):
    """What `MatrixMemory` carries.

    Attributes:
        memory: the matrices and where they stand, see `miras.State`.
        convs: inputs of the convolutions of queries, keys and values; () without.
        seen: tokens of the document so far, for rotary positions, [B].
        stats: means of surprise and gates over the tokens of the last call.
    """

    memory: miras.State
    convs: tuple[ConvState, ...]
    seen: Int[Array, " B"]
    stats: MemoryStats


class MatrixMemory(nnx.Module):
    """A matrix per head that learns at every token, as a sequence mixer.

        q, k = features(conv(x W_q)), features(conv(x W_k)),  v = conv(x W_v) (with SiLU if conv)
        q, k = q / ||q||, k / ||k||  or  rotated; then q = scale q
        m    = the rule over (q, k, v, gates(x)), W_0 = 0, see `miras.Rule`
        y    = (RMSNorm(m) * gate(x W_g)) W_o

    Args:
        dim: model dimension E.
        heads: number of memories H.
        head_dim: dimension K of keys and queries (default dim / heads).
        value_dim: dimension V of the values of a head (default `head_dim`).
        rule: the memory; its structure is `miras.matrix()`, with W_0 = 0.
        gates: a module `x -> miras.Gates`, see `memjax.layers.gates`. It gives what the rule needs:
            `momentum`, `threshold` and `write` too.
        conv: width of the depthwise causal convolutions, 0 for none.
        features: of keys and queries: "none", "silu", "elu+1".
        unit_keys: scale keys and queries to length 1.
        rope_base: rotate keys and queries by their positions, with this base; None: do not.
        scale: of the queries (default 1 / sqrt(head_dim)).
        key_heads: heads of keys and queries, each shared by H / key_heads memories (default H). A
            single one is not split over a mesh: every device has it whole.
        normalised: divide by what the memory answers for values of 1, `q . sum_t k_t` (then keys
            and queries must be positive), in the place of the norm.
        gate: "silu", "sigmoid" or None: what the output is multiplied by.
        gate_rank: rank of the gate's projection (default: full).
        gate_first: `RMSNorm(m * gate)` over all heads, in the place of the norm of each head.
        skip: add `D v` to m, D per head, 1 at the start.
        rngs: the stream `params` draws the weights.
    Raises:
        ValueError: sizes or names that do not fit, a rule of another structure or with another
            W_0, gates without what the rule needs.
        TypeError: a rule that is none.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        value_dim: int | None = None,
        *,
        rule: miras.Rule,
        gates: nnx.Module,
        conv: int = 0,
        features: str = "none",
        unit_keys: bool = False,
        rope_base: float | None = None,
        scale: float | None = None,
        key_heads: int | None = None,
        normalised: bool = False,
        gate: str | None = "silu",
        gate_rank: int | None = None,
        gate_first: bool = False,
        skip: bool = False,
        rngs: nnx.Rngs,
    ):
        head_dim = shell.head_size(dim, heads, head_dim)
        value_dim = head_dim if value_dim is None else value_dim
        key_heads = heads if key_heads is None else key_heads
        shell.check_sizes(value_dim=value_dim, key_heads=key_heads)
        shell.check_sizes(0, conv=conv)
        if gate_rank is not None:
            shell.check_sizes(gate_rank=gate_rank)
        if heads % key_heads:
            raise ValueError(f"heads {heads} must be a multiple of key_heads {key_heads}")
        if features not in FEATURES:
            raise ValueError(f"features {features!r} must be one of {', '.join(FEATURES)}")
        if gate not in ("silu", "sigmoid", None):
            raise ValueError(f'gate {gate!r} must be "silu", "sigmoid" or None')
        if rope_base is not None and head_dim % 2:
            raise ValueError(f"head_dim {head_dim} must be even: rotary positions pair features")
        if not isinstance(rule, miras.Rule):
            raise TypeError(
                f"rule must be a miras.Rule, such as miras.zoo.delta_net(), got {rule!r}"
            )
        if not isinstance(rule.structure, miras.matrix):
            raise ValueError(f"MatrixMemory needs a rule of matrix(), not of {rule.structure}")
        shell.check_starts_at_zero("MatrixMemory", rule)
        _check_gates(rule, gates, dim)
        self.dim, self.heads, self.head_dim, self.value_dim = dim, heads, head_dim, value_dim
        self.rule, self.gates, self.features, self.rope_base = rule, gates, features, rope_base
        self.scale = head_dim**-0.5 if scale is None else scale
        self.unit_keys, self.key_heads, self.normalised = unit_keys, key_heads, normalised
        # A memory that is linear in its query can scale its answer instead, and so leave the norms
        # to the kernel; rotation keeps them.
        self.unit_late = unit_keys and rule.structure.features is None
        self.gate_kind, self.gate_first = gate, gate_first

        self.key_axis = "heads" if key_heads > 1 else None

        def project(count: int, size: int, axis: str | None) -> Linear:
            return Linear(dim, (count, size), axes=("embed", axis, "kv"), rngs=rngs)

        self.query = project(key_heads, head_dim, self.key_axis)
        self.key = project(key_heads, head_dim, self.key_axis)
        self.value = project(heads, value_dim, "heads")
        self.out = Linear((heads, value_dim), dim, axes=("heads", "kv", "embed"), rngs=rngs)
        keys, values = (key_heads * head_dim, self.key_axis), (heads * value_dim, "heads")
        self.convs = nnx.List(
            CausalConv(channels, conv, rngs=rngs, axis_name=axis)
            for channels, axis in ((keys, keys, values) if conv else ())
        )
        narrow = gate is not None and gate_rank is not None
        self.gate_down = Linear(dim, gate_rank, axes=("embed", None), rngs=rngs) if narrow else None
        self.gate = _gate(dim, (heads, value_dim), gate, gate_rank, rngs)
        # over all heads, of each head, or none
        size = heads * value_dim if gate_first else value_dim
        axis = "heads" if gate_first else "kv"
        self.norm = None if normalised else RMSNorm(size, rngs=rngs, axis_name=axis)
        self.skip = nnx.Param(jnp.ones((heads,)), axes=("heads",)) if skip else None
        slow = rule.init(jax.random.key(0), head_dim, value_dim + normalised).slow
        self.slow = shell.slow_weights(
            {name: jnp.broadcast_to(w, (heads, *w.shape)).copy() for name, w in slow.items()}
        )

    def start(self, batch: int) -> MatrixMemoryState:
        """The state before the first token.

        Args:
            batch: B.
        """
        values = self.value_dim + self.normalised
        plain = self.rule.init(jax.random.key(0), self.head_dim, values)
        fast = jax.tree.map(lambda w: jnp.broadcast_to(w, (self.heads, *w.shape)), plain.fast)
        slow = {name: w[...] for name, w in self.slow.items()}
        memory = miras.start(self.rule, miras.Weights(fast, slow), batch)
        convs = tuple(conv.start(batch, memory.weights[0].dtype) for conv in self.convs)
        nothing = jnp.zeros((batch, self.heads))
        stats = MemoryStats(
            nothing if isinstance(self.rule.bias, miras.l2) else None,
            nothing,
            None,
            nothing if self.rule.retention.needs_retain else None,
        )
        seen = jnp.zeros((batch,), jnp.int32)
        # each its own array: a caller may donate them
        return jax.tree.map(jnp.copy, MatrixMemoryState(memory, convs, seen, stats))

    def __call__(
        self,
        x: Float[Array, "B T E"],
        state: MatrixMemoryState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], MatrixMemoryState]:
        """Reads and learns x, going on from `state`.

        Args:
            x: [B, T, dim].
            state: what the tokens before left; None = `start(B)`.
            segment_ids: document of each token [B, T]; the memory restarts where it changes.
            positions: [B, T], for rotation only; None = counted on from the state, from 0 in each
                document.
        Returns:
            [B, T, dim] in the dtype of x, and the state after the last token.
        Raises:
            ValueError: x, the state, segment_ids or positions do not fit.
            TypeError: the state is not one of a `MatrixMemory`.
        """
        shell.check_inputs(x, self.dim, segment_ids, positions)
        state = shell.go_on(self, state, MatrixMemoryState, x.shape[0])
        place = documents.follow(segment_ids, state.memory.segment, state.seen, x.shape[1])
        positions = place.index if positions is None else positions
        q, k, v, convs = self._project(x, state.convs, segment_ids, positions)
        gates = self.gates(x)
        counted = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1) if self.normalised else v
        surprised = isinstance(self.rule.bias, miras.l2)
        m, surprise, memory = miras.trace(
            self.rule, state.memory, q, k, counted, gates, segment_ids=segment_ids, loss=surprised,
            unit=self.unit_late,
        )  # fmt: skip
        if self.unit_late:
            m = (self.scale * m).astype(m.dtype)
        if self.normalised:
            m = m[..., :-1] / (m[..., -1:] + 1e-6)
        if self.skip is not None:
            m = m + (self.skip[...][:, None] * v).astype(m.dtype)
        y = self.out(constrain(self._gated(x, m), ("batch", "time", "heads", "kv")))
        stats = shell.stats(surprise, gates.lr, None, gates.retain)
        y = constrain(y, ("batch", "time", "embed"))
        seen = positions[:, -1].astype(jnp.int32) + 1
        return y, MatrixMemoryState(memory, convs, seen, stats)

    def _project(self, x, convs, segment_ids, positions):
        """Queries, keys and values of x [B, T, H, .], and the convolutions' states."""
        activated = self.features == "silu"
        (q, k, v), states = shell.project(
            x, (self.query, self.key, self.value), self.convs, convs, segment_ids,
            axes=(self.key_axis, self.key_axis, "heads"),
            silu=(activated, activated, bool(self.convs)),
        )  # fmt: skip
        q, k = self._mapped(q, positions), self._mapped(k, positions)
        q = q if self.unit_late else (self.scale * q).astype(q.dtype)
        return q, k, v, states

    def _mapped(self, z, positions):
        """Queries or keys as the memory takes them, repeated for each of the heads they serve."""
        z = elu_plus_one(z) if self.features == "elu+1" else z
        z = unit(z) if self.unit_keys and not self.unit_late else z
        z = z if self.rope_base is None else rotary(z, positions, self.rope_base)
        z = jnp.repeat(z, self.heads // self.key_heads, axis=2)
        return constrain(z, ("batch", "time", "heads", "kv"))

    def _gated(self, x, m):
        """What the memory answers [B, T, H, V], normalised and gated."""
        gate = None
        if self.gate is not None:
            gate = self.gate(x if self.gate_down is None else self.gate_down(x))
            gate = jax.nn.silu(gate) if self.gate_kind == "silu" else jax.nn.sigmoid(gate)
        if self.gate_first:
            m = m if gate is None else m * gate
            return self.norm(m.reshape(*m.shape[:2], -1)).reshape(m.shape)
        m = m if self.norm is None else self.norm(m)
        return m if gate is None else m * gate


def _check_gates(rule: miras.Rule, gates: nnx.Module, dim: int) -> None:
    """Raises ValueError where the gates lack what `memjax.layers.gates` does not give."""
    needed = {
        "momentum": rule.learner.needs_momentum,
        "threshold": rule.bias.needs_threshold,
        "write": rule.learner.exchanges,
    }
    if not any(needed.values()):
        return
    graph, state = nnx.split(gates)  # a copy: what the module changes stays in the trace
    x = jax.ShapeDtypeStruct((1, 1, dim), jnp.float32)
    given = jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, x)
    for name, is_needed in needed.items():
        if is_needed and getattr(given, name) is None:
            layer = "RWKV7" if name == "write" else "NeuralMemory"
            raise ValueError(
                f"the rule needs gates.{name} ({rule.learner}, {rule.bias}), but "
                f"{type(gates).__name__} gives none: use gates of your own, or layers.{layer}"
            )


def _gate(dim, outputs, gate, rank, rngs) -> Linear | None:
    """The last projection of the output gate."""
    if gate is None:
        return None
    inputs, axis = (dim, "embed") if rank is None else (rank, None)
    return Linear(inputs, outputs, axes=(axis, "heads", "kv"), rngs=rngs)


def elu_plus_one(x: Array) -> Array:
    """`elu(x) + 1`; as it stands it would lose exp(x) beside the 1, in bf16 all below 1/256."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))
