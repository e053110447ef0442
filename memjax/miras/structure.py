"""Structures: what the memory is, a small network M(x; W).

A structure is written once, against a primitive `linear(i, x)` that stands for `x W_i` with its
i-th fast weight. The engine runs the same code three ways: plainly (`apply`), capturing the input
and the back-propagated signal of every linear map, and reading through weights that differ from
token to token without forming them. Whatever goes through `linear` learns at test time; what else
the structure owns (`slow`) is held fixed there and learned only end to end.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

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

    def init(self, key: Key, dim_k: int, dim_v: int) -> Weights:
        """Initial weights W_0, without batch or heads axis."""
        raise TypeError("Structure is the interface: use matrix() or mlp()")

    def forward(self, linear: Linear, slow: dict[str, Array], x: Array) -> Array:
        """M(x) with its linear maps left to `linear`."""
        raise TypeError("Structure is the interface: use matrix() or mlp()")

    @property
    def channelwise(self) -> bool:
        """Whether retention per key channel is defined: one linear map, straight from the key."""
        return False

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
class matrix(Structure):
    """Linear memory `M(x) = x W`, W [K, V]; W_0 = 0, or normal with deviation `scale / sqrt(K)`."""

    scale: float = 0.0

    def init(self, key: Key, dim_k: int, dim_v: int) -> Weights:
        return Weights((_normal(key, dim_k, dim_v, self.scale),), {})

    def forward(self, linear: Linear, slow: dict[str, Array], x: Array) -> Array:
        return linear(0, x)

    @property
    def channelwise(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class mlp(Structure):
    """Deep memory, an MLP of `depth` linear maps without offsets.

        f(x) = act(... act(x W_1) W_2 ...) W_L         W_1 [K, F], W_L [F, V], F = expansion * K
        M(x) = x + LayerNorm(f(x))                     with norm=True, residual=True

    At depth 1, `f(x) = x W_1` with W_1 [K, V].

    Args:
        depth: number of linear maps, 1 to 4.
        expansion: hidden dimension over key dimension.
        activation: "gelu" (tanh approximation), "silu" or "relu".
        norm: layer normalisation of the output (epsilon 1e-6), its scale and bias slow weights.
        residual: add the input; needs dim_k == dim_v.
        scale: W_0 is normal with deviation `scale / sqrt(fan_in)`.
    Raises:
        ValueError: a depth, expansion or activation that does not exist.
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
        if self.depth not in (1, 2, 3, 4):
            raise ValueError(f"mlp depth {self.depth!r} must be 1, 2, 3 or 4")
        if self.expansion < 1:
            raise ValueError(f"mlp expansion {self.expansion!r} must be at least 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"mlp activation {self.activation!r} must be one of {', '.join(ACTIVATIONS)}"
            )

    def init(self, key: Key, dim_k: int, dim_v: int) -> Weights:
        if self.residual and dim_k != dim_v:
            raise ValueError(
                f"mlp residual=True adds the key to the value: dim_k {dim_k} must equal dim_v "
                f"{dim_v}, or use residual=False"
            )
        widths = [dim_k, *[self.expansion * dim_k] * (self.depth - 1), dim_v]
        keys = jax.random.split(key, self.depth)
        fast = tuple(
            _normal(k, fan_in, fan_out, self.scale)
            for k, fan_in, fan_out in zip(keys, widths[:-1], widths[1:], strict=True)
        )
        slow = {"scale": jnp.ones(dim_v), "bias": jnp.zeros(dim_v)} if self.norm else {}
        return Weights(fast, slow)

    def forward(self, linear: Linear, slow: dict[str, Array], x: Array) -> Array:
        h = x
        for i in range(self.depth):
            h = linear(i, h if i == 0 else ACTIVATIONS[self.activation](h))
        if self.norm:
            h = h - jnp.mean(h, axis=-1, keepdims=True)
            variance = jnp.mean(jnp.square(h), axis=-1, keepdims=True)
            h = h * jax.lax.rsqrt(variance + NORM_EPSILON) * slow["scale"] + slow["bias"]
        return x + h if self.residual else h

    @property
    def channelwise(self) -> bool:
        return self.depth == 1


def _normal(key: Key, fan_in: int, fan_out: int, scale: float) -> Float[Array, "K V"]:
    return jax.random.normal(key, (fan_in, fan_out)) * (scale / fan_in**0.5)
