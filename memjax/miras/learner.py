"""Learners: how a gradient becomes a change of the weights.

A learner's definition is `update`, one token at a time. Where the change is linear in the gradients
(`linear`), `response` is the same recurrence solved over a chunk, for the dual form, and a test
holds the two equal: with `S_0` the momentum before the chunk and `g_j` the gradient of token `j`,

    S_i = m_i S_0 - sum_{j <= i} E[i, j] lr_j g_j.

A learner that acts at the end of every chunk (`closes`) only gathers in `update`; `close` steps.
"""

import dataclasses

import jax
import jax.numpy as jnp

from memjax import checks
from memjax.miras import kinds
from memjax.miras.bias import Bias, l2
from memjax.miras.newton_schulz import orthogonal
from memjax.miras.products import prefix_products, segment_products
from memjax.miras.retention import Retention
from memjax.miras.structure import Structure, least_squares, matrix, vector
from memjax.typing import Array, Bool, Float, PyTree


@dataclasses.dataclass(frozen=True)
class Learner:
    """What a learner must give; see `gd`, `momentum` and `implicit`."""

    needs_momentum = False
    linear = True  # whether the change is linear in the gradients, and `response` there
    closes = False  # whether the weights change at the ends of chunks only
    exchanges = False  # whether it erases along one key and writes along another: `Gates.write`
    erases = False  # whether each linear map also erases what it holds along its input
    solves = False  # whether what is read is the solution of a system that it keeps
    window = 1  # tokens whose gradients a token takes, itself the last

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        own = vars(cls)
        if "update" in own and "response" not in own and own.get("linear", True):
            raise TypeError(
                f"{cls.__name__} defines update: define response too, the same over a chunk, or "
                "set linear = False, and the weights of every token are formed"
            )

    def rates(self, lr: Float[Array, "*L"], k: Float[Array, "*N K"]) -> Float[Array, "*L"]:
        """The step sizes, of the gate `lr` and the keys."""
        return lr

    def check(self, structure: Structure, bias: Bias, retention: Retention, chunk: int) -> None:
        """Raises ValueError, with the reason, where this learner cannot serve such a memory."""

    def start(self, weights: PyTree) -> PyTree:
        """The momentum before the first token: () or a tree whose leaves are like the weights'."""
        raise TypeError("Learner is the interface: use gd(), momentum() or another")

    def gather(
        self, velocity: PyTree, total: PyTree, rate: Float[Array, ""], count: Float[Array, ""]
    ) -> PyTree:
        """`update` of many tokens, for a learner that `closes`.

        Args:
            velocity: the momentum before.
            total: `- sum_t lr_t g_t`.
            rate: the sum of their momentum gates.
            count: how many tokens they are.
        """
        raise TypeError(f"{self} does not act at the ends of chunks")

    def close(self, velocity: PyTree) -> tuple[PyTree, PyTree]:
        """The end of a chunk, for a learner that `closes`: as `update`."""
        raise TypeError(f"{self} does not act at the ends of chunks")

    def update(
        self, velocity: PyTree, gradient: PyTree, lr: Float[Array, ""], eta: Float[Array, ""] | None
    ) -> tuple[PyTree, PyTree]:
        """One token: (new momentum, what is added to the weights)."""
        raise TypeError("Learner is the interface: use gd(), momentum() or another")

    def response(
        self, eta: Float[Array, " C"] | None, same: Bool[Array, "C C"], first: Bool[Array, " C"]
    ) -> tuple[Float[Array, "C C"] | None, Float[Array, " C"] | None]:
        """`(E, m)` over a chunk; None stands for the identity and for a learner without momentum.

        Args:
            eta: the momentum gate of each token.
            same: same[i, j] where tokens i and j belong to one document.
            first: the first token of each document.
        """
        raise TypeError(f"{self} has no response within a chunk: its change is not linear")


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
class delta_gd(gd):
    """Delta gradient descent: every linear map also erases what it gives for the token's input.

        W_t = W_{t-1} (a_t I - lr_t z_t z_t^T) - lr_t g_t         (in columns; here rows are z)

    with z_t the input of the map for key k_t at W', where the gradient g_t is taken: the key itself
    for the first map, what the layer before gives for the next. It is the step on
    `1/2 ||W z - u||^2`, u the negative derivative at the map's output, in the place of `-<W z, u>`
    whose step is gradient descent. A map is stable where
    `lr ||z||^2 < 2`; with `l2`, whose gradient erases too, a single linear map where it is below 1,
    and it then recalls half the value. Needs linear maps of the key (not
    `vector`), and `none()` or `decay()` when the token is added.

    Source: nested learning (arXiv:2512.24695), equations 56, 57 and 88.
    """

    erases = True

    def check(self, structure: Structure, bias: Bias, retention: Retention, chunk: int) -> None:
        if isinstance(structure, vector):
            raise ValueError(
                "delta_gd() erases along the input of each linear map, which is the same for all "
                f"keys in {structure}: use matrix() or mlp(), or learner=gd()"
            )
        if not retention.linear or retention.closes or retention.first:
            raise ValueError(
                f'delta_gd() erases beside none() or decay() before the "update", not {retention}: '
                "use one of them, or learner=gd()"
            )


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

    def check(self, structure: Structure, bias: Bias, retention: Retention, chunk: int) -> None:
        _online_matrix("implicit()", structure, bias, retention, chunk)


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


