"""Pipelines: exact contents, exact resumption, sharding by host, and bad configs."""

import gzip
import json
from collections import Counter

import ml_collections
import numpy as np
import pytest

from memjax import data
from memjax.data import corpus as corpus_module
from memjax.data import sources

CONTEXT = 32


def make_files(folder, count=30):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        words = rng.choice(["memory", "surprise", "記憶", "\n", "decay "], int(rng.integers(1, 25)))
        (folder / f"{i:02}.txt").write_text(f"{i}:" + "".join(words))
    return {"source": str(folder), "validation_fraction": 0.3}


@pytest.fixture
def config(tmp_path):
    return make_files(tmp_path / "files")


@pytest.fixture
def tokenizer_json(tmp_path):
    path = tmp_path / "bpe.json"
    data.BPETokenizer.train(["memory surprise decay 記憶\n" * 20], 300).save(path)
    return str(path)


def make(config, split="train", **options):
    options = {"batch": 4, "context": CONTEXT, "seed": 0} | options
    return data.make_pipeline(config, split=split, **options)


def take(pipeline, count):
    return [next(pipeline) for _ in range(count)]


def check_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            assert batch[key].dtype == other[key].dtype
            np.testing.assert_array_equal(batch[key], other[key])


def differ(batches, others):
    return any(
        not np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(batches, others, strict=True)
    )


def pieces_of(batches, decode):
    """Count the segments of all rows by the bytes of their targets."""
    found = Counter()
    for batch in batches:
        for row in range(len(batch["tokens"])):
            ids = batch["segment_ids"][row]
            for segment in range(1, ids.max(initial=0) + 1):
                targets = batch["targets"][row][ids == segment]
                assert (batch["weights"][row][ids == segment] == 1).all()
                found[decode(targets)] += 1
    return found


def pieces_expected(texts, tokenizer, context):
    found = Counter()
    for text in texts:
        ids = [*tokenizer.encode(text).tolist(), tokenizer.eos]
        found.update(tuple(ids[i : i + context]) for i in range(0, len(ids), context))
    return found


def texts_of(config, split):
    documents = data.pipeline.open_documents(config, split)
    return [documents.read(i, 0, int(n)) for i, n in enumerate(documents.sizes)]


def ids(targets):
    return tuple(targets.tolist())


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_one_pass_holds_every_document_once(config, tokenizer_json, kind, split):
    config["tokenizer"] = "byte" if kind == "byte" else tokenizer_json
    pipeline = make(config, split, batch=1)
    batches = take(pipeline, pipeline.batches)
    expected = pieces_expected(texts_of(config, split), pipeline.tokenizer, CONTEXT)
    assert pieces_of(batches, ids) == expected
    assert pieces_of(batches[1:], ids) != expected
    text = b"".join(texts_of(config, split))
    assert pipeline.statistics["bytes"] == len(text)
    assert pipeline.statistics["rows"] == pipeline.batches == len(batches)
    counted = sum(int(b["weights"].sum()) for b in batches)
    assert pipeline.statistics["tokens"] == counted
    lengths = pipeline.tokenizer.byte_lengths
    assert sum((lengths[b["targets"]] * b["weights"]).sum() for b in batches) == len(text)
    line = pipeline.describe()
    for figure in (f"{len(text):,} bytes", f"{counted:,} tokens", f"{len(batches):,} rows"):
        assert figure in line


def test_epochs_are_shuffled_anew(config):
    pipeline = make(config, batch=1)
    epochs = [take(pipeline, pipeline.batches) for _ in range(3)]
    one, two, three = (pieces_of(epoch, ids) for epoch in epochs)
    assert one == two == three
    assert differ(epochs[0], epochs[1])
    assert differ(epochs[1], epochs[2])


def test_seed_decides_the_order(config):
    first = take(make(config, seed=5), 6)
    check_same(first, take(make(config, seed=5), 6))
    assert differ(first, take(make(config, seed=6), 6))


@pytest.mark.parametrize("taken", [0, 1, 3, 11, 40])
def test_resume_gives_the_same_batches(config, taken):
    pipeline = make(config)
    assert pipeline.batches < 40  # so that the last case is in a later epoch
    take(pipeline, taken)
    state = pipeline.get_state()
    expected = take(pipeline, 12)

    check_same(expected, resumed(config, json.loads(json.dumps(state))))
    check_same(expected, resumed(config, {k: np.asarray(v, np.int32) for k, v in state.items()}))
    pipeline.set_state(state)  # in place, with batches read ahead
    check_same(expected, take(pipeline, 12))
    assert differ(expected, resumed(config, state | {"batches": taken + 1}))


def resumed(config, state):
    pipeline = make(config)
    pipeline.set_state(state)
    assert {k: int(v) for k, v in state.items()} == pipeline.get_state()
    return take(pipeline, 12)


def test_state_is_small_ints_with_fixed_keys(config):
    pipeline = make(config, seed=2**40 + 7)
    before = pipeline.get_state()
    take(pipeline, 3)
    after = pipeline.get_state()
    assert after == before | {"batches": 3}
    assert all(type(v) is int and 0 <= v < 2**31 for v in after.values())


