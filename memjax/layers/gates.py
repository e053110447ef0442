"""Gates: the rates of a memory as functions of the token, as the papers parametrise them."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from memjax import miras
from memjax.layers.linear import Linear
from memjax.typing import Array, Float


class GateHead(nnx.Module):
    """A gate per token and head: `sigmoid(x W + b)` in fp32, `initial` where x W is 0.

    Args:
        dim: model dimension.
        heads: H.
        channels: gates of each head; None: one, without an axis of its own.
        initial: value of the gate at the start, between 0 and 1.
        axis: logical name of the heads; None leaves them whole on every device.
        rngs: the stream `params` draws the weight, at a tenth of the usual deviation.
    Raises:
        ValueError: `initial` is not between 0 and 1, or a size below 1.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        channels: int | None = None,
        initial: float,
        axis: str | None = "heads",
        rngs: nnx.Rngs,
    ):
        if not 0 < initial < 1:
            raise ValueError(f"GateHead initial {initial} must be between 0 and 1")
        shape = heads if channels is None else (heads, channels)
        axes = ("embed", axis) if channels is None else ("embed", axis, None)
        self.linear = Linear(dim, shape, axes=axes, bias=True, rngs=rngs)
        self.linear.weight[...] *= 0.1
        self.linear.bias[...] += jnp.log(initial / (1 - initial))

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T H *K"]:
        """[B, T, dim] to [B, T, heads] or [B, T, heads, channels], fp32."""
        return jax.nn.sigmoid(self.linear(x.astype(jnp.promote_types(x.dtype, jnp.float32))))


class ThresholdHead(nnx.Module):
    """A threshold per token and head: `softplus(x W + b)` in fp32, 1 where x W is 0.

    Args:
        dim: model dimension.
        heads: H.
        rngs: the stream `params` draws the weight, at a tenth of the usual deviation.
    """

    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        self.linear = Linear(dim, heads, axes=("embed", "heads"), bias=True, rngs=rngs)
        self.linear.weight[...] *= 0.1
        self.linear.bias[...] += math.log(math.e - 1)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T H"]:
        """[B, T, dim] to [B, T, heads], fp32."""
        return jax.nn.softplus(self.linear(x.astype(jnp.promote_types(x.dtype, jnp.float32))))


class SoftplusDecay(nnx.Module):
    """`a = exp(-exp(A) softplus(f(x) + b))`, per head or per key channel, in fp32.

    exp(A) starts uniform from 1 to 16 (per head), softplus(b) log-uniform from 0.001 to 0.1.

    Args:
        dim: model dimension.
        heads: H.
        channels: key dimension K for a gate per channel; None: per head.
        rank: f is of that rank, `x W_1 W_2`; None: `x W`.
        rngs: the stream `params` draws the weights.
    Source: Mamba (arXiv:2312.00752) section 3.6 for the form and its start; per head Mamba-2
        (arXiv:2405.21060) and Gated DeltaNet (arXiv:2412.06464), per channel Kimi Linear
        (arXiv:2510.26692).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        channels: int | None = None,
        rank: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.rates = _Rates(dim, heads, channels, rank, rngs=rngs)
        shape = (heads,) if channels is None else (heads, channels)
        axes = ("heads",) if channels is None else ("heads", "kv")
        self.log_rate = nnx.Param(_uniform_log(rngs.params(), (heads,), 1.0, 16.0), axes=("heads",))
        self.offset = nnx.Param(_softplus_inverse(rngs.params(), shape), axes=axes)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T H *K"]:
        """[B, T, dim] to [B, T, heads] or [B, T, heads, channels]."""
        step = jax.nn.softplus(self.rates(x) + self.offset[...])
        rate = jnp.exp(self.log_rate[...])
        return jnp.exp(-(rate if step.ndim == 3 else rate[:, None]) * step)


class PowerDecay(nnx.Module):
    """`a = sigmoid(x W_1 W_2 + b)^(1 / temperature)` per key channel, in fp32.

    Args:
        dim: model dimension.
        heads: H.
        channels: key dimension K.
        rank: columns of W_1.
        temperature: the root that is taken.
        rngs: the stream `params` draws the weights.
    Raises:
        ValueError: a temperature that is not above 0, or a size below 1.
    Source: gated linear attention (arXiv:2312.06635), section 4.4.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        channels: int,
        *,
        rank: int = 16,
        temperature: float = 16.0,
        rngs: nnx.Rngs,
    ):
        if not temperature > 0:
            raise ValueError(f"PowerDecay temperature {temperature} must be above 0")
        self.temperature = temperature
        self.rates = _Rates(dim, heads, channels, rank, rngs=rngs)
        self.offset = nnx.Param(jnp.zeros((heads, channels)), axes=("heads", "kv"))

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T H K"]:
        """[B, T, dim] to [B, T, heads, channels]."""
        return jnp.exp(jax.nn.log_sigmoid(self.rates(x) + self.offset[...]) / self.temperature)


