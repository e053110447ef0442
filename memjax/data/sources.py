"""Sources: documents from the standard library, files, folders, globs, .gz and Hugging Face sets.

A source is a list of documents as bytes, read when asked for. `open_source` picks the documents of
one split: several files are split by file (a stable hash of the relative path), a single file at a
place near its end, Hugging Face data sets by their own splits or by a hash of the row number.
"""

import functools
import glob
import gzip
import hashlib
import mmap
import os
import shutil
import sysconfig
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

BLOCK = 1 << 20
"""Documents are read, checked and tokenized in blocks of at most this many bytes."""

_STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Files:
    """Documents that are stretches of files: document i is bytes [start[i], stop[i]) of a file."""

    def __init__(self, names: list[str], paths: list[str], stamps: list[tuple[int, int]]):
        self.names, self.paths = names, paths
        self.origin = [
            (os.path.abspath(path), *stamp) for path, stamp in zip(paths, stamps, strict=True)
        ]
        self.file = np.zeros(0, np.int64)
        self.start = np.zeros(0, np.int64)
        self.stop = np.zeros(0, np.int64)
        # Threads may still read from a handle that has left the cache, so handles close themselves.
        self._handle = functools.lru_cache(maxsize=128)(_Handle)

    def __len__(self) -> int:
        return len(self.file)

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each document."""
        return self.stop - self.start

    def keep(self, which: np.ndarray) -> "Files":
        """Keep the documents that `which` (indices or a mask) picks."""
        self.file, self.start, self.stop = self.file[which], self.start[which], self.stop[which]
        return self

    def read(self, document: int, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of a document."""
        path = self.paths[self.file[document]]
        begin = int(self.start[document]) + start
        data = self._handle(path).read(begin, stop - start)
        if len(data) != stop - start:
            raise ValueError(
                f"{self.names[self.file[document]]!r} became shorter while in use: {len(data)} of "
                f"{stop - start} bytes at {begin}; do not change data under a run"
            )
        return data

    def blocks(self) -> Iterator[tuple[int, str, int, bytes]]:
        """Yield (document, file name, offset in the file, block) over all documents in order."""
        for document, size in enumerate(self.sizes.tolist()):
            name, at = self.names[self.file[document]], 0
            while at < size:
                block = self.read(document, at, min(at + BLOCK, size))
                block = block[: _cut(block) if at + BLOCK < size else len(block)]
                yield document, name, int(self.start[document]) + at, block
                at += len(block)

    def identity(self) -> list:
        """What decides the content, for the key of a cache."""
        spans = np.stack([self.file, self.start, self.stop]).astype(np.int64)
        return [self.origin, zlib.crc32(spans.tobytes())]


class HubDocuments:
    """Documents that are rows of a text column of a Hugging Face data set."""

    def __init__(self, name: str, dataset: Any, column: str, rows: np.ndarray):
        self.name, self.dataset, self.column, self.rows = name, dataset, column, rows

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self) -> Iterator[tuple[int, str, int, bytes]]:
        """Yield (document, data set and row, offset, block) over all documents in order."""
        for first in range(0, len(self.rows), 1000):
            rows = self.rows[first : first + 1000]
            for i, text in enumerate(self.dataset[rows.tolist()][self.column]):
                where = f"{self.name} row {rows[i]}"
                if not isinstance(text, str):
                    raise ValueError(
                        f"{where}: column {self.column!r} holds {type(text).__name__}, not text"
                    )
                data, at = text.encode("utf-8"), 0
                while at < len(data):
                    block = data[at : at + BLOCK]
                    block = block[: _cut(block) if at + BLOCK < len(data) else len(block)]
                    yield first + i, where, at, block
                    at += len(block)

    def identity(self) -> list:
        """What decides the content, for the key of a cache."""
        return [self.dataset._fingerprint, self.column, zlib.crc32(self.rows.tobytes())]


def open_source(
    source: str,
    split: str,
    *,
    validation_source: str | None = None,
    validation_fraction: float = 0.05,
    separator: str | None = None,
    column: str = "text",
    subset: str | None = None,
    folder: str | None = None,
) -> Files | HubDocuments:
    """Return the documents of one split.

    Args:
      source: "stdlib", a file, a folder (all its files, hidden ones left out), a glob, or
        "hf:name" (a name on the hub, or a local folder). `.gz` files are unpacked.
      split: "train" or "validation".
      validation_source: where validation comes from; then `source` is for training only.
      validation_fraction: share of the source that is validation otherwise.
      separator: cut files into documents at this text, which is dropped; None = a file is one.
      column, subset: of a Hugging Face data set.
      folder: where to keep unpacked files; None = a temporary folder.

    Raises:
      FileNotFoundError, ValueError: what is missing, empty or unreadable, and the remedy.
    """
    if validation_source is not None:
        source = validation_source if split == "validation" else source
        fraction = None
    else:
        fraction = validation_fraction
    if source.startswith("hf:"):
        documents = _open_hub(source, split, fraction, column, subset)
    else:
        documents = _open_files(source, split, fraction, separator, folder)
    if not len(documents):
        remedy = "give more text" + (
            ', a validation_source, or another "validation_fraction"' if fraction else ""
        )
        raise ValueError(f"the {split} split of {source!r} is empty; {remedy}")
    return documents


