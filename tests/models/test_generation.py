"""Generation: streams what the model says, whatever the chunks, at constant size."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.models import generate, sample
from memjax.models.generation import Sampling, _pick
from tests.models.toys import call, model_of, tokens_of

MIXERS = ("toy_average", "transformer", "swa")


def greedy(model, prompt, length):
    """The whole sequence anew for every token, padded to one length: causal, so exact."""
    run, time = call(model), prompt.shape[1]
    row = jnp.pad(prompt, ((0, 0), (0, length)))
    for n in range(length):
        logits, _ = run(row)
        row = row.at[:, time + n].set(jnp.argmax(logits[:, time + n - 1], axis=-1))
    return np.asarray(row[:, time:])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_greedy_is_the_whole_forward(mixer, chunk):
    model, prompt = model_of(pattern=(mixer,)), tokens_of(time=7)
    tokens = sample(model, prompt, length=6, temperature=0, prefill_chunk=chunk)
    np.testing.assert_array_equal(tokens, greedy(model, prompt, 6))
    assert tokens.dtype == prompt.dtype


def test_the_prompt_matters():
    model = model_of()
    a = sample(model, tokens_of(time=7), length=6, temperature=0)
    b = sample(model, tokens_of(time=7, seed=1), length=6, temperature=0)
    assert (a != b).any()


def test_key_decides():
    model, prompt = model_of(), tokens_of(time=5)
    draw = lambda seed, **o: sample(model, prompt, length=8, key=jax.random.key(seed), **o)  # noqa: E731
    np.testing.assert_array_equal(draw(0), draw(0, prefill_chunk=2))
    assert (draw(0) != draw(1)).any()


def test_every_token_of_every_row_is_drawn_anew():
    model = model_of()
    model.embedding[...] = jnp.zeros_like(model.embedding[...])  # all tokens equally likely
    tokens = np.asarray(sample(model, tokens_of(time=5), length=12, key=jax.random.key(0)))
    assert min(len(set(row)) for row in tokens) > 6
    assert (tokens[0] != tokens[1]).any()


def test_streams_one_by_one():
    model, prompt = model_of(), tokens_of(time=5)
    stream = generate(model, prompt, length=10**9, temperature=0)
    first = list(itertools.islice(stream, 4))
    assert [token.shape for token in first] == [(2,)] * 4
    whole = sample(model, prompt, length=4, temperature=0)
    np.testing.assert_array_equal(jnp.stack(first, 1), whole)
    assert sample(model, prompt, length=0, temperature=0).shape == (2, 0)


def test_parameters_survive():
    model, prompt = model_of(pattern=("transformer",)), tokens_of(time=5)
    before = model(prompt)[0]
    sample(model, prompt, length=3, temperature=0)
    np.testing.assert_array_equal(model(prompt)[0], before)


LOGITS = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]))


def drawn(temperature=1.0, top_k=None, top_p=None, draws=2000):
    """Frequency of each token, [B, Q]."""
    sampling = Sampling(temperature, top_k, top_p)
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = jax.vmap(lambda key: _pick(LOGITS, key, sampling))(keys)
    return jnp.mean(jax.nn.one_hot(tokens, 4), axis=0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.685, 0.247, 0.062, 0.007]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, [0.526, 0.316, 0.158, 0]),
        ({"top_p": 0.1}, [1, 0, 0, 0]),
        ({"top_p": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
    ],
)
def test_distribution(options, expected):
    frequency = drawn(**options)
    np.testing.assert_allclose(frequency[0], expected, atol=0.04)
    np.testing.assert_allclose(frequency[1], expected[::-1], atol=0.04)
    np.testing.assert_array_equal(frequency[0] == 0, np.asarray(expected) == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sampling needs a key"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_k": 33}, "top_k must be from 1 to the vocabulary's 32, got 33"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"length": -1}, "length -1 must be at least 0"),
        ({"prefill_chunk": 0}, "prefill_chunk 0 at least 1"),
    ],
)
def test_bad_options_fail_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        generate(model_of(), tokens_of(), **({"length": 1} | options))


def test_bad_prompts():
    model = model_of()
    with pytest.raises(ValueError, match="ids from 3 to 99, but the model's vocabulary is 0 to 31"):
        generate(model, jnp.asarray([[3, 99]]), length=1, temperature=0)
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, jnp.zeros((1, 0), jnp.int32), length=1, temperature=0)
