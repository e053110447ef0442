"""Memory as a gate, and memory as a layer: a window and a memory side by side, or in a row."""

from typing import NamedTuple

from flax import nnx

from memjax.layers import Attention, AttentionState, NeuralMemory, NeuralMemoryState, RMSNorm, shell
from memjax.models.combine import Combine
from memjax.typing import Array, Float, Int


class BranchesState(NamedTuple):
    """The states of attention and of the memory."""

    attention: AttentionState
    memory: NeuralMemoryState


class MemoryAsGate(nnx.Module):
    """MAG: sliding-window attention, gated by a long-term memory that reads the same tokens.

        y = SWA([P | x]),  m = M([P | x]),  o = Combine(y, m)

    P are persistent tokens; each branch has its own.

    Args:
        attention: sliding-window attention.
        memory: long-term memory.
        dim: model dimension.
        combine: see `Combine`.
        rngs: the stream `params` draws the weights.
    Source: Titans (arXiv:2501.00663), section 4.2, equations 26 to 28.
    """

    def __init__(
        self,
        attention: Attention,
        memory: NeuralMemory,
        dim: int,
        *,
        combine: str = "gate",
        rngs: nnx.Rngs,
    ):
        self.attention, self.memory = attention, memory
        self.combine = Combine(dim, combine, rngs=rngs)

    def start(self, batch: int) -> BranchesState:
        """The state before the first token."""
        return BranchesState(self.attention.start(batch), self.memory.start(batch))

    def __call__(
        self,
        x: Float[Array, "B T E"],
        state: BranchesState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], BranchesState]:
        """Mixes the tokens of x, going on from `state`; arguments as for every mixer."""
        attended, memorised = _branches(self, x, state, segment_ids, positions)
        beside = {"segment_ids": segment_ids, "positions": positions}
        y, attended = self.attention(x, attended, **beside)
        m, memorised = self.memory(x, memorised, **beside)
        return self.combine(y, m), BranchesState(attended, memorised)


class MemoryAsLayer(nnx.Module):
    """MAL: a long-term memory compresses the past, sliding-window attention reads its output.

        m = M([P | x]),  o = m + SWA(RMSNorm(m))

    The sum is the residual connection that the paper has around every module.

    Args:
        attention: sliding-window attention.
        memory: long-term memory.
        dim: model dimension.
        rngs: the stream `params` draws the weights.
    Source: Titans (arXiv:2501.00663), section 4.3, equations 29 to 31.
    """

    def __init__(self, attention: Attention, memory: NeuralMemory, dim: int, *, rngs: nnx.Rngs):
        self.attention, self.memory = attention, memory
        self.norm = RMSNorm(dim, rngs=rngs)

    def start(self, batch: int) -> BranchesState:
        """The state before the first token."""
        return BranchesState(self.attention.start(batch), self.memory.start(batch))

    def __call__(
        self,
        x: Float[Array, "B T E"],
        state: BranchesState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], BranchesState]:
        """Mixes the tokens of x, going on from `state`; arguments as for every mixer."""
        attended, memorised = _branches(self, x, state, segment_ids, positions)
        beside = {"segment_ids": segment_ids, "positions": positions}
        m, memorised = self.memory(x, memorised, **beside)
        y, attended = self.attention(self.norm(m), attended, **beside)
        return m + y, BranchesState(attended, memorised)


def _branches(mixer, x, state, segment_ids, positions):
    """The states that both go on from; without one each begins, and knows that it does."""
    shell.check_inputs(x, mixer.memory.dim, segment_ids, positions)
    if state is None:
        return None, None
    return shell.go_on(mixer, state, BranchesState, x.shape[0])
