"""Sources: which documents are in which split, read exactly, and errors that say what to do."""

import gzip
import os
import sys
import sysconfig

import numpy as np
import pytest

from memjax.data import sources
from memjax.data.sources import open_source

SPLITS = ("train", "validation")


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(folder)


def read_all(documents):
    """The documents, by blocks and by direct reads: both must give the same."""
    texts = [b""] * len(documents)
    for document, _, _, block in documents.blocks():
        texts[document] += block
    if isinstance(documents, sources.Files):
        assert texts == [documents.read(i, 0, int(n)) for i, n in enumerate(documents.sizes)]
    return texts


def both(source, **options):
    return [read_all(open_source(source, split, **options)) for split in SPLITS]


def many(count=40):
    return {
        f"{'sub/' if i % 3 else ''}file{i:02}.txt": f"document {i}\n" * (i + 1)
        for i in range(count)
    }


def check_split(parts, expected):
    assert sorted(parts[0] + parts[1]) == sorted(expected)
    assert not set(parts[0]) & set(parts[1])


def test_folder_is_split_by_file(tmp_path):
    files = many()
    parts = both(write(tmp_path, files), validation_fraction=0.3)
    expected = [text.encode() for text in files.values()]
    check_split(parts, expected)
    assert 3 <= len(parts[1]) <= 25
    with pytest.raises(AssertionError):
        check_split([parts[0], parts[1] + parts[0][:1]], expected)
    with pytest.raises(AssertionError):
        check_split([parts[0][1:], parts[1]], expected)


def test_split_is_stable_when_files_are_added(tmp_path):
    source = write(tmp_path, many(20))
    before = both(source, validation_fraction=0.3)
    write(tmp_path, {f"more{i}": f"more {i}" for i in range(20)})
    after = both(source, validation_fraction=0.3)
    assert set(before[0]) < set(after[0])
    assert set(before[1]) < set(after[1])


def test_neither_split_of_two_files_is_empty(tmp_path):
    source = write(tmp_path, {"a": "aaa", "b": "bbb"})
    for fraction in (1e-6, 1 - 1e-6):
        check_split(both(source, validation_fraction=fraction), [b"aaa", b"bbb"])


def test_order_does_not_depend_on_the_folder(tmp_path):
    files = many()
    one = both(write(tmp_path / "one", files))
    two = both(write(tmp_path / "two", dict(reversed(files.items()))))
    assert one == two


def test_hidden_files_are_left_out_and_empty_ones_skipped(tmp_path):
    source = write(tmp_path, {"a": "aa", "b": "bb", "empty": "", ".hidden": "h", ".git/x": "x"})
    check_split(both(source), [b"aa", b"bb"])


def test_glob(tmp_path):
    write(tmp_path, many() | {"note.md": "not this"})
    parts = both(str(tmp_path / "**" / "*.txt"))
    check_split(parts, [text.encode() for text in many().values()])
    # Names are relative to the fixed part, so the split is the folder's.
    os.remove(tmp_path / "note.md")
    assert parts == both(str(tmp_path))


def test_single_file_is_cut_at_a_line(tmp_path):
    lines = [f"line {i}\n".encode() for i in range(1000)]
    train, validation = both(
        write(tmp_path, {"f": b"".join(lines)}) + "/f", validation_fraction=0.1
    )
    assert train[0] + validation[0] == b"".join(lines)
    assert train[0].endswith(b"\n")
    assert 0.08 < len(validation[0]) / len(b"".join(lines)) <= 0.1


@pytest.mark.parametrize("shift", range(4))
def test_single_file_without_lines_is_cut_at_a_character(tmp_path, shift):
    text = ("x" * shift + "記憶🧠" * 50).encode()
    train, validation = both(write(tmp_path, {"f": text}) + "/f", validation_fraction=0.5)
    assert train[0] + validation[0] == text
    train[0].decode()
    validation[0].decode()