def test_state_of_another_order_is_refused(config, tmp_path, tokenizer_json):
    state = make(config).get_state()
    others = {
        "seed": make(config, seed=1),
        "batch": make(config, batch=2),
        "context": make(config, context=16),
        "align": make(config, align=4),
        "corpus": make(make_files(tmp_path / "other", 29)),
        "tokenizer": make(config | {"tokenizer": tokenizer_json}),
    }
    told = {
        "corpus": r"the documents of '.*other' were others \(now \d+ of [\d,]+ bytes\)",
        "tokenizer": r"the tokenizer was another one \(now .*\)",
    }
    for name, other in others.items():
        told_of = told.get(name, rf"{name} was \d+, is \d+")
        with pytest.raises(ValueError, match=rf"saved with: .*{told_of}.*checkpoint to go on"):
            other.set_state(state)
    with pytest.raises(ValueError, match="not the state of a data pipeline"):
        make(config).set_state({"next_index": 3})


def join(shares):
    return [
        {key: np.concatenate([share[key] for share in batch]) for key in batch[0]}
        for batch in zip(*shares, strict=True)
    ]


def test_state_of_another_text_of_the_same_lengths_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a memory of a memory " * 100)
    config = {"source": str(path), "validation_source": str(path), "tokenizer": "byte"}
    state = make(config).get_state()
    path.write_text("a memory of a mammal " * 100)
    with pytest.raises(ValueError, match="were others"):
        make(config).set_state(state)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_every_batch(config, split, count):
    whole = make(config, split)
    steps = whole.batches
    shares = [make(config, split, process_index=p, process_count=count) for p in range(count)]
    assert [share.batches for share in shares] == [steps] * count
    batches, parts = take(whole, steps), [take(share, steps) for share in shares]
    assert {b["tokens"].shape for part in parts for b in part} == {(4 // count, CONTEXT)}
    check_same(batches, join(parts))
    with pytest.raises(AssertionError):
        check_same(batches, join([parts[0]] * count))
    # A checkpoint of any number of processes restores on any other.
    assert all(share.get_state() == whole.get_state() for share in shares)


def test_resume_on_another_number_of_processes(config):
    pipelines = [make(config, process_index=p, process_count=2) for p in range(2)]
    for pipeline in pipelines:
        take(pipeline, 5)
    state = pipelines[0].get_state()
    whole = make(config)
    whole.set_state(state)
    check_same(take(whole, 4), join([take(pipeline, 4) for pipeline in pipelines]))


def test_validation_is_one_pass_of_constant_shape(config):
    pipeline = make(config, "validation", batch=5)
    batches = list(pipeline)
    assert len(batches) == pipeline.batches
    assert {b["tokens"].shape for b in batches} == {(5, CONTEXT)}
    rows = pipeline.statistics["rows"]
    assert rows % 5, "the case needs a last batch that is not full"
    empty = [b["weights"].sum(axis=1) == 0 for b in batches]
    assert np.concatenate(empty).tolist() == [i >= rows for i in range(5 * len(batches))]
    with pytest.raises(StopIteration):
        next(pipeline)
    pipeline.reset()
    check_same(batches, list(pipeline))
    check_same(batches, list(make(config, "validation", batch=5, seed=9)))


def test_validation_limited_to_some_rows(config):
    everything = list(make(config, "validation"))
    pipeline = make(config, "validation", rows=6)
    some = list(pipeline)
    assert len(some) == pipeline.batches == 2
    check_same(everything[:1], some[:1])
    np.testing.assert_array_equal(everything[1]["tokens"][:2], some[1]["tokens"][:2])
    assert some[1]["weights"][2:].sum() == 0
    check_same(everything, list(make(config, "validation", rows=10_000)))


def test_align_of_the_config_wins(config):
    def starts(batch):
        previous = np.pad(batch["segment_ids"][:, :-1], ((0, 0), (1, 0)))
        begins = (batch["segment_ids"] != previous) & (batch["segment_ids"] > 0)
        return np.nonzero(begins)[1]

    options = {"split": "validation", "batch": 50}
    assert (starts(next(make(config, align=8, **options))) % 8 == 0).all()
    assert (starts(next(make(config | {"align": 4}, align=8, **options))) % 4 == 0).all()
    assert (starts(next(make(config | {"align": 4}, align=8, **options))) % 8 != 0).any()


def test_gz_gives_the_batches_of_the_plain_file(tmp_path, tokenizer_json):
    text = "memory decay 記憶\n" * 200
    (tmp_path / "f.txt").write_text(text)
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(text.encode()))
    for tokenizer in ("byte", tokenizer_json):
        plain, packed = (
            make({"source": str(tmp_path / name), "tokenizer": tokenizer})
            for name in ("f.txt", "f.txt.gz")
        )
        check_same(take(plain, 5), take(packed, 5))


def test_cache_holds_the_tokens(config, tokenizer_json, tmp_path, monkeypatch):
    config |= {"tokenizer": tokenizer_json}
    expected = take(make(config), 8)
    config |= {"cache": str(tmp_path / "cache")}
    check_same(expected, take(make(config), 8))

    def again(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(corpus_module, "_tokenize", again)
    check_same(expected, take(make(config), 8))
    assert make(config).statistics == make(config).statistics
    with pytest.raises(AssertionError, match="tokenized again"):  # another split is another key
        make(config, "validation")
    (tmp_path / "files" / "07.txt").write_text("changed")
    (tmp_path / "files" / "08.txt").write_text("changed")
    for split in ("train", "validation"):
        with pytest.raises(AssertionError, match="tokenized again"):
            make(config, split)


def test_failed_tokenization_leaves_no_cache(config, tokenizer_json, tmp_path):
    (tmp_path / "files" / "bad.txt").write_bytes(b"\xff")
    config |= {"tokenizer": tokenizer_json, "cache": str(tmp_path / "cache")}
    config |= {"validation_source": config["source"]}
    with pytest.raises(ValueError, match="not UTF-8"):
        make(config)
    assert list((tmp_path / "cache").iterdir()) == []


def test_tokens_do_not_depend_on_grouping(config, tokenizer_json, monkeypatch):
    config |= {"tokenizer": tokenizer_json}
    whole = make(config)
    monkeypatch.setattr(corpus_module, "_GROUP", 50)
    grouped = make(config)
    check_same(take(whole, 8), take(grouped, 8))
    assert whole.statistics == grouped.statistics


def test_text_that_is_not_utf8(tmp_path, tokenizer_json, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 64)
    text = ("memory\n" * 30).encode()
    bad = text[:100] + b"\xe9" + text[100:]
    (tmp_path / "f.txt").write_bytes(bad)
    config = {"source": str(tmp_path / "f.txt"), "validation_source": str(tmp_path / "f.txt")}

    pipeline = make(config, batch=1)  # bytes are bytes
    batches = take(pipeline, pipeline.batches)
    assert pieces_of(batches, ids) == pieces_expected([bad], pipeline.tokenizer, CONTEXT)

    config["tokenizer"] = tokenizer_json
    with pytest.raises(ValueError, match=r'f\.txt: byte 100 \(0xe9\).*errors="replace".*"byte"'):
        make(config)
    pipeline = make(config | {"errors": "replace"}, "validation", batch=2, context=512)
    (batch,) = pipeline
    counted = batch["targets"][batch["weights"] == 1]
    assert pipeline.tokenizer.decode(counted).count("\ufffd") == 1
    assert pipeline.statistics["bytes"] == len(bad)
    with pytest.raises(ValueError, match='errors \'ignore\' must be "strict" or "replace"'):
        make(config | {"errors": "ignore"})


def test_bad_configs(config):
    cases = {
        "sorce": r"unknown data config key 'sorce'; did you mean source",
        "zzz": r"unknown data config key 'zzz'; known: \['align', 'cache'",
    }
    for key, message in cases.items():
        with pytest.raises(ValueError, match=message):
            make(config | {key: 1})
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            make(config | {"validation_fraction": fraction})
    with pytest.raises(ValueError, match=r"split 'test' must be one of \('train', 'validation'\)"):
        make(config, "test")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        make(config | {"source": "/nowhere/at/all.txt"})
    for options in (
        {"batch": 0},
        {"process_count": 3},
        {"process_count": 0},
        {"process_count": 2, "process_index": 2},
    ):
        with pytest.raises(ValueError, match="positive multiple of process_count"):
            make(config, **options)
    for split, rows in (("train", 3), ("validation", 0)):
        with pytest.raises(ValueError, match=f"rows {rows} must be positive, and is for"):
            make(config, split, rows=rows)
    with pytest.raises(ValueError, match="context 0 and align 1"):
        make(config, context=0)


def test_corpus_shorter_than_the_context(tmp_path):
    (tmp_path / "f.txt").write_text("short\n" * 20)
    config = {"source": str(tmp_path / "f.txt")}
    with pytest.raises(
        ValueError, match=r"has 1\d\d tokens, fewer than the context 512; give more"
    ):
        make(config, context=512)
    (batch,) = make(config, "validation", context=512)  # one row, mostly padding: exact
    assert batch["weights"].sum() == len("short\n") + 1


def test_ml_collections_config(config):
    check_same(take(make(ml_collections.ConfigDict(config)), 2), take(make(config), 2))


def test_texts_are_the_split(config):
    assert list(data.texts(config)) == texts_of(config, "train")
    assert list(data.texts(config, "validation")) == texts_of(config, "validation")


def test_stdlib_is_the_default():
    train, validation = (make({}, split, context=512) for split in ("train", "validation"))
    assert train.statistics["bytes"] > 5_000_000
    assert train.statistics["padding"] < 0.02
    assert "stdlib train" in train.describe()
    text = train.tokenizer.decode(np.concatenate([b["tokens"].ravel() for b in take(train, 50)]))
    assert text.count("self") > 50
    assert next(validation)["weights"].sum() > 1500
