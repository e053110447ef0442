"""Multi-query associative recall."""

import dataclasses

import jax
import jax.numpy as jnp

from memjax import checks
from memjax.data.tasks.task import TaskBatch, at_least, distinct
from memjax.typing import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class MQAR:
    """Key-value pairs, then each key once more: the model must name its value.

        k_1 v_1 k_2 v_2 ... k_K v_K  . . k_2 . . . . k_1 ...        . is blank, or noise
                                         v_2         v_1            the targets

    Keys are drawn without replacement from [1, V/2), values from [V/2, V). After the 2K tokens of
    the pairs there are S = (T - 2K) / 2 slots of two tokens; the key of pair j comes back as the
    first token of slot g_j. The slots g_1, g_2, ... are drawn one after another without
    replacement, with probabilities of a power law over the slots i = 1 .. S:

        p(i) ~ i^(a - 1),        a = `power` (above 0)

    so a small `power` asks soon after the pairs, and 1 asks anywhere with equal chance. Only the
    K places where a key comes back are scored, and the value does not follow there.

    Args:
      vocabulary: V.
      length: T.
      pairs: K.
      power: a.
      noise: fill the blanks (token 0) with tokens drawn from [0, V).

    Raises:
      ValueError: fields that leave no room; the message says what would.

    Source: Zoology, arXiv:2312.04927, and its generator `multiquery_ar`; Figure 2 has V = 8192, no
    noise and (T, K) = (64, 4), (128, 8), (256, 16), (512, 64).
    """

    vocabulary: int = 8192
    length: int = 64
    pairs: int = 4
    power: float = 0.01
    noise: bool = False

    def __post_init__(self):
        at_least(self, vocabulary=4, length=4, pairs=1)
        if self.length % 2:
            raise ValueError(f"MQAR: length {self.length} must be even: slots are of two tokens")
        if 4 * self.pairs > self.length:
            raise ValueError(
                f"MQAR: {self.pairs} pairs take 4 tokens each, but length is {self.length}; make it"
                f" at least {4 * self.pairs}, or pairs at most {self.length // 4}"
            )
        if self.vocabulary // 2 - 1 < self.pairs:
            raise ValueError(
                f"MQAR: vocabulary {self.vocabulary} has {self.vocabulary // 2 - 1} keys for"
                f" {self.pairs} pairs; make it at least {2 * self.pairs + 2}"
            )
        checks.real("MQAR: power", self.power, above=0.0)

    @property
    def scored(self) -> int:
        """K."""
        return self.pairs

    @property
    def probabilities(self) -> Float[Array, "S"]:
        """[S], p(i): the chance of each slot for the key that is placed first."""
        return jax.nn.softmax(self._logits)

    @property
    def _logits(self) -> Float[Array, "S"]:
        """[S], log p(i) and a constant: for a large power, p underflows to 0 and i^a overflows."""
        slots = (self.length - 2 * self.pairs) // 2
        return (self.power - 1.0) * jnp.log(jnp.arange(1, slots + 1, dtype=jnp.float32))

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
        for_keys, for_values, for_slots, for_noise = jax.random.split(key, 4)
        half, count = self.vocabulary // 2, self.pairs
        keys = 1 + distinct(for_keys, half - 1, count)
        values = half + distinct(for_values, self.vocabulary - half, count)
        logits = self._logits
        # Gumbel top-k: drawn one after another, each time among the slots that are left.
        drawn = jax.random.gumbel(for_slots, logits.shape, logits.dtype) + logits
        slots = jax.lax.top_k(drawn, count)[1]
        places = 2 * count + 2 * slots

        pairs = jnp.stack([keys, values], axis=1).reshape(-1)
        blank = jnp.zeros(self.length, jnp.int32)
        tokens = blank.at[: 2 * count].set(pairs).at[places].set(keys)
        weights = jnp.zeros(self.length, jnp.float32).at[places].set(1.0)
        if self.noise:
            given = (jnp.arange(self.length) < 2 * count) | (weights > 0)
            filler = jax.random.randint(for_noise, (self.length,), 0, self.vocabulary)
            tokens = jnp.where(given, tokens, filler)
        return tokens, blank.at[places].set(values), weights