@dataclasses.dataclass(frozen=True)
class exchange(gd):
    """Erases what is found along one key and writes the value along another:

        W_t = a_t W_{t-1} - (lr_t o k_t)^T (k_t W_{t-1}) + w_t^T v_t

    with `Gates.lr` per key channel [B, T, H, K] and w = `Gates.write` [B, T, H, K]; for
    `w = lr o k` this is `gd()` on `l2` with a rate per channel. Needs `matrix`, `l2` and chunk 1.

    Source: RWKV-7 (arXiv:2503.14456), equation 17.
    """

    exchanges = True

    def check(self, structure: Structure, bias: Bias, retention: Retention, chunk: int) -> None:
        _online_matrix("exchange()", structure, bias, retention, chunk, first=False)


@dataclasses.dataclass(frozen=True)
class normal_equations(gd):
    """The least-squares solution of all pairs so far, weighted by their decays:

        W_t = argmin_W  sum_{i <= t} (prod_{i < j <= t} a_j) lr_i ||k_i W - v_i||^2 + ridge

    from `H_t = a_t H_{t-1} + lr_t k_t^T k_t` and `G_t = a_t G_{t-1} + lr_t k_t^T v_t`, by conjugate
    gradients for each query. Needs `least_squares`, `l2`, scalar decay and chunk 1. Both start at
    0: fast weights given to `miras.start` are not read.

    Args:
        steps: iterations; K of them are exact but for rounding.
    Raises:
        ValueError: no steps.
    Source: MesaNet (arXiv:2506.05233), equations 6 to 9.
    """

    steps: int = 30
    solves = True

    def __post_init__(self):
        checks.whole("normal_equations steps", self.steps)

    def start(self, weights: PyTree) -> PyTree:
        (w,) = weights
        return (jnp.zeros((*w.shape[:-1], w.shape[-2]), w.dtype),)

    def check(self, structure: Structure, bias: Bias, retention: Retention, chunk: int) -> None:
        _online_matrix("normal_equations()", structure, bias, retention, chunk, kind=least_squares)


@dataclasses.dataclass(frozen=True)
class muon(momentum):
    """Momentum whose direction alone counts: every matrix of it orthogonalised, at every token.

        S_t = e_t S_{t-1} - g_t,     W_t = a_t W_{t-1} + lr_t NS(S_t)

    Args:
        steps: Newton-Schulz iterations, see `memjax.miras.newton_schulz`.
    Raises:
        ValueError: no steps.
    Source: ATLAS (arXiv:2505.23735), equations 32 and 33, with the sign that descends.
    """

    steps: int = 5
    linear = False

    def __post_init__(self):
        checks.whole("muon steps", self.steps)

    def update(
        self, velocity: PyTree, gradient: PyTree, lr: Float[Array, ""], eta: Float[Array, ""] | None
    ) -> tuple[PyTree, PyTree]:
        velocity = jax.tree.map(lambda s, g: eta * s - g, velocity, gradient)
        return velocity, jax.tree.map(lambda s: lr * orthogonal(s, self.steps), velocity)


