"""Sizes of the kernels' steps, by op, decay, chip and dimension of a head."""

from typing import NamedTuple

from pallas_kernels.blocks_table import TABLE


class Blocks(NamedTuple):
    """How a kernel cuts its work.

    Args:
        block: tokens a tile, a power of two of at least 16.
        tiles: tiles of a step of the grid.
        heads: heads of a step of the grid, at most.
        backward: heads of a step of the backward kernel, at most; None = as many.
    """

    block: int
    tiles: int
    heads: int
    backward: int | None = None


DEFAULT = "v5p"  # whose sizes a chip has that is not in the table


def find(op: str, decay: str, dim: int, chip: str | None = None) -> Blocks:
    """The sizes of a step.

    Args:
        op: name of the package.
        decay: "none", "head" or "channel".
        dim: the widest of a head's dimensions.
        chip: "v5e", "v5p" or "v6e"; another, or None, has the sizes of v5p.
    """
    chips = TABLE[op][decay]
    rows = chips.get(chip, chips[DEFAULT])
    fitting = [size for size in rows if size >= dim] or [max(rows)]
    return Blocks(*rows[min(fitting)])
