"""Cases, inputs and checks of the ops whose tokens change a matrix affinely, and their oracle."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import Blocks
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.delta_rule import reference as delta_reference
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.linear_attention import reference as linear_reference

OPS = {"delta_rule": delta_rule, "linear_attention": linear_attention}
REFERENCES = {
    "delta_rule": delta_reference.delta_rule,
    "linear_attention": linear_reference.linear_attention,
}


class Case(NamedTuple):
    """What a check is about; `packed` = several documents a row."""

    op: str = "delta_rule"
    decay: str = "head"
    first: bool = True
    read: str = "after"
    packed: bool = False
    length: int = 45
    batch: int = 2
    heads: int = 2
    key: int = 64
    value: int = 64
    blocks: Blocks | None = Blocks(16, 2, 2)
    dtype: Any = jnp.float32
    implementation: str = "xla"
    cores: int = 1  # on which the interpreter runs the parallel grid; 0 = it is compiled
    unit_eps: float | None = None

    def __str__(self) -> str:
        words = (self.op.partition("_")[0], self.decay, "" if self.first else "late", self.read)
        sizes = (self.batch, self.length, self.heads), (self.key, self.value), self.blocks or ()
        sizes = ("x".join(str(n) for n in some if n is not None) for some in sizes)
        words += ("packed" if self.packed else "", "unit" if self.unit_eps else "")
        words += (*sizes, jnp.dtype(self.dtype).name)
        return "-".join(filter(None, (*words, self.implementation)))


class Inputs(NamedTuple):
    """Of an op; `log_decay` and `initial` may be None. What is differentiated, then documents."""

    q: Any
    k: Any
    v: Any
    lr: Any
    log_decay: Any
    state: Any
    initial: Any
    starts: Any


class Results(NamedTuple):
    """Of an op; `loss` is None where it has none."""

    y: Any
    loss: Any
    state: Any


def inputs(case: Case, seed: int = 0) -> Inputs:
    """Random: unit keys, unless the op makes them so, rates of 0 to 1, decays of 0.01 to 1."""
    random = np.random.default_rng(seed)
    shape = (case.batch, case.length, case.heads)

    def unit(*shape):
        x = random.normal(size=shape)
        return x / (np.sqrt(case.key / 2) if case.unit_eps else norm(x))

    channels = {"none": None, "head": (), "channel": (case.key,)}[case.decay]
    starts = random.random(shape[:2]) < 4 / case.length
    starts[0, case.length // 2] = True
    return rounded(
        case,
        Inputs(
            q=unit(*shape, case.key),
            k=unit(*shape, case.key),
            v=random.normal(size=(*shape, case.value)),
            lr=random.uniform(0, 1, shape),
            log_decay=None
            if channels is None
            else -np.exp(random.uniform(np.log(1e-3), np.log(5), (*shape, *channels))),
            state=random.normal(size=(case.batch, case.heads, case.key, case.value)),
            initial=random.normal(size=(case.heads, case.key, case.value)) if case.packed else None,
            starts=starts if case.packed else None,
        ),
    )


def norm(x):
    return np.linalg.norm(x, axis=-1, keepdims=True)


def rounded(case: Case, given: Inputs) -> Inputs:
    """Arrays of the dtypes that the op takes."""

    def to(x, dtype):
        return None if x is None else jnp.asarray(x, dtype)

    wide = (to(x, case.dtype) for x in given[:3])
    return Inputs(*wide, *(to(x, jnp.float32) for x in given[3:7]), to(given.starts, bool))


def cotangents(case: Case, seed: int = 1) -> Results:
    random = np.random.default_rng(seed)
    shape = (case.batch, case.length, case.heads)
    return Results(
        jnp.asarray(random.normal(size=(*shape, case.value)), case.dtype),
        jnp.asarray(random.normal(size=shape), jnp.float32) if has_loss(case) else None,
        jnp.asarray(
            random.normal(size=(case.batch, case.heads, case.key, case.value)), jnp.float32
        ),
    )


def has_loss(case: Case) -> bool:
    return case.op == "delta_rule"


def of_delta_rule(case: Case) -> dict[str, Any]:
    return {"decay_first": case.first, "unit_eps": case.unit_eps}


def call(case: Case, given: Inputs) -> Results:
    """The op by the implementation of the case."""
    options = {"surprise": True, **of_delta_rule(case)} if has_loss(case) else {}
    if case.implementation == "pallas" and case.cores:
        options["interpret"] = pltpu.InterpretParams(
            detect_races=True, num_cores_or_threads=case.cores
        )
    found = OPS[case.op](
        *given[:6], initial=given.initial, starts=given.starts, read=case.read,
        implementation=case.implementation, blocks=case.blocks, **options,
    )  # fmt: skip
    return Results(*found) if has_loss(case) else Results(found[0], None, found[1])


def reference(case: Case, given: Inputs) -> Results:
    """`reference.py` of the op."""
    options = of_delta_rule(case) if has_loss(case) else {}
    found = REFERENCES[case.op](
        *given[:6], initial=given.initial, starts=given.starts, read=case.read, **options
    )
    return Results(*found) if has_loss(case) else Results(found[0], None, found[1])


Run = Callable[[Case, Inputs], Results]


def pulled(run: Run, case: Case, given: Inputs, by: Results) -> tuple[Results, Inputs]:
    """Results, and gradients of all inputs that have one."""
    return compiled(run, case)(given, by)


def compiled(run: Run, case: Case) -> Callable[[Inputs, Results], tuple[Results, Inputs]]:
    @jax.jit
    def both(given: Inputs, by: Results):
        found, pull = jax.vjp(lambda *x: run(case, Inputs(*x, given.starts)), *given[:7])
        return found, Inputs(*pull(by), None)

    return both


@functools.lru_cache
def expected(case: Case) -> tuple[Results, Inputs]:
    """`in_float64` of a case's random inputs."""
    return in_float64(case, inputs(case), cotangents(case))


