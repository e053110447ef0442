"""TPU chips by the name that a topology has, and the slices that are made of them."""

import math
import re
from typing import NamedTuple


class Chip(NamedTuple):
    """What a chip can do, per device as JAX counts them.

    Args:
      name: as topologies have it, "v5p".
      devices: JAX devices of a chip; each has its own memory.
      flops: bf16 operations a second, a multiply-add counted as two.
      hbm_bandwidth: bytes a second.
      hbm: bytes of memory.
      ici_bandwidth: bytes a second that all links together send, one way.
      flops_a_cycle: of all matrix units; `flops / flops_a_cycle` is the clock.
      cores: tensor cores, over which a kernel's parallel grid is split.
      dimensions: of the shape that a slice has.
    """

    name: str
    devices: int
    flops: float
    hbm_bandwidth: float
    hbm: int
    ici_bandwidth: float
    flops_a_cycle: int
    cores: int
    dimensions: int = 3

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.flops / self.flops_a_cycle


def _chip(
    name, tflops, gigabytes, gibibytes, ici, flops_a_cycle, devices=1, cores=1, dimensions=3
) -> Chip:
    return Chip(
        name,
        devices,
        tflops * 1e12 / devices,
        gigabytes * 1e9 / devices,
        gibibytes * 2**30 // devices,
        ici * 1e9 / devices,
        flops_a_cycle,
        cores,
        dimensions,
    )


# Peaks of a chip: https://cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x (bf16, HBM, half of the
# bidirectional ICI bandwidth). Matrix units: v5e 4 of 128 x 128, v5p two cores of 4. Of v6e and
# tpu7x neither what their units do in a cycle nor the clock is published: twice two of 256 x 256 a
# device is what the compiler's estimates of large products fit.
CHIPS = {
    chip.name: chip
    for chip in (
        _chip("v5e", 197, 819, 16, 200, 4 * 128 * 128 * 2, dimensions=2),
        _chip("v5p", 459, 2765, 95, 600, 2 * 4 * 128 * 128 * 2, cores=2),
        _chip("v6e", 918, 1640, 32, 400, 4 * 256 * 256 * 2, dimensions=2),
        _chip("tpu7x", 2307, 7380, 192, 600, 4 * 256 * 256 * 2, devices=2),
    )
}
EXAMPLES = "v5e:2x2, v5e:16x16, v5p:2x2x1, v5p:4x4x4, v5p:8x8x16, v6e:16x16, tpu7x:4x4x4"


def parse(topology: str) -> tuple[Chip, int]:
    """The chip of a topology, and how many JAX devices the slice has.

        parse("v5p:4x4x4") == (CHIPS["v5p"], 64)

    Args:
      topology: name and shape, as in `EXAMPLES`.

    Raises:
      ValueError: no such chip, or no shape that its slices have.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", topology)
    if not found or found[1] not in CHIPS:
        raise ValueError(
            f"topology {topology!r} must be one of {', '.join(CHIPS)}, a colon and the shape of the"
            f" slice in chips, such as {EXAMPLES}"
        )
    chip, sizes = CHIPS[found[1]], [int(size) for size in found[2].split("x")]
    if len(sizes) != chip.dimensions:
        examples = [one for one in EXAMPLES.split(", ") if one.startswith(f"{chip.name}:")]
        raise ValueError(
            f"topology {topology!r}: a slice of {chip.name} has {chip.dimensions} dimensions, such"
            f" as {', '.join(examples)}"
        )
    count = math.prod(sizes)
    if count == 0:
        raise ValueError(f"topology {topology!r}: a slice has at least one chip")
    return chip, count * chip.devices
