"""HOPE: a self-referential memory, and a continuum of slower ones behind it."""

from typing import NamedTuple

from flax import nnx

from memjax.layers import shell
from memjax.layers.continuum import ContinuumMemory, ContinuumState
from memjax.layers.self_referential import SelfReferentialMemory, SelfReferentialState
from memjax.typing import Array, Float, Int


class HopeState(NamedTuple):
    """What `Hope` carries.

    Attributes:
        titans: of the self-referential memory.
        continuum: of the continuum after it.
    """

    titans: SelfReferentialState
    continuum: ContinuumState


class Hope(nnx.Module):
    """HOPE: a self-referential memory, and a continuum of slower ones behind it.

        o = SelfReferentialMemory(x),    y = o + ContinuumMemory(o)

    It is a whole block's work: models use it without a feed-forward layer.

    Args:
        titans: the `SelfReferentialMemory`.
        continuum: the `ContinuumMemory`, of the same dim.
    Raises:
        ValueError: the dims differ.
    Source: nested learning (arXiv:2512.24695), equations 94 to 97.
    """

    def __init__(self, titans: SelfReferentialMemory, continuum: ContinuumMemory):
        if titans.dim != continuum.dim:
            raise ValueError(f"the memory has dim {titans.dim}, the continuum {continuum.dim}")
        self.dim, self.titans, self.continuum = titans.dim, titans, continuum

    def start(self, batch: int) -> HopeState:
        """The state before the first token.

        Args:
            batch: B.
        """
        return HopeState(self.titans.start(batch), self.continuum.start(batch))

    def __call__(
        self,
        x: Float[Array, "B T E"],
        state: HopeState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], HopeState]:
        """Reads and learns x, going on from `state`.

        Args:
            x: [B, T, dim].
            state: what the tokens before left; None = `start(B)`.
            segment_ids: document of each token [B, T]; all memories restart where it changes.
            positions: not used; there for the mixers' one signature.
        Returns:
            [B, T, dim] in the dtype of x, and the state after the last token.
        Raises:
            ValueError: x, the state or segment_ids do not fit.
            TypeError: the state is not one of a `Hope`.
        """
        shell.check_inputs(x, self.dim, segment_ids, positions)
        if state is None:
            titans = continuum = None
        else:
            titans, continuum = shell.go_on(self, state, HopeState, x.shape[0])
        o, titans = self.titans(x, titans, segment_ids=segment_ids)
        y, continuum = self.continuum(o, continuum, segment_ids=segment_ids)
        return o + y, HopeState(titans, continuum)
