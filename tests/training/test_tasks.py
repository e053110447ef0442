"""Training on a task: what a run gives, its learning rate, and how it ends."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from memjax import sharding
from memjax.data import tasks
from memjax.evaluation import recall
from memjax.models import LanguageModel, LanguageModelConfig
from memjax.training import optimizer as optimizer_lib
from memjax.training import state as state_lib
from memjax.training import step as step_lib
from memjax.training.config import TrainConfig
from memjax.training.tasks import ScoreConfig, Stopped, TaskTrainer

TASK = tasks.Parity(length=4)
MODEL = LanguageModelConfig(
    vocab=3, dim=8, layers=1, heads=1, hidden=16, context=4, dtype="float32"
)
TRAIN = TrainConfig(steps=6, batch=8, warmup=2, log_every=2, weight_decay=0.1)
SCORE = ScoreConfig(rows=32, batch=16, every=3)


def trainer(**changes):
    mesh = changes.pop("mesh", None) or sharding.make_mesh(data=1)
    return TaskTrainer(
        **{"model": MODEL, "task": TASK, "test": TASK, "train": TRAIN, "score": SCORE, **changes},
        mesh=mesh,
    )


@pytest.fixture(scope="module")
def shared():
    return trainer()


def test_a_run_is_that_of_the_plain_step(shared):
    """The rate outside the compiled step, and the batches, against `step.make` with `train.lr`."""
    lr = 7e-3
    outcome = shared.run(3, lr)
    assert (outcome.steps, outcome.diverged) == (6, None)

    config = dataclasses.replace(TRAIN, lr=lr)
    mesh = sharding.make_mesh(data=1)

    def make_model(rngs):
        return LanguageModel(MODEL, rngs=rngs)

    graphdef, shapes = state_lib.describe(make_model)
    optimizer = optimizer_lib.make(config, shapes)
    model_key, data_key = jax.random.split(jax.random.key(3))
    state = state_lib.start(make_model, optimizer, mesh, model_key)
    schedule = optimizer_lib.learning_rate(config)
    step = jax.jit(
        step_lib.make(graphdef, optimizer, schedule, np.ones(3, np.int32), forward=recall.forward)
    )
    for n in range(6):
        rows = TASK.batch(jax.random.fold_in(data_key, n), 8)
        state, _ = step(state, recall.gather(rows, TASK.scored))
    score = recall.evaluate(nnx.merge(graphdef, state.params), TASK, rows=32, batch=16)
    assert outcome.score.loss == pytest.approx(score.loss, rel=1e-5)
    assert outcome.score.accuracy == score.accuracy
    other = shared.run(3, 2 * lr).score.loss
    assert abs(other - score.loss) > 1e-4, "another rate would be seen"


def test_the_same_run_again_and_on_other_meshes(shared):
    first, again, other = shared.run(0, 1e-2), shared.run(0, 1e-2), shared.run(1, 1e-2)
    assert first.score == again.score
    assert first.score.loss != other.score.loss
    wide = trainer(mesh=sharding.make_mesh(data=4, fsdp=2)).run(0, 1e-2)
    assert wide.score.loss == pytest.approx(first.score.loss, rel=1e-4)


def test_it_learns_and_stops_early():
    model = dataclasses.replace(MODEL, dim=32, hidden=64)
    train = dataclasses.replace(TRAIN, steps=600, batch=32, warmup=20)
    score = ScoreConfig(rows=64, batch=64, every=50, stop=0.95)
    outcome = trainer(model=model, task=tasks.Parity(length=3), test=tasks.Parity(length=3),
                      train=train, score=score).run(0, 3e-3)  # fmt: skip
    assert outcome.score.accuracy >= 0.95
    assert outcome.steps < 600
    assert outcome.steps % 50 == 0


def test_a_test_may_be_longer_than_training():
    longer = tasks.Parity(length=9)
    outcome = trainer(model=dataclasses.replace(MODEL, context=9), test=longer).run(0, 1e-3)
    assert 0 < outcome.score.accuracy <= 1
    assert outcome.score.rows == 32


def test_a_run_that_diverges_is_told():
    outcome = trainer(train=dataclasses.replace(TRAIN, warmup=0, clip=None)).run(0, 1e38)
    assert outcome.diverged is not None
    assert outcome.steps == outcome.diverged <= 6
    assert (outcome.score.accuracy, outcome.score.loss) == (0.0, math.inf)


def test_a_caller_may_end_it(shared):
    seen = []
    with pytest.raises(Stopped):
        shared.run(0, 1e-3, keep_going=lambda step, loss: seen.append((step, loss)) or step < 3)
    assert [step for step, _ in seen] == [2, 3]
    assert all(0 < loss < 2 for _, loss in seen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"data": 3}}, r"rows cannot be split over 3 devices: make it a multiple of 3"),
        ({"score": ScoreConfig(batch=2), "mesh": {"data": 8}}, r"score.batch = 2 rows"),
    ],
)
def test_batches_must_fit_the_mesh(changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(**{**changes, "mesh": sharding.make_mesh(**changes["mesh"])})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": 0}, "score.rows must be at least 1"),
        ({"stop": 0.0}, "a value above 1 never stops"),
    ],
)
def test_bad_scores_are_explained(fields, message):
    with pytest.raises(ValueError, match=message):
        ScoreConfig(**fields)