def _open_files(
    source: str, split: str, fraction: float | None, separator: str | None, folder: str | None
) -> Files:
    listed = _list_files(source)
    stats = [os.stat(path) for _, path in listed]
    found = [(n, p, (s.st_size, s.st_mtime_ns)) for (n, p), s in zip(listed, stats, strict=True)]
    found = [f for f in found if f[2][0] > 0]
    if not found:
        raise ValueError(
            f"{source!r} is empty: {len(listed)} file(s) of 0 bytes; give files with text"
        )
    by_file = len(found) > 1
    if fraction and by_file:
        picked = _in_validation([name for name, _, _ in found], fraction)
        found = [f for f, v in zip(found, picked, strict=True) if v == (split == "validation")]
    files = Files(*(list(column) for column in zip(*found, strict=True)))
    _unpack(files, folder)
    _find_documents(files, separator)
    if not len(files):
        raise ValueError(f"{source!r} is empty: no text outside separators; give files with text")
    if fraction and not by_file:
        _cut_tail(files, split, fraction)
    return files


def _list_files(source: str) -> list[tuple[str, str]]:
    """Return (relative name, path) of the files of a source, sorted by name."""
    if source == "stdlib":
        root = sysconfig.get_paths()["stdlib"]
        names = [
            name
            for name in _walk(root, _STDLIB_LEFT_OUT)
            if name.endswith(".py") and not os.path.basename(name).startswith("_sysconfigdata")
        ]
        if not names:
            raise FileNotFoundError(
                f"no .py files in the standard library at {root!r}; "
                "use a Python installed with its sources, or another data source"
            )
        return [(name, os.path.join(root, name)) for name in names]
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        names = _walk(path, set())
        if not names:
            raise FileNotFoundError(f"folder {source!r} has no files; put text files there")
        return [(name, os.path.join(path, name)) for name in names]
    if os.path.isfile(path):
        return [(os.path.basename(path), path)]
    if glob.has_magic(path):
        fixed = path[: next(i for i, c in enumerate(path) if c in "*?[")]
        root = os.path.dirname(fixed) or "."
        paths = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        if not paths:
            raise FileNotFoundError(
                f"glob {source!r} matches no file; check it with ls, ** goes into sub-folders"
            )
        return [(os.path.relpath(p, root).replace(os.sep, "/"), p) for p in paths]
    raise FileNotFoundError(
        f'data source {source!r} does not exist; give a local file, folder or glob, "stdlib", or '
        '"hf:name" for a Hugging Face data set'
    )


def _walk(root: str, left_out: set[str]) -> list[str]:
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in left_out and not f.startswith(".")]
        for file in files:
            path = os.path.join(folder, file)
            if not file.startswith(".") and os.path.isfile(path):
                names.append(os.path.relpath(path, root).replace(os.sep, "/"))
    return sorted(names)


def _in_validation(names: list[str], fraction: float) -> list[bool]:
    """Pick by a hash of the name, so that adding files moves no other; neither side stays empty."""
    digests = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
    ranks = [int.from_bytes(d[:8], "big") for d in digests]
    picked = [rank < fraction * 2**64 for rank in ranks]
    if not any(picked):
        picked[ranks.index(min(ranks))] = True
    if all(picked):
        picked[ranks.index(max(ranks))] = False
    return picked


def _unpack(files: Files, folder: str | None) -> None:
    """Replace the paths of .gz files by unpacked copies, and drop files that unpack to nothing."""
    packed = [i for i, name in enumerate(files.names) if name.endswith(".gz")]
    if packed and folder is None:
        folder = tempfile.mkdtemp(prefix="memjax-data-")
        weakref.finalize(files, shutil.rmtree, folder, ignore_errors=True)
    for i in packed:
        path = files.paths[i]
        key = hashlib.sha256(repr(files.origin[i]).encode()).hexdigest()
        target = os.path.join(folder, f"unpacked-{key[:20]}")
        if not os.path.exists(target):
            os.makedirs(folder, exist_ok=True)
            part = f"{target}.{os.getpid()}"
            try:
                with gzip.open(path, "rb") as reader, open(part, "wb") as writer:
                    shutil.copyfileobj(reader, writer, BLOCK)
            except (OSError, EOFError, zlib.error) as error:
                if os.path.exists(part):
                    os.remove(part)
                raise ValueError(
                    f"{path!r} cannot be unpacked ({error}); the file is truncated or no gzip, "
                    "fetch it again or rename it"
                ) from error
            os.replace(part, target)
        files.paths[i] = target