def test_separator(tmp_path):
    text = "<|end|>one<|end|>two two<|end|><|end|>three\nthree<|end|>four"
    source = write(tmp_path, {"f": text}) + "/f"
    train, validation = both(source, separator="<|end|>", validation_fraction=0.2)
    assert train == [b"one", b"two two", b"three\nthree"]
    assert validation == [b"four"]
    whole = both(source, validation_source=source)
    assert whole == [[text.encode()]] * 2


def test_validation_source(tmp_path):
    source = write(tmp_path / "a", many())
    held_out = write(tmp_path / "b", {"v": "held out"}) + "/v"
    train, validation = both(source, validation_source=held_out)
    assert len(train) == 40
    assert validation == [b"held out"]


def test_gz_is_unpacked_and_cleaned_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.tempfile, "tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    text = "".join(f"line {i}\n" for i in range(500)).encode()
    plain = write(tmp_path / "plain", {"f.txt": text}) + "/f.txt"
    packed = write(tmp_path / "packed", {"f.txt.gz": gzip.compress(text)}) + "/f.txt.gz"
    assert both(packed) == both(plain)
    folder = write(
        tmp_path / "folder", {"a.gz": gzip.compress(text), "b": "b", "c.gz": gzip.compress(b"")}
    )
    check_split(both(folder, validation_fraction=0.4), [text, b"b"])
    assert os.listdir(tmp_path / "temp") == []


def test_gz_is_kept_in_a_folder(tmp_path):
    packed = write(tmp_path / "p", {"f.gz": gzip.compress(b"one\ntwo\n" * 50)}) + "/f.gz"
    first = both(packed, folder=str(tmp_path / "cache"))
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes().replace(b"two", b"TWO"))  # seen: the copy is what is read
    assert b"TWO" in both(packed, folder=str(tmp_path / "cache"))[0][0]
    assert b"TWO" not in first[0][0]


def test_blocks_are_whole_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 16)
    texts = ["記憶" * 20, "a line\n" * 9 + "🧠" * 9, "x" * 50, "é"]
    source = write(tmp_path, {f"f{i}": text for i, text in enumerate(texts)})
    documents = open_source(source, "train", validation_source=source)
    assert read_all(documents) == [text.encode() for text in texts]
    blocks = [block for *_, block in documents.blocks()]
    assert max(map(len, blocks)) <= 16
    for block in blocks:
        block.decode()
    offsets = [(document, at) for document, _, at, _ in documents.blocks()]
    assert len(set(offsets)) == len(offsets) > 4


def test_stdlib():
    train, validation = (open_source("stdlib", split) for split in SPLITS)
    names = [set(d.names) for d in (train, validation)]
    assert not names[0] & names[1]
    assert {"argparse.py", "json/decoder.py", "os.py"} <= names[0] | names[1]
    parts = {part for name in names[0] | names[1] for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert all(name.endswith(".py") for name in names[0] | names[1])
    assert train.names == sorted(train.names)
    sizes = [int(d.sizes.sum()) for d in (train, validation)]
    assert sum(sizes) > 5_000_000
    assert 0.02 < sizes[1] / sum(sizes) < 0.25
    root = sysconfig.get_paths()["stdlib"]
    with open(os.path.join(root, validation.names[3]), "rb") as f:
        assert validation.read(3, 0, int(validation.sizes[3])) == f.read()


def test_stdlib_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"no \.py files.*installed with its sources"):
        open_source("stdlib", "train")


def test_missing_and_empty(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "one").write_text("x")
    cases = {
        "nowhere.txt": (FileNotFoundError, r"nowhere\.txt.*does not exist; give a local file"),
        "*.md": (FileNotFoundError, r"\*\.md' matches no file"),
        "folder": (FileNotFoundError, "folder .*folder' has no files"),
        "empty.txt": (ValueError, r"empty\.txt' is empty: 1 file\(s\) of 0 bytes"),
        "empty.gz": (ValueError, r"empty\.gz' is empty"),
        "one": (ValueError, r"the train split of .*one' is empty; give more text"),
    }
    for name, (error, message) in cases.items():
        with pytest.raises(error, match=message):
            open_source(str(tmp_path / name), "train")
    with pytest.raises(ValueError, match='separator "" is empty'):
        open_source(str(tmp_path / "one"), "train", separator="")


