"""Chips and slices by name, and the errors of a machine without libtpu."""

import os
import sys

import pytest

from memjax.tpu import chips, target


@pytest.mark.parametrize(
    ("topology", "chip", "devices"),
    [
        ("v5p:4x4x4", "v5p", 64),
        ("v5e:16x16", "v5e", 256),
        ("v6e:2x2", "v6e", 4),
        ("tpu7x:2x2x1", "tpu7x", 8),
    ],
)
def test_slices_by_name(topology, chip, devices):
    assert chips.parse(topology) == (chips.CHIPS[chip], devices)


def test_peaks_are_of_a_device():
    v5p, tpu7x = chips.CHIPS["v5p"], chips.CHIPS["tpu7x"]
    assert v5p.clock == pytest.approx(1.75e9, rel=0.01)
    assert chips.CHIPS["v5e"].clock == pytest.approx(1.5e9, rel=0.01)
    assert (tpu7x.devices, tpu7x.hbm) == (2, 96 * 2**30)
    assert tpu7x.flops == 2307e12 / 2


@pytest.mark.parametrize(
    "name", ["v5p", "v5p:", "v9:2x2", "v5p:4", "v5p:4x-4", "v5p:axb", "v5e:0x4"]
)
def test_names_that_are_no_slice_are_explained(name):
    with pytest.raises(ValueError, match="topology"):
        chips.parse(name)


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("v5e:2x2x2", "v5e:2x2"),
        ("v6e:4x4x1", "v6e:16x16"),
        ("v5p:4x4", "v5p:2x2x1"),
        ("tpu7x:4x4", "tpu7x:4x4x4"),
    ],
)
def test_a_shape_has_the_dimensions_of_the_chip(name, right):
    """As libtpu alone would not say: it takes v5e:2x2x2."""
    count = right.count("x", right.index(":")) + 1
    with pytest.raises(ValueError, match=f"'{name}': .* has {count} dimensions, such as .*{right}"):
        chips.parse(name)


def test_every_example_is_a_slice():
    for name in chips.EXAMPLES.split(", "):
        chips.parse(name)


def test_a_missing_libtpu_gets_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ImportError, match=r'needs libtpu: pip install -U "memjax\[tpu\]"'):
        target.devices("v5p:2x2x1")


def test_settings_are_for_this_process_alone(monkeypatch):
    monkeypatch.setattr(os, "environ", {"LIBTPU_INIT_ARGS": "--mine"})
    target.prepare(dump="/somewhere", environment={"TPU_ACCELERATOR_TYPE": "v6e-4"})
    assert os.environ["TPU_ACCELERATOR_TYPE"] == "v6e-4"
    assert os.environ["LIBTPU_INIT_ARGS"].startswith("--mine --xla_jf_dump_to=/somewhere ")


@pytest.mark.parametrize(
    ("name", "cycles"),
    [("v5p", 544_925), ("v5e", 1_083_068), ("v6e", 301_616), ("tpu7x", 316_312)],
)
def test_a_large_product_takes_no_less_than_the_peak_allows(name, cycles):
    """The compiler's estimates of 4096^3 in bf16: 80 to 100 % of the peak, by the clock too."""
    chip = chips.CHIPS[name]
    share = 2 * 4096**3 / chip.flops_a_cycle / cycles
    assert 0.8 < share < 1
    assert 2 * 4096**3 / chip.flops / (cycles / chip.clock) == pytest.approx(share)
    assert 1e9 < chip.clock < 2.5e9
