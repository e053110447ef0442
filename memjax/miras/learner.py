"""Learners: how a gradient becomes a step.

A learner has two faces that a test holds equal. `update` is its definition, one token at a time.
`response` is the same recurrence solved over a chunk, for the dual form: with `S_0` the momentum
before the chunk and `g_j` the gradient of token `j`,

    S_i = m_i S_0 - sum_{j <= i} E[i, j] lr_j g_j.
"""

import dataclasses

import jax
import jax.numpy as jnp

from memjax.miras.bias import Bias, l2
from memjax.miras.products import prefix_products, segment_products
from memjax.miras.structure import Structure, matrix
from memjax.typing import Array, Bool, Float, PyTree


@dataclasses.dataclass(frozen=True)
class Learner:
    """What a learner must give; see `gd`, `momentum` and `implicit`."""

    needs_momentum = False

    def rates(self, lr: Float[Array, "*N"], k: Float[Array, "*N K"]) -> Float[Array, "*N"]:
        """The step sizes, of the gate `lr` and the keys."""
        return lr

    def check(self, structure: Structure, bias: Bias, chunk: int) -> None:
        """Raises ValueError, with the reason, where this learner cannot serve such a memory."""

    def start(self, weights: PyTree) -> PyTree:
        """The momentum before the first token."""
        raise TypeError("Learner is the interface: use gd() or momentum()")

    def update(
        self, velocity: PyTree, gradient: PyTree, lr: Float[Array, ""], eta: Float[Array, ""] | None
    ) -> tuple[PyTree, PyTree]:
        """One token: (new momentum, what is added to the weights)."""
        raise TypeError("Learner is the interface: use gd() or momentum()")

    def response(
        self, eta: Float[Array, " C"] | None, same: Bool[Array, "C C"], first: Bool[Array, " C"]
    ) -> tuple[Float[Array, "C C"] | None, Float[Array, " C"] | None]:
        """`(E, m)` over a chunk; None stands for the identity and for a learner without momentum.

        Args:
            eta: the momentum gate of each token.
            same: same[i, j] where tokens i and j belong to one document.
            first: the first token of each document.
        """
        raise TypeError("Learner is the interface: use gd() or momentum()")


@dataclasses.dataclass(frozen=True)
class gd(Learner):
    """Gradient descent: `W_t = a_t W_{t-1} - lr_t g_t`."""

    def start(self, weights: PyTree) -> PyTree:
        return ()

    def update(
        self, velocity: PyTree, gradient: PyTree, lr: Float[Array, ""], eta: Float[Array, ""] | None
    ) -> tuple[PyTree, PyTree]:
        return (), jax.tree.map(lambda g: -lr * g, gradient)

    def response(
        self, eta: Float[Array, " C"] | None, same: Bool[Array, "C C"], first: Bool[Array, " C"]
    ) -> tuple[None, None]:
        return None, None


@dataclasses.dataclass(frozen=True)
class implicit(gd):
    """One implicit (proximal) step on `l2`: the gradient is taken where the step ends.

        W_t = argmin_W  1/(2 lr_t) ||W - W_{t-1}||^2 + 1/2 ||k_t W - v_t||^2
            = W_{t-1} - lr_t / (1 + lr_t ||k_t||^2) k_t^T (k_t W_{t-1} - v_t)

    It is stable for every lr > 0. Needs a `matrix` memory, `l2` and chunk 1, where this closed form
    holds; with `decay(before="gradient")`, `W_{t-1}` is the decayed one.

    Source: Longhorn (arXiv:2407.14207), theorem 3.1, without its diagonal approximation.
    """

    def rates(self, lr: Float[Array, "*N"], k: Float[Array, "*N K"]) -> Float[Array, "*N"]:
        return lr / (1 + lr * jnp.sum(jnp.square(k.astype(lr.dtype)), axis=-1))

    def check(self, structure: Structure, bias: Bias, chunk: int) -> None:
        if not (isinstance(structure, matrix) and isinstance(bias, l2) and chunk == 1):
            raise ValueError(
                f"implicit() has a closed form for matrix(), l2() and chunk 1 alone, not for "
                f"{structure}, {bias} and chunk {chunk}: use gd() or momentum()"
            )


@dataclasses.dataclass(frozen=True)
class momentum(Learner):
    """Gradient descent with momentum: `S_t = e_t S_{t-1} - lr_t g_t`, `W_t = a_t W_{t-1} + S_t`.

    Source: Titans (arXiv:2501.00663), equations 9, 10 and 13.
    """

    needs_momentum = True

    def start(self, weights: PyTree) -> PyTree:
        return jax.tree.map(jnp.zeros_like, weights)

    def update(
        self, velocity: PyTree, gradient: PyTree, lr: Float[Array, ""], eta: Float[Array, ""] | None
    ) -> tuple[PyTree, PyTree]:
        velocity = jax.tree.map(lambda s, g: eta * s - lr * g, velocity, gradient)
        return velocity, velocity

    def response(
        self, eta: Float[Array, " C"] | None, same: Bool[Array, "C C"], first: Bool[Array, " C"]
    ) -> tuple[Float[Array, "C C"], Float[Array, " C"]]:
        between = segment_products(eta, same)
        return between, prefix_products(between, eta, first)
