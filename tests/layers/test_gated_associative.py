"""Gated associative memory against NumPy, at float64, and through what every mixer must be."""

import pytest
from flax import nnx

from memjax.layers import GatedAssociativeMemory
from tests.layers import mixer_checks as checks
from tests.layers import mixer_oracle as oracle

DIM, SLOTS, CONV = 6, 5, 3


def build(**changes):
    return GatedAssociativeMemory(
        **{"dim": DIM, "slots": SLOTS, "conv": CONV} | changes, rngs=nnx.Rngs(0)
    )


CASE = checks.Case(build, oracle.gated_associative, ({"scale": 1.0}, {"turned": True}))


@pytest.mark.parametrize(
    "check",
    [checks.check_equations, checks.check_splits, checks.check_gradients, checks.check_bfloat16,
     checks.check_donation],
)  # fmt: skip
def test_is_its_equations(check):
    check(CASE)


def test_reaches_back_no_further_than_its_convolution():
    checks.check_reach(CASE, lambda t, s: t - s < CONV)


@pytest.mark.parametrize("name", ["dim", "slots", "conv"])
def test_bad_options_are_named(name):
    with pytest.raises(ValueError, match=f"{name} 0 must be an integer of at least 1"):
        build(**{name: 0})


def test_bad_inputs_are_named():
    checks.check_refusals(CASE, build(conv=2))


def test_parameters_name_their_axes():
    flat = nnx.to_flat_state(nnx.state(build(), nnx.Param))
    assert {".".join(map(str, path)): p.axes for path, p in flat} == {
        "conv.weight": ("conv", "embed"),
        "local.weight": ("embed", None),
        "bank": (None, "embed"),
        "gates.weight": ("embed", None, None),
        "out.weight": (None, "embed"),
    }
