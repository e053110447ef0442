"""Selective copying."""

import dataclasses

import jax
import jax.numpy as jnp

from memjax.data.tasks.task import TaskBatch, at_least, distinct
from memjax.typing import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class SelectiveCopying:
    """Data tokens among blanks, then markers: the model must give the data tokens in their order.

        . . d_1 . . . d_2 d_3 . . d_4 .   # # # #                   . blank, # marker
                                          d_1 d_2 d_3 d_4           the targets

    The N data tokens are drawn with replacement from [1, V - 1) and stand at random places of the
    first T - N, any set of places with equal chance; blanks are token 0, markers token V - 1. A
    model without choice of what to remember, such as a fixed convolution, cannot do it: the
    distances differ from row to row.

    Args:
      vocabulary: V.
      length: T, markers included.
      count: N.

    Raises:
      ValueError: fields that leave no room; the message says what would.

    Source: Mamba, arXiv:2312.00752, section 4.1 (16 data tokens among 4096, V = 16), after
    the copying task of arXiv:1511.06464.
    """

    vocabulary: int = 16
    length: int = 256
    count: int = 16

    def __post_init__(self):
        at_least(self, vocabulary=3, length=2, count=1)
        if self.length < 2 * self.count:
            raise ValueError(
                f"SelectiveCopying: {self.count} data tokens and as many markers do not fit in"
                f" length {self.length}; make it at least {2 * self.count}"
            )

    @property
    def scored(self) -> int:
        """N."""
        return self.count

    def batch(self, key: Key, size: int) -> TaskBatch:
        """`size` rows, a pure function of the key.

        Args:
          key: random key.
          size: B.

        Returns:
          tokens, targets and weights, each [B, T].
        """
        return TaskBatch(*jax.vmap(self._row)(jax.random.split(key, size)))

    def _row(self, key: Key) -> tuple[Int[Array, "T"], Int[Array, "T"], Float[Array, "T"]]:
        for_data, for_places = jax.random.split(key)
        start = self.length - self.count
        data = jax.random.randint(for_data, (self.count,), 1, self.vocabulary - 1)
        places = jnp.sort(distinct(for_places, start, self.count))
        blank = jnp.zeros(self.length, jnp.int32)
        tokens = blank.at[places].set(data).at[start:].set(self.vocabulary - 1)
        weights = jnp.zeros(self.length, jnp.float32).at[start:].set(1.0)
        return tokens, blank.at[start:].set(data), weights
