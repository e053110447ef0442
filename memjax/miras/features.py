"""Feature maps: what a memory does to keys and queries before its first linear map."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from memjax import checks
from memjax.typing import Array, Float

UNIT_EPSILON = 1e-6


def unit(x: Float[Array, "*B D"], eps: float = UNIT_EPSILON) -> Float[Array, "*B D"]:
    """`x / sqrt(||x||^2 + eps^2)` over the last axis: l2 normalisation, safe at zero."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    norm = jnp.sqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + eps**2)
    return (wide / norm).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Features:
    """What a feature map must give; see `polynomial`."""

    def dim(self, dim_k: int) -> int:
        """Number of features of a key of dimension `dim_k`."""
        raise TypeError("Features is the interface: use polynomial(), elu1(), taylor_exp(), dpfp()")

    def init(self) -> dict[str, Array]:
        """Weights of its own; they do not learn at test time."""
        return {}

    def apply(self, slow: dict[str, Array], x: Float[Array, "N K"]) -> Float[Array, "N F"]:
        """phi(x)."""
        raise TypeError("Features is the interface: use polynomial(), elu1(), taylor_exp(), dpfp()")


@dataclasses.dataclass(frozen=True)
class polynomial(Features):
    """All monomials to degree p, so that `phi(q) . phi(k) = sum_i c_i^2 (q . k)^i`, i = 0 .. p.

    A memory with these features stores far more pairs: the number of features is
    `binomial(K + p, p)` instead of K. The coefficients c_i are slow weights ("taylor"), from
    1 / sqrt(i!), where the kernel is the Taylor polynomial of exp.

    Args:
        degree: p, at least 1.
    Raises:
        ValueError: another degree.
    Source: ATLAS (arXiv:2505.23735), section 3.2.
    """

    degree: int = 2

    def __post_init__(self):
        checks.whole("polynomial degree", self.degree)

    def dim(self, dim_k: int) -> int:
        return math.comb(dim_k + self.degree, self.degree)

    def init(self) -> dict[str, Array]:
        return {"taylor": jnp.array([math.factorial(i) ** -0.5 for i in range(self.degree + 1)])}

    def apply(self, slow: dict[str, Array], x: Float[Array, "N K"]) -> Float[Array, "N F"]:
        return _monomials(x, slow["taylor"])


@dataclasses.dataclass(frozen=True)
class taylor_exp(Features):
    """`polynomial` with the coefficients of exp held fixed: `phi(q) . phi(k) ~ exp(q . k)`.

    Args:
        degree: terms after the first, at least 1.
    Source: Based (arXiv:2402.18668), section 4.1, of degree 2.
    """

    degree: int = 2

    def __post_init__(self):
        polynomial(self.degree)

    def dim(self, dim_k: int) -> int:
        return polynomial(self.degree).dim(dim_k)

    def apply(self, slow: dict[str, Array], x: Float[Array, "N K"]) -> Float[Array, "N F"]:
        return _monomials(x, polynomial(self.degree).init()["taylor"].astype(x.dtype))


@dataclasses.dataclass(frozen=True)
class elu1(Features):
    """`elu(x) + 1`, positive. Source: Katharopoulos et al. (arXiv:2006.16236), equation 7."""

    def dim(self, dim_k: int) -> int:
        return dim_k

    def apply(self, slow: dict[str, Array], x: Float[Array, "N K"]) -> Float[Array, "N F"]:
        return jax.nn.elu(x) + 1


@dataclasses.dataclass(frozen=True)
class dpfp(Features):
    """Deterministic parameter-free projection: with `u = relu([x, -x])`,

        phi(x) = [u o roll(u, 1), ..., u o roll(u, nu)]            2 K nu features

    Args:
        nu: at least 1.
    Raises:
        ValueError: another nu.
    Source: Schlag et al. (arXiv:2102.11174), equation 37.
    """

    nu: int = 1

    def __post_init__(self):
        checks.whole("dpfp nu", self.nu)

    def dim(self, dim_k: int) -> int:
        return 2 * dim_k * self.nu

    def apply(self, slow: dict[str, Array], x: Float[Array, "N K"]) -> Float[Array, "N F"]:
        u = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
        return jnp.concatenate(
            [u * jnp.roll(u, shift, axis=-1) for shift in range(1, self.nu + 1)], axis=-1
        )


def _monomials(x: Float[Array, "N K"], coefficients: Float[Array, " P"]) -> Float[Array, "N F"]:
    """Monomials of every degree, each with the root of its multinomial coefficient."""
    parts = []
    for degree in range(coefficients.shape[0]):
        sets = list(itertools.combinations_with_replacement(range(x.shape[-1]), degree))
        ways = [
            math.factorial(degree) / math.prod(math.factorial(s.count(i)) for i in set(s))
            for s in sets
        ]
        which = np.array(sets, np.int32).reshape(len(sets), degree)
        terms = jnp.asarray(np.sqrt(ways), x.dtype) * coefficients[degree].astype(x.dtype)
        terms = jnp.broadcast_to(terms, (*x.shape[:-1], len(sets)))
        for factor in range(degree):
            terms = terms * jnp.take(x, which[:, factor], axis=-1)
        parts.append(terms)
    return jnp.concatenate(parts, axis=-1)
