"""The papers' sizes, counted."""

import jax
import pytest
from flax import nnx

from memjax.models import parameter_count, preset, presets
from tests.models.toys import model_of


def transformer_parameters(layers, dim, hidden, vocab=32000):
    """Of a pre-norm transformer with SwiGLU, rotary positions and a tied head."""
    attention = 4 * dim * dim
    feed_forward = 3 * dim * hidden
    return vocab * dim + layers * (attention + feed_forward + 2 * dim) + dim


@pytest.mark.parametrize(
    ("name", "layers", "dim", "hidden", "count"),
    [
        ("transformer_170m", 12, 768, 2048, 109_529_856),
        ("transformer_340m", 24, 1024, 2816, 341_099_520),
        ("transformer_760m", 24, 1536, 4096, 728_704_512),
        ("transformer_1.3b", 18, 2048, 5504, 976_300_032),
    ],
)
def test_transformer_counts(name, layers, dim, hidden, count):
    assert parameter_count(preset(name)) == count
    assert transformer_parameters(layers, dim, hidden) == count


def test_untied_and_windowed_counts():
    tied = parameter_count(preset("transformer_170m"))
    assert parameter_count(preset("transformer_170m", tied=False)) == tied + 32000 * 768
    assert parameter_count(preset("transformer_170m", pattern=("swa",), window=64)) == tied


def test_count_is_that_of_a_model():
    model = model_of(pattern=("toy_average", "transformer"), tied=False)
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert parameter_count(model.config) == sum(sizes)


def test_names():
    assert "mac_760m" in presets.NAMES
    with pytest.raises(ValueError, match=r"unknown preset 'transformer_170'; .*'transformer_170m'"):
        preset("transformer_170")
    assert preset("transformer_1.3b").heads == 8
    assert preset("transformer_340m", remat="full").remat == "full"
