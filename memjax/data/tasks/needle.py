"""A needle in a text: RULER's single-needle retrieval, S-NIAH 1 to 3, over any text."""

import dataclasses
import functools
import itertools
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np

from memjax.data.pipeline import texts
from memjax.data.tasks.task import TaskBatch, at_least
from memjax.data.tokenizers import Tokenizer, make_tokenizer
from memjax.typing import Key

HAYSTACKS = ("noise", "text")
VALUES = ("number", "uuid")

# The wording is RULER's for one needle and one value.
_HEAD = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it."
    " I will quiz you about the {kind} afterwards."
)
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic {kind}s for {name} is: {value}."
_QUESTION = (
    "\nWhat is the special magic {kind} for {name} mentioned in the provided text?"
    " The special magic {kind} for {name} mentioned in the provided text is"
)
_FIRST = [
    "amber", "ancient", "bold", "brisk", "calm", "clever", "copper", "crimson", "curious",
    "distant", "eager", "early", "faint", "fierce", "frozen", "gentle", "golden", "hidden",
    "hollow", "humble", "jolly", "lively", "lucky", "mellow", "narrow", "patient", "proud", "quiet",
    "rapid", "silver", "tidy", "vivid",
]  # fmt: skip
_SECOND = [
    "anchor", "badger", "barrel", "beacon", "bridge", "button", "candle", "castle", "cedar",
    "comet", "dragon", "engine", "falcon", "feather", "forest", "garden", "harbor", "hammer",
    "island", "kettle", "ladder", "lantern", "meadow", "mirror", "needle", "orchard", "pebble",
    "pepper", "rocket", "saddle", "teapot", "willow",
]  # fmt: skip

_TEXT_BYTES = 1 << 20
_SENTENCE = 200  # characters


