"""The papers' sizes, counted."""

import pathlib

import jax
import pytest
from flax import nnx

from memjax.models import parameter_count, preset, presets
from tests.models.toys import model_of

ROOT = pathlib.Path(__file__).resolve().parents[2]


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


def memory_parameters(dim, heads, persistent, conv=4, depth=2, expansion=4):
    """Of Titans' memory layer."""
    head = dim // heads
    projections = 5 * dim * dim  # queries, keys, values, gate, output
    gates = 3 * (dim * heads + heads)  # rate, momentum, retention
    convolutions = 3 * conv * dim
    hidden = expansion * head
    mlp = head * hidden + (depth - 2) * hidden * hidden + hidden * head
    return (
        projections
        + head  # norm of a head's output
        + gates
        + convolutions
        + heads * (mlp + 2 * head)  # W_0, and the scale and offset of its layer norm
        + persistent * dim
    )


def titans_parameters(block, layers, dim, heads, hidden, vocab=32000, persistent=16):
    attention = 4 * dim * dim
    mixer = {
        "lmm": memory_parameters(dim, heads, persistent),
        # one set of persistent tokens, those of the segment; two norms where the branches meet
        "mac": memory_parameters(dim, heads, 0) + attention + persistent * dim + 2 * dim,
        # each branch has its own
        "mag": memory_parameters(dim, heads, persistent) + attention + persistent * dim + 2 * dim,
        "mal": memory_parameters(dim, heads, persistent) + attention + persistent * dim + dim,
    }[block]
    return vocab * dim + layers * (mixer + 3 * dim * hidden + 2 * dim) + dim


SIZES = {
    "170m": (12, 768, 16, 2048),
    "340m": (24, 1024, 16, 2816),
    "760m": (24, 1536, 16, 4096),
    "1.3b": (18, 2048, 8, 5504),
}
COUNTS = {
    "lmm_170m": 120_866_688,
    "lmm_340m": 380_767_872,
    "lmm_760m": 816_518_016,
    "lmm_1.3b": 1_129_290_672,
    "mac_170m": 149_196_672,
    "mac_340m": 481_480_320,
    "mac_760m": 1_043_084_160,
    "mac_1.3b": 1_431_354_288,
    "mag_170m": 149_344_128,
    "mag_340m": 481_873_536,
    "mag_760m": 1_043_673_984,
    "mag_1.3b": 1_431_944_112,
    "mal_170m": 149_334_912,
    "mal_340m": 481_848_960,
    "mal_760m": 1_043_637_120,
    "mal_1.3b": 1_431_907_248,
}


@pytest.mark.parametrize("name", COUNTS)
def test_titans_counts(name):
    block, _, size = name.rpartition("_")
    assert titans_parameters(block, *SIZES[size]) == COUNTS[name]
    assert parameter_count(preset(name)) == COUNTS[name]


def test_every_preset_is_counted():
    assert {f"{block}_{size}" for block in ("lmm", "mac", "mag", "mal") for size in SIZES} == set(
        COUNTS
    )


def test_the_page_has_the_counts():
    """The table of docs/architectures/titans.md, against the presets themselves."""
    text = (ROOT / "docs" / "architectures" / "titans.md").read_text(encoding="utf-8")
    table = text[text.index("| preset |") :].split("\n\n")[0]
    cells = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in table.split("\n")]
    blocks, rows = cells[0][1:], cells[2:]
    found = {
        f"{b}_{size}": n for size, *counts in rows for b, n in zip(blocks, counts, strict=True)
    }
    assert found.keys() == set(presets.NAMES)
    for name, count in found.items():
        assert count == f"{parameter_count(preset(name)):,}", name


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
