"""Retention: how the memory forgets. `A_t = a_t A_{t-1} + change_t`, `W_t = link(A_t)`.

A retention turns the gates into the factors `a_t`, one per token and head, or one per token, head
and key channel (then row `i` of a `[K, V]` matrix memory is multiplied by `a_t[i]`). What it
accumulates, A, is the weights themselves unless it has a *link*: the map that a divergence other
than the squared distance leaves between the sum of gradients and the weights (mirror descent).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from memjax import checks
from memjax.miras import passes
from memjax.miras.structure import Structure
from memjax.typing import Array, Float

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Retention:
    """What a retention must give; see `decay` and `none`."""

    needs_retain = False
    linear = True  # whether W = A: no link
    to_initial = False  # whether what is forgotten gives way to W_0, not to 0
    closes = False  # whether `close` does anything

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "link" in vars(cls):  # what follows from the link that it has replaced does not hold
            cls.linear = vars(cls).get("linear", False)
            cls.answer = vars(cls).get("answer", Retention.answer)

    @property
    def first(self) -> bool:
        """Whether the memory decays before a token's gradient is taken."""
        return False

    def check(self, structure: Structure) -> None:
        """Raises ValueError, with the reason, where this retention cannot serve such a memory."""

    def factors(self, retain: Float[Array, "*shape"] | None) -> Float[Array, "*shape"] | None:
        """The factors `a_t` of these gates; None stands for 1."""
        raise TypeError("Retention is the interface: use decay(), lq() or another")

    def link(self, a: Float[Array, "*N I O"]) -> Float[Array, "*N I O"]:
        """The weights W of what was accumulated, matrix by matrix."""
        return a

    def answer(
        self, product: Callable, x: Float[Array, "C I"], a: Float[Array, "I O"]
    ) -> Float[Array, "C O"]:
        """`product(x, link(a))`, for one matrix, with the fewest passes over it."""
        return product(x, self.link(a))

    def close(
        self, a: Float[Array, "*N I O"], begin: Float[Array, "*#N I O"]
    ) -> Float[Array, "*N I O"]:
        """What the end of a chunk makes of A; `begin` is what the document started from."""
        return a


@dataclasses.dataclass(frozen=True)
class decay(Retention):
    """Weight decay from the gate `retain` (`a = 1 - alpha`), per head or per key channel.

    Args:
        before: "update": a token's gradient is taken at W' as it is, and the weights decay when
            it is added (Titans, Miras). "gradient": the weights decay first, W' with them, and
            the gradient is taken at what is left, `(prod a_m) W'` over the chunk's tokens so far;
            at chunk 1 that is `a_t W_{t-1}` (the gated delta rule). For `dot` both are the same.
        to: "zero", or "initial": `A_t = W_0 + a_t (A_{t-1} - W_0) + change_t`, the retention by
            the squared distance from the initial weights.
    Raises:
        ValueError: another word.
    Source: Miras (arXiv:2504.13173), section 3.2, for both; Titans (arXiv:2501.00663), equation 13.
    """

    before: str = "update"
    to: str = "zero"
    needs_retain = True

    def __post_init__(self):
        if self.before not in ("update", "gradient"):
            raise ValueError(f'decay before {self.before!r} must be "update" or "gradient"')
        if self.to not in ("zero", "initial"):
            raise ValueError(f'decay to {self.to!r} must be "zero" or "initial"')

    @property
    def first(self) -> bool:
        return self.before == "gradient"

    @property
    def to_initial(self) -> bool:
        return self.to == "initial"

    def factors(self, retain: Float[Array, "*shape"] | None) -> Float[Array, "*shape"] | None:
        return retain


@dataclasses.dataclass(frozen=True)
class none(Retention):
    """Nothing is forgotten: `a = 1`."""

    def factors(self, retain: Float[Array, "*shape"] | None) -> None:
        if retain is not None:
            raise ValueError(
                "gates.retain was given, but the rule's retention is none(): "
                "leave it None or use retention=decay()"
            )
        return None


@dataclasses.dataclass(frozen=True)
class _Linked(Retention):
    """Decay of what is accumulated, and weights that are not it."""

    needs_retain = True

    def factors(self, retain: Float[Array, "*shape"] | None) -> Float[Array, "*shape"] | None:
        return retain


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _norm(q: float, a: Float[Array, "*N I O"]) -> Float[Array, "*N 1 1"]:
    """`||a||_q` of every matrix: its entries by the largest, so that no power leaves the dtype."""
    return _norm_and_largest(q, a)[0]


def _norm_and_largest(q, a):
    most = passes.result(jnp.maximum(passes.largest(jnp.abs, jax.lax.stop_gradient(a)), EPSILON))
    total = passes.total(lambda a: (jnp.square(a / most) + EPSILON**2) ** (q / 2), a)
    return passes.result(most * total ** (1 / q)), most


@_norm.defjvp
def _norm_jvp(q, primals, tangents):
    (a,), (change,) = primals, tangents
    norm, most = _norm_and_largest(q, a)
    slope = (a / most) * (jnp.square(a / most) + EPSILON**2) ** (q / 2 - 1)
    by = (most / norm) ** (q - 1)
    return norm, by * jnp.sum(slope * change, axis=(-2, -1), keepdims=True)


