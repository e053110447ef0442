"""Structures: what the memory is, a small network M(x; W).

A structure is written once, against a primitive `linear(i, x)` that stands for `x W_i` with its
i-th fast weight. The engine runs the same code three ways: plainly (`apply`), capturing the input
and the back-propagated signal of every linear map, and reading through weights that differ from
token to token without forming them. Whatever goes through `linear` learns at test time; what else
the structure owns (`slow`) is held fixed there and learned only end to end.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memjax import checks
from memjax.miras.features import Features
from memjax.miras.precision import matmul
from memjax.typing import Array, Float, Key

Linear = Callable[[int, Array], Array]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}
NORM_EPSILON = 1e-6


class Weights(NamedTuple):
    """The weights of a memory: `fast` learn at test time, `slow` do not."""

    fast: tuple[Array, ...]
    slow: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Structure:
    """What a structure must give; see `matrix` and `mlp`."""

    features: Features | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        if self.features is not None and not isinstance(self.features, Features):
            hint = f"; write {self.features.__name__}()" if isinstance(self.features, type) else ""
            raise TypeError(f"features {self.features!r} is not a Features{hint}")

    def init(self, key: Key, dim_k: int, dim_v: int) -> Weights:
        """Initial weights W_0, without batch or heads axis."""
        raise TypeError("Structure is the interface: use matrix(), mlp(), gated_mlp() or vector()")

    def forward(self, linear: Linear, slow: dict[str, Array], x: Array) -> Array:
        """M(x) with its linear maps left to `linear`."""
        raise TypeError("Structure is the interface: use matrix(), mlp(), gated_mlp() or vector()")

    @property
    def channelwise(self) -> bool:
        """Whether retention per key channel is defined: one linear map, straight from the key."""
        return False

    @property
    def starts_at_zero(self) -> bool:
        """Whether a fast weight of `init` is all zero: some retentions cannot go on from there."""
        return False

    def inputs(self, dim_k: int) -> int:
        """Features that the first linear map gets for a key of dimension `dim_k`."""
        return dim_k if self.features is None else self.features.dim(dim_k)

    def mapped(self, slow: dict[str, Array], x: Float[Array, "N K"]) -> Float[Array, "N F"]:
        """The key as the first linear map gets it."""
        return x if self.features is None else self.features.apply(slow, x)

    def apply(self, weights: Weights, x: Float[Array, "*N K"]) -> Float[Array, "*N V"]:
        """y = M(x; W) with the same weights for every x.

        Args:
            weights: as from `init`.
            x: [..., K].
        Returns:
            [..., V] in the dtype of x.
        """
        rows = x.reshape(-1, x.shape[-1])
        y = self.forward(
            lambda i, z: matmul(z, weights.fast[i], compute=x.dtype), weights.slow, rows
        )
        return y.reshape(*x.shape[:-1], y.shape[-1]).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class vector(Structure):
    """The smallest memory, a weight per channel: `M(x) = x o w`, w [1, V], K = V; w_0 = 0, or 1.

    Args:
        scale: what every weight is at the start.
        features: see `memjax.miras.features`; they must give V features.
    Raises:
        ValueError: a scale that is not a finite number.
    Source: Miras (arXiv:2504.13173), section 3 names it as the simplest structure.
    """

    scale: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        checks.real("vector scale", self.scale)

    def init(self, key: Key, dim_k: int, dim_v: int) -> Weights:
        if self.inputs(dim_k) != dim_v:
            raise ValueError(
                f"vector() has a weight per channel: dim_k {dim_k} (with its features "
                f"{self.inputs(dim_k)}) must equal dim_v {dim_v}"
            )
        return Weights((jnp.full((1, dim_v), self.scale, float),), _slow(self))

    @property
    def starts_at_zero(self) -> bool:
        return self.scale == 0

    def forward(self, linear: Linear, slow: dict[str, Array], x: Array) -> Array:
        return self.mapped(slow, x) * linear(0, jnp.ones_like(x[:, :1]))


@dataclasses.dataclass(frozen=True)
class matrix(Structure):
    """Linear memory `M(x) = phi(x) W`, W [F, V]; without features F = K and phi(x) = x.

    Args:
        scale: W_0 is normal with deviation `scale / sqrt(F)`; 0 = zero.
        features: phi, see `memjax.miras.features`.
    Raises:
        ValueError: a scale that is not a finite number of at least 0.
    """

    scale: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        checks.real(f"{type(self).__name__} scale", self.scale, least=0.0)

    def init(self, key: Key, dim_k: int, dim_v: int) -> Weights:
        return Weights((_normal(key, self.inputs(dim_k), dim_v, self.scale),), _slow(self))

    def forward(self, linear: Linear, slow: dict[str, Array], x: Array) -> Array:
        return linear(0, self.mapped(slow, x))

    @property
    def channelwise(self) -> bool:
        return self.features is None

    @property
    def starts_at_zero(self) -> bool:
        return self.scale == 0


@dataclasses.dataclass(frozen=True)
class least_squares(matrix):
    """A `matrix` whose learner solves for it, with a ridge per key channel: `normal_equations`.

    The ridge is `softplus` of the slow weight "ridge" [K], 1 at the start. W_0 = 0.

    Raises:
        ValueError: features.
    Source: MesaNet (arXiv:2506.05233), equation 9, its Lambda.
    """

    scale: float = dataclasses.field(default=0.0, init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        if self.features is not None:
            raise ValueError("least_squares() takes no features: apply them to keys and queries")

    def init(self, key: Key, dim_k: int, dim_v: int) -> Weights:
        fast, slow = super().init(key, dim_k, dim_v)
        return Weights(fast, slow | {"ridge": jnp.full(dim_k, math.log(math.e - 1), float)})


@dataclasses.dataclass(frozen=True)
class _Deep(Structure):
    """What deep memories share: `M(x) = x + LayerNorm(f(phi(x)))`."""

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        checks.whole(f"{name} expansion", self.expansion)
        checks.boolean(f"{name} norm", self.norm)
        checks.boolean(f"{name} residual", self.residual)
        checks.real(f"{name} scale", self.scale, least=0.0)
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"{name} activation {self.activation!r} must be one of {', '.join(ACTIVATIONS)}"
            )

    @property
    def starts_at_zero(self) -> bool:
        return self.scale == 0

    def _init(self, key: Key, shapes: list[tuple[int, int]], dim_k: int, dim_v: int) -> Weights:
        if self.residual and dim_k != dim_v:
            raise ValueError(
                f"{type(self).__name__} residual=True adds the key to the value: dim_k {dim_k} must"
                f" equal dim_v {dim_v}, or use residual=False"
            )
        keys = jax.random.split(key, len(shapes))
        fast = tuple(_normal(k, *s, self.scale) for k, s in zip(keys, shapes, strict=True))
        slow = {"scale": jnp.ones(dim_v), "bias": jnp.zeros(dim_v)} if self.norm else {}
        return Weights(fast, _slow(self) | slow)

    def _finish(self, slow: dict[str, Array], x: Array, h: Array) -> Array:
        if self.norm:
            h = h - jnp.mean(h, axis=-1, keepdims=True)
            variance = jnp.mean(jnp.square(h), axis=-1, keepdims=True)
            h = h * jax.lax.rsqrt(variance + NORM_EPSILON) * slow["scale"] + slow["bias"]
        return x + h if self.residual else h


@dataclasses.dataclass(frozen=True)
class mlp(_Deep):
    """Deep memory, an MLP of `depth` linear maps without offsets.

        f(x) = act(... act(phi(x) W_1) W_2 ...) W_L    W_1 [F_0, F], W_L [F, V], F = expansion * K
        M(x) = x + LayerNorm(f(x))                     with norm=True, residual=True

    At depth 1, `f(x) = phi(x) W_1` with W_1 [F_0, V]. Without features F_0 = K, phi(x) = x.

    Args:
        depth: number of linear maps, 1 to 4.
        expansion: hidden dimension over key dimension.
        activation: "gelu" (tanh approximation), "silu" or "relu".
        norm: layer normalisation of the output (epsilon 1e-6), its scale and bias slow weights.
        residual: add the input; needs dim_k == dim_v.
        scale: W_0 is normal with deviation `scale / sqrt(fan_in)`.
        features: phi, see `memjax.miras.features`.
    Raises:
        ValueError: a depth, expansion, activation, norm, residual or scale that does not exist.
    Source: Titans (arXiv:2501.00663) section 3.1; TTT (arXiv:2407.04620) section 2.7; the residual
        form with norm is also that of Miras (arXiv:2504.13173) section 5.
    """

    depth: int = 2
    expansion: int = 4
    activation: str = "gelu"
    norm: bool = False
    residual: bool = False
    scale: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.depth, bool | float) or self.depth not in (1, 2, 3, 4):
            raise ValueError(f"mlp depth {self.depth!r} must be 1, 2, 3 or 4")

    def init(self, key: Key, dim_k: int, dim_v: int) -> Weights:
        hidden = [self.expansion * dim_k] * (self.depth - 1)
        widths = [self.inputs(dim_k), *hidden, dim_v]
        return self._init(key, list(itertools.pairwise(widths)), dim_k, dim_v)

    def forward(self, linear: Linear, slow: dict[str, Array], x: Array) -> Array:
        h = linear(0, self.mapped(slow, x))
        for i in range(1, self.depth):
            h = linear(i, ACTIVATIONS[self.activation](h))
        return self._finish(slow, x, h)

    @property
    def channelwise(self) -> bool:
        return self.depth == 1 and self.features is None


@dataclasses.dataclass(frozen=True)
class gated_mlp(_Deep):
    """Gated deep memory (SwiGLU with "silu"), three linear maps without offsets.

        f(x) = (act(phi(x) W_1) o phi(x) W_2) W_3      W_1, W_2 [F_0, F], W_3 [F, V]
        M(x) = x + LayerNorm(f(x))                     with norm=True, residual=True

    Args:
        expansion: hidden dimension F over key dimension.
        activation, norm, residual, scale, features: see `mlp`.
    Raises:
        ValueError: an expansion, activation, norm, residual or scale that does not exist.
    Source: LaCT (arXiv:2505.23884), equation 9; ATLAS (arXiv:2505.23735), its gated memory, with
        "gelu" and residual.
    """

    expansion: int = 2
    activation: str = "silu"
    norm: bool = False
    residual: bool = False
    scale: float = 1.0

    def init(self, key: Key, dim_k: int, dim_v: int) -> Weights:
        first, hidden = self.inputs(dim_k), self.expansion * dim_k
        shapes = [(first, hidden), (first, hidden), (hidden, dim_v)]
        return self._init(key, shapes, dim_k, dim_v)

    def forward(self, linear: Linear, slow: dict[str, Array], x: Array) -> Array:
        z = self.mapped(slow, x)
        gate, value = linear(0, z), linear(1, z)
        return self._finish(slow, x, linear(2, ACTIVATIONS[self.activation](gate) * value))


def _slow(structure: Structure) -> dict[str, Array]:
    """Slow weights of the features."""
    return {} if structure.features is None else structure.features.init()


def _normal(key: Key, fan_in: int, fan_out: int, scale: float) -> Float[Array, "K V"]:
    return jax.random.normal(key, (fan_in, fan_out)) * (scale / fan_in**0.5)
