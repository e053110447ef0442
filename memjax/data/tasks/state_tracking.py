"""State tracking: parity, and the composition of permutations (S5).

Both rows begin with a token of their own, which is not scored. Without it, attention whose
positions are relative reads the same thing after one 1 and after many, and fails for that alone.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from memjax.data.tasks.task import TaskBatch, at_least
from memjax.typing import Array, Int, Key


@dataclasses.dataclass(frozen=True)
class Parity:
    """Bits; after each, whether the ones so far are odd in number.

        x_0 = 2 (begin),     x_t in {0, 1},     target_t = x_1 xor x_2 xor ... xor x_t

    Every bit is scored, so a model that guesses has an accuracy of 1/2. The smallest state that has
    to be tracked: one bit, that some token turns over.

    Args:
      length: T, with the token that begins it.

    Raises:
      ValueError: a length below 2.

    Source: "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues",
    arXiv:2411.12537: linear recurrences whose transitions have no negative eigenvalue cannot do it
    at all lengths. Papers differ in scoring all positions (here) or the last one.
    """

    length: int = 64

    def __post_init__(self):
        at_least(self, length=2)

    @property
    def vocabulary(self) -> int:
        """3: the bits and the token that begins a row."""
        return 3

    @property
    def scored(self) -> int:
        """T - 1."""
        return self.length - 1

    def batch(self, key: Key, size: int) -> TaskBatch:
        """`size` rows, a pure function of the key.

        Args:
          key: random key.
          size: B.

        Returns:
          tokens, targets and weights, each [B, T].
        """
        bits = jax.random.randint(key, (size, self.scored), 0, 2, jnp.int32)
        return _rows(bits, jnp.cumsum(bits, axis=1, dtype=jnp.int32) % 2, begin=2)


@dataclasses.dataclass(frozen=True)
class Permutations:
    """Permutations; after each, the composition of all so far: the word problem of a group S_n.

        x_0 = n! (begin),   x_t in [0, n!),   s_0 = id,   s_t = g(x_t) o s_{t-1}
        target_t = g^-1(s_t)

    g(i) is permutation i of 0 .. n - 1 in lexicographic order (`itertools.permutations`), and
    (p o q)(j) = p(q(j)): the newest one acts last. Tokens are uniform, among all permutations or
    those that move few things; every position but the first is scored. S_5 is the smallest whose
    word problem is complete for NC1, since it is not solvable: attention and diagonal linear
    recurrences of fixed depth, which lie in TC0, are not expected to solve it at all lengths. A
    swap (`moved=2`) is one reflection, which a delta rule with a rate of 2 can make in one step; a
    permutation of n things may take n - 1 of them.

    Args:
      length: T, with the token that begins it.
      degree: n; 5 is S5, with 120 permutations.
      moved: the most things that a token moves: 2 for swaps (and the identity), None for any.

    Raises:
      ValueError: a length below 2, a degree outside 2 .. 6, `moved` outside 2 .. n.

    Source: "The Illusion of State in State-Space Models", arXiv:2404.08819; few things moved:
    arXiv:2411.12537.
    """

    length: int = 32
    degree: int = 5
    moved: int | None = None

    def __post_init__(self):
        at_least(self, length=2, degree=2)
        if self.degree > 6:
            raise ValueError(
                f"Permutations: degree {self.degree} has {math.factorial(self.degree):,}"
                " permutations; make it at most 6"
            )
        if self.moved is not None:
            at_least(self, moved=2)
            if self.moved > self.degree:
                raise ValueError(
                    f"Permutations: moved {self.moved} must be at most the degree {self.degree}"
                )

    @property
    def vocabulary(self) -> int:
        """n! + 1: the permutations and the token that begins a row."""
        return math.factorial(self.degree) + 1

    @property
    def scored(self) -> int:
        """T - 1."""
        return self.length - 1

    def batch(self, key: Key, size: int) -> TaskBatch:
        """`size` rows, a pure function of the key.

        Args:
          key: random key.
          size: B.

        Returns:
          tokens, targets and weights, each [B, T].
        """
        table, index = _permutations(self.degree)
        moves = (table != np.arange(self.degree)).sum(axis=1)
        drawn = np.flatnonzero(moves <= (self.moved or self.degree)).astype(np.int32)
        tokens = jax.random.randint(key, (size, self.scored), 0, len(drawn), jnp.int32)
        tokens = jnp.asarray(drawn)[tokens]
        states = jax.lax.associative_scan(_after, jnp.asarray(table)[tokens], axis=1)
        return _rows(tokens, jnp.asarray(index)[_code(states, self.degree)], begin=len(table))


def _rows(tokens: Int[Array, "B N"], targets: Int[Array, "B N"], begin: int) -> TaskBatch:
    """Rows of N + 1 tokens, the first of them `begin`, with all others scored."""

    def led(x, first):
        return jnp.pad(x, ((0, 0), (1, 0)), constant_values=first)

    return TaskBatch(led(tokens, begin), led(targets, 0), led(jnp.ones_like(targets, "float32"), 0))


def _after(first: Int[Array, "*B n"], second: Int[Array, "*B n"]) -> Int[Array, "*B n"]:
    """`second o first`: j goes to second[first[j]]."""
    return jnp.take_along_axis(second, first, axis=-1)


def _code(permutations, degree: int):
    """A number below degree**degree for each: the entries as its digits."""
    return (permutations * degree ** np.arange(degree, dtype=np.int32)).sum(-1)


@functools.cache
def _permutations(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """All permutations [n!, n], and the place among them of each code [n**n]."""
    table = np.array(list(itertools.permutations(range(degree))), np.int32)
    index = np.zeros(degree**degree, np.int32)
    index[_code(table, degree)] = np.arange(len(table), dtype=np.int32)
    return table, index
