"""The feed-forward layers that a model's blocks choose from, by name.

A builder takes the `LanguageModelConfig` and the random streams, and returns a module that maps
`[B, T, E]` to `[B, T, E]`, each token by itself:

    @feed_forwards.register("relu2")
    def relu2(config, rngs):
        return SquaredReLU(config.dim, config.hidden_dim, rngs=rngs)

The name "none" stands for a block without one.
"""

from flax import nnx

from memjax.layers import SwiGLU
from memjax.models.registry import Registry

registry = Registry("feed_forward", reserved=("none",))
register = registry.register
build = registry.build


@register("swiglu")
def swiglu(config, rngs: nnx.Rngs) -> SwiGLU:
    """Gated feed-forward layer with `config.hidden_dim` hidden units."""
    return SwiGLU(config.dim, config.hidden_dim, rngs=rngs)
