"""Pipelines: from a data config to batches, the same ones again after a restart.

All rows of an epoch are planned before training (`packing.Plan`), so the pipeline holds no buffer:
batch k of a run is a function of k, and the state is k. Grain shuffles row numbers by seed and
epoch, batches them and reads ahead in threads. Each process writes out its own share of the rows.
"""

import dataclasses
import difflib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from memjax.data.corpus import load_corpus
from memjax.data.packing import Batch, make_plan, render
from memjax.data.sources import open_source
from memjax.data.tokenizers import Tokenizer, make_tokenizer

SPLITS = ("train", "validation")

_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a config's `data` section may hold.

    Args:
      source: "stdlib", a file, folder or glob, .gz too, or "hf:name".
      validation_source: where validation text comes from; None splits the source.
      validation_fraction: share of the source that is held out otherwise.
      tokenizer: "byte", or the path of a tokenizer json.
      align: documents start at multiples of this in a row; None leaves it to the caller.
      separator: cut files into documents at this text; None: one document a file.
      column: of a Hugging Face data set, where its text is.
      subset: of a Hugging Face data set.
      errors: "strict", or "replace" for text that is not UTF-8.
      cache: folder to keep tokens and unpacked files in; None keeps them in memory.
    """

    source: str = "stdlib"
    validation_source: str | None = None
    validation_fraction: float = 0.05
    tokenizer: str = "byte"
    align: int | None = None
    separator: str | None = None
    column: str = "text"
    subset: str | None = None
    errors: str = "strict"
    cache: str | None = None

    @classmethod
    def from_dict(cls, config: Any) -> "DataConfig":
        """Check a mapping or an ml_collections.ConfigDict; unknown keys raise, naming the nearest.

        Raises ValueError.
        """
        config = dict(config)
        known = {field.name for field in dataclasses.fields(cls)}
        for key in config:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
                hint = f"did you mean {' or '.join(near)}?" if near else f"known: {sorted(known)}"
                raise ValueError(f"unknown data config key {key!r}; {hint}")
        if not isinstance(config.get("align"), int | None):
            raise ValueError(f"align must be an integer or None, got {config['align']!r}")
        self = cls(**config)
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction {self.validation_fraction} must lie between 0 and 1; "
                "to train on everything give a validation_source"
            )
        return self


def open_documents(config: Any, split: str) -> Any:
    """Return the documents of one split of a data config (`sources.Files` or `HubDocuments`)."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} must be one of {SPLITS}")
    c = DataConfig.from_dict(config)
    return open_source(
        c.source,
        split,
        validation_source=c.validation_source,
        validation_fraction=c.validation_fraction,
        separator=c.separator,
        column=c.column,
        subset=c.subset,
        folder=c.cache,
    )


def texts(config: Any, split: str = "train") -> Iterator[bytes]:
    """Yield the text of a split in blocks of up to 1 MiB, for example to train a tokenizer."""
    for *_, block in open_documents(config, split).blocks():
        yield block


