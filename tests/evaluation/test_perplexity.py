"""Evaluation against hand computation."""

import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from memjax import evaluation, models, sharding
from memjax.evaluation import losses, perplexity

BYTES = np.array([1, 2, 0, 3])


class Bigram(nnx.Module):
    """Logits are rows of one table; nothing else of a language model is needed here."""

    def __init__(self, table):
        self.table = nnx.Param(jnp.asarray(table, jnp.float32), axes=("vocab", "embed"))

    def __call__(self, tokens, state=None, *, segment_ids=None, positions=None):
        last = segment_ids[:, -1]
        return self.table[...][tokens], models.LanguageModelState((), last, last)


def batches(count, rows=4, time=6):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        lengths = rng.integers(1, 4, (rows, time))
        ids = np.array([np.repeat(np.arange(time), row)[:time] + 1 for row in lengths])
        found.append(
            {
                "tokens": rng.integers(0, 4, (rows, time)).astype(np.int32),
                "targets": rng.integers(0, 4, (rows, time)).astype(np.int32),
                "weights": rng.choice([0.0, 1.0], (rows, time)).astype(np.float32),
                "segment_ids": ids.astype(np.int32),
                "positions": np.zeros((rows, time), np.int32),
            }
        )
    return found


def oracle(table, found):
    """Sums over all tokens, one at a time, in float64."""
    nats = tokens = size = 0.0
    by_position = np.zeros((2, found[0]["tokens"].shape[1]))
    for batch in found:
        for b, row in enumerate(batch["tokens"]):
            since = 0
            for t, token in enumerate(row):
                ids = batch["segment_ids"][b]
                since = 0 if t == 0 or ids[t] != ids[t - 1] else since + 1
                weight, target = batch["weights"][b, t], batch["targets"][b, t]
                logits = table[token]
                loss = math.log(np.exp(logits).sum()) - logits[target]
                nats += weight * loss
                tokens += weight
                size += weight * BYTES[target]
                by_position[:, since] += weight * loss, weight
    return nats, tokens, size, by_position


def test_an_evaluation_by_hand():
    table = np.random.default_rng(1).normal(size=(4, 4))
    found = batches(5)
    nats, tokens, size, (at, count) = oracle(table, found)
    result = evaluation.evaluate(Bigram(table), iter(found), BYTES)
    assert result.loss == pytest.approx(nats / tokens, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert (result.tokens, result.bytes) == (tokens, size)
    np.testing.assert_array_equal(result.tokens_by_position, count)
    filled = count > 0
    np.testing.assert_allclose(
        result.loss_by_position[filled], at[filled] / count[filled], rtol=1e-5
    )
    assert np.all(np.isnan(result.loss_by_position[~filled]))
    # Planted fault: unweighted, the loss is another one.
    plain = [{**batch, "weights": np.ones_like(batch["weights"])} for batch in found]
    assert oracle(table, plain)[0] / oracle(table, plain)[1] != pytest.approx(result.loss, rel=1e-3)


def test_an_even_guess_costs_its_bits():
    """256 equally likely bytes: 8 bits each, a perplexity of 256."""
    table, lengths = np.zeros((256, 256)), np.ones(256, np.int32)
    result = evaluation.evaluate(Bigram(table), batches(1), lengths)
    assert result.bits_per_byte == pytest.approx(8.0)
    assert result.perplexity == pytest.approx(256.0)


def test_a_limit_reads_the_first_batches():
    table = np.random.default_rng(2).normal(size=(4, 4))
    found = batches(5)
    limited = evaluation.evaluate(Bigram(table), found, BYTES, limit=2)
    assert limited.tokens == oracle(table, found[:2])[1]
    assert limited.tokens != oracle(table, found)[1]


def test_a_split_without_counted_tokens_is_an_error():
    empty = [{**batch, "weights": np.zeros_like(batch["weights"])} for batch in batches(1)]
    for found in ([], empty):
        with pytest.raises(ValueError, match="no counted token"):
            evaluation.evaluate(Bigram(np.zeros((4, 4))), found, BYTES)


def test_an_evaluation_on_a_mesh():
    table = np.random.default_rng(3).normal(size=(4, 4))
    found = batches(3)
    single = evaluation.evaluate(Bigram(table), found, BYTES)
    graphdef, params = nnx.split(Bigram(table), nnx.Param)
    mesh = sharding.make_mesh(data=2, fsdp=2, sequence=2)
    params = jax.device_put(params, sharding.shardings(params, mesh))
    step = perplexity.make_step(graphdef, BYTES, mesh)
    result = perplexity.run(step, params, found, mesh=mesh)
    assert result.loss == pytest.approx(single.loss, rel=1e-6)
    np.testing.assert_allclose(result.loss_by_position, single.loss_by_position, rtol=1e-5)
    # The same parameters in a model, where they stay on the mesh.
    again = evaluation.evaluate(nnx.merge(graphdef, params), found, BYTES)
    assert again.loss == pytest.approx(single.loss, rel=1e-6)


def test_what_is_no_model_is_named():
    jaxtyping.config.update("jaxtyping_disable", True)  # the tests' type checks come first
    try:
        with pytest.raises(TypeError, match=r"nnx.Module, got State: .*nnx.merge\(run"):
            evaluation.evaluate(nnx.state(Bigram(np.zeros((4, 4)))), batches(1), BYTES)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_token_losses_are_in_fp32_and_exact_for_large_logits():
    logits = jnp.array([[[1000.0, 0.0], [0.0, 1000.0]]], jnp.bfloat16)
    found = losses.token_losses(logits, jnp.array([[0, 0]]))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [[0.0, 1000.0]])


def test_context_positions_count_within_documents():
    ids = jnp.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]])
    np.testing.assert_array_equal(
        losses.context_positions(ids), [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    )
