"""What the ops refuse, which form they take, and whose sizes."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import blocks, dispatch
from pallas_kernels.blocks import Blocks
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.linear_attention import linear_attention

WIDE, GATE = jnp.zeros((2, 5, 4, 64)), jnp.zeros((2, 5, 4))
STATE, STARTS = jnp.zeros((2, 4, 64, 64)), jnp.zeros((2, 5), bool)
SHORT, HALF = WIDE[:, :4], WIDE.astype(jnp.bfloat16)


def arguments(**changes):
    """What both ops take, but for the changes."""
    fine = {"q": WIDE, "k": WIDE, "v": WIDE, "lr": GATE, "log_decay": None, "state": STATE}
    return fine | {"implementation": "xla"} | changes


@pytest.mark.parametrize("op", [delta_rule, linear_attention])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": WIDE[0]}, r"q \(5, 4, 64\), k .* must be \[B, T, H, K\]"),
        ({"k": SHORT}, r"k \(2, 4, 4, 64\) .* must be \[B, T, H, K\], the same"),
        ({"v": SHORT}, r"v \(2, 4, 4, 64\) must be"),
        ({"v": GATE}, r"v \(2, 5, 4\) must be"),
        ({"q": WIDE[:, :0], "k": WIDE[:, :0], "v": WIDE[:, :0]}, "must have a token and a head"),
        ({"v": HALF}, "v bfloat16 must all be float32 or all bfloat16"),
        (dict.fromkeys("qkv", WIDE.astype(jnp.float16)), "q float16, .* must all be float32"),
        ({"state": STATE[:1]}, r"state float32\(1, 4, 64, 64\) must be float32\(2, 4, 64, 64\)"),
        ({"state": STATE.astype(jnp.bfloat16)}, "state bfloat16.* must be float32"),
        ({"initial": STATE[0]}, "initial is what documents begin from: give starts too"),
        ({"initial": STATE, "starts": STARTS}, r"initial .* must be float32\(4, 64, 64\)"),
        ({"initial": HALF[0, :4].swapaxes(0, 1), "starts": STARTS}, "initial bfloat16"),
        ({"starts": STARTS[:, :2]}, r"starts bool\(2, 2\) must be bool\(2, 5\)"),
        ({"starts": STARTS.astype(int)}, "starts int32.* must be bool"),
        ({"read": "chunk"}, 'read \'chunk\' must be "after" or "before"'),
        ({"lr": WIDE}, r"lr \(2, 5, 4, 64\) must be \[B, T, H\] = \(2, 5, 4\)"),
        ({"log_decay": STATE}, r"log_decay \(2, 4, 64, 64\) must be \[B, T, H\] = \(2, 5, 4\) or"),
        ({"implementation": "mosaic"}, "implementation 'mosaic' must be None, \"pallas\" or"),
        ({"interpret": True}, "interpret is of the kernel: leave it out"),
        ({"blocks": Blocks(8, 1, 1)}, "block must be a power of two of at least 16"),
        ({"blocks": Blocks(48, 1, 1)}, "block must be a power of two"),
        ({"blocks": Blocks(16, 0, 1)}, "tiles and heads at least 1"),
        ({"blocks": Blocks(16, 1, 0)}, "tiles and heads at least 1"),
        ({"blocks": Blocks(16, 1, 2, 0)}, "tiles and heads at least 1"),
    ],
)
def test_mistakes_are_explained(op, changes, message):
    with pytest.raises(ValueError, match=message):
        op(**arguments(**changes))


def test_heads_must_fill_registers():
    odd = {"lr": GATE[:, :, :3], "state": STATE[:, :3]} | dict.fromkeys("qkv", WIDE[:, :, :3])
    delta_rule(**arguments(**odd))
    with pytest.raises(ValueError, match=r"3 heads of \(64, 64\) .* a multiple of 2 heads; use im"):
        delta_rule(**arguments(**odd, implementation="pallas"))


@pytest.mark.parametrize(
    ("heads", "dims", "most", "found"),
    [
        (8, (128, 128), 8, 8),
        (8, (128, 128), 5, 4),
        (6, (128, 256), 4, 3),
        (7, (128, 128), 4, 1),
        (8, (64, 128), 1, 2),
        (12, (32, 64), 8, 4),
    ],
)
def test_heads_of_a_step(heads, dims, most, found):
    assert dispatch.heads_of_step(heads, dims, most) == found


@pytest.mark.parametrize("op", [delta_rule, linear_attention])
def test_the_form_is_the_platforms_or_as_asked(op):
    def kernels(**options):
        given = arguments(**options)
        return str(jax.make_jaxpr(lambda q: op(**given | {"q": q}))(WIDE)).count("pallas_call[")

    assert kernels(implementation=None) == 0
    assert kernels(implementation="xla") == 0
    assert kernels(implementation="pallas") == 1
    assert kernels(implementation=None, interpret=True) == 1


def test_sizes_are_those_of_the_chip(monkeypatch):
    table = {"op": {"head": {"v5p": {64: (64, 2, 8), 256: (16, 1, 2, 1)}, "v6e": {64: (32, 1, 1)}}}}
    monkeypatch.setattr(blocks, "TABLE", table)
    assert blocks.find("op", "head", 64) == Blocks(64, 2, 8)
    assert blocks.find("op", "head", 128) == Blocks(16, 1, 2, 1)
    assert blocks.find("op", "head", 512) == Blocks(16, 1, 2, 1)
    assert blocks.find("op", "head", 512, "v6e") == Blocks(32, 1, 1)
    assert blocks.find("op", "head", 64, "tpu7x") == Blocks(64, 2, 8)


def test_the_table_is_whole():
    """Every op and decay has sizes for every chip and dimension, and the ops take them."""
    decays = ("none", "head", "channel")
    kinds = {"deep_memory": ("none",), "delta_rule": decays, "linear_attention": decays}
    assert {op: tuple(rows) for op, rows in blocks.TABLE.items()} == kinds
    for op, decay in ((op, decay) for op, decays in kinds.items() for decay in decays):
        chips = blocks.TABLE[op][decay]
        assert {*chips} == {"v5e", "v5p", "v6e"}
        for chip, rows in chips.items():
            assert [*rows] == [64, 128, 256]
            for dim, sizes in rows.items():
                assert blocks.find(op, decay, dim, chip) == Blocks(*sizes)
                assert Blocks(*sizes).block == 64 or op != "deep_memory", "the chunk measured"
                q = jnp.zeros((1, 1, 8, dim), jnp.bfloat16)
                gate = {"none": None, "head": q[..., 0], "channel": q}[decay]
                plan = dispatch.plan(
                    None, op, q, q, gate, None, kernel=True, interpret=False, chip=chip
                )
                steps = (plan.block, plan.tiles, plan.heads, plan.backward_heads)
                assert steps == (*sizes, sizes[2])[:4], "no heads of eight are left out"
                assert plan.backward_heads <= plan.heads
                for dtype in (jnp.bfloat16, jnp.float32):
                    fits = op == "deep_memory" or dispatch.fits(
                        op, 8, (dim, dim), gate, dtype, chip
                    )
                    assert fits, "affine ops take all rows of the table"


@pytest.mark.parametrize(
    ("op", "decay", "heads", "dim", "dtype", "fits"),
    [
        ("delta_rule", "channel", 16, 200, "bfloat16", False),  # 195 MiB of 128
        ("delta_rule", "none", 32, 300, "bfloat16", False),  # 65.2 MiB of 64
        ("delta_rule", "channel", 8, 256, "bfloat16", True),  # compiles
        ("delta_rule", "none", 8, 512, "bfloat16", True),
        ("linear_attention", "channel", 16, 200, "bfloat16", False),
        ("linear_attention", "head", 8, 48, "bfloat16", True),
    ],
)
def test_what_is_known_to_fit(op, decay, heads, dim, dtype, fits):
    """Of what libtpu 0.0.42.1 says for v5e."""
    q = jnp.zeros((1, 1, heads, dim), dtype)
    gate = {"none": None, "channel": q, "head": q[..., 0]}[decay]
    assert dispatch.fits(op, heads, (dim, dim), gate, q.dtype, "v5e") == fits


@pytest.mark.parametrize(
    ("dims", "dtype", "heads"),
    [
        ((256, 256), "bfloat16", 8),
        ((512, 512), "bfloat16", 2),
        ((128, 512), "bfloat16", 4),
        ((384, 512), "float32", 1),
    ],
)
def test_heads_wider_than_the_table_take_fewer_a_step(dims, dtype, heads):
    q, v = (jnp.zeros((1, 1, 32, dim), dtype) for dim in dims)
    plan = dispatch.plan(None, "delta_rule", q, v, None, None, kernel=True, interpret=False)
    assert plan.heads == heads


@pytest.mark.parametrize(
    ("kind", "chip"),
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x"),
     ("TPU v3", None), ("cpu", None)],
)  # fmt: skip
def test_the_chip_is_that_of_the_mesh(kind, chip):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh(
        (1,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(mesh):
        assert dispatch.here() == chip
    assert dispatch.here() is None


def test_single_precision_takes_half_the_heads():
    def heads(dtype, blocks=None):
        q = jnp.zeros((1, 1, 8, 128), dtype)
        plan = dispatch.plan(None, "delta_rule", q, q, None, blocks, kernel=True, interpret=False)
        return plan.heads

    assert heads(jnp.float32) * 2 == heads(jnp.bfloat16)
    assert heads(jnp.float32, Blocks(64, 1, 8)) == 8
