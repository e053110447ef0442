"""Attentional bias: what the memory minimises at every token.

A bias gives the loss of the memory's answer `y = M(k)` against the value `v`, and its derivative by
`y`, the *signal* that is propagated back through the memory.
"""

import dataclasses

import jax.numpy as jnp

from memjax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class Bias:
    """What a bias must give; see `l2` and `dot`."""

    def loss(self, y: Float[Array, "*N V"], v: Float[Array, "*N V"]) -> Float[Array, "*N"]:
        raise TypeError("Bias is the interface: use l2() or dot(), or define loss and signal")

    def signal(self, y: Float[Array, "*N V"], v: Float[Array, "*N V"]) -> Float[Array, "*N V"]:
        """Derivative of `loss` by `y`."""
        raise TypeError("Bias is the interface: use l2() or dot(), or define loss and signal")


@dataclasses.dataclass(frozen=True)
class l2(Bias):
    """Regression, `1/2 ||y - v||^2` summed over features; signal `y - v`.

    With a matrix memory one step of size `lr` is the delta rule with `beta = lr`.
    """

    def loss(self, y: Float[Array, "*N V"], v: Float[Array, "*N V"]) -> Float[Array, "*N"]:
        return 0.5 * jnp.sum(jnp.square(y - v), axis=-1)

    def signal(self, y: Float[Array, "*N V"], v: Float[Array, "*N V"]) -> Float[Array, "*N V"]:
        return y - v


@dataclasses.dataclass(frozen=True)
class dot(Bias):
    """Similarity, `-<y, v>`; signal `-v`. With a matrix memory: (decayed) linear attention."""

    def loss(self, y: Float[Array, "*N V"], v: Float[Array, "*N V"]) -> Float[Array, "*N"]:
        return -jnp.sum(y * v, axis=-1)

    def signal(self, y: Float[Array, "*N V"], v: Float[Array, "*N V"]) -> Float[Array, "*N V"]:
        return -jnp.broadcast_to(v, y.shape)
