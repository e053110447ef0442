"""Packing: documents into rows of `context` tokens, as a plan that is fixed before training.

A document d_1 .. d_n is the sequence  eos d_1 .. d_n eos:  its n + 1 inputs are `eos d_1 .. d_n`
and the targets are `d_1 .. d_n eos`, so each token and the end of the document is predicted once.
A document with more than `context` inputs is cut into pieces of `context` and a rest. Pieces are
contiguous: the last target of a piece is the first input of the next. Every piece is a document of
its own in its row: segment ids count 1, 2, ... in the row and positions start at 0.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from memjax.typing import Int

Batch = dict[str, np.ndarray]
"""Arrays [B, T] by the names of `DTYPES`."""

DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "weights": np.float32,
    "segment_ids": np.int32,
    "positions": np.int32,
}

Read = Callable[[int, int, int], np.ndarray]
"""read(document, start, stop): token ids of a stretch of a document, without specials."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which pieces of which documents stand in which row; pieces are sorted by row and column."""

    document: np.ndarray  # [pieces]
    start: np.ndarray  # [pieces] first input of the piece, 0 = the eos before the document
    length: np.ndarray  # [pieces] inputs (= targets)
    ends: np.ndarray  # [pieces] whether the document ends here, so that the last target is eos
    column: np.ndarray  # [pieces] where the piece starts in its row
    first: np.ndarray  # [rows + 1] first piece of each row
    context: int

    @property
    def rows(self) -> int:
        return len(self.first) - 1

    @property
    def targets(self) -> int:
        """Targets in all rows: the tokens of all documents and one eos each."""
        return int(self.length.sum())


def make_plan(lengths: Int[np.ndarray, "D"], context: int, align: int = 1) -> Plan:
    """Lay documents of these lengths out in rows: full pieces first, then the rests, best fit.

    The rests are placed in order of decreasing length (ties by document), each in the row with the
    least room that suffices. The result depends on the arguments alone.

    Args:
      lengths: tokens of each document, without specials.
      context: length of a row.
      align: pieces start at multiples of this; the room in between is padding.

    Raises:
      ValueError: `context` or `align` below 1.
    """
    if context < 1 or align < 1:
        raise ValueError(f"context {context} and align {align} must be at least 1")
    inputs = np.asarray(lengths, np.int64) + 1
    full, rest = np.divmod(inputs, context)
    document = np.repeat(np.arange(len(inputs)), full)
    place = np.arange(len(document)) - np.repeat(np.cumsum(full) - full, full)

    rests = np.flatnonzero(rest)
    rests = rests[np.argsort(-rest[rests], kind="stable")]
    bins, columns = _best_fit(rest[rests].tolist(), context, align)
    order = np.lexsort((columns, bins))
    rests, bins, columns = rests[order], bins[order], columns[order]

    row = np.concatenate([np.arange(len(document)), len(document) + bins])
    rows = int(row[-1]) + 1 if len(row) else 0
    document = np.concatenate([document, rests])
    start = np.concatenate([place * context, full[rests] * context])
    length = np.concatenate([np.full(len(place), context), rest[rests]])
    return Plan(
        document=document,
        start=start,
        length=length.astype(np.int32),
        ends=start + length == inputs[document],
        column=np.concatenate([np.zeros(len(place)), columns]).astype(np.int32),
        first=np.searchsorted(row, np.arange(rows + 1)),
        context=context,
    )


def _best_fit(sizes: list[int], context: int, align: int) -> tuple[np.ndarray, np.ndarray]:
    """Return bin and column of each size; bins are numbered as they are opened.

    Rows are kept by the room they have left; bit r of `rooms` says that some row has room r, so
    the tightest fit is the lowest set bit from `size` on.
    """
    bins, columns = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
    open_rows: dict[int, list[int]] = {}
    rooms = opened = 0
    for i, size in enumerate(sizes):
        fits = rooms >> size
        if fits:
            room = size + (fits & -fits).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            row, room = opened, context
            opened += 1
        bins[i], columns[i] = row, context - room
        left = room - -(-size // align) * align
        if left > 0:
            open_rows.setdefault(left, []).append(row)
            rooms |= 1 << left
    return bins, columns


def render(plan: Plan, rows: Int[np.ndarray, "B"], read: Read, *, eos: int, pad: int) -> Batch:
    """Write out the rows with these numbers; row -1 is a row of padding.

    Returns tokens, targets, weights (1 where a target counts), segment_ids (0 = padding) and
    positions, each [B, T].
    """
    shape = (len(rows), plan.context)
    tokens, targets = np.full(shape, pad, np.int32), np.full(shape, pad, np.int32)
    weights = np.zeros(shape, np.float32)
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for b, row in enumerate(rows):
        if row < 0:
            continue
        begin = plan.first[row]
        for piece in range(begin, plan.first[row + 1]):
            n, column = int(plan.length[piece]), int(plan.column[piece])
            sequence = _sequence(plan, piece, read, eos)
            if len(sequence) != n + 1:
                raise ValueError(
                    f"document {plan.document[piece]} is shorter than when the plan was made; "
                    "the data changed under the run"
                )
            span = slice(column, column + n)
            tokens[b, span], targets[b, span] = sequence[:-1], sequence[1:]
            weights[b, span] = 1.0
            segment_ids[b, span] = piece - begin + 1
            positions[b, span] = np.arange(n, dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": weights,
        "segment_ids": segment_ids,
        "positions": positions,
    }


def _sequence(plan: Plan, piece: int, read: Read, eos: int) -> np.ndarray:
    """Return the inputs of a piece and its last target: [eos] d_1 .. d_n [eos] from `start` on."""
    start, stop = int(plan.start[piece]), int(plan.start[piece] + plan.length[piece])
    ends = bool(plan.ends[piece])
    inner = read(int(plan.document[piece]), max(start - 1, 0), stop - ends)
    begins = start == 0
    sequence = np.full(begins + len(inner) + ends, eos, np.int32)
    sequence[begins : begins + len(inner)] = inner
    return sequence