@dataclasses.dataclass(frozen=True)
class NeedleInText:
    """One sentence of a long text holds a value; at the end of the row it is asked for.

        eos  head  s_1 s_2 ... needle ... s_n  question  answer  pad ...
        targets: the tokens of the answer, predicted one by one from the right ones before

    with `One of the special magic numbers for <name> is: <value>.` as the needle and `... The
    special magic number for <name> mentioned in the provided text is` as the end of the question.
    As many sentences are taken as fit in the row; the needle stands before any of them, or after
    the last, with equal chance. A row counts as solved when all its scored positions are right,
    which is when greedy decoding begins with the answer (`evaluation.recall` calls it `exact`).

    Names are an adjective and a noun (1024 of them), numbers have 7 digits, uuids are of version 4.
    Pieces (head, sentences, needle, question, answer) are tokenized one by one, each with the space
    or line end before it, so that lengths add up; the space before the answer is scored with it.

    A batch is put together by NumPy on the host, since tokenizers run there: inside jit this is a
    `jax.pure_callback`, which the key alone decides. Each batch crosses over from the host once.

    Args:
      length: T.
      haystack: "noise" (one sentence group repeated) or "text" (of `source`).
      value: "number" or "uuid".
      source: where text comes from, as in `memjax.data.DataConfig`; its first MiB is used. Each row
        begins at a sentence drawn anew and goes on from the first one after the last.
      split: "train" or "validation" of that source.
      tokenizer: "byte", or the path of a tokenizer json.

    Raises:
      ValueError: an unknown `haystack` or `value`, a length that holds no sentence beside the
        question (the message says which would); what `memjax.data.texts` raises.

    Source: RULER, arXiv:2404.06654 (NIAH single 1: noise and number, 2: text and number, 3: text
    and uuid). Its texts are essays that are to be downloaded and begin at their first word each
    time; it draws one of 40 depths, and its names from longer lists.
    """

    length: int = 1024
    haystack: str = "noise"
    value: str = "number"
    source: str = "stdlib"
    split: str = "train"
    tokenizer: str = "byte"

    def __post_init__(self):
        at_least(self, length=1)
        for field, valid in (("haystack", HAYSTACKS), ("value", VALUES)):
            if getattr(self, field) not in valid:
                raise ValueError(
                    f"NeedleInText: {field} must be one of {valid}, got {getattr(self, field)!r}"
                )
        tokens = _tokenizer(self.tokenizer)
        longest = max(len(s) for s in self._sentences.pieces)
        name = f"{max(_FIRST, key=len)}-{max(_SECOND, key=len)}"
        value = self._draw_value(np.random.default_rng(0))
        least = longest + sum(map(len, self._around(tokens, name, value)))
        if self.length < least:
            raise ValueError(
                f"NeedleInText: length {self.length} does not hold the needle, the question and a"
                f" sentence; make it at least {least}"
            )

    @property
    def vocabulary(self) -> int:
        """That of the tokenizer."""
        return _tokenizer(self.tokenizer).vocab

    @property
    def scored(self) -> int:
        """The bytes of the answer, of which a token takes one at least."""
        return 1 + {"number": 7, "uuid": 36}[self.value]

    def batch(self, key: Key, size: int) -> TaskBatch:
        """`size` rows, a pure function of the key.

        Args:
          key: random key.
          size: B.

        Returns:
          tokens, targets and weights, each [B, T].
        """
        shape = (size, self.length)
        shapes = TaskBatch(
            jax.ShapeDtypeStruct(shape, jnp.int32),
            jax.ShapeDtypeStruct(shape, jnp.int32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        )
        seed = jax.random.bits(key, (4,), jnp.uint32)
        return jax.pure_callback(lambda seed: self._write(np.asarray(seed), size), shapes, seed)

    def _write(self, seed: np.ndarray, size: int) -> TaskBatch:
        tokenizer = _tokenizer(self.tokenizer)
        rng = np.random.default_rng(seed)
        tokens = np.full((size, self.length), tokenizer.pad, np.int32)
        targets = np.zeros((size, self.length), np.int32)
        weights = np.zeros((size, self.length), np.float32)
        for b in range(size):
            row, answer = self._row(rng, tokenizer)
            inputs, stop = row[:-1], len(row) - 1
            tokens[b, :stop] = inputs
            targets[b, stop - answer : stop] = row[-answer:]
            weights[b, stop - answer : stop] = 1.0
        return TaskBatch(tokens, targets, weights)

    def _row(self, rng: np.random.Generator, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
        """The tokens of a row, the last of the answer included, and how many the answer has."""
        name = f"{_FIRST[rng.integers(len(_FIRST))]}-{_SECOND[rng.integers(len(_SECOND))]}"
        head, needle, question, answer = self._around(tokenizer, name, self._draw_value(rng))
        # The last token of the answer is a target only.
        room = self.length + 1 - sum(map(len, (head, needle, question, answer)))
        hay = self._sentences.take(int(rng.integers(len(self._sentences.pieces))), room)
        hay.insert(int(rng.integers(len(hay) + 1)), needle)
        return np.concatenate([head, *hay, question, answer]), len(answer)

    def _around(self, tokenizer: Tokenizer, name: str, value: str) -> list[np.ndarray]:
        """Head (with eos before it), needle, question and answer as tokens."""
        words = {"kind": self.value, "name": name, "value": value}
        before = _SEPARATORS[self.haystack]
        pieces = [_HEAD, before + _NEEDLE, _QUESTION, " {value}"]
        head, *others = (tokenizer.encode(piece.format(**words)) for piece in pieces)
        return [np.concatenate([[tokenizer.eos], head]).astype(np.int32), *others]

    def _draw_value(self, rng: np.random.Generator) -> str:
        if self.value == "number":
            return str(rng.integers(10**6, 10**7))
        digits = list(rng.bytes(16).hex())
        digits[12], digits[16] = "4", "89ab"[rng.integers(4)]
        cuts = [0, 8, 12, 16, 20, 32]
        return "-".join("".join(digits[a:b]) for a, b in itertools.pairwise(cuts))

    @property
    def _sentences(self) -> "_Sentences":
        if self.haystack == "noise":
            return _noise(self.tokenizer)
        return _text(self.source, self.split, self.tokenizer)


_SEPARATORS = {"noise": "\n", "text": " "}


@dataclasses.dataclass(frozen=True)
class _Sentences:
    """The sentences of a haystack as tokens, each with its separator before it."""

    pieces: list[np.ndarray]

    def take(self, first: int, room: int) -> list[np.ndarray]:
        """As many as fit in `room` tokens, from number `first` on, round and round."""
        taken, at = [], first
        while len(self.pieces[at]) <= room:
            taken.append(self.pieces[at])
            room -= len(self.pieces[at])
            at = (at + 1) % len(self.pieces)
        return taken


@functools.lru_cache(maxsize=8)
def _tokenizer(name: str) -> Tokenizer:
    return make_tokenizer(name)


@functools.lru_cache(maxsize=8)
def _noise(tokenizer: str) -> _Sentences:
    return _Sentences([_tokenizer(tokenizer).encode(_SEPARATORS["noise"] + _NOISE)])


@functools.lru_cache(maxsize=8)
def _text(source: str, split: str, tokenizer: str) -> _Sentences:
    """The sentences of the first MiB of a source, each in single spaces.

    They end at `.`, `!` or `?`, and after 200 characters: code and tables have no sentences.
    """
    blocks, size = [], 0
    for block in texts({"source": source}, split):
        blocks.append(block)
        size += len(block)
        if size >= _TEXT_BYTES:
            break
    text = b"\n".join(blocks)[:_TEXT_BYTES].decode("utf-8", errors="replace")
    encode = _tokenizer(tokenizer).encode
    pieces = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        words = " ".join(sentence.split())
        for piece in textwrap.wrap(words, _SENTENCE, break_on_hyphens=False):
            pieces.append(encode(_SEPARATORS["text"] + piece))
    if not pieces:
        raise ValueError(f"NeedleInText: the {split} split of {source!r} has no words; give text")
    return _Sentences(pieces)
