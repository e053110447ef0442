"""Gated associative memory: a short convolution beside static slots, read by every token."""

import jax
import jax.numpy as jnp
from flax import nnx

from memjax.layers import shell
from memjax.layers.conv import CausalConv, ConvState
from memjax.layers.linear import Linear, fan_in_normal
from memjax.sharding import constrain
from memjax.typing import Array, Float, Int


class GatedAssociativeMemory(nnx.Module):
    """Local order from a convolution, global patterns from slots that are trained, not written.

        local  = conv(x) W_l,     global = softmax(x B^T / sqrt(E)) B          B [N, E]: the slots
        g_l, g_g = sigmoid(x W_1), sigmoid(x W_2)
        y      = (g_l o local + g_g o global) W_o

    The slots see the token alone: nothing but the convolution reaches back, so the state is that
    of the convolution, and cost and state do not grow with the context.

    Args:
        dim: model dimension E.
        slots: N.
        conv: width of the depthwise causal convolution, at least 1.
        rngs: the stream `params` draws the weights.
    Raises:
        ValueError: a size that is no integer of at least 1.
    Source: GAM (arXiv:2509.00605), section 3.
    """

    def __init__(self, dim: int, slots: int = 512, *, conv: int = 4, rngs: nnx.Rngs):
        shell.check_sizes(dim=dim, slots=slots, conv=conv)
        self.dim = dim
        self.conv = CausalConv(dim, conv, rngs=rngs)
        self.local = Linear(dim, dim, axes=("embed", None), rngs=rngs)
        self.bank = nnx.Param(fan_in_normal(rngs.params(), (slots, dim), dim), axes=(None, "embed"))
        self.gates = Linear(dim, (2, dim), axes=("embed", None, None), rngs=rngs)
        self.out = Linear(dim, dim, axes=(None, "embed"), rngs=rngs)

    def start(self, batch: int) -> ConvState:
        """The state before the first token.

        Args:
            batch: B.
        """
        return self.conv.start(batch, jnp.promote_types(self.bank[...].dtype, jnp.float32))

    def __call__(
        self,
        x: Float[Array, "B T E"],
        state: ConvState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], ConvState]:
        """Mixes x, going on from `state`.

        Args:
            x: [B, T, dim].
            state: what the tokens before left; None = `start(B)`.
            segment_ids: document of each token [B, T]; the convolution sees no other.
            positions: not used; there for the mixers' one signature.
        Returns:
            [B, T, dim] in the dtype of x, and the state after the last token.
        Raises:
            ValueError: x, the state or segment_ids do not fit.
            TypeError: the state is not one of a `GatedAssociativeMemory`.
        """
        shell.check_inputs(x, self.dim, segment_ids, positions)
        state = shell.go_on(self, state, ConvState, x.shape[0])
        local, state = self.conv(x, state, segment_ids=segment_ids)
        bank = self.bank[...].astype(x.dtype)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scores = jnp.einsum("bte,ne->btn", x, bank, preferred_element_type=wide)
        share = jax.nn.softmax(scores / self.dim**0.5, axis=-1).astype(x.dtype)
        gate = jax.nn.sigmoid(self.gates(x))
        y = gate[..., 0, :] * self.local(local) + gate[..., 1, :] * (share @ bank)
        return constrain(self.out(y), ("batch", "time", "embed")), state
