"""Corpora: the tokens of the documents of a source, in memory, in a cache, or left in the files."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from memjax.data.sources import Files, HubDocuments
from memjax.data.tokenizers import ByteTokenizer, Tokenizer

_FORMAT = 1
_GROUP = 16 << 20  # bytes that are tokenized together, on all cores


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens of documents: `store[offsets[d] + i]` is token i of document d.

    With the byte tokenizer on plain files `store` is the files themselves, which are read piece by
    piece and never held; otherwise it is one array, in memory or mapped from the cache.
    """

    store: np.ndarray | Files
    lengths: np.ndarray  # [D] tokens of each document, without specials
    offsets: np.ndarray  # [D]
    size: int  # bytes of the documents

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of a document."""
        if isinstance(self.store, Files):
            return np.frombuffer(self.store.read(document, start, stop), np.uint8)
        at = int(self.offsets[document])
        return self.store[at + start : at + stop]

    def fingerprint(self) -> int:
        """A number below 2**31 that another corpus is unlikely to have.

        It is made of all lengths and of the first tokens of up to 1024 documents.
        """
        value = zlib.crc32(np.ascontiguousarray(self.lengths, np.int64).tobytes())
        count = len(self.lengths)
        for document in range(0, count, max(1, -(-count // 1024))):
            head = self.read(document, 0, min(256, int(self.lengths[document])))
            value = zlib.crc32(np.ascontiguousarray(head, np.int64).tobytes(), value)
        return value & 0x7FFFFFFF


def load_corpus(
    source: Files | HubDocuments,
    tokenizer: Tokenizer,
    *,
    errors: str = "strict",
    cache: str | None = None,
) -> Corpus:
    """Tokenize the documents of a source.

    Args:
      source: the documents.
      tokenizer: a byte tokenizer leaves plain files where they are; any other is run over all.
      errors: "strict", or "replace" to turn bytes that are not UTF-8 into U+FFFD (no matter for
        the byte tokenizer, which takes any bytes).
      cache: folder in which tokens are kept and mapped from; None = in memory.

    Raises:
      ValueError: text that is not UTF-8 (file and byte offset), an unknown `errors`.
    """
    if errors not in ("strict", "replace"):
        raise ValueError(f'errors {errors!r} must be "strict" or "replace"')
    if isinstance(source, Files) and isinstance(tokenizer, ByteTokenizer):
        sizes = source.sizes
        return Corpus(source, sizes, np.zeros(0, np.int64), int(sizes.sum()))
    dtype = np.dtype(_smallest(tokenizer))
    if cache is None:
        tokens = io.BytesIO()
        lengths, size = _tokenize(source, tokenizer, errors, dtype, tokens.write)
        return _corpus(np.frombuffer(tokens.getbuffer(), dtype), lengths, size)

    key = [_FORMAT, tokenizer.name, errors, source.identity()]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    folder = os.path.join(os.path.expanduser(cache), f"tokens-{digest[:20]}")
    if not os.path.isdir(folder):
        part = f"{folder}.{os.getpid()}"
        os.makedirs(part, exist_ok=True)
        try:
            with open(os.path.join(part, "tokens"), "wb") as f:
                lengths, size = _tokenize(source, tokenizer, errors, dtype, f.write)
            np.save(os.path.join(part, "lengths.npy"), np.append(lengths, size))
            os.replace(part, folder)
        except OSError:
            if not os.path.isdir(folder):  # else another process was first, with the same tokens
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    saved = np.load(os.path.join(folder, "lengths.npy"))
    store = np.memmap(os.path.join(folder, "tokens"), dtype, mode="r")
    return _corpus(store, saved[:-1], int(saved[-1]))


def _corpus(store: np.ndarray, lengths: np.ndarray, size: int) -> Corpus:
    return Corpus(store, lengths, np.cumsum(lengths) - lengths, size)


def _smallest(tokenizer: Tokenizer) -> type:
    """Return the smallest type that holds the ids of text (bytes are below 256)."""
    if isinstance(tokenizer, ByteTokenizer):
        return np.uint8
    return np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32


def _tokenize(
    source: Files | HubDocuments,
    tokenizer: Tokenizer,
    errors: str,
    dtype: np.dtype,
    write: Callable[[bytes], Any],
) -> tuple[np.ndarray, int]:
    """Write the tokens of all documents; return the length of each, and the bytes read."""
    lengths, size = np.zeros(len(source), np.int64), 0
    group: list[tuple[int, str, int, bytes]] = []
    waiting = 0

    def flush() -> None:
        if isinstance(tokenizer, ByteTokenizer):
            encoded = [tokenizer.encode(block) for *_, block in group]
        else:
            encoded = tokenizer.encode_batch([_text(*block, errors) for _, *block in group])
        for (document, *_), ids in zip(group, encoded, strict=True):
            write(ids.astype(dtype).tobytes())
            lengths[document] += len(ids)
        group.clear()

    for item in source.blocks():
        group.append(item)
        waiting += len(item[3])
        if waiting >= _GROUP:
            flush()
            size, waiting = size + waiting, 0
    flush()
    return lengths, size + waiting


def _text(name: str, offset: int, block: bytes, errors: str) -> str:
    try:
        return block.decode("utf-8", errors=errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: byte {offset + error.start} (0x{block[error.start]:02x}) is not UTF-8 "
            f'({error.reason}); convert the file, set data.errors="replace", or use '
            'data.tokenizer="byte", which takes any bytes'
        ) from error
