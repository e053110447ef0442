"""Newton-Schulz orthogonalisation: checks and dispatch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, sequence
from pallas_kernels.newton_schulz import tpu


def newton_schulz(
    x: jax.Array,
    steps: int = 5,
    *,
    compute: Any = None,
    implementation: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Singular values brought near 1 by products alone, forward and backward in one kernel each.

        X_0 = x / ||x||_F,   A = X X^T,   X <- 3.4445 X + (-4.7750 A + 2.0315 A A) X

    with the products on the side of the shorter axis; where x is 0, so is the result.

    Args:
        x: matrices [..., I, J] in float32 or bfloat16, each orthogonalised for itself.
        steps: iterations, at least 1.
        compute: dtype of the operands of products, float32 or bfloat16; None = x's.
        implementation: "pallas" (TPU), "xla", or None = "pallas" where the default backend is TPU.
        interpret: runs the kernel in Pallas' TPU interpreter, on any platform: True or
            `pltpu.InterpretParams(...)`.

    Returns:
        [..., I, J] in x's dtype. Products take operands in `compute`, in fp32 exact to fp32, and
        sum in fp32; the iterates are in fp32. The gradient needs x alone: the backward pass
        iterates again. Small matrices share registers in the kernel, so that one that is not finite
        makes its neighbours nan.

    Raises:
        ValueError: an argument that does not fit, by name.
    Source: Muon (K. Jordan, 2024), whose coefficients trade exactness for speed.
    """
    if x.ndim < 2 or min(x.shape[-2:]) < 1:
        raise ValueError(f"x {x.shape} must be [..., I, J] with at least one row and one column")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x {x.dtype} must be float32 or bfloat16")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps {steps!r} must be an integer of at least 1")
    compute = jnp.dtype(x.dtype if compute is None else compute)
    if compute not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"compute {compute} must be float32 or bfloat16")
    kernel = dispatch.kernel(implementation, interpret)
    if x.size == 0:
        return x
    if kernel and not fits(x.shape[-2:], x.dtype, compute, steps):
        room = tpu.room(x.shape[-2:], x.dtype, compute, steps)
        raise ValueError(
            f"x {x.dtype}{x.shape} with steps {steps} wants {room >> 20} MiB of VMEM a matrix, of"
            f' {sequence.VMEM >> 20}; use implementation="xla"'
        )
    interpret = pltpu.InterpretParams() if interpret is True else interpret
    return tpu.orthogonal(tpu.Plan(steps, compute, kernel, interpret), x)


def fits(shape: tuple[int, ...], dtype: Any, compute: Any, steps: int) -> bool:
    """Whether the kernel has room for a matrix of that shape."""
    return tpu.room(shape, dtype, compute, steps) <= sequence.VMEM
