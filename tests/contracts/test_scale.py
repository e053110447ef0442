"""Long sequences: finite in bf16, and small in memory."""

import pytest

from memjax import miras
from tests.contracts import faults, rules, scale
from tests.contracts.scenes import FORMS, stepwise

MATRIX = rules.BY_NAME["matrix_before"]


def test_finite():
    scale.check_finite(FORMS, 2048)


@pytest.mark.slow
def test_finite_at_32k():
    scale.check_finite(FORMS, 32768)


@pytest.mark.parametrize("fault", ["infinite", "gradient_infinite"])
def test_finite_can_fail(fault):
    with pytest.raises(AssertionError):
        scale.check_finite(faults.plant("chunkwise", getattr(faults, fault)), 13, MATRIX)


@pytest.mark.parametrize("which", ["recurrent", "chunkwise"])
def test_no_weights_for_each_token(which):
    scale.check_memory(FORMS, which)


def test_memory_can_fail():
    """A plain loop over tokens keeps every token's weights for its gradient."""
    forms = FORMS._replace(chunkwise=stepwise(miras.step))
    with pytest.raises(AssertionError):
        scale.check_memory(forms, "chunkwise")