def in_float64(case: Case, given: Inputs, by: Results) -> tuple[Results, Inputs]:
    """Results and gradients of the reference in float64, at inputs as rounded for the op."""
    with jax.enable_x64(True):
        found = pulled(reference, case, *jax.tree.map(wide, (given, by)))
        return jax.tree.map(np.asarray, found)


def wide(x):
    return jnp.asarray(np.asarray(x, bool if x.dtype == bool else np.float64))


def oracle(case: Case, given: Inputs) -> Results:
    """The equations of the ops, a token at a time, in NumPy and float64."""
    q, k, v, lr = (np.asarray(x, np.float64) for x in given[:4])
    if case.unit_eps:
        q, k = (x / np.sqrt(norm(x) ** 2 + case.unit_eps**2) for x in (q, k))
    y, losses = np.zeros(v.shape), np.zeros(lr.shape)
    last = np.array(given.state, np.float64)
    for row, head in np.ndindex(case.batch, case.heads):
        memory = last[row, head]
        for t in range(case.length):
            at = (row, t, head)
            if given.starts is not None and given.starts[row, t]:
                memory = np.asarray(given.initial[head], np.float64)
            keep = np.ones(case.key)
            if given.log_decay is not None:
                keep = keep * np.exp(np.asarray(given.log_decay[at], np.float64))
            decayed = keep[:, None] * memory
            wanted = v[at]
            if case.op == "delta_rule":
                wanted = wanted - (decayed if case.first else memory).T @ k[at]
                losses[at] = wanted @ wanted / 2
            written = decayed + lr[at] * np.outer(k[at], wanted)
            y[at] = (written if case.read == "after" else memory).T @ q[at]
            memory = written
        last[row, head] = memory
    return Results(y, losses if has_loss(case) else None, last)


def assert_close(got, want, tolerance: float, name: str = "") -> None:
    """Array by array: the largest error is at most `tolerance` of the largest value."""
    got, want = jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)
    for (path, a), b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, (name, path, a.shape, b.shape)
        error, size = np.abs(a - b).max(), np.abs(b).max()
        assert error <= tolerance * size, (
            f"{name}{jax.tree_util.keystr(path)}: off by {error:.2e}, {error / size:.2e} of the"
            f" largest; {tolerance:.2e} is allowed"
        )


def assert_zero(got, name: str = "") -> None:
    """Every number is exactly 0."""
    for path, x in jax.tree_util.tree_leaves_with_path(got):
        largest = np.abs(np.asarray(x, np.float64)).max(initial=0)
        assert largest == 0, f"{name}{jax.tree_util.keystr(path)}: {largest:.2e}"
