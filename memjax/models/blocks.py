"""The residual block that every model is stacked from."""

from typing import Any

import jax
from flax import nnx

from memjax.layers import RMSNorm
from memjax.models import feed_forwards, mixers
from memjax.models.config import LanguageModelConfig
from memjax.sharding import constrain
from memjax.typing import Array, Float, Int

RESIDUAL = ("batch", "time", "embed")


class Block(nnx.Module):
    """A pre-norm residual block: `x = x + mixer(norm(x)); x = x + feed_forward(norm(x))`.

    Args:
        config: of the model.
        mixer: a name in `memjax.models.mixers`.
        feed_forward: a name in `memjax.models.feed_forwards`; "none" leaves the second line out.
        rngs: the stream `params` draws the weights.
    """

    def __init__(
        self, config: LanguageModelConfig, mixer: str, feed_forward: str, *, rngs: nnx.Rngs
    ):
        self.names = (f"mixer.{mixer}", f"feed_forward.{feed_forward}")
        self.mixer_norm = RMSNorm(config.dim, rngs=rngs)
        self.mixer = mixers.build(mixer, config, rngs)
        if feed_forward == "none":
            self.feed_forward_norm = self.feed_forward = None
        else:
            self.feed_forward_norm = RMSNorm(config.dim, rngs=rngs)
            self.feed_forward = feed_forwards.build(feed_forward, config, rngs)

    def start(self, batch: int) -> Any:
        """The state of the mixer before the first token."""
        return self.mixer.start(batch)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        state: Any = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], Any]:
        """Applies the block.

        Args:
            x: [B, T, E].
            state: of the mixer; None is a fresh one.
            segment_ids: [B, T] or None, as for every mixer.
            positions: [B, T] or None, as for every mixer.

        Returns:
            (y [B, T, E] in the dtype of x, state).
        """
        x = constrain(x, RESIDUAL)
        # profilers and memjax.tpu tell the parts of a model by these names
        with jax.named_scope(self.names[0]):
            y, state = self.mixer(
                self.mixer_norm(x), state, segment_ids=segment_ids, positions=positions
            )
            x = constrain(x + y, RESIDUAL)
        if self.feed_forward is not None:
            with jax.named_scope(self.names[1]):
                x = constrain(x + self.feed_forward(self.feed_forward_norm(x)), RESIDUAL)
        return x, state
