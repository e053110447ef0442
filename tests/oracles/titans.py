"""Titans' layer and blocks: one row, one document, one token at a time, in float64 NumPy.

Every function takes one document [T, E]; `by_document` applies it to packed rows, and so says what
a document in a row is: the document alone. The memory itself is `tests.oracles.miras`.

Source: Titans (arXiv:2501.00663), sections 3.3 and 4.1 to 4.4, read as docs/deviations.md says.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests.attention import oracle as attention_oracle
from tests.oracles import miras as engine

EPSILON = 1e-6


@dataclass(frozen=True)
class Memory:
    """Parameters of the memory layer; sizes: dim E, heads H, head D, convolution width C."""

    query: np.ndarray  # [E, H, D], as key, value and gate
    key: np.ndarray
    value: np.ndarray
    gate: np.ndarray
    out: np.ndarray  # [H, D, E]
    norm: np.ndarray  # [D]
    convs: tuple  # of query, key and value, each [C, H * D]; () for none
    lr: tuple  # weight [E, H] and offset [H]
    momentum: tuple | None
    retain: tuple | None
    fast: list  # W_0, each [H, in, out]
    slow: dict  # each [H, D]
    persistent: np.ndarray | None  # [P, E]
    lr_max: float
    rule: engine.Rule
    threshold: tuple | None = None  # weight [E, H] and offset [H]
    window: tuple | None = None  # weight [E, H, c] and offset [H, c]


@dataclass(frozen=True)
class Attention:
    """Parameters of attention; without rotation, windows and persistent tokens where None."""

    query: np.ndarray  # [E, H, D], as key and value
    key: np.ndarray
    value: np.ndarray
    output: np.ndarray  # [H, D, E]
    persistent: np.ndarray | None  # [P, E]
    base: float
    window: int | None = None


@dataclass(frozen=True)
class Context:
    """Parameters of memory as context."""

    memory: Memory
    attention: Attention
    segment: int
    combine: tuple  # way, scale of attention's norm [E], scale of the memory's norm [E]


@dataclass(frozen=True)
class Running:
    """A memory in the middle of a document: inputs of its convolutions so far, and its weights."""

    inputs: tuple  # for query, key and value: [t, H * D]
    state: engine.State


def by_document(function, x, ids=None):
    """Applies `function` to each document of each row of x [B, T, E]."""
    y = np.zeros(x.shape)
    for b, row in enumerate(x):
        cuts = [] if ids is None else [t for t in range(1, len(row)) if ids[b, t] != ids[b, t - 1]]
        for begin, end in zip([0, *cuts], [*cuts, len(row)], strict=True):
            y[b, begin:end] = function(row[begin:end])
    return y


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def silu(z):
    return z * sigmoid(z)


def unit(z):
    return z / np.sqrt((z**2).sum(-1, keepdims=True) + EPSILON**2)


def rms_norm(z, scale):
    return z / np.sqrt((z**2).mean(-1, keepdims=True) + EPSILON) * scale


def heads_of(x, weight):
    return np.einsum("te,ehd->thd", x, weight)


def begin(p: Memory) -> Running:
    """Before the first token of a document: the persistent tokens are read, the chunk is new."""
    size = p.query.shape[1] * p.query.shape[2]
    state = engine.start(p.rule, p.fast, p.slow, 1, key=p.query.shape[2])
    still = Running((np.zeros((0, size)),) * 3, state)
    if p.persistent is None:
        return still
    read = write(p, still, p.persistent)[1].state
    read = replace(read, base=[w.copy() for w in read.weights], place=np.zeros(1, np.int64))
    return replace(still, state=read)


def queries_keys_values(p: Memory, running: Running, x):
    """q, k, v of x [T, E], each [T, H, D], and the inputs of the convolutions so far."""
    shape = (len(x), *p.query.shape[1:])
    outputs, inputs = [], []
    for i, weight in enumerate((p.query, p.key, p.value)):
        z = heads_of(x, weight).reshape(len(x), -1)
        past = np.concatenate([running.inputs[i], z])
        inputs.append(past)
        if p.convs:
            z = np.zeros_like(z)
            for t in range(len(x)):
                at = len(past) - len(x) + t
                for s in range(min(len(p.convs[i]), at + 1)):
                    z[t] += p.convs[i][s] * past[at - s]
        outputs.append(silu(z).reshape(shape))
    q, k, v = outputs
    return (unit(q), unit(k), v), tuple(inputs)


def read_and_write(p: Memory, running: Running, x):
    """Answers [T, H, D], losses [T, H] and what runs on, token by token over x [T, E]."""
    (q, k, v), inputs = queries_keys_values(p, running, x)

    def gate(pair, most=1.0, bound=sigmoid):
        return None if pair is None else most * bound(np.tensordot(x, pair[0], 1) + pair[1])[None]

    gates = engine.Gates(
        gate(p.lr, p.lr_max),
        gate(p.momentum),
        gate(p.retain),
        threshold=gate(p.threshold, bound=lambda z: np.logaddexp(0, z)),
        window=gate(p.window),
    )
    m, loss, state = engine.run(p.rule, running.state, q[None], k[None], v[None], gates)
    return m[0], loss[0], Running(inputs, state)


def write(p: Memory, running: Running, x):
    """What the memory answers to x [T, E] as it learns it, [T, H, D], and what runs on."""
    m, _, running = read_and_write(p, running, x)
    return m, running


def losses(p: Memory, running: Running, x):
    """The surprise of each token, [T, H]."""
    return read_and_write(p, running, x)[1]


def answer(p: Memory, m, x):
    """(RMSNorm(m) * SiLU(x W_g)) W_o"""
    gated = rms_norm(m, p.norm) * silu(heads_of(x, p.gate))
    return np.einsum("thd,hde->te", gated, p.out)


def recall(p: Memory, running: Running, x):
    """RMSNorm(M(q)) W_o for every token of x, nothing written; q without convolution."""
    q = unit(silu(heads_of(x, p.query)))
    m = engine.read(p.rule, running.state, q[None])[0]
    return np.einsum("thd,hde->te", rms_norm(m, p.norm), p.out)


def neural_memory(p: Memory, x):
    """The memory alone: LMM."""
    return answer(p, write(p, begin(p), x)[0], x)


def rotate(z, positions, base):
    """[..., T, H, D] by the angle position * base^(-2 i / D), feature i with i + D/2."""
    half = z.shape[-1] // 2
    angle = np.asarray(positions)[:, None, None] * base ** (-np.arange(half) / half)
    first, second = z[..., :half], z[..., half:]
    return np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
        ],
        axis=-1,
    )


def window_attention(p: Attention, x):
    """Every token over the persistent tokens and the last `window` ones."""
    places = np.arange(len(x))
    q = rotate(heads_of(x, p.query), places, p.base)
    k = rotate(heads_of(x, p.key), places, p.base)
    v = heads_of(x, p.value)
    prefix = None
    if p.persistent is not None:
        prefix = (heads_of(p.persistent, p.key), heads_of(p.persistent, p.value))
    y = attention_oracle.attend(q[None], k[None], v[None], window=p.window, prefix=prefix)[0]
    return np.einsum("thd,hde->te", y, p.output)


def combine(how, y, m):
    way, attention_scale, memory_scale = how
    y, m = rms_norm(y, attention_scale), rms_norm(m, memory_scale)
    return {"gate": y * sigmoid(m), "product": y * silu(m), "sum": y + m}[way]


def memory_as_context(p: Context, x, seen_ahead=0):
    """MAC: equations 21 to 25. `seen_ahead` tokens too many are recalled (a fault to plant)."""
    outputs, running = [], begin(p.memory)
    for start in range(0, len(x), p.segment):
        own = x[start : start + p.segment]
        h = recall(p.memory, running, own)
        y = np.stack(
            [
                attend_in_context(p.attention, own, h, t, start, min(t + seen_ahead, len(own) - 1))
                for t in range(len(own))
            ]
        )
        m, running = write(p.memory, running, y)
        outputs.append(combine(p.combine, y, answer(p.memory, m, y)))
    return np.concatenate(outputs)


def attend_in_context(p: Attention, own, h, t, start, last):
    """Token t of a segment over [persistent | h up to `last` | its segment up to itself]."""
    sources = [] if p.persistent is None else [(p.persistent, np.zeros(len(p.persistent)))]
    sources += [
        (h[: last + 1], start + np.arange(last + 1)),
        (own[: t + 1], start + np.arange(t + 1)),
    ]
    tokens = np.concatenate([source for source, _ in sources])
    places = np.concatenate([place for _, place in sources])
    q = rotate(heads_of(own[t : t + 1], p.query), [start + t], p.base)[0]
    k, v = rotate(heads_of(tokens, p.key), places, p.base), heads_of(tokens, p.value)
    y = np.zeros(q.shape)
    for head in range(len(q)):
        score = k[:, head] @ q[head] / np.sqrt(q.shape[-1])
        weight = np.exp(score - score.max())
        y[head] = weight @ v[:, head] / weight.sum()
    return np.einsum("hd,hde->e", y, p.output)


def memory_as_gate(attention: Attention, memory: Memory, how: Any, x):
    """MAG: equations 26 to 28."""
    return combine(how, window_attention(attention, x), neural_memory(memory, x))


def memory_as_layer(attention: Attention, memory: Memory, scale, x):
    """MAL: equations 29 to 31, m + SWA(RMSNorm(m))."""
    m = neural_memory(memory, x)
    return m + window_attention(attention, rms_norm(m, scale))