@dataclasses.dataclass(frozen=True)
class delta_momentum(momentum):
    """Momentum that is itself a memory with a delta rule, and so forgets along new gradients:

        S_t = (e_t - lr_t g_t g_t^T) S_{t-1} - lr_t g_t,     W_t = a_t W_{t-1} + S_t

    with `g g^T` [K, K] on the side of the inputs, every matrix of the memory for itself.

    Source: Nested learning (arXiv:2512.24695), its delta momentum; the side of the product, and
        one rate for both terms, are ours (docs/deviations.md).
    """

    linear = False

    def update(
        self, velocity: PyTree, gradient: PyTree, lr: Float[Array, ""], eta: Float[Array, ""] | None
    ) -> tuple[PyTree, PyTree]:
        velocity = jax.tree.map(lambda s, g: eta * s - lr * (g @ (g.T @ s) + g), velocity, gradient)
        return velocity, velocity


@dataclasses.dataclass(frozen=True)
class chunk_muon(Learner):
    """A step at the end of every chunk, on its summed gradients, orthogonalised:

        S = mean(e_t) S - sum_t lr_t g_t,     W = W' + NS(S)         over the tokens of a chunk

    Inside a chunk the memory stays as it is, whatever the rule's `read`. The momentum holds S as
    "before", the sums of `-lr_t g_t` and of e_t since the chunk began as "sum" and "rate", and how
    many tokens they are of as "count".

    Args:
        steps: Newton-Schulz iterations; 0 = `W = W' + S`, plain momentum by chunk.
    Raises:
        ValueError: fewer than 0 steps.
    Source: LaCT (arXiv:2505.23884), equations 6 to 10.
    """

    steps: int = 5
    needs_momentum = True
    linear = False
    closes = True

    def __post_init__(self):
        checks.whole("chunk_muon steps", self.steps, least=0)

    def check(self, structure: Structure, bias: Bias, retention: Retention, chunk: int) -> None:
        if retention.needs_retain:
            raise ValueError(
                f"chunk_muon() leaves the weights alone inside a chunk, so {retention} has no "
                "place there: use none() or renormalise()"
            )

    def start(self, weights: PyTree) -> PyTree:
        zeros = jax.tree.map(jnp.zeros_like, weights)
        rate = jnp.zeros_like(jax.tree.leaves(weights)[0][..., 0, 0])
        return {
            "before": zeros, "sum": jax.tree.map(jnp.zeros_like, zeros), "rate": rate,
            "count": jnp.zeros_like(rate),
        }  # fmt: skip

    def update(
        self, velocity: PyTree, gradient: PyTree, lr: Float[Array, ""], eta: Float[Array, ""] | None
    ) -> tuple[PyTree, PyTree]:
        one = jnp.ones_like(velocity["count"])
        velocity = self.gather(velocity, jax.tree.map(lambda g: -lr * g, gradient), eta, one)
        return velocity, jax.tree.map(jnp.zeros_like, gradient)

    def gather(
        self, velocity: PyTree, total: PyTree, rate: Float[Array, ""], count: Float[Array, ""]
    ) -> PyTree:
        return velocity | {
            "sum": jax.tree.map(jnp.add, velocity["sum"], total),
            "rate": velocity["rate"] + rate,
            "count": jax.lax.stop_gradient(velocity["count"]) + count,
        }

    def close(self, velocity: PyTree) -> tuple[PyTree, PyTree]:
        rate = velocity["rate"] / jnp.maximum(velocity["count"], 1)
        moved = jax.tree.map(lambda m, s: rate * m + s, velocity["before"], velocity["sum"])
        change = jax.tree.map(lambda s: orthogonal(s, self.steps) if self.steps else s, moved)
        zeros = jax.tree.map(jnp.zeros_like, moved)
        nothing = jnp.zeros_like(rate)
        return {"before": moved, "sum": zeros, "rate": nothing, "count": nothing}, change


