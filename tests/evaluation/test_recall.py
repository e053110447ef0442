"""Scores of synthetic tasks against counting by hand, and the size of the state."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.data import tasks
from memjax.evaluation import losses, recall
from memjax.models import LanguageModel, LanguageModelConfig

TASK = tasks.MQAR(vocabulary=16, length=12, pairs=3)
CONFIG = LanguageModelConfig(
    vocab=16, dim=8, layers=2, heads=2, hidden=8, context=12, dtype="float32"
)


@pytest.fixture(scope="module")
def model():
    return LanguageModel(CONFIG, rngs=nnx.Rngs(0))


def test_gathered_logits_are_those_of_the_whole_row(model):
    batch = TASK.batch(jax.random.key(3), 5)
    drawn = recall.gather(batch, TASK.scored)
    logits, _ = recall.forward(model, drawn, jax.random.key(0))
    whole, _ = model(batch.tokens)
    for b in range(5):
        places = np.asarray(drawn["places"][b])
        assert sorted(places) == np.flatnonzero(batch.weights[b]).tolist()
        np.testing.assert_array_equal(drawn["targets"][b], batch.targets[b, places])
        np.testing.assert_allclose(logits[b], whole[b, places], rtol=1e-5, atol=1e-5)
    all_nats = jnp.sum(batch.weights * losses.token_losses(whole, batch.targets))
    totals = losses.totals(logits, drawn, jnp.ones(16, jnp.int32))
    assert float(totals["nats"]) == pytest.approx(float(all_nats), rel=1e-5)


def test_rows_with_fewer_scored_positions_are_padded_with_weight_0():
    weights = jnp.array([[0, 1, 0, 1], [0, 0, 1, 0]], jnp.float32)
    rows = tasks.TaskBatch(jnp.zeros((2, 4), int), jnp.arange(8).reshape(2, 4), weights)
    drawn = recall.gather(rows, 3)
    np.testing.assert_array_equal(drawn["weights"].sum(1), [2, 1])
    np.testing.assert_array_equal((drawn["weights"] * drawn["targets"]).sum(1), [1 + 3, 6])


def test_score_against_counting(model):
    score = recall.evaluate(model, TASK, rows=16, batch=8)
    right = nats = 0
    whole_rows = 0
    for i in range(2):
        batch = TASK.batch(recall.held_out_key(i), 8)
        logits = np.asarray(model(batch.tokens)[0], np.float64)
        for b in range(8):
            good = []
            for t in np.flatnonzero(batch.weights[b]):
                target = int(batch.targets[b, t])
                good.append(logits[b, t].argmax() == target)
                nats += math.log(np.exp(logits[b, t]).sum()) - logits[b, t, target]
            right += sum(good)
            whole_rows += all(good)
    assert score.rows == 16
    assert score.accuracy == pytest.approx(right / 48)
    assert score.exact == pytest.approx(whole_rows / 16)
    assert score.loss == pytest.approx(nats / 48, rel=1e-5)


class Solver(nnx.Module):
    """Looks the answer up: keys stand at even places of the pairs, values after them."""

    config = CONFIG

    def hidden(self, tokens, *, segment_ids, positions):
        keys, values = tokens[:, None, :6:2], tokens[:, None, 1:6:2]
        answer = jnp.sum(jnp.where(keys == tokens[..., None], values, 0), axis=-1)
        return jax.nn.one_hot(answer, 16), None

    def head(self, x):
        return x


def test_a_model_that_looks_up_scores_1():
    score = recall.evaluate(Solver(), TASK, rows=8, batch=8)
    assert (score.accuracy, score.exact) == (1.0, 1.0)


def test_one_mistake_in_a_row_spoils_the_row():
    class OneWrong(Solver):
        def head(self, x):
            return x.at[0, 1].set(-x[0, 1]).at[2, :].set(-x[2, :])

    score = recall.evaluate(OneWrong(), TASK, rows=8, batch=8)
    assert score.accuracy == pytest.approx(1 - 4 / 24)
    assert score.exact == pytest.approx(6 / 8)


def test_a_task_beyond_the_vocabulary_is_refused(model):
    with pytest.raises(ValueError, match="build it with vocab=64"):
        recall.evaluate(model, tasks.MQAR(vocabulary=64))


def test_state_bytes():
    """Two layers of keys and values of 12 tokens, 2 heads of 4, in fp32, and what goes with it."""
    small = recall.state_bytes(CONFIG)
    keys_and_values = 2 * 2 * 12 * 8 * 4
    assert keys_and_values <= small < 1.5 * keys_and_values
    model = LanguageModel(CONFIG, rngs=nnx.Rngs(0))
    one, two = (sum(x.nbytes for x in jax.tree.leaves(model.start(n).blocks)) for n in (1, 2))
    assert small == two - one


def test_state_bytes_of_a_memory():
    """The matrix, and nothing that rows share."""
    config = dataclasses.replace(CONFIG, pattern=("delta_net",), layers=1, conv=0)
    matrix = config.heads * (config.dim // config.heads) ** 2 * 4
    assert matrix <= recall.state_bytes(config) < matrix + 100
