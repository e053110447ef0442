"""Training on a synthetic task: batches made on the device, one compiled step, no checkpoints."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from memjax import sharding
from memjax.data.tasks import Task
from memjax.evaluation import recall
from memjax.models import LanguageModel, LanguageModelConfig
from memjax.training import optimizer as optimizer_lib
from memjax.training import state as state_lib
from memjax.training import step as step_lib
from memjax.training.config import TrainConfig
from memjax.training.state import TrainState
from memjax.typing import Array, Key, PyTree


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """The `score` section: how a model is tested while it trains and at its end.

    Args:
      rows: of the test, at least; always the same ones.
      batch: rows at once.
      every: steps between two tests; the last step is followed by one in any case.
      stop: training ends early at a test with at least this accuracy; above 1 it never does. A
        sweep then leaves out the other learning rates of the seed.
    """

    rows: int = 1024
    batch: int = 64
    every: int = 250
    stop: float = 0.99

    def __post_init__(self):
        for name in ("rows", "batch", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"score.{name} must be at least 1, got {getattr(self, name)}")
        if not self.stop > 0:
            raise ValueError(
                f"score.stop must be above 0, got {self.stop}; a value above 1 never stops"
            )


class Outcome(NamedTuple):
    """How one run ended.

    Args:
      score: of the last test; all zeros (and an infinite loss) for a run that diverged.
      steps: optimiser steps taken.
      seconds: time, the compiling of a first run included.
      diverged: the step after which the loss was seen not to be finite, or None.
    """

    score: recall.Score
    steps: int
    seconds: float
    diverged: int | None


class Stopped(Exception):
    """`keep_going` of `TaskTrainer.run` said no."""


@dataclasses.dataclass(frozen=True)
class TaskTrainer:
    """A model, a task, and the compiled functions that all its seeds and learning rates share.

    Step n of a run draws a new batch of the task, so no row comes twice; with the same seed and
    rate a run gives the same numbers on the same mesh.

    Args:
      model: its vocabulary must not be below the task's.
      task: to train on.
      test: to be tested on: the same task, or a longer or harder one.
      train: steps, batch, optimiser and schedule; its `lr` is not read.
      score: how to test.
      mesh: of `sharding.make_mesh`.

    Raises:
      ValueError: a batch that the mesh does not divide.
    """

    model: LanguageModelConfig
    task: Task
    test: Task
    train: TrainConfig
    score: ScoreConfig
    mesh: Mesh

    def __post_init__(self):
        over = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        for name, rows in (
            ("train.batch / train.accumulate", self.train.batch // self.train.accumulate),
            ("score.batch", self.score.batch),
        ):
            if rows % over:
                raise ValueError(
                    f"{name} = {rows} rows cannot be split over {over} devices: make it a multiple"
                    f" of {over}, or set --config.mesh.data=1"
                )

    def _make_model(self, rngs: nnx.Rngs) -> nnx.Module:
        return LanguageModel(self.model, rngs=rngs)

    @functools.cached_property
    def _described(self) -> tuple[Any, PyTree]:
        return state_lib.describe(self._make_model)

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self._described[1]))

    @functools.cached_property
    def _unit(self) -> TrainConfig:
        """The schedule with a peak of 1: updates are proportional to the rate, which scales them
        outside, so that one compiled step serves every rate."""
        return dataclasses.replace(self.train, lr=1.0)

    @functools.cached_property
    def _start(self) -> Callable[[Key], TrainState]:
        optimizer = self._optimizer(1.0)
        return functools.partial(state_lib.start, self._make_model, optimizer, self.mesh)

    def _optimizer(self, rate: Any) -> optax.GradientTransformation:
        return optax.chain(optimizer_lib.make(self._unit, self._described[1]), optax.scale(rate))

    @functools.cached_property
    def _step(self) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
        schedule = optimizer_lib.learning_rate(self._unit)
        lengths = np.ones(self.model.vocab, np.int32)

        def step(state: TrainState, data: Key, rate: Array):
            rows = self.task.batch(jax.random.fold_in(data, state.step), self.train.batch)
            batch = recall.gather(rows, self.task.scored)
            batch = {n: sharding.constrain(x, ("batch", "time")) for n, x in batch.items()}
            take = step_lib.make(
                self._described[0],
                self._optimizer(rate),
                lambda n: rate * schedule(n),
                lengths,
                accumulate=self.train.accumulate,
                forward=recall.forward,
            )
            state, metrics = take(state, batch)
            return state, {"loss": metrics["loss"]}

        abstract = state_lib.abstract(self._make_model, self._optimizer(1.0), self.mesh)
        placed = jax.tree.map(lambda x: x.sharding, abstract)
        return jax.jit(step, donate_argnums=0, out_shardings=(placed, None))

    @functools.cached_property
    def _totals(self) -> Callable[[PyTree, Key], dict[str, Array]]:
        graphdef = self._described[0]
        return jax.jit(
            lambda params, key: recall.totals(graphdef, params, self.test, key, self.score.batch)
        )

    def run(
        self,
        seed: int,
        lr: float,
        *,
        keep_going: Callable[[int, float], bool] = lambda step, loss: True,
    ) -> Outcome:
        """Trains from the start.

        Args:
          seed: of the parameters and of the training rows.
          lr: peak learning rate.
          keep_going: called with step and loss every `train.log_every` steps and at each test; a
            false answer ends the run.

        Returns:
          How it ended.

        Raises:
          Stopped: `keep_going` said no; nothing of the run is kept.
        """
        began = time.perf_counter()
        model_key, data_key = jax.random.split(jax.random.key(seed))
        batches = math.ceil(self.score.rows / self.score.batch)
        with jax.set_mesh(self.mesh):
            state = self._start(model_key)
            for step in range(1, self.train.steps + 1):
                state, metrics = self._step(state, data_key, np.float32(lr))
                test = step % self.score.every == 0 or step == self.train.steps
                if not test and step % self.train.log_every:
                    continue
                loss = float(metrics["loss"])
                if not math.isfinite(loss):
                    return self._diverged(step, began)
                if not keep_going(step, loss):
                    raise Stopped
                if test:
                    score = recall.run(self._totals, state.params, batches)
                    if not math.isfinite(score.loss):
                        return self._diverged(step, began)
                    if score.accuracy >= self.score.stop:
                        break
        return Outcome(score, step, time.perf_counter() - began, None)

    def _diverged(self, step: int, began: float) -> Outcome:
        score = recall.Score(accuracy=0.0, exact=0.0, loss=math.inf, rows=0)
        return Outcome(score, step, time.perf_counter() - began, step)