class FixedDecay(nnx.Module):
    """`a = 1 - 2^(-5 - h)` for head h = 0, 1, ...: nothing is learned.

    Args:
        heads: H.
    Source: RetNet (arXiv:2307.08621), equation 8.
    """

    def __init__(self, heads: int):
        self.rates = tuple(1 - 2.0 ** (-5 - h) for h in range(heads))

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T H"]:
        """[B, T, dim] to [B, T, heads]."""
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.broadcast_to(jnp.asarray(self.rates, dtype), (*x.shape[:2], len(self.rates)))


class Gating(nnx.Module):
    """A rate and a decay that do not know of each other.

    Args:
        rate: `x -> lr` [B, T, H], or None: 1.
        decay: `x -> retain` [B, T, H] or [B, T, H, K], or None: nothing decays.
        heads: H.
        most: factor on the rate; 2 lets the eigenvalues of `I - lr k k^T` reach -1 for unit keys,
            without which such a memory cannot track states (arXiv:2411.12537).
    """

    def __init__(
        self,
        rate: nnx.Module | None,
        decay: nnx.Module | None,
        heads: int,
        *,
        most: float = 1.0,
    ):
        self.rate, self.decay, self.heads, self.most = rate, decay, heads, most

    def __call__(self, x: Float[Array, "B T E"]) -> miras.Gates:
        """The gates of the tokens of x [B, T, dim]."""
        if self.rate is None:
            dtype = jnp.promote_types(x.dtype, jnp.float32)
            lr = jnp.full((*x.shape[:2], self.heads), self.most, dtype)
        else:
            lr = self.most * self.rate(x)
        return miras.Gates(lr=lr, retain=None if self.decay is None else self.decay(x))


class StepSize(nnx.Module):
    """The step of a discretised state space: `lr = dt`, `a = exp(-exp(A) dt)`, per head.

        dt = softplus(x W + b)

    Args:
        dim: model dimension.
        heads: H.
        rngs: the stream `params` draws the weights, as for `SoftplusDecay`.
    Source: Mamba-2 (arXiv:2405.21060), sections 2.1 and 7.
    """

    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        self.linear = Linear(dim, heads, axes=("embed", "heads"), rngs=rngs)
        self.log_rate = nnx.Param(_uniform_log(rngs.params(), (heads,), 1.0, 16.0), axes=("heads",))
        self.offset = nnx.Param(_softplus_inverse(rngs.params(), (heads,)), axes=("heads",))

    def __call__(self, x: Float[Array, "B T E"]) -> miras.Gates:
        """The gates of the tokens of x [B, T, dim]."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        step = jax.nn.softplus(self.linear(wide) + self.offset[...])
        return miras.Gates(lr=step, retain=jnp.exp(-jnp.exp(self.log_rate[...]) * step))


class _Rates(nnx.Module):
    """`x W`, or `x W_1 W_2` of some rank, to [heads] or [heads, channels], in fp32."""

    def __init__(self, dim, heads, channels, rank, *, rngs: nnx.Rngs):
        outputs = (heads,) if channels is None else (heads, channels)
        axes = ("heads",) if channels is None else ("heads", "kv")
        source, start = (dim, "embed") if rank is None else (rank, None)
        self.down = None if rank is None else Linear(dim, rank, axes=("embed", None), rngs=rngs)
        self.up = Linear(source, outputs, axes=(start, *axes), rngs=rngs)

    def __call__(self, x):
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return self.up(x if self.down is None else self.down(x))


def _uniform_log(key, shape, least: float, most: float) -> Array:
    """Logarithms of numbers that are uniform between `least` and `most`."""
    return jnp.log(jax.random.uniform(key, shape, minval=least, maxval=most))


def _softplus_inverse(key, shape, least: float = 1e-3, most: float = 1e-1) -> Array:
    """b with softplus(b) log-uniform between `least` and `most`."""
    uniform = jax.random.uniform(key, shape, minval=math.log(least), maxval=math.log(most))
    step = jnp.exp(uniform)
    return step + jnp.log(-jnp.expm1(-step))
