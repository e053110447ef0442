"""Newton-Schulz: reference, XLA form and interpreted kernel against the iteration in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.newton_schulz import newton_schulz, reference, tpu

STEPS = 5
INTERPRET = pltpu.InterpretParams(detect_races=True)
A, B, C = 3.4445, -4.7750, 2.0315


def oracle(x, steps=STEPS):
    """One matrix after another, from the equations, always on the left side."""
    x = np.asarray(x, np.float64)
    result = np.zeros_like(x)
    for at in np.ndindex(x.shape[:-2]):
        y = x[at]
        if not np.any(y):
            continue
        y = y / np.linalg.norm(y)
        for _ in range(steps):
            gram = y @ y.T
            y = A * y + B * gram @ y + C * gram @ gram @ y
        result[at] = y
    return result
