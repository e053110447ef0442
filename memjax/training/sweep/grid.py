"""The grid of a sweep: a configuration, checked, and the runs that it describes."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from memjax import sharding
from memjax.data import tasks
from memjax.models import LanguageModelConfig
from memjax.training import config as config_lib
from memjax.training.config import MeshConfig, TrainConfig, nearest
from memjax.training.tasks import ScoreConfig, TaskTrainer

ENTRIES = {"dims": (64,), "lrs": (1e-3,), "seeds": (0,), "workdir": "runs/recall"}
# The fields of TrainConfig that a sweep reads: its rates are in `lrs`, and it has no checkpoints.
TRAIN = (
    *("steps", "batch", "accumulate", "optimizer", "warmup", "final_lr", "weight_decay"),
    *("clip", "beta1", "beta2", "eps", "log_every"),
)
_SECTIONS = {
    "train": (
        TrainConfig,
        {f.name: f.default for f in dataclasses.fields(TrainConfig) if f.name in TRAIN},
    ),
    "score": (ScoreConfig, {f.name: f.default for f in dataclasses.fields(ScoreConfig)}),
    "mesh": (MeshConfig, {f.name: f.default for f in dataclasses.fields(MeshConfig)}),
}
NAMED = ("tasks", "models")
_NAME = re.compile(r"[A-Za-z0-9_.+-]+")
_FIXED = ("vocab", "dim")
SEEDS = 2**32  # seeds are below


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model of one size on one task: what all its seeds and rates share.

    Args:
      task_name, model_name, dim: how tables call it.
      task: its settings: the `task` to train on and the `test`, each by name with its fields.
      trainer: that trains it.
    """

    task_name: str
    model_name: str
    dim: int
    task: dict[str, Any]
    trainer: TaskTrainer


