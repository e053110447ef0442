"""The gated feed-forward layer."""

import jax
from flax import nnx

from memjax.layers.linear import Linear
from memjax.typing import Array, Float


class SwiGLU(nnx.Module):
    """A feed-forward layer whose hidden units are gated: `y = (silu(x W_g) * (x W_u)) W_d`.

    Args:
        dim: model dimension.
        hidden: hidden units; about 8/3 dim has the parameters of a plain layer of 4 dim.
        rngs: the stream `params` draws the weights.

    Raises:
        ValueError: dim or hidden is no integer of at least 1.

    Source: Shazeer, 2020, arXiv:2002.05202, equation 6.
    """

    def __init__(self, dim: int, hidden: int, *, rngs: nnx.Rngs):
        self.gate = Linear(dim, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.up = Linear(dim, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.down = Linear(hidden, dim, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        """Applies the layer to each token.

        Args:
            x: [..., dim].

        Returns:
            [..., dim] in the dtype of x.

        Raises:
            ValueError: the last axis of x is not `dim`.
        """
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