def test_broken_gz(tmp_path):
    good = gzip.compress(b"text " * 1000)
    for name, data in (("cut.gz", good[:-12]), ("text.gz", b"not packed")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}' cannot be unpacked.*truncated or no gzip"):
            open_source(str(tmp_path / name), "train", folder=str(tmp_path / "cache"))
    assert not any((tmp_path / "cache").iterdir())


def test_file_that_shrinks_under_a_run(tmp_path):
    source = write(tmp_path, {"f": "line\n" * 100}) + "/f"
    documents = open_source(source, "train")
    os.truncate(source, 100)
    with pytest.raises(ValueError, match="'f' became shorter while in use"):
        documents.read(0, 50, 200)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


TEXTS = [f"text {i} 記憶\n" * (i % 5) for i in range(200)]  # every fifth is empty


def test_hub_single_split(hub, tmp_path):
    hub.Dataset.from_dict({"text": TEXTS, "n": list(range(200))}).save_to_disk(tmp_path / "set")
    parts = both(f"hf:{tmp_path / 'set'}", validation_fraction=0.2)
    assert sorted(parts[0] + parts[1]) == sorted(t.encode() for t in TEXTS)
    assert 25 <= len(parts[1]) <= 55
    assert parts == both(f"hf:{tmp_path / 'set'}", validation_fraction=0.2)


def test_hub_own_splits(hub, tmp_path):
    sets = {"train": TEXTS[:150], "test": TEXTS[150:]}
    hub.DatasetDict({k: hub.Dataset.from_dict({"body": v}) for k, v in sets.items()}).save_to_disk(
        tmp_path / "set"
    )
    parts = both(f"hf:{tmp_path / 'set'}", column="body")
    assert parts == [[t.encode() for t in sets[k]] for k in ("train", "test")]
    with pytest.raises(
        ValueError, match=r"no column 'text'; set data\.column to one of \['body'\]"
    ):
        open_source(f"hf:{tmp_path / 'set'}", "train")


def test_hub_folder_of_json(hub, tmp_path):
    write(tmp_path, {"set/train.jsonl": "".join(f'{{"text": "line {i}"}}\n' for i in range(9))})
    parts = both(f"hf:{tmp_path / 'set'}", validation_fraction=0.3)
    check_split(parts, [f"line {i}".encode() for i in range(9)])


def test_hub_long_documents_come_in_blocks(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 16)
    hub.Dataset.from_dict({"text": ["記憶" * 30, "b"]}).save_to_disk(tmp_path / "set")
    source = f"hf:{tmp_path / 'set'}"
    documents = open_source(source, "train", validation_source=source)
    assert read_all(documents) == [("記憶" * 30).encode(), b"b"]
    assert max(len(block) for *_, block in documents.blocks()) <= 16


def test_hub_bad_sets(hub, tmp_path):
    with pytest.raises(ValueError, match=r"nothing.*cannot be opened"):
        open_source(f"hf:{tmp_path / 'nothing'}", "train")
    hub.Dataset.from_dict({"text": [1, 2]}).save_to_disk(tmp_path / "numbers")
    source = f"hf:{tmp_path / 'numbers'}"
    with pytest.raises(ValueError, match="row 0: column 'text' holds int, not text"):
        read_all(open_source(source, "train", validation_source=source))


def test_hub_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "memjax\[text\]"'):
        open_source("hf:anything", "train")


def test_sizes_are_known_without_reading(tmp_path):
    documents = open_source(write(tmp_path, many(3)), "train")
    assert documents.sizes.dtype == np.int64
    assert len(documents) == len(documents.sizes) == 2