class Pipeline(grain.DatasetIterator):
    """An iterator of batches (a Grain iterator) that can be saved, restored and rewound.

    Attributes:
      tokenizer: the tokenizer of the config.
      statistics: documents, bytes, tokens, rows and more of the split (`describe()` prints them).
      batches: batches in one pass.
    """

    def __init__(
        self,
        parent: grain.DatasetIterator,
        tokenizer: Tokenizer,
        identity: dict[str, int],
        statistics: dict[str, Any],
        batches: int,
    ):
        super().__init__(parent)
        self.tokenizer = tokenizer
        self.statistics = statistics
        self.batches = batches
        self._identity = identity

    def __next__(self) -> Batch:
        return next(self._parent)

    def get_state(self) -> dict[str, int]:
        """Return how many batches were taken, and what the order of the rows depends on.

        All values are ints below 2**31, the same keys always: the state can be a part of a pytree.
        It does not depend on the process, nor on how many there are.
        """
        return {"batches": int(self._parent.get_state()["next_index"]), **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue after the batches that were taken when `state` was saved.

        Raises ValueError where another corpus, seed, batch size, context or alignment would give
        other batches than those the state counts.
        """
        if set(state) != {"batches", *self._identity}:
            raise ValueError(
                f"not the state of a data pipeline: it has keys {sorted(state)}, not "
                f"{sorted({'batches', *self._identity})}"
            )
        other = {k: (int(state[k]), v) for k, v in self._identity.items() if int(state[k]) != v}
        if other:
            listed = ", ".join(self._changed(name, *values) for name, values in other.items())
            raise ValueError(
                f"the data are not those that the state was saved with: {listed}. Give the data "
                "config and files of the checkpoint to go on from it, or begin anew in another "
                "--workdir"
            )
        self._parent.set_state({"next_index": int(state["batches"])})

    def _changed(self, name: str, was: int, now: int) -> str:
        """One entry of the identity in words: two of them are checksums, which say nothing."""
        s = self.statistics
        if name == "corpus":
            return (
                f"the documents of {s['source']!r} were others (now {s['documents']:,} of "
                f"{s['bytes']:,} bytes)"
            )
        if name == "tokenizer":
            return f"the tokenizer was another one (now {s['tokenizer']})"
        return f"{name} was {was}, is {now}"

    def reset(self) -> None:
        """Go back to the first batch, for one more pass."""
        self._parent.set_state({"next_index": 0})

    def describe(self) -> str:
        """Return one line with the figures of the split."""
        s = self.statistics
        return (
            f"{s['source']} {s['split']}: {s['documents']:,} documents, {s['bytes']:,} bytes, "
            f"{s['tokens']:,} tokens ({s['tokenizer']}, vocabulary {s['vocab']:,}), "
            f"{s['rows']:,} rows of {s['context']:,}, {s['padding']:.1%} padding"
        )


def make_pipeline(
    config: Any,
    *,
    split: str,
    batch: int,
    context: int,
    seed: int = 0,
    align: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    rows: int | None = None,
) -> Pipeline:
    """Return the batches of one split: without end for "train", one pass for "validation".

    Process p of n gets rows [p b, (p + 1) b) of every global batch, b = batch / n: put together
    in the order of the processes, the shares are the batch that a single process would get.
    Validation rows come in a fixed mixed order that does not depend on the seed; the last batch is
    filled up with rows of padding (weights 0), so that all batches have one shape.

    Args:
      config: the `data` section, a mapping with the keys of `DataConfig`.
      split: "train" or "validation".
      batch: rows of a batch over all processes.
      context: tokens of a row.
      seed: of the order of the training rows, which is another one in each epoch.
      align: documents start at multiples of this in a row, unless the config says otherwise.
      process_index, process_count: `jax.process_index()`, `jax.process_count()`.
      rows: validation only: take this many rows (the first of the mixed order), None = all.

    Raises:
      ValueError, FileNotFoundError: a bad argument, config or source, with the remedy.
    """
    if not 0 <= process_index < process_count or batch < 1 or batch % process_count:
        raise ValueError(
            f"batch {batch} must be a positive multiple of process_count {process_count}, and "
            f"process_index {process_index} below it"
        )
    if rows is not None and (split == "train" or rows < 1):
        raise ValueError(f"rows {rows} must be positive, and is for validation only, not {split!r}")
    c = DataConfig.from_dict(config)
    documents = open_documents(config, split)
    tokenizer = make_tokenizer(c.tokenizer)
    corpus = load_corpus(documents, tokenizer, errors=c.errors, cache=c.cache)
    align = align if c.align is None else c.align
    plan = make_plan(corpus.lengths, context, align)
    if split == "train" and plan.targets < context:
        raise ValueError(
            f"the train split of {c.source!r} has {plan.targets} tokens, fewer than the context "
            f"{context}; give more text or a smaller context"
        )

    # Only row numbers are shuffled and batched; each process then writes out its share.
    numbers = grain.MapDataset.range(plan.rows)
    if split == "train":
        # Not repeat(): its length is the largest index, and batch() of it overflows.
        numbers = numbers.seed(seed % 2**32).shuffle().repeat(2**30)
        taken = plan.rows
    else:
        numbers = numbers.seed(0).shuffle()
        taken = min(rows or plan.rows, plan.rows)
        numbers = numbers[:taken]
    share = batch // process_count

    def write(global_rows: np.ndarray) -> Batch:
        mine = global_rows[process_index * share : (process_index + 1) * share]
        mine = np.pad(mine, (0, share - len(mine)), constant_values=-1)
        return render(plan, mine, corpus.read, eos=tokenizer.eos, pad=tokenizer.pad)

    iterator = iter(numbers.batch(batch).map(write).to_iter_dataset(_AHEAD))
    statistics = {
        "source": c.validation_source or c.source if split == "validation" else c.source,
        "split": split,
        "tokenizer": tokenizer.name,
        "vocab": tokenizer.vocab,
        "documents": len(corpus.lengths),
        "bytes": corpus.size,
        "tokens": plan.targets,
        "context": context,
        "rows": plan.rows,
        "padding": 1 - plan.targets / (plan.rows * context),
    }
    identity = {
        "batch": batch,
        "context": context,
        "align": align,
        "seed": seed % 2**31,
        "tokenizer": zlib.crc32(tokenizer.name.encode()) & 0x7FFFFFFF,
        "corpus": corpus.fingerprint(),
    }
    return Pipeline(iterator, tokenizer, identity, statistics, -(-taken // batch))