class Run(NamedTuple):
    """One point of the grid.

    Args:
      cell: model, size and task.
      seed, lr: the rest.
      path: of its JSON.
    """

    cell: Cell
    seed: int
    lr: float
    path: str

    @property
    def name(self) -> str:
        """How lines of progress call it."""
        cell = self.cell
        return f"{cell.task_name} {cell.model_name} d{cell.dim} s{self.seed} lr {self.lr}"

    def identity(self) -> dict[str, Any]:
        """Everything that its result depends on, as JSON gives it back."""
        trainer = self.cell.trainer
        train = config_lib.plain(trainer.train)
        identity = {
            **self.cell.task,
            "model": trainer.model.to_dict(),
            "train": {name: train[name] for name in TRAIN},
            "score": config_lib.plain(trainer.score),
            "seed": self.seed,
            "lr": self.lr,
        }
        return json.loads(json.dumps(identity))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A grid that is checked: `read` makes it.

    Args:
      cells: in the order of the configuration.
      seeds, lrs: every cell is run with each of both.
      mesh: on which.
    """

    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    mesh: Mesh

    def runs(self, workdir: str) -> list[Run]:
        """All points of the grid, those of a cell one after another."""
        return [
            Run(
                cell, seed, lr, os.path.join(workdir, "runs", cell.task_name, _file(cell, seed, lr))
            )
            for cell in self.cells
            for seed in self.seeds
            for lr in self.lrs
        ]


def _file(cell: Cell, seed: int, lr: float) -> str:
    return f"{cell.model_name}-d{cell.dim}-s{seed}-lr{lr}.json"


def complete(config: ConfigDict | Mapping[str, Any]) -> ConfigDict:
    """The configuration of a sweep with every default written out, for a config file to return.

    Args:
      config: `tasks` and `models` (each a mapping from a name to settings), `model` (fields of
        `LanguageModelConfig` that all models share), `train`, `score`, `mesh`, and the entries of
        `ENTRIES`; all but `tasks` and `models` may be missing.

    Returns:
      A `ConfigDict` of which every field can be overridden on the command line.

    Raises:
      ValueError: an unknown section or key, with the nearest valid ones; no tasks or no models.
    """
    given = config_lib.plain(config)
    sections = [*NAMED, "model", *_SECTIONS, *ENTRIES]
    for key in given:
        if key not in sections:
            raise ValueError(f"unknown section {key}: {nearest(key, sections)}")
    config = ConfigDict()
    for name in NAMED:
        if not isinstance(given.get(name), Mapping) or not given[name]:
            raise ValueError(f"a sweep needs {name}: a mapping from names to settings")
        config[name] = config_lib.overridable(given[name])
    for name, fields in given["models"].items():
        if isinstance(fields, Mapping):
            config.models[name] = config_lib.overridable(fields, LanguageModelConfig)
    config.model = config_lib.overridable(given.get("model", {}), LanguageModelConfig)
    for name, (cls, defaults) in _SECTIONS.items():
        for key in given.get(name, {}):
            if key not in defaults:
                raise ValueError(f"unknown key {name}.{key}: {nearest(key, defaults)}")
        config[name] = config_lib.overridable({**defaults, **given.get(name, {})}, cls)
    for name, default in ENTRIES.items():
        config[name] = given.get(name, default)
    return config


def read(
    config: ConfigDict | Mapping[str, Any],
    *,
    only_tasks: list[str] | None = None,
    only_models: list[str] | None = None,
) -> Sweep:
    """Checks a configuration and makes its grid; nothing is computed yet.

    A task is `{"task": name, "test": {...}, field: value, ...}`: a name of `data.tasks.TASKS`, its
    fields, and under `test` the fields that are others when it is tested (a longer row, say). A
    model is fields of `LanguageModelConfig`, over those of the section `model`; its vocabulary is
    that of the task, its `dim` each of `dims`, its `context` the longest row unless it says so.

    Args:
      config: what `complete` takes.
      only_tasks, only_models: names of those to keep; None keeps all.

    Returns:
      The grid.

    Raises:
      ValueError: anything in the configuration that does not do, with what would.
    """
    values = config_lib.plain(complete(config))
    train = config_lib.section(TrainConfig, "train", values["train"])
    score = config_lib.section(ScoreConfig, "score", values["score"])
    sizes = config_lib.section(MeshConfig, "mesh", values["mesh"])
    mesh = sharding.make_mesh(**dataclasses.asdict(sizes))
    grid = {}
    for name, kinds in (("dims", int), ("seeds", int), ("lrs", (int, float))):
        grid[name] = _distinct(name, values[name], kinds)
    cells = []
    for task_name, settings in _chosen("tasks", values["tasks"], only_tasks).items():
        described, task, test = _tasks(task_name, settings)
        for model_name, fields in _chosen("models", values["models"], only_models).items():
            for dim in grid["dims"]:
                model = _model(model_name, values["model"], fields, dim, task, test)
                trainer = TaskTrainer(model, task, test, train, score, mesh)
                cells.append(Cell(task_name, model_name, dim, described, trainer))
    lrs = tuple(float(lr) for lr in grid["lrs"])
    return Sweep(tuple(cells), grid["seeds"], lrs, mesh)


def _distinct(name: str, values: Any, kinds: Any) -> tuple:
    least = {"dims": 1, "seeds": 0, "lrs": 0}[name]
    below = {"seeds": SEEDS}.get(name, math.inf)

    def fits(value: Any) -> bool:
        number = isinstance(value, kinds) and not isinstance(value, bool)
        return number and least <= value < below

    good = isinstance(values, tuple) and values and len(set(values)) == len(values)
    if not good or not all(map(fits, values)):
        limits = f"at least {least}" + (f" and at most {below - 1}" if name == "seeds" else "")
        raise ValueError(
            f"{name} must be a tuple of different numbers, each {limits}, got {values!r}:"
            f" for example --config.{name}='(1,)'"
        )
    return values


def _chosen(kind: str, there: Mapping[str, Any], only: list[str] | None) -> dict[str, Any]:
    for name in there:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{kind}: {name!r} names files, so use letters, digits, _ . + - only")
    if only is not None and not only:
        raise ValueError(f"none of the {kind} was chosen: there are {', '.join(there)}")
    for name in only or ():
        if name not in there:
            raise ValueError(
                f"the configuration has no {kind[:-1]} {name!r}: {nearest(name, there)}"
            )
    return {name: there[name] for name in there if only is None or name in only}


def _tasks(name: str, settings: Any) -> tuple[dict[str, Any], tasks.Task, tasks.Task]:
    """The settings in full, the task to train on, and that of the test."""
    if not isinstance(settings, Mapping) or not isinstance(settings.get("test", {}), Mapping):
        raise ValueError(f"tasks.{name} must be a mapping with the key task, got {settings!r}")
    fields = {key: value for key, value in settings.items() if key not in ("task", "test")}
    kind = settings.get("task", name)
    try:
        task = tasks.make(kind, fields)
        test = tasks.make(kind, {**fields, **settings.get("test", {})})
    except ValueError as error:
        raise ValueError(f"tasks.{name}: {error}") from error
    if test.vocabulary != task.vocabulary:
        raise ValueError(
            f"tasks.{name}: the test has {test.vocabulary} tokens, training {task.vocabulary}; give"
            " both one vocabulary"
        )
    described = {"name": kind, **tasks.options(task)}
    return {"task": described, "test": {"name": kind, **tasks.options(test)}}, task, test


def _model(
    name: str, shared: dict[str, Any], fields: Any, dim: int, task: tasks.Task, test: tasks.Task
) -> LanguageModelConfig:
    """The shared settings and a model's own over them, for a task."""
    if not isinstance(fields, Mapping):
        raise ValueError(
            f"models.{name} must be a mapping of LanguageModelConfig's fields, got {fields!r}"
        )
    fields = config_lib.merge(shared, fields)
    for key in _FIXED:
        if key in fields:
            source = "dims" if key == "dim" else "the task's vocabulary"
            raise ValueError(f"models.{name}: {key} comes from {source}: leave it out")
    fields = {"context": max(task.length, test.length), **fields}
    try:
        return LanguageModelConfig.from_dict({"vocab": task.vocabulary, "dim": dim, **fields})
    except ValueError as error:
        raise ValueError(f"models.{name}: {error}") from error