def _find_documents(files: Files, separator: str | None) -> None:
    """Fill in the spans: whole files, or the stretches between separators; none is empty."""
    if separator is not None and not separator:
        raise ValueError('separator "" is empty; give a text, or None for one document a file')
    file, start, stop = [], [], []
    for i, path in enumerate(files.paths):
        size = os.path.getsize(path)
        bounds = [(0, size)] if separator is None or not size else _between(path, separator)
        for a, b in bounds:
            if a < b:
                file.append(i)
                start.append(a)
                stop.append(b)
    files.file, files.start, files.stop = (np.array(x, np.int64) for x in (file, start, stop))


def _between(path: str, separator: str) -> Iterator[tuple[int, int]]:
    mark, at = separator.encode("utf-8"), 0
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as text:
        while (found := text.find(mark, at)) >= 0:
            yield at, found
            at = found + len(mark)
        yield at, len(text)


def _cut_tail(files: Files, split: str, fraction: float) -> None:
    """Split a single file: its last documents, or the end of its only one, are validation."""
    train = split == "train"
    if len(files) > 1:
        end = np.cumsum(files.sizes)
        here = min(int(np.searchsorted(end, (1 - fraction) * end[-1])) + 1, len(files) - 1)
        files.keep(np.arange(len(files)) < here if train else np.arange(len(files)) >= here)
        return
    size = int(files.sizes[0])
    middle = int((1 - fraction) * size)
    text = files.read(0, middle, min(middle + BLOCK, size))
    newline = text.find(b"\n") + 1
    if not 0 < newline < len(text):  # no line ends here: cut at the start of a UTF-8 character
        newline = next((i for i, byte in enumerate(text[:4]) if byte & 0xC0 != 0x80), 0)
    here = int(files.start[0]) + middle + newline
    side = files.stop if train else files.start
    side[0] = here
    files.keep(files.sizes > 0)


def _cut(block: bytes) -> int:
    """Where to end a block within a document: after its last line, or after a whole character."""
    newline = block.rfind(b"\n") + 1
    if newline:
        return newline
    for back in range(1, min(4, len(block) - 1) + 1):
        if block[-back] & 0xC0 != 0x80:
            return len(block) - back if block[-back] >= 0xC0 else len(block)
    return len(block)


class _Handle:
    """An open file that threads share; it closes when the last of them lets go."""

    def __init__(self, path: str):
        self._descriptor = None
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, start: int, count: int) -> bytes:
        data = os.pread(self._descriptor, count, start)
        while 0 < len(data) < count:  # one pread returns at most 2 GiB
            more = os.pread(self._descriptor, count - len(data), start + len(data))
            if not more:
                break
            data += more
        return data

    def __del__(self):
        if self._descriptor is not None:
            os.close(self._descriptor)


def _open_hub(
    source: str, split: str, fraction: float | None, column: str, subset: str | None
) -> HubDocuments:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f'data source {source!r} needs the package "datasets": pip install "memjax[text]"'
        ) from error

    name = os.path.expanduser(source.removeprefix("hf:"))
    marks = ("dataset_dict.json", "state.json")
    if any(os.path.isfile(os.path.join(name, mark)) for mark in marks):
        loaded = datasets.load_from_disk(name)
    else:
        try:
            loaded = datasets.load_dataset(name, subset)
        except (OSError, ValueError) as error:  # not found, no such subset, offline
            raise ValueError(
                f"Hugging Face data set {name!r} (subset {subset!r}) cannot be opened: {error}; "
                "check the name, the subset and the network, or give a local folder"
            ) from error
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    held_out = next((s for s in ("validation", "valid", "dev", "test") if s in splits), None)
    own = split == "validation" and fraction is not None and held_out is not None
    wanted = held_out if own else "train"
    if wanted not in splits:
        raise ValueError(f"{source!r} has no split {wanted!r}, only {sorted(splits)}")
    dataset = splits[wanted]
    if column not in dataset.column_names:
        raise ValueError(
            f"{source!r} has no column {column!r}; set data.column to one of {dataset.column_names}"
        )
    dataset = dataset.select_columns([column])
    rows = np.arange(len(dataset))
    if fraction is not None and held_out is None:
        # Fibonacci hashing: rows spread evenly, and a row's side depends on its number alone.
        rank = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        picked = rank < np.uint64(fraction * 2**64)
        rows = rows[picked == (split == "validation")]
    return HubDocuments(source, dataset, column, rows)
