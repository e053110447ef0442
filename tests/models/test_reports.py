"""Statistics of the memories of a model."""

import jax
import numpy as np

from memjax.models import statistics
from tests.models.toys import call, model_of, tokens_of


def test_statistics_by_layer():
    model = model_of(layers=4, pattern=("toy_average", "transformer"))
    _, state = call(model)(tokens_of())
    found = jax.jit(statistics)(state)
    assert sorted(found) == sorted(
        f"layer_{layer}/{name}" for layer in ("00", "02") for name in ("surprise", "lr", "retain")
    )
    stats = state.blocks[0].stats
    for repeat, layer in enumerate(("00", "02")):
        np.testing.assert_allclose(
            found[f"layer_{layer}/surprise"], stats.surprise[repeat].mean(), rtol=1e-6
        )
        np.testing.assert_allclose(found[f"layer_{layer}/lr"], 0.5)
    assert found["layer_00/surprise"] != found["layer_02/surprise"]
    assert all(value.shape == () for value in found.values())


def test_no_memory_no_statistics():
    assert statistics(model_of(pattern=("transformer",)).start(2)) == {}


def test_several_memories_in_a_layer_are_counted():
    state = model_of(layers=1).start(2)
    twice = state._replace(blocks=((state.blocks[0], state.blocks[0]),))
    names = {"surprise", "lr", "retain"}
    assert set(statistics(twice)) == {
        f"layer_00/memory_{n}/{name}" for n in (0, 1) for name in names
    }