@dataclasses.dataclass(frozen=True)
class omega(Learner):
    """Learns the last tokens together at every token: the gradient of the Omega rule,

        g_t = sum_{i = t-c+1 .. t} w_{t,i} grad l(W'; k_i, v_i)

    over tokens of the document alone, then the step of another learner (c = 1: that learner).

    Args:
        window: c.
        step: the learner that takes g_t: `gd()` (OmegaNet), `momentum()`, `muon()` (ATLAS).
    Raises:
        ValueError: a window below 1, or a step that is a window itself.
    Source: ATLAS (arXiv:2505.23735), equations 9 to 11. `w_{t,i}` is `Gates.window`.
    """

    window: int = 4
    step: Learner = dataclasses.field(default_factory=momentum)

    def __post_init__(self):
        checks.whole("omega window", self.window)
        if not isinstance(self.step, Learner) or isinstance(
            self.step, omega | delta_gd | implicit | exchange | normal_equations
        ):
            raise ValueError(
                f"omega step {self.step!r} must be another learner, such as momentum()"
            )

    @property
    def needs_momentum(self) -> bool:
        return self.step.needs_momentum

    @property
    def linear(self) -> bool:
        return self.step.linear

    @property
    def closes(self) -> bool:
        return self.step.closes

    def check(self, structure: Structure, bias: Bias, retention: Retention, chunk: int) -> None:
        self.step.check(structure, bias, retention, chunk)
        if retention.first and self.window > 1:
            raise ValueError(
                'omega() takes all gradients of its window at W\', which decay(before="gradient")'
                " moves within a chunk: use decay()"
            )

    def start(self, weights: PyTree) -> PyTree:
        return self.step.start(weights)

    def update(
        self, velocity: PyTree, gradient: PyTree, lr: Float[Array, ""], eta: Float[Array, ""] | None
    ) -> tuple[PyTree, PyTree]:
        return self.step.update(velocity, gradient, lr, eta)

    def gather(
        self, velocity: PyTree, total: PyTree, rate: Float[Array, ""], count: Float[Array, ""]
    ) -> PyTree:
        return self.step.gather(velocity, total, rate, count)

    def close(self, velocity: PyTree) -> tuple[PyTree, PyTree]:
        return self.step.close(velocity)

    def response(
        self, eta: Float[Array, " C"] | None, same: Bool[Array, "C C"], first: Bool[Array, " C"]
    ) -> tuple[Float[Array, "C C"] | None, Float[Array, " C"] | None]:
        return self.step.response(eta, same, first)


def _online_matrix(
    name: str,
    structure: Structure,
    bias: Bias,
    retention: Retention,
    chunk: int,
    *,
    kind: type[matrix] = matrix,
    first: bool = True,
) -> None:
    """Raises ValueError where the memory is not a plain matrix that learns at every token.

    Args:
        name: of the learner.
        structure, bias, retention, chunk: the rule's.
        kind: what the structure has to be.
        first: whether the decay may come before the gradient.
    """
    plain = kinds.keeps(structure, (kind,), "forward", "mapped") and structure.features is None
    decays = retention.linear and not retention.closes and not retention.to_initial
    usual = first or not retention.first
    kept = "decay() or none()" if first else 'decay(before="update") or none()'
    misfits = [
        f"for {wanted} alone, not for {part}"
        for fits, part, wanted in (
            (plain, structure, "least_squares()" if kind is least_squares else
             "a matrix without features"),
            (kinds.keeps(bias, (l2,), "loss", "signal"), bias, "l2()"),
            (decays and usual, retention, kept),
            (chunk == 1, f"chunk={chunk}", "chunk=1"),
        )
        if not fits
    ]  # fmt: skip
    if misfits:
        raise ValueError(
            f"{name} has a closed form {', '.join(misfits)}: change what does not fit, or take "
            "another learner, such as gd() or momentum()"
        )
