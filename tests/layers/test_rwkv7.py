"""RWKV-7 against NumPy, at float64, and through what every mixer must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.layers import RWKV7
from tests.layers import mixer_checks as checks
from tests.layers import mixer_oracle as oracle

DIM, HEADS, KEY = 6, 2, 4


def build(**changes):
    return RWKV7(DIM, **{"heads": HEADS, "head_dim": KEY, "rank": 3} | changes, rngs=nnx.Rngs(0))


CASE = checks.Case(
    build,
    oracle.rwkv7,
    ({"root": 0.49}, {"order": "eraser writes"}, {"bonus": False}),
    precise=("decay", "rate", "gate"),
    long=70,
)


@pytest.mark.parametrize(
    "check",
    [
        checks.check_equations, checks.check_splits, checks.check_reach, checks.check_gradients,
        checks.check_bfloat16, checks.check_donation,
    ],
)  # fmt: skip
def test_is_its_equations(check):
    check(CASE)


def test_parameters_name_their_axes_and_start_as_the_paper_says():
    flat = nnx.to_flat_state(nnx.state(build(), nnx.Param))
    p = {".".join(map(str, path)): leaf for path, leaf in flat}
    into, low = ("embed", "heads", "kv"), ("decay", "rate", "gate")
    assert {name: leaf.axes for name, leaf in p.items()} == {
        **{f"shift.{name}": ("embed",) for name in ("receptance", "key", "value", *low)},
        **{f"{name}.weight": into for name in ("receptance", "key", "value")},
        "out.weight": ("heads", "kv", "embed"),
        **{f"{name}.down.weight": ("embed", None) for name in low},
        **{f"{name}.up.weight": (None, "heads", "kv") for name in low},
        **{f"{name}.offset": ("heads", "kv") for name in ("decay", "rate")},
        **dict.fromkeys(("erased", "mixed", "bonus"), ("heads", "kv")),
        "norm.scale": ("kv",),
    }
    assert p["decay.down.weight"].shape == (DIM, 3)
    _, state = build()(jnp.zeros((1, 1, DIM)))
    np.testing.assert_allclose(state.stats.lr, 0.5)
    np.testing.assert_allclose(state.stats.retain, np.exp(-np.exp(-0.5) / (1 + np.e)), rtol=1e-6)


def test_reports_surprise_and_gates():
    """Rate and decay are means over channels too."""
    begun, after = jax.eval_shape(
        lambda m: (m.start(2), m(jnp.zeros((2, 3, DIM)))[1]), nnx.eval_shape(build)
    )
    assert jax.tree.map(jnp.shape, begun) == jax.tree.map(jnp.shape, after)
    assert begun.stats.lr.shape == begun.stats.surprise.shape == (2, HEADS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4, "head_dim": None}, "dim 6 is not a multiple of heads 4"),
        ({"heads": 0}, "heads 0"),
        ({"head_dim": 0}, "head_dim 0"),
        ({"rank": 0}, "rank 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_bad_inputs_are_named():
    checks.check_refusals(CASE, RWKV7(8, HEADS, KEY, rngs=nnx.Rngs(0)))
