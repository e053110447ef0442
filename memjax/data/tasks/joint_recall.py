"""Joint recall: what a key stands for depends on the context that it is asked in."""

import dataclasses

import jax
import jax.numpy as jnp

from memjax.data.tasks.task import TaskBatch, at_least, distinct
from memjax.typing import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class JointRecall:
    """A table of contexts by keys, then each of its cells is asked for.

        c_1 k_1 v_11 k_2 v_12 ..  c_2 k_2 v_22 k_1 v_21 ..   . . .   c_2 k_1  c_1 k_1 ...
                                                                         v_21     v_11   the targets

    Every context lists the same M keys, each list in an order of its own, with a value for each
    drawn anew: neither the key nor the context alone gives the value. After the table come blanks
    (token 0), and at the end of the row each of the N M cells is asked for once, in random order,
    as its context and its key; the target stands at the key, and the value does not follow.

    Contexts are drawn without replacement from [1, V/4), keys from [V/4, V/2), values, with
    replacement, from [V/2, V).

    Args:
      vocabulary: V.
      length: T, at least N + 4 N M.
      contexts: N.
      keys: M.

    Raises:
      ValueError: fields that leave no room; the message says what would.

    Source: "Overcoming Long-Context Limitations of State-Space Models via Context-Dependent Sparse
    Attention", arXiv:2507.00449, which defines the task (multi-query joint recall); how the tokens
    are laid out, and the ranges, are ours.
    """

    vocabulary: int = 8192
    length: int = 128
    contexts: int = 4
    keys: int = 4

    def __post_init__(self):
        at_least(self, vocabulary=8, length=5, contexts=1, keys=1)
        needed = self.contexts + 4 * self.contexts * self.keys
        if self.length < needed:
            raise ValueError(
                f"JointRecall: {self.contexts} contexts of {self.keys} keys take {needed} tokens"
                f" (the table and the questions), but length is {self.length}; make it at least"
                f" {needed}"
            )
        quarter, half = self.vocabulary // 4, self.vocabulary // 2
        for name, count, there in (
            ("contexts", self.contexts, quarter - 1),
            ("keys", self.keys, half - quarter),
        ):
            if there < count:
                raise ValueError(
                    f"JointRecall: vocabulary {self.vocabulary} has {there} {name} to draw"
                    f" {count} from; make it at least {4 * (count + 1)}"
                )

    @property
    def scored(self) -> int:
        """N M."""
        return self.contexts * self.keys

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
        for_contexts, for_keys, for_values, for_order, for_questions = jax.random.split(key, 5)
        n, m, cells = self.contexts, self.keys, self.scored
        quarter, half = self.vocabulary // 4, self.vocabulary // 2
        contexts = 1 + distinct(for_contexts, quarter - 1, n)
        keys = quarter + distinct(for_keys, half - quarter, m)
        keys = jax.vmap(lambda key: keys[distinct(key, m, m)])(jax.random.split(for_order, n))
        values = jax.random.randint(for_values, (n, m), half, self.vocabulary)

        pairs = jnp.stack([keys, values], axis=2).reshape(n, 2 * m)
        table = jnp.concatenate([contexts[:, None], pairs], axis=1).reshape(-1)
        asked = distinct(for_questions, cells, cells)
        questions = jnp.stack([contexts[asked // m], keys.reshape(-1)[asked]], axis=1).reshape(-1)

        blank = jnp.zeros(self.length, jnp.int32)
        start = self.length - 2 * cells
        tokens = blank.at[: len(table)].set(table).at[start:].set(questions)
        targets = blank.at[start + 1 :: 2].set(values.reshape(-1)[asked])
        weights = jnp.zeros(self.length, jnp.float32).at[start + 1 :: 2].set(1.0)
        return tokens, targets, weights
