"""Where documents begin: one definition, for ids of any integer type."""

import jax.numpy as jnp
import numpy as np
import pytest

from memjax import documents
from tests.contracts.scenes import float64


@float64
@pytest.mark.parametrize("last", [5, 7])
def test_ids_past_int32_are_compared_as_states_carry_them(last):
    """As int32, 5 and 2**32 + 5 are one id, wherever a call ends."""
    ids = jnp.asarray([[5, 2**32 + 5, 2**32 + 6, 6, 2**33 + 5]])
    assert ids.dtype == jnp.int64
    before = jnp.full((1,), last, jnp.int32)
    new = documents.starts(ids, before)
    np.testing.assert_array_equal(new, [[last != 5, False, True, False, True]])
    place = documents.follow(ids, before, jnp.full((1,), 3, jnp.int32), 5)
    np.testing.assert_array_equal(place.number, np.cumsum(new, axis=1))
    for cut in range(1, 5):
        first = documents.follow(ids[:, :cut], before, jnp.full((1,), 3, jnp.int32), cut)
        assert first.last.dtype == jnp.int32
        np.testing.assert_array_equal(documents.starts(ids[:, cut:], first.last), new[:, cut:])
        rest = documents.follow(ids[:, cut:], first.last, first.seen, 5 - cut)
        np.testing.assert_array_equal(rest.index, place.index[:, cut:])
