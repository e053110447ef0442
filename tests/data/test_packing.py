"""Packing: nothing lost, nothing twice, and the layout that the models rely on."""

import itertools
from collections import Counter

import numpy as np
import pytest

from memjax.data import make_plan, render
from memjax.data.packing import _best_fit

EOS, PAD = -2, -1


def documents(lengths):
    """Documents of unique tokens, so that a pair of neighbours says where it comes from."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)]


def pack(docs, context, align=1, rows=None):
    plan = make_plan(np.array([len(d) for d in docs], np.int64), context, align)
    rows = np.arange(plan.rows) if rows is None else rows
    return plan, render(plan, rows, lambda d, a, b: docs[d][a:b], eos=EOS, pad=PAD)


def pieces(batch):
    """Yield (row, column, tokens, targets, positions, weights, segment) of each segment."""
    for b, ids in enumerate(batch["segment_ids"]):
        for segment in range(1, ids.max(initial=0) + 1):
            at = np.flatnonzero(ids == segment)
            assert len(at), "segments of a row are numbered 1, 2, ... without a gap"
            assert at[-1] - at[0] + 1 == len(at), "a segment is contiguous"
            yield (
                at[0],
                *(batch[k][b, at] for k in ("tokens", "targets", "positions", "weights")),
            )


def check_contents(batch, docs):
    """Every token and every end of a document is predicted exactly once, from its predecessor."""
    counted = batch["weights"] == 1
    assert np.isin(batch["weights"], [0, 1]).all()
    pairs = zip(batch["tokens"][counted], batch["targets"][counted], strict=True)
    expected = Counter()
    for d in docs:
        sequence = [EOS, *d.tolist(), EOS]
        expected.update(itertools.pairwise(sequence))
    assert Counter((int(a), int(b)) for a, b in pairs) == expected


def check_layout(batch, context, align):
    for column, tokens, targets, positions, weights in pieces(batch):
        assert column % align == 0
        np.testing.assert_array_equal(tokens[1:], targets[:-1])
        np.testing.assert_array_equal(positions, np.arange(len(tokens)))
        assert (weights == 1).all()
        assert (tokens[1:] != EOS).all(), "a document begins only at the start of a segment"
    padding = batch["segment_ids"] == 0
    assert (batch["weights"][padding] == 0).all()
    assert (batch["tokens"][padding] == PAD).all()
    assert (batch["targets"][padding] == PAD).all()
    assert (batch["positions"][padding] == 0).all()
    first = batch["segment_ids"][:, 0]
    assert (first == 1).all()


@pytest.mark.parametrize("context", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("align", [1, 2, 5, 16, 100])
def test_contents_and_layout(context, align):
    rng = np.random.default_rng(context * 101 + align)
    lengths = [0, 0, 1, context - 1, context, context + 1, 3 * context - 1, 3 * context]
    docs = documents(rng.permutation([*lengths, *rng.integers(0, 60, 40)]))
    plan, batch = pack(docs, context, align)
    assert plan.targets == sum(len(d) + 1 for d in docs)
    check_contents(batch, docs)
    check_layout(batch, context, align)
    # Only the last piece of a document is shorter than the context.
    assert len(list(pieces(batch))) == sum(-(-(len(d) + 1) // context) for d in docs)
    assert {k: v.dtype for k, v in batch.items()} == {
        "tokens": np.int32,
        "targets": np.int32,
        "weights": np.float32,
        "segment_ids": np.int32,
        "positions": np.int32,
    }


def test_contents_check_sees_faults():
    docs = documents([5, 20, 0, 9])
    _, batch = pack(docs, 8)

    def fault(key, change):
        broken = batch | {key: batch[key].copy()}
        change(broken[key])
        with pytest.raises(AssertionError):
            check_contents(broken, docs)

    fault("weights", lambda w: w.__setitem__((0, 0), 0))  # lost
    fault("targets", lambda t: t.__setitem__((0, 1), t[0, 2]))  # wrong
    fault("tokens", lambda t: t.__setitem__(slice(None), np.roll(t, 1, axis=1)))  # shifted
    twice = {k: np.concatenate([v, v[:1]]) for k, v in batch.items()}
    with pytest.raises(AssertionError):
        check_contents(twice, docs)


def test_layout_check_sees_faults():
    docs = documents([5, 20, 0, 9, 3, 3])
    _, batch = pack(docs, 16, 4)
    check_layout(batch, 16, 4)
    _, unaligned = pack(docs, 16, 1)
    with pytest.raises(AssertionError):
        check_layout(unaligned, 16, 4)
    with pytest.raises(AssertionError):
        check_layout(batch | {"positions": batch["positions"] + 1}, 16, 4)


def naive_best_fit(sizes, context, align):
    rows = []  # room left; among equals the row that came to this room last
    result = []
    for time, size in enumerate(sizes):
        fitting = [(room, -since, row) for row, (room, since) in enumerate(rows) if room >= size]
        if fitting:
            room, _, row = min(fitting)
        else:
            row, room = len(rows), context
            rows.append(None)
        result.append((row, context - room))
        start = context - room + size
        rows[row] = (context - (start + (-start) % align), time)
    return result


@pytest.mark.parametrize("align", [1, 3, 8])
def test_best_fit_is_the_naive_one(align):
    rng = np.random.default_rng(align)
    sizes = sorted(rng.integers(1, 40, 300).tolist(), reverse=True)
    bins, columns = _best_fit(sizes, 50, align)
    assert list(zip(bins.tolist(), columns.tolist(), strict=True)) == naive_best_fit(
        sizes, 50, align
    )
    other, _ = _best_fit(sizes, 51, align)
    assert other.tolist() != bins.tolist()


def test_rows_are_well_filled():
    lengths = np.random.default_rng(0).integers(1, 300, 2000)
    plan = make_plan(lengths, 256)
    assert plan.targets / (plan.rows * 256) > 0.97


def test_rows_in_any_order_and_padding_rows():
    docs = documents([30, 4, 4, 11])
    plan, batch = pack(docs, 8)
    order = np.array([plan.rows - 1, -1, 0])
    _, picked = pack(docs, 8, rows=order)
    for key, value in batch.items():
        np.testing.assert_array_equal(picked[key][[0, 2]], value[[plan.rows - 1, 0]])
    assert (picked["weights"][1] == 0).all()
    assert (picked["tokens"][1] == PAD).all()
    assert (picked["segment_ids"][1] == 0).all()


def test_no_documents():
    plan = make_plan(np.zeros(0, np.int64), 8)
    assert plan.rows == plan.targets == 0


def test_bad_arguments():
    for context, align in ((0, 1), (8, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            make_plan(np.array([3]), context, align)


def test_documents_that_shrink():
    docs = documents([30, 4])
    plan = make_plan(np.array([30, 4]), 8)
    with pytest.raises(ValueError, match="shorter than when the plan was made"):
        render(plan, np.arange(plan.rows), lambda d, a, b: docs[d][:20][a:b], eos=EOS, pad=PAD)
