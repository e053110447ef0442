"""The sequence mixers that a model's blocks choose from, by name.

A builder takes the `LanguageModelConfig` and the random streams, and returns a mixer, a module with
these two:

    mixer(x, state=None, *, segment_ids=None, positions=None) -> (y, state)
    mixer.start(batch) -> state

For example:

    @mixers.register("average")
    def average(config, rngs):
        return MovingAverage(config.dim, rngs=rngs)

    LanguageModelConfig(..., pattern=("average", "transformer"))

Layers of memjax name the logical axes of their parameters, so that meshes can split them;
parameters of plain Flax layers work too, whole on every device. docs/extending.md has an example.
"""

import dataclasses

from flax import nnx

from memjax.layers import (
    RWKV7,
    Attention,
    ContinuumMemory,
    GatedAssociativeMemory,
    Hope,
    MatrixMemory,
    MixtureOfMemories,
    NeuralMemory,
    SelfReferentialMemory,
    TNTMemory,
    matrix_memory,
)
from memjax.models.mac import MemoryAsContext
from memjax.models.mag import MemoryAsGate, MemoryAsLayer
from memjax.models.registry import Registry

registry = Registry("mixer")
register = registry.register
build = registry.build

HOPE_CHUNK = 64


def _heads(config) -> tuple[int, int | None]:
    """Heads of a memory and their dimension; None = dim / heads."""
    heads = config.memory.heads or config.heads
    return heads, config.head_dim if heads == config.heads else None


def _attention(
    config, rngs: nnx.Rngs, window: int | None, sinks: int, persistent: int = 0
) -> Attention:
    return Attention(
        config.dim,
        config.heads,
        config.head_dim,
        window=window,
        context=config.context,
        sinks=sinks,
        persistent=persistent,
        kv_heads=config.kv_heads,
        rope_base=config.rope_base,
        qk_norm=config.qk_norm,
        rngs=rngs,
    )


@register("attention")
@register("transformer")
def transformer(config, rngs: nnx.Rngs) -> Attention:
    """Causal attention over all of the context, with rotary positions."""
    return _attention(config, rngs, window=None, sinks=0)


@register("swa")
def swa(config, rngs: nnx.Rngs) -> Attention:
    """Causal attention over the last `config.window` tokens and `config.sinks` first ones."""
    return _attention(config, rngs, window=config.window, sinks=config.sinks)


def _memory(config, rngs: nnx.Rngs, persistent: int) -> NeuralMemory:
    return NeuralMemory(
        config.dim,
        *_heads(config),
        rule=config.memory.build(),
        conv=config.conv,
        persistent=persistent,
        lr_max=config.memory.lr_max,
        rngs=rngs,
    )


def _named(rule: str):
    """The memory of one row of the zoo in the shell of Titans' and Miras' layers."""

    def build(config, rngs: nnx.Rngs) -> NeuralMemory:
        memory = config.memory.of_rule(rule)
        return _memory(dataclasses.replace(config, memory=memory), rngs, config.persistent)

    return build


for _rule in (
    "ttt_linear", "ttt_mlp", "moneta", "yaad", "memora", "dla", "swdt", "deep_omega_transformer",
    "omega_net", "atlas", "lact",
):  # fmt: skip
    register(_rule)(_named(_rule))


@register("lmm")
def lmm(config, rngs: nnx.Rngs) -> NeuralMemory:
    """Titans' long-term memory alone."""
    return _memory(config, rngs, config.persistent)


@register("mac")
def mac(config, rngs: nnx.Rngs) -> MemoryAsContext:
    """Titans' memory as context, in segments of `config.segment` tokens."""
    return MemoryAsContext(
        _memory(config, rngs, persistent=0),
        config.dim,
        config.heads,
        config.head_dim,
        segment=config.segment,
        persistent=config.persistent,
        rope_base=config.rope_base,
        combine=config.memory.combine,
        remat=config.remat == "full",
        rngs=rngs,
    )


@register("mag")
def mag(config, rngs: nnx.Rngs) -> MemoryAsGate:
    """Titans' memory as gate of attention over the last `config.window` tokens."""
    return MemoryAsGate(
        _attention(config, rngs, config.window, config.sinks, config.persistent),
        _memory(config, rngs, config.persistent),
        config.dim,
        combine=config.memory.combine,
        rngs=rngs,
    )


@register("mal")
def mal(config, rngs: nnx.Rngs) -> MemoryAsLayer:
    """Titans' memory as layer before attention over the last `config.window` tokens."""
    return MemoryAsLayer(
        _attention(config, rngs, config.window, config.sinks, config.persistent),
        _memory(config, rngs, config.persistent),
        config.dim,
        rngs=rngs,
    )


def _matrix(builder, config, rngs: nnx.Rngs, **options) -> MatrixMemory:
    if config.memory.value_dim is not None:
        options["value_dim"] = config.memory.value_dim
    return builder(config.dim, *_heads(config), rngs=rngs, **options)


