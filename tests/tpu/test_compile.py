"""Compiling for TPU for real, where libtpu is installed (tests/README.md lists the skip)."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='no libtpu: pip install "memjax[tpu]"'
)
SMALL = (
    "--config=configs/titans.py:transformer_170m", "--topology=v5p:2x2x1",
    "--config.data.tokenizer=byte", "--config.model.dim=256", "--config.model.heads=2",
    "--config.model.layers=2", "--config.model.context=256", "--config.train.batch=64",
    "--config.train.accumulate=1", "--mesh=data=1,fsdp=4",
)  # fmt: skip


def compiled(out, *arguments):
    command = [sys.executable, "experiments/compile.py", f"--out={out}", *SMALL, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "report.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("full"), "--config.model.remat=full")


def test_the_same_step_gives_the_same_report(full, tmp_path):
    again, text = compiled(tmp_path / "again", "--config.model.remat=full")
    first, _ = full
    for name in ("cycles", "flops", "bytes", "memory", "traffic", "parts", "schedules", "seconds"):
        assert again[name] == first[name], name
    assert "fits" in text


def test_without_remat_there_is_less_to_do_and_more_to_keep(full, tmp_path):
    """The forward pass of the blocks is not computed again, which it is but for each block's last
    product, the third of the feed-forward layer: no gradient needs what comes of that."""
    none, _ = compiled(tmp_path / "none", "--config.model.remat=none")
    first, _ = full
    assert none["memory"]["temporaries"] > first["memory"]["temporaries"]
    assert none["memory"]["parameters"] == first["memory"]["parameters"]
    forward = {p["name"]: p["flops"] for p in first["parts"] if not p["backward"]}
    again = forward["mixer.transformer"] + 2 / 3 * forward["feed_forward.swiglu"]
    assert again > 0
    assert first["flops"] - none["flops"] == pytest.approx(again, rel=0.01)


def test_kernels_and_traffic_are_those_of_the_model(full):
    """Splash attention forward and backward; each weight is gathered, its gradient scattered."""
    first, _ = full
    names = {one["name"] for one in first["schedules"]}
    assert {name.split("_segmented")[0] for name in names} == {
        "splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv",
    }  # fmt: skip
    assert all(0 < one["use"]["MXU"] < 1 for one in first["schedules"] if "MXU" in one["use"])
    kinds = {(one["kind"], one["part"]) for one in first["traffic"]}
    assert ("all-gather", "feed_forward.swiglu") in kinds
    assert ("reduce-scatter", "feed_forward.swiglu") in kinds
    # three matrices of 256 x 768 a layer: their gradients in bf16, once
    (scattered,) = (
        one
        for one in first["traffic"]
        if (one["kind"], one["part"]) == ("reduce-scatter", "feed_forward.swiglu")
    )
    assert scattered["bytes"] == 2 * 3 * 256 * 768 * 2


def test_a_plain_product_is_near_the_peak(tmp_path):
    """The calibration: 4096^3 in bf16 at 544,925 cycles of v5p, 96 % of what its units could."""
    script = """
from memjax.tpu import chips, hlo, target
target.prepare()
import jax, jax.numpy as jnp
device = target.devices("v5p:2x2x1")[0]
place = jax.sharding.SingleDeviceSharding(device)
x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=place)
module = hlo.parse(jax.jit(jnp.matmul).lower(x, x).compile().as_text())
chip = chips.CHIPS["v5p"]
print(2 * 4096**3 / chip.flops_a_cycle / hlo.cycles(module))
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0.85 < float(done.stdout) <= 1.0


def test_neither_tokens_nor_a_whole_parameter_are_gathered(tmp_path):
    """Where the time axis is split, an affine memory gathers what the devices make of its state,
    `K (K + V)` numbers a head from each; layers are gathered one at a time."""
    rows, length, dim, heads, layers = 4, 4096, 256, 2, 4
    report, _ = compiled(
        tmp_path, "--config.model.pattern=('gated_delta_net',)", "--mesh=data=1,fsdp=4,sequence=2",
        "--topology=v5p:2x2x2", f"--config.model.context={length}",
        f"--config.train.batch={rows}",
        f"--config.model.layers={layers}", "--config.model.remat=full",
    )  # fmt: skip
    gathers = {
        (one["part"], one["group"]): (one["bytes"], one["count"])
        for one in report["traffic"]
        if one["kind"] == "all-gather"
    }
    of_states = 2 * 2 * heads * (dim // heads) ** 2 * 4  # M and N of two devices
    of_tokens = rows // 4 * length * dim * 2  # one activation of a device's row, whole
    total, _ = gathers["mixer.gated_delta_net", 2]
    assert total < 2 * layers * of_states + of_tokens / 4  # forward, and again backward
    largest = max(size / count for size, count in gathers.values())
    assert largest < report["model_parameters"] * 2 / layers
