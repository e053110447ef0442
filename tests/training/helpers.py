"""Tiny runs: a corpus of a few kilobytes, a model of a few thousand parameters."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memjax.training import run as run_lib
from memjax.training import state as state_lib
from memjax.training.arrays import flatten
from memjax.training.checkpoint import Checkpoints

MODEL = {
    "pattern": ("transformer",),
    "dim": 16,
    "layers": 1,
    "heads": 2,
    "hidden": 16,
    "context": 16,
    "dtype": "float32",
}
TRAIN = {
    "steps": 6,
    "batch": 4,
    "warmup": 2,
    "lr": 3e-3,
    "log_every": 2,
    "evaluate_every": None,
    "checkpoint_every": 100,
    "progress": False,
}


def write_corpus(folder):
    """Ten small files with different words, so that batches differ."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    words = ["memory", "chunk", "surprise", "token", "gate", "state", "learn", "forget"]
    for i in range(10):
        text = " ".join(rng.choice(words, size=60 + 7 * i))
        (folder / f"{i}.txt").write_text(text)
    return folder


def config(corpus, **sections):
    """A configuration on that corpus; `train={...}` and so on override single fields."""
    values = {
        "model": copy.deepcopy(MODEL),
        "data": {"source": str(corpus), "validation_fraction": 0.3},
        "train": dict(TRAIN),
        "evaluate": {"batches": 2},
        "mesh": {"data": 1},
        "seed": 3,
    }
    for name, fields in sections.items():
        values[name] = {**values[name], **fields} if isinstance(fields, dict) else fields
    return values


def noisy_forward(model, batch, key):
    """A loss that depends on the step's key, as with dropout."""
    logits, _ = model(
        batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"]
    )
    return logits + 0.1 * jax.random.normal(key, logits.shape), {}


class Bigram(nnx.Module):
    """A model that can be computed by hand: the logits are rows of one table."""

    def __init__(self, table):
        self.table = nnx.Param(table, axes=("vocab", "embed"))

    def __call__(self, tokens, state=None, *, segment_ids=None, positions=None):
        return self.table[...][tokens], ()


def table_forward(model, batch, key):
    logits, _ = model(batch["tokens"])
    return logits, {}


def leaves(tree):
    """All arrays of a tree by name, as NumPy; random keys as their integers."""
    return {name: np.asarray(x) for name, x in flatten(tree).items()}


def assert_same(a, b):
    """Two trees are equal, bit for bit."""
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def differs(a, b):
    """The names of the arrays that are not equal."""
    a, b = leaves(a), leaves(b)
    return [name for name in a if not np.array_equal(a[name], b[name])]


DATA = {"batches": 7, "seed": 3, "corpus": 2**31 - 1}


@functools.cache
def make_run(corpus):
    """The parts of the tiny run, made once."""
    return run_lib.build(config(corpus))


def open_checkpoints(run, folder, keep=3):
    return Checkpoints(str(folder), identity=run.identity, config=run.config, keep=keep)


@functools.cache
def _start(run_corpus, seed):
    run = make_run(run_corpus)
    return state_lib.start(run.make_model, run.optimizer, run.mesh, jax.random.key(seed))


def start(corpus, seed=0, step=0):
    """A new state that is told to be at some step."""
    state = jax.tree.map(jnp.copy, _start(corpus, seed))
    return state._replace(step=jax.device_put(jnp.int32(step), state.step.sharding))
