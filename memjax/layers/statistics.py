"""What a layer leaves in its state about the last call: means to log, a loss to train on."""

from typing import NamedTuple

from memjax.typing import Array, Float


class MemoryStats(NamedTuple):
    """Means over the tokens of one call of a memory, kept in its state for whoever logs them.

    A memory without momentum or without retention leaves that field None, as does one whose loss is
    not computed on the way the surprise. Inside a stack of layers
    every field has a leading layers axis. `memjax.models.statistics` collects them from a model.

    Args:
        surprise: loss of the tokens before they are written, [B, H].
        lr: inner learning rate.
        momentum: momentum gate.
        retain: retention gate.
    """

    surprise: Float[Array, "*L B H"] | None
    lr: Float[Array, "*L B H"]
    momentum: Float[Array, "*L B H"] | None
    retain: Float[Array, "*L B H"] | None


class Auxiliary(NamedTuple):
    """A loss of a layer's own over one call, which training adds to that of the tokens.

    Kept in the state with its gradient, weighted as it is to be added;
    `memjax.models.statistics` sums it over the layers.

    Args:
        loss: of each row, [B]; inside a stack of layers with a leading layers axis.
    """

    loss: Float[Array, "*L B"]
