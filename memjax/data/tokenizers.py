"""Tokenizers: bytes as they are, and byte-level BPE from a json file."""

import codecs
import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from memjax.typing import Int

VOCAB_MULTIPLE = 128
"""Vocabularies are rounded up to this, so that embeddings fill TPU lanes and divide over a mesh."""

_EOS_NAMES = ("<|eos|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_PAD = "<|pad|>"


@runtime_checkable
class Tokenizer(Protocol):
    """What the pipelines, the evaluation and the sampler need of a tokenizer."""

    name: str  # says which tokenizer it is; two that encode differently differ in name
    vocab: int  # number of ids, rounded up to a multiple of 128
    eos: int  # starts and ends every document
    pad: int
    byte_lengths: np.ndarray  # [vocab]: bytes each token stands for; 0 for specials and unused ids

    def encode(self, text: bytes | str) -> np.ndarray: ...

    def decode_bytes(self, ids: Any) -> bytes: ...

    def decode(self, ids: Any) -> str: ...


class ByteTokenizer:
    """Bytes as tokens: ids 0 to 255 are the bytes, 256 pads, 257 starts and ends a document.

    `vocab` is 384 (258 rounded up); the ids from 258 on are unused.
    """

    name = "byte"
    pad = 256
    eos = 257
    vocab = 3 * VOCAB_MULTIPLE

    def __init__(self):
        self.byte_lengths = np.zeros(self.vocab, np.int32)
        self.byte_lengths[:256] = 1

    def encode(self, text: bytes | str) -> Int[np.ndarray, "T"]:
        """Return the bytes of `text` (a str as UTF-8) as int32 ids, without specials."""
        text = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Any) -> bytes:
        """Return the bytes that `ids` stand for; specials and unused ids are dropped."""
        ids = _checked(ids, self.vocab)
        return ids[ids < 256].astype(np.uint8).tobytes()

    def decode(self, ids: Any) -> str:
        """Return the text of `ids`; what is not UTF-8 becomes U+FFFD, nothing raises."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class BPETokenizer:
    """Byte-level BPE through the `tokenizers` package, from a json file or trained on local text.

    Needs `pip install "memjax[text]"`. Files of other makers work when they are byte-level
    (GPT-2, Llama 3, Qwen): every token is a string of bytes. A normaliser in the file (NFC in
    Qwen's) is applied, and then decoding returns the normalised text.
    """

    def __init__(self, tokenizer: Any):
        spec = json.loads(tokenizer.to_str())
        if not _has_byte_level(spec.get("decoder")):
            raise ValueError(
                "the tokenizer is not byte-level (its decoder is not ByteLevel), so the bytes of a "
                "token are unknown; use a byte-level BPE, for example BPETokenizer.train(...)"
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # A document that contains the text "<|eos|>" must not contain the special token.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        added = {t["id"]: (t["content"], t["special"]) for t in spec["added_tokens"]}
        ids = {content: id_ for id_, (content, _) in added.items()}
        eos = next((ids[name] for name in _EOS_NAMES if name in ids), None)
        if eos is None:
            raise ValueError(
                f"the tokenizer has no end-of-document token: none of {', '.join(_EOS_NAMES)} is "
                f"among its added tokens {sorted(ids)}; add one to the json"
            )
        self.eos = eos
        self.pad = ids.get(_PAD, eos)
        table = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab = -(-(max(table.values()) + 1) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        byte_of = _byte_of_character()
        self._bytes = [b""] * self.vocab
        for token, id_ in table.items():
            if id_ not in added:
                self._bytes[id_] = bytes(byte_of[c] for c in token)
            elif not added[id_][1]:
                self._bytes[id_] = token.encode("utf-8")
        self.byte_lengths = np.array([len(b) for b in self._bytes], np.int32)
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
        self.name = f"bpe-{len(table)}-{digest[:8]}"

    @classmethod
    def train(cls, texts: Iterable[bytes | str], vocab: int) -> "BPETokenizer":
        """Train on `texts` up to `vocab` tokens in all (256 bytes and two specials among them)."""
        tokenizers = _package()
        if vocab < 258:
            raise ValueError(f"vocab {vocab} must be at least 258: the 256 bytes, pad and eos")
        from tokenizers import decoders, models, pre_tokenizers, trainers

        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[_PAD, _EOS_NAMES[0]],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator((_text(t, "replace") for t in texts), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BPETokenizer":
        """Read a tokenizer json (ours or any byte-level one).

        Raises FileNotFoundError, or ValueError for a file that is no byte-level tokenizer.
        """
        tokenizers = _package()
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f'tokenizer {os.fspath(path)!r} is not a file; give "byte" or a tokenizer json '
                "(make one with memjax.data.BPETokenizer.train(texts, vocab).save(path))"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{os.fspath(path)!r} is not a tokenizer json: {error}") from error
        return cls(tokenizer)

    def save(self, path: str | os.PathLike) -> None:
        """Write the json that `load` reads."""
        self._tokenizer.save(os.fspath(path))

    def encode(self, text: bytes | str) -> Int[np.ndarray, "T"]:
        """Return the int32 ids of `text`, without specials.

        Raises ValueError for bytes that are not UTF-8, naming the offset.
        """
        return self.encode_batch([_text(text, "strict")])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Encode several texts on all cores."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encoded]

    def decode_bytes(self, ids: Any) -> bytes:
        """Return the bytes that `ids` stand for; specials and unused ids are dropped."""
        return b"".join(self._bytes[i] for i in _checked(ids, self.vocab))

    def decode(self, ids: Any) -> str:
        """Return the text of `ids`; what is not UTF-8 becomes U+FFFD, nothing raises."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class StreamDecoder:
    """Turns ids that come one at a time into text, holding back characters that are not complete.

    `"".join(push(i) for i in ids) + flush()` is `tokenizer.decode(ids)`.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Any) -> str:
        """Return the text that `ids` (one or several) complete; may be empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """End the text: an incomplete character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


def make_tokenizer(spec: str) -> ByteTokenizer | BPETokenizer:
    """Return the tokenizer that a config names: "byte", or the path of a tokenizer json."""
    return ByteTokenizer() if spec == "byte" else BPETokenizer.load(spec)


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            'BPE needs the package "tokenizers": pip install "memjax[text]"'
        ) from error
    return tokenizers


def _text(text: bytes | str, errors: str) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8", errors=errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start} (0x{text[error.start]:02x}) is not UTF-8: {error.reason}; "
            'convert the text, or use ByteTokenizer ("byte"), which takes any bytes'
        ) from error


def _checked(ids: Any, vocab: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.size == 0:
        return np.zeros(0, np.int32)
    if ids.min() < 0 or ids.max() >= vocab:
        bad = ids.max() if ids.max() >= vocab else ids.min()
        raise ValueError(f"token id {bad} is outside the vocabulary [0, {vocab})")
    return ids.reshape(-1)


def _has_byte_level(decoder: dict | None) -> bool:
    if decoder is None:
        return False
    return decoder["type"] == "ByteLevel" or any(map(_has_byte_level, decoder.get("decoders", [])))


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes a byte as a visible character: itself, or the next one from U+0100."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {c: ord(c) for c in alphabet if ord(c) < 256}
    others = sorted(set(range(256)) - set(table.values()))
    return table | dict(zip((c for c in alphabet if ord(c) >= 256), others, strict=True))
