"""What every synthetic task is: a value that makes batches from a key."""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from memjax import checks
from memjax.typing import Array, Float, Int, Key


class TaskBatch(NamedTuple):
    """Rows of a task.

    Args:
      tokens: [B, T], what the model reads.
      targets: [B, T]; entry t is what it must predict after reading `tokens[:, :t + 1]`. It is
        counted only where `weights` is not 0, and is 0 elsewhere.
      weights: [B, T], 1 at the scored positions, 0 at all others.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]


@runtime_checkable
class Task(Protocol):
    """A frozen dataclass with these; a task of your own needs no more."""

    @property
    def vocabulary(self) -> int:
        """Tokens and targets are below this."""

    @property
    def length(self) -> int:
        """T, tokens of a row."""

    @property
    def scored(self) -> int:
        """The most scored positions that a row can have."""

    def batch(self, key: Key, size: int) -> TaskBatch:
        """`size` rows, a pure function of the key; works inside jit, with `size` static."""


def at_least(task: Any, **least: int) -> None:
    """Raises ValueError where a field of a task is no integer of at least this.

    Args:
      task: a dataclass.
      **least: the smallest value of each field.
    """
    for name, bound in least.items():
        checks.whole(f"{type(task).__name__}: {name}", getattr(task, name), bound)


def options(task: Any) -> dict[str, Any]:
    """The fields of a task by name, which make it again: `type(task)(**options(task))`."""
    return {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}


def distinct(key: Key, n: int, count: int) -> Int[Array, "count"]:
    """`count` different numbers below n, every ordered choice with equal chance.

        permutation(n)[:count],      without a sort of all n

    Args:
      key: random key.
      n, count: with count <= n.

    Returns:
      [count].
    """
    return jax.lax.top_k(jax.random.bits(key, (n,), jnp.uint32), count)[1]