def _delta_family(builder, config, rngs: nnx.Rngs) -> MatrixMemory:
    negative = config.memory.negative_eigenvalues
    return _matrix(builder, config, rngs, conv=config.conv, negative_eigenvalues=negative)


@register("linear_attention")
def linear_attention(config, rngs: nnx.Rngs) -> MatrixMemory:
    """Linear attention with features elu + 1, normalised."""
    return _matrix(matrix_memory.linear_attention, config, rngs)


@register("retnet")
def retnet(config, rngs: nnx.Rngs) -> MatrixMemory:
    """Multi-scale retention."""
    return _matrix(matrix_memory.retnet, config, rngs, rope_base=config.rope_base)


@register("gla")
def gla(config, rngs: nnx.Rngs) -> MatrixMemory:
    """Gated linear attention."""
    return _matrix(matrix_memory.gla, config, rngs)


@register("mamba2")
def mamba2(config, rngs: nnx.Rngs) -> MatrixMemory:
    """Mamba-2."""
    return _matrix(matrix_memory.mamba2, config, rngs, conv=config.conv)


@register("delta_net")
def delta_net(config, rngs: nnx.Rngs) -> MatrixMemory:
    """DeltaNet."""
    return _delta_family(matrix_memory.delta_net, config, rngs)


@register("gated_delta_net")
def gated_delta_net(config, rngs: nnx.Rngs) -> MatrixMemory:
    """Gated DeltaNet."""
    return _delta_family(matrix_memory.gated_delta_net, config, rngs)


@register("kda")
def kda(config, rngs: nnx.Rngs) -> MatrixMemory:
    """Kimi delta attention."""
    return _delta_family(matrix_memory.kda, config, rngs)


@register("longhorn")
def longhorn(config, rngs: nnx.Rngs) -> MatrixMemory:
    """Longhorn's implicit step."""
    return _matrix(matrix_memory.longhorn, config, rngs, conv=config.conv)


@register("mesa_net")
def mesa_net(config, rngs: nnx.Rngs) -> MatrixMemory:
    """MesaNet's least-squares memory."""
    return _matrix(matrix_memory.mesa_net, config, rngs, conv=config.conv)


@register("rwkv7")
def rwkv7(config, rngs: nnx.Rngs) -> RWKV7:
    """RWKV-7's time mixing."""
    return RWKV7(config.dim, *_heads(config), rngs=rngs)


@register("mom")
def mixture_of_memories(config, rngs: nnx.Rngs) -> MixtureOfMemories:
    """Mixture-of-Memories over gated delta rules, `config.memory.active` of `memory.memories`."""
    return MixtureOfMemories(
        config.dim,
        *_heads(config),
        memories=config.memory.memories,
        active=config.memory.active,
        balance=config.memory.balance,
        conv=config.conv,
        rngs=rngs,
    )


@register("tnt")
def tnt(config, rngs: nnx.Rngs) -> TNTMemory:
    """TNT's global and local memories: `memory.chunk`, `memory.local_chunks`, `memory.shard`."""
    memory = config.memory
    return TNTMemory(
        config.dim,
        *_heads(config),
        chunk=2048 if memory.chunk is None else memory.chunk,
        local_chunks=memory.local_chunks,
        shard=memory.shard,
        expansion=4 if memory.expansion is None else memory.expansion,
        conv=config.conv,
        lr_max=memory.lr_max,
        rngs=rngs,
    )


@register("self_referential_titans")
def self_referential_titans(config, rngs: nnx.Rngs) -> SelfReferentialMemory:
    """HOPE's memory: its keys, values and gates are answers of memories that learn too."""
    memory = config.memory
    return SelfReferentialMemory(
        config.dim,
        *_heads(config),
        chunk=HOPE_CHUNK if memory.chunk is None else memory.chunk,
        projection_chunk=memory.projection_chunk,
        expansion=4 if memory.expansion is None else memory.expansion,
        conv=config.conv,
        lr_max=memory.lr_max,
        rngs=rngs,
    )


@register("continuum")
def continuum(config, rngs: nnx.Rngs) -> ContinuumMemory:
    """A chain of MLPs that learn every `memory.periods` tokens, in a feed-forward layer's place."""
    memory = config.memory
    return ContinuumMemory(
        config.dim,
        periods=memory.periods,
        expansion=4 if memory.expansion is None else memory.expansion,
        lr_max=memory.continuum_lr_max,
        rngs=rngs,
    )


@register("hope")
def hope(config, rngs: nnx.Rngs) -> Hope:
    """HOPE, a block's whole work: `self_referential_titans`, and `continuum` behind it."""
    return Hope(self_referential_titans(config, rngs), continuum(config, rngs))


@register("gam")
def gam(config, rngs: nnx.Rngs) -> GatedAssociativeMemory:
    """Gated associative memory of `memory.slots` slots."""
    return GatedAssociativeMemory(
        config.dim, config.memory.slots, conv=max(config.conv, 1), rngs=rngs
    )
