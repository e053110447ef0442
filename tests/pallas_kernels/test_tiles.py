"""The inverse of a unit lower triangle against NumPy's, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tiles import unit_lower_inverse
from tests.pallas_kernels.affine import assert_close

# Below fp32, products keep 16 bits of their operands and are summed in fp32: each level of doubling
# multiplies by two blocks, and the errors of the levels add up.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2**-15}


def system(count, strength, heads=3):
    """Of random unit keys, as the delta rule has it; strictly lower."""
    random = np.random.default_rng(count)
    keys = random.normal(size=(heads, count, 64))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    return np.tril(strength * keys @ keys.swapaxes(1, 2), -1)


def check_inverse(lower, compute, inverse=unit_lower_inverse):
    lower = np.asarray(lower, np.float32)
    want = np.linalg.inv(np.eye(lower.shape[-1]) + lower.astype(np.float64))
    found = np.asarray(inverse(jnp.asarray(lower), compute))
    assert_close(found, want, TOLERANCE[compute])
    assert np.array_equal(found, np.tril(found)), "above the diagonal"


@pytest.mark.parametrize("compute", TOLERANCE)
@pytest.mark.parametrize("count", [16, 32, 64, 128])
@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_inverse(count, strength, compute):
    check_inverse(system(count, strength), compute)


@pytest.mark.parametrize("compute", TOLERANCE)
def test_of_one_key_the_inverse_is_exact(compute):
    """The powers of this triangle have binomials of 128 in them; its inverse has 1 and -1."""
    lower = np.tril(np.ones((1, 128, 128)), -1)
    found = unit_lower_inverse(jnp.asarray(lower, jnp.float32), compute)
    np.testing.assert_array_equal(found[0], np.eye(128) - np.eye(128, k=-1))
    alternating = np.tril(np.cumprod(np.full((128, 128), -1.0), axis=0), 0)
    alternating = 2 * alternating * np.cumprod(np.full(128, -1.0)) - np.eye(128)
    found = unit_lower_inverse(jnp.asarray(2 * lower, jnp.float32), compute)
    np.testing.assert_array_equal(found[0], np.tril(alternating))


def test_faults_are_found():
    """A solution of one Neumann step, and products in plain bf16."""

    def neumann(lower, compute):
        return jnp.eye(lower.shape[-1]) - lower + lower @ lower

    def plain(lower, compute):
        return unit_lower_inverse(lower.astype(jnp.bfloat16).astype(jnp.float32), compute)

    for fault in (neumann, plain):
        for compute in TOLERANCE:
            with pytest.raises(AssertionError, match="off by"):
                check_inverse(system(64, 1.0), compute, fault)
