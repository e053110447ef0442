"""Sizes of the kernels' steps, by op and chip."""

from typing import NamedTuple


class Blocks(NamedTuple):
    """How a kernel cuts its work.

    Args:
        block: tokens a tile, a power of two of at least 16.
        tiles: tiles of a step of the grid.
        heads: heads of a step of the grid, at most.
    """

    block: int
    tiles: int
    heads: int


# By op, kind of decay, and the widest of a head's dimensions up to which it holds.
TABLE: dict[str, dict[str, dict[int, Blocks]]] = {
    "delta_rule": {
        "none": {128: Blocks(64, 2, 8), 256: Blocks(64, 1, 4)},
        "head": {128: Blocks(64, 2, 8), 256: Blocks(64, 1, 4)},
        "channel": {128: Blocks(64, 1, 8), 256: Blocks(64, 1, 4)},
    },
    "deep_memory": {
        "none": {128: Blocks(64, 1, 2), 256: Blocks(64, 1, 1)},
    },
    "linear_attention": {
        "none": {128: Blocks(128, 1, 8), 256: Blocks(128, 1, 4)},
        "head": {128: Blocks(128, 1, 8), 256: Blocks(128, 1, 4)},
        "channel": {128: Blocks(64, 1, 8), 256: Blocks(64, 1, 4)},
    },
}


def find(op: str, decay: str, dim: int) -> Blocks:
    """The sizes for an op, a kind of decay ("none", "head", "channel") and a head's dimension."""
    rows = TABLE[op][decay]
    fitting = [size for size in rows if size >= dim] or [max(rows)]
    return rows[min(fitting)]