@dataclasses.dataclass(frozen=True)
class lq(_Linked):
    """The q-norm: `A_t = a_t A_{t-1} + change_t`, `W_t = A_t / ||A_t||_q^(q-2)`.

    The norm is over all entries of a matrix; at q = 2 this is `decay()`. Above 2 the link is steep
    without bound at A = 0, so that a memory must not start there.

    Args:
        q: above 1. The derivation in the paper covers q <= 2; its Moneta takes 4.
    Raises:
        ValueError: another q; in a `Rule`, q > 2 where W_0 = 0.
    Source: Miras (arXiv:2504.13173), equations 23 and 24.
    """

    q: float = 4.0

    def __post_init__(self):
        checks.real("lq q", self.q, above=1.0)

    def check(self, structure: Structure) -> None:
        if self.q > 2:
            _starts_elsewhere(
                structure, f"lq({self.q:g}) has a link of unbounded slope at A = 0, gradients too"
            )

    def link(self, a: Float[Array, "*N I O"]) -> Float[Array, "*N I O"]:
        return a * self._scale(a)

    def answer(
        self, product: Callable, x: Float[Array, "C I"], a: Float[Array, "I O"]
    ) -> Float[Array, "C O"]:
        return product(x, a) * self._scale(a)

    def _scale(self, a: Float[Array, "*N I O"]) -> Float[Array, "*N 1 1"]:
        return _norm(self.q, a) ** (2 - self.q)


@dataclasses.dataclass(frozen=True)
class simplex(_Linked):
    """Weights that are probabilities, retained by the Kullback-Leibler divergence:

        W_t = softmax(a_t log W_{t-1} - lr_t g_t),   held as  A_t = a_t A_{t-1} - lr_t g_t

    per output feature, over the inputs: the weights of each column are positive and sum to `total`.
    (softmax does not see what is added to a whole column, so log W and A are the same to it.)

    Args:
        temperature: `W = total softmax(A / temperature)`.
        total: what a column sums to.
    Raises:
        ValueError: a temperature or total that is not positive.
    Source: Miras (arXiv:2504.13173), equations 19 to 21 and 27 (Memora).
    """

    temperature: float = 1.0
    total: float = 1.0

    def __post_init__(self):
        checks.real("simplex temperature", self.temperature, above=0.0)
        checks.real("simplex total", self.total, above=0.0)

    def link(self, a: Float[Array, "*N I O"]) -> Float[Array, "*N I O"]:
        return self.total * jax.nn.softmax(a / self.temperature, axis=-2)

    def answer(
        self, product: Callable, x: Float[Array, "C I"], a: Float[Array, "I O"]
    ) -> Float[Array, "C O"]:
        # The sums by the product's own unit, with the numerators.
        a = a / self.temperature
        most = passes.result(passes.largest_of_columns(jax.lax.stop_gradient(a)))
        shares = jnp.exp(a - most)
        both = product(jnp.concatenate([x, jnp.ones_like(x[:1])]), shares)
        return self.total * both[:-1] / both[-1:]


@dataclasses.dataclass(frozen=True)
class elastic_net(_Linked):
    """Squares and moduli: `A_t = a_t A_{t-1} + change_t`, `W_t = A_t atan(|A_t| / c) / (pi / 2)`.

    The soft threshold of the l1 part is smooth, as in the paper, so that small entries come back;
    the l2 part is the decay.

    Args:
        threshold: c.
    Raises:
        ValueError: a threshold that is not positive.
    Source: Miras (arXiv:2504.13173), equation 22 in its follow-the-regularised-leader form.
    """

    threshold: float = 0.1

    def __post_init__(self):
        checks.real("elastic_net threshold", self.threshold, above=0.0)

    def link(self, a: Float[Array, "*N I O"]) -> Float[Array, "*N I O"]:
        return a * jnp.arctan(jnp.sqrt(jnp.square(a) + EPSILON**2) / self.threshold) * (2 / jnp.pi)


@dataclasses.dataclass(frozen=True)
class renormalise(none):
    """At every chunk's end each output feature's weights return to the norm they had in W_0.

        W[:, o] = ||W_0[:, o]|| W[:, o] / ||W[:, o]||

    Raises:
        ValueError: in a `Rule`, where W_0 = 0.
    Source: LaCT (arXiv:2505.23884), equation 10.
    """

    closes = True

    def check(self, structure: Structure) -> None:
        _starts_elsewhere(
            structure, "renormalise() takes the weights back to the norms of W_0, here to 0"
        )

    def close(
        self, a: Float[Array, "*N I O"], begin: Float[Array, "*#N I O"]
    ) -> Float[Array, "*N I O"]:
        def norm(w):
            return jnp.sqrt(jnp.sum(jnp.square(w), axis=-2, keepdims=True) + EPSILON**2)

        return a * (norm(begin) / norm(a))


def _starts_elsewhere(structure: Structure, why: str) -> None:
    """Raises ValueError where W_0 = 0."""
    if structure.starts_at_zero:
        raise ValueError(
            f"{why}, and {structure} starts at W_0 = 0: take matrix(scale=1.0), mlp(), or another "
            "scale above 0"
        )
