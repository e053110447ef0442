"""Attentional bias: what the memory minimises at every token.

A bias gives the loss of the memory's answer `y = M(k)` against the value `v`, and the *signal*, its
derivative by `y`, that is propagated back through the memory. With `r = y - v`; sums are over the
V features of a token, and `||r||` stands for `sqrt(sum r^2 + 1e-6)` in `huber` and `robust`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from memjax import checks
from memjax.typing import Array, Float

SMOOTH = 1e-6  # added under the roots of |r| and ||r||, which have a derivative at 0 so


@dataclasses.dataclass(frozen=True)
class Bias:
    """What a bias must give: `loss`; and `signal`, where it is not just the derivative.

    Those that set `needs_threshold` take a third argument, `Gates.threshold` of the tokens.
    """

    needs_threshold = False

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "loss" in vars(cls) and "signal" not in vars(cls):
            cls.signal = Bias.signal  # not that of the loss it has replaced

    def loss(self, y: Float[Array, "*N V"], v: Float[Array, "*N V"], *more) -> Float[Array, "*N"]:
        raise TypeError("Bias is the interface: use l2(), huber() or another, or define loss")

    def signal(
        self, y: Float[Array, "*N V"], v: Float[Array, "*N V"], *more
    ) -> Float[Array, "*N V"]:
        """Derivative of `loss` by `y`."""
        return jax.grad(lambda y: jnp.sum(self.loss(y, v, *more)))(y)


@dataclasses.dataclass(frozen=True)
class l2(Bias):
    """Regression, `1/2 ||r||^2`; signal `r`.

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


@dataclasses.dataclass(frozen=True)
class lp(Bias):
    """The p-norm, `sum |r|^p`; signal `p tanh(nu r) (r^2 + 1e-6)^((p-1)/2)`.

    tanh and the root stand for sign and modulus, whose own derivatives the model around the memory
    could not learn through.

    Args:
        p: at least 1.
        sharpness: nu.
    Raises:
        ValueError: p below 1 or a sharpness that is not positive.
    Source: Miras (arXiv:2504.13173), equations 11 to 13 and remark 2.
    """

    p: float = 3.0
    sharpness: float = 10.0

    def __post_init__(self):
        checks.real("lp p", self.p, least=1.0)
        checks.real("lp sharpness", self.sharpness, above=0.0)

    def loss(self, y: Float[Array, "*N V"], v: Float[Array, "*N V"]) -> Float[Array, "*N"]:
        return jnp.sum((jnp.square(y - v) + SMOOTH) ** (self.p / 2), axis=-1)

    def signal(self, y: Float[Array, "*N V"], v: Float[Array, "*N V"]) -> Float[Array, "*N V"]:
        r = y - v
        size = (jnp.square(r) + SMOOTH) ** ((self.p - 1) / 2)
        return self.p * jnp.tanh(self.sharpness * r) * size


@dataclasses.dataclass(frozen=True)
class huber(Bias):
    """Huber's loss with the learned threshold `d = Gates.threshold`, one per token and head.

        kind = "coordinate":  each r_i:  r_i if |r_i| <= d, else d tanh(nu r_i)
               "norm":        r min(1, d / ||r||)               clips the error of a token
               "switch":      r where ||r|| <= d, else d tanh(nu r)           Yaad

    Written as signals; the losses are 1/2 r^2 and d |r| - 1/2 d^2 where they apply, by feature, by
    norm, and (switch) with the sum of moduli.

    Args:
        kind: see above.
        sharpness: nu; tanh(nu r) stands for sign(r).
    Raises:
        ValueError: another kind, or a sharpness that is not positive.
    Source: Miras (arXiv:2504.13173), equations 14, 15 and 16.
    """

    kind: str = "switch"
    sharpness: float = 10.0
    needs_threshold = True

    def __post_init__(self):
        if self.kind not in ("coordinate", "norm", "switch"):
            raise ValueError(f'huber kind {self.kind!r} must be "coordinate", "norm" or "switch"')
        checks.real("huber sharpness", self.sharpness, above=0.0)

    def loss(
        self, y: Float[Array, "*N V"], v: Float[Array, "*N V"], threshold: Float[Array, "*N"]
    ) -> Float[Array, "*N"]:
        r, d = y - v, threshold
        if self.kind == "coordinate":
            d = d[..., None]
            size = jnp.abs(r)
            by_feature = jnp.where(size <= d, 0.5 * jnp.square(r), d * size - 0.5 * jnp.square(d))
            return jnp.sum(by_feature, axis=-1)
        norm = _norm(r)
        far = d * (norm if self.kind == "norm" else jnp.sum(jnp.abs(r), axis=-1))
        return jnp.where(norm <= d, 0.5 * jnp.square(norm), far - 0.5 * jnp.square(d))

    def signal(
        self, y: Float[Array, "*N V"], v: Float[Array, "*N V"], threshold: Float[Array, "*N"]
    ) -> Float[Array, "*N V"]:
        r, d = y - v, threshold[..., None]
        if self.kind == "norm":
            norm = _norm(r)[..., None]
            return r * jnp.where(norm <= d, 1.0, d / norm)
        near = jnp.abs(r) <= d if self.kind == "coordinate" else _norm(r)[..., None] <= d
        return jnp.where(near, r, d * jnp.tanh(self.sharpness * r))


@dataclasses.dataclass(frozen=True)
class robust(Bias):
    """The worst value within a distance `D = Gates.threshold` of v:

        max over ||e|| <= D of 1/2 ||y - (v + e)||^2 = 1/2 (||r|| + D)^2;  signal  r (1 + D / ||r||)

    Source: Miras (arXiv:2504.13173), equation 17.
    """

    needs_threshold = True

    def loss(
        self, y: Float[Array, "*N V"], v: Float[Array, "*N V"], threshold: Float[Array, "*N"]
    ) -> Float[Array, "*N"]:
        return 0.5 * jnp.square(_norm(y - v) + threshold)

    def signal(
        self, y: Float[Array, "*N V"], v: Float[Array, "*N V"], threshold: Float[Array, "*N"]
    ) -> Float[Array, "*N V"]:
        r = y - v
        return r * (1 + (threshold / _norm(r))[..., None])


def _norm(r: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """`sqrt(||r||^2 + 1e-6)`, which has a derivative at 0."""
    return jnp.sqrt(jnp.sum(jnp.square(r), axis=-1) + SMOOTH)
