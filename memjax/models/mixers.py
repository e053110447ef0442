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
"""

from flax import nnx

from memjax.layers import Attention
from memjax.models.registry import Registry

registry = Registry("mixer")
register = registry.register
build = registry.build


def _attention(config, rngs: nnx.Rngs, window: int | None, sinks: int) -> Attention:
    return Attention(
        config.dim,
        config.heads,
        config.head_dim,
        window=window,
        context=config.context,
        sinks=sinks,
        kv_heads=config.kv_heads,
        rope_base=config.rope_base,
        qk_norm=config.qk_norm,
        rngs=rngs,
    )


@register("transformer")
def transformer(config, rngs: nnx.Rngs) -> Attention:
    """Causal attention over all of the context, with rotary positions."""
    return _attention(config, rngs, window=None, sinks=0)


@register("swa")
def swa(config, rngs: nnx.Rngs) -> Attention:
    """Causal attention over the last `config.window` tokens and `config.sinks` first ones."""
    return _attention(config, rngs, window=config.window, sinks=config.sinks)
