"""Sampling from a language model: prefill in chunks, then token by token in constant memory."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memjax.models.language_model import LanguageModel, LanguageModelState
from memjax.typing import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn; the arguments of `generate`."""

    temperature: float
    top_k: int | None
    top_p: float | None


GREEDY = Sampling(0.0, None, None)


def generate(
    model: LanguageModel,
    prompt: Int[Array, "B T"],
    *,
    length: int,
    key: Key | None = None,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    prefill_chunk: int = 512,
) -> Iterator[Int[Array, "B"]]:
    """Streams `length` tokens that continue the prompt.

        for token in generate(model, prompt, length=100, key=jax.random.key(0)): ...

    The state has one size throughout. The prompt is read in chunks of `prefill_chunk` and one
    shorter rest, so that memory does not grow with it. The same key gives the same tokens, whatever
    the chunk (up to rounding).

    Args:
        model: to sample from.
        prompt: [B, T] token ids, T of at least 1.
        length: number of tokens.
        key: of the random draws; not needed at temperature 0.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among the k most likely tokens only.
        top_p: draw among the fewest most likely tokens whose probabilities sum to p or more.
        prefill_chunk: tokens of the prompt read at once.

    Returns:
        An iterator over [B] arrays, one token of every row at a time. Stopping early costs nothing.

    Raises:
        ValueError: an argument out of range, or token ids that the model does not have.
    """
    vocab = model.config.vocab
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 2 or 0 in prompt.shape or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(
            "prompt must be integers [batch, time] with at least one token, got"
            f" {prompt.dtype}{list(prompt.shape)}"
        )
    if int(prompt.min()) < 0 or int(prompt.max()) >= vocab:
        raise ValueError(
            f"prompt has token ids from {int(prompt.min())} to {int(prompt.max())}, but the model's"
            f" vocabulary is 0 to {vocab - 1}; use the tokenizer that it was trained with"
        )
    if length < 0 or prefill_chunk < 1:
        raise ValueError(
            f"length {length} must be at least 0 and prefill_chunk {prefill_chunk} at least 1"
        )
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocab:
        raise ValueError(f"top_k must be from 1 to the vocabulary's {vocab}, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if key is None:
        if temperature > 0:
            raise ValueError("sampling needs a key, such as jax.random.key(0); or temperature=0")
        key = jax.random.key(0)
    sampling = Sampling(float(temperature), top_k, None if top_p is None else float(top_p))
    return _stream(model, prompt, length, key, sampling, prefill_chunk)


def sample(model: LanguageModel, prompt: Int[Array, "B T"], **options: Any) -> Int[Array, "B N"]:
    """The tokens that `generate` streams, as one [B, length] array; arguments as there."""
    tokens = list(generate(model, prompt, **options))
    if not tokens:
        return jnp.zeros((prompt.shape[0], 0), prompt.dtype)
    return jnp.stack(tokens, axis=1)


def _stream(
    model: LanguageModel,
    prompt: Array,
    length: int,
    key: Key,
    sampling: Sampling,
    chunk: int,
) -> Iterator[Array]:
    if length == 0:
        return
    graphdef, values = nnx.split(model)
    # `prefill` takes the state over, and parts of a fresh one may share a buffer
    state = jax.tree.map(jnp.copy, model.start(prompt.shape[0]))
    logits, state = prefill(graphdef, values, state, prompt, chunk)
    token = _pick(logits, jax.random.fold_in(key, 0), sampling).astype(prompt.dtype)
    yield token
    for n in range(1, length):
        token, state = step(graphdef, values, state, token, jax.random.fold_in(key, n), sampling)
        yield token


def prefill(
    graphdef: nnx.GraphDef,
    values: Any,
    state: LanguageModelState,
    tokens: Int[Array, "B T"],
    chunk: int,
) -> tuple[Float[Array, "B Q"], LanguageModelState]:
    """Reads tokens into a state, chunk by chunk.

    Args:
        graphdef, values: `nnx.split(model)`.
        state: to start from; its buffers are used up.
        tokens: [B, T] of any length T of at least 1.
        chunk: tokens read at once; the last chunk may be shorter.

    Returns:
        (logits [B, Q] of the token after the last one, state).
    """
    for begin in range(0, tokens.shape[1], chunk):
        logits, state = _read(graphdef, values, state, tokens[:, begin : begin + chunk])
    return logits, state


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(graphdef, values, state, tokens):
    model = nnx.merge(graphdef, values)
    x, state = model.hidden(tokens, state)
    return model.head(x[:, -1]), state


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
def step(
    graphdef: nnx.GraphDef,
    values: Any,
    state: LanguageModelState,
    token: Int[Array, "B"],
    key: Key,
    sampling: Sampling,
) -> tuple[Int[Array, "B"], LanguageModelState]:
    """One token of every row: the whole of what `generate` runs for it.

    Args:
        graphdef, values: `nnx.split(model)`.
        state: of the tokens before; its buffers are used up.
        token: [B], the last one.
        key: of the draw.
        sampling: how to draw.

    Returns:
        (the next token [B], state).
    """
    model = nnx.merge(graphdef, values)
    logits, state = model(token[:, None], state)
    return _pick(logits[:, 0], key, sampling).astype(token.dtype), state


@functools.partial(jax.jit, static_argnums=2)
def _pick(logits, key, sampling):
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)  # a tiny temperature stays finite
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        before = jnp.pad(before[:, :-1], ((0, 0), (1, 0)))
        # a token stays while those above it do not reach p; the first always does
        least = jnp.min(
            jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True
        )
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1)
