"""From a configuration to the parts of a run: model, data, mesh, optimiser."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from memjax import data, sharding
from memjax.evaluation import losses, placement
from memjax.models import LanguageModel, LanguageModelConfig, feed_forwards, mixers
from memjax.training import checkpoint
from memjax.training import config as config_lib
from memjax.training import optimizer as optimizer_lib
from memjax.training import state as state_lib
from memjax.training import step as step_lib
from memjax.training.config import EvaluateConfig, MeshConfig, TrainConfig
from memjax.typing import PyTree

# What may differ between the run that saved and the one that goes on: how it computes, not what.
FREE = ("remat", "dtype")


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run. Nothing is computed on a device yet.

    Args:
      config: the whole configuration as nested dictionaries, with `model.vocab` filled in.
      model, train, evaluate: its sections.
      mesh: of `sharding.make_mesh`.
      tokenizer: of `data.make_tokenizer`.
      make_model: builds the model from its random streams.
      graphdef: the static part of the model.
      shapes: the parameters as shapes.
    """

    config: dict[str, Any]
    model: LanguageModelConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    mesh: Mesh
    tokenizer: Any
    make_model: Callable[[nnx.Rngs], nnx.Module]
    graphdef: Any
    shapes: PyTree

    @functools.cached_property
    def learning_rate(self) -> optax.Schedule:
        """The schedule, a function of the step."""
        return optimizer_lib.learning_rate(self.train)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimiser that `train` names."""
        return optimizer_lib.make(self.train, self.shapes)

    @functools.cached_property
    def abstract_state(self) -> state_lib.TrainState:
        """Shapes and shardings of the training state."""
        return state_lib.abstract(self.make_model, self.optimizer, self.mesh)

    @functools.cached_property
    def abstract_params(self) -> PyTree:
        """Shapes and shardings of the parameters alone."""
        return jax.tree.map(
            lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
            self.shapes,
            sharding.shardings(self.shapes, self.mesh),
        )

    @property
    def context(self) -> int:
        """Tokens of a training row."""
        return self.train.context or self.model.context

    @property
    def byte_lengths(self) -> np.ndarray:
        """[vocab] bytes of each token; a vocabulary larger than the tokenizer's ends in zeros."""
        known = np.asarray(self.tokenizer.byte_lengths)
        return np.pad(known, (0, self.model.vocab - len(known)))

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree in to be continued by this run."""
        fields = config_lib.plain(self.model)
        # TNT's stage 2 goes on with other chunks of the local memories; how many there are is seen
        # in the parameters.
        del fields["memory"]["local_chunks"]
        return {
            "model": {name: value for name, value in fields.items() if name not in FREE},
            "data": {"tokenizer": self.tokenizer.name},
        }

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(self.shapes))

    def compiled_step(
        self, forward: losses.Forward = losses.forward
    ) -> Callable[[state_lib.TrainState, losses.Batch], tuple[state_lib.TrainState, dict]]:
        """The training step of this run, compiled when it is first called or lowered.

        Args:
          forward: (model, batch, key) -> (logits, statistics).
        """
        step = step_lib.make(
            self.graphdef,
            self.optimizer,
            self.learning_rate,
            self.byte_lengths,
            accumulate=self.train.accumulate,
            forward=forward,
        )
        return step_lib.compile(step, self.abstract_state, self.mesh)

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a training batch."""
        self._check_training()
        shape, placed = (self.train.batch, self.context), placement.batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
            for name, dtype in data.DTYPES.items()
        }

    def training_data(self) -> data.Pipeline:
        """This host's share of the training batches, from the first one."""
        self._check_training()
        return self._pipeline("train", self.train.batch, self.context)

    def validation_data(self) -> data.Pipeline:
        """This host's share of one pass over the validation split."""
        batch = self.evaluate.batch or self.train.batch
        context = self.evaluate.context or self.context
        self._check("evaluate.batch", batch, "evaluate.context", context)
        rows = None if self.evaluate.batches is None else self.evaluate.batches * batch
        return self._pipeline("validation", batch, context, rows=rows)

    def _check_training(self) -> None:
        part = self.train.batch // self.train.accumulate
        self._check("train.batch / train.accumulate", part, "train.context", self.context)

    def check_rows(self, name: str, rows: int) -> None:
        """Raises a ValueError where the mesh does not divide a batch.

        Args:
          name: how the error calls it.
          rows: its size.
        """
        over = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if rows < 1 or rows % over:
            raise ValueError(
                f"{name} = {rows} rows cannot be split over mesh.data * mesh.fsdp = {over}"
                f" devices: make it a multiple of {over}, or set --config.mesh.data"
            )

    def _check(self, batch_name: str, batch: int, context_name: str, context: int) -> None:
        """Raises a ValueError where the mesh does not divide the batch or the context."""
        self.check_rows(batch_name, batch)
        sizes = self.mesh.shape
        if context % sizes["sequence"]:
            raise ValueError(
                f"{context_name} = {context} tokens cannot be split over mesh.sequence ="
                f" {sizes['sequence']} devices: make it a multiple"
            )

    def _pipeline(self, split: str, batch: int, context: int, **options) -> data.Pipeline:
        return data.make_pipeline(
            self.config["data"],
            split=split,
            batch=batch,
            context=context,
            seed=self.config["seed"],
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            **options,
        )


def build(config: ConfigDict | Mapping[str, Any], *, devices: Sequence[Any] | None = None) -> Run:
    """Checks a configuration and makes the parts that it describes.

    Args:
      config: sections model, data, train, evaluate, mesh and the entries seed and workdir; what is
        left out takes its default. `model.vocab` defaults to the tokenizer's.
      devices: of the mesh, by default all; those of a slice that is not there will do to compile.

    Returns:
      The parts.

    Raises:
      ValueError: an unknown key, a value out of range, a mesh that the devices do not fill.
    """
    values = config_lib.plain(config_lib.complete(config))
    data.DataConfig.from_dict(values["data"])
    tokenizer = data.make_tokenizer(values["data"]["tokenizer"])
    if values["model"]["vocab"] is None:
        values["model"]["vocab"] = tokenizer.vocab
    if values["model"]["vocab"] < tokenizer.vocab:
        raise ValueError(
            f"model.vocab {values['model']['vocab']} is smaller than the {tokenizer.vocab} tokens"
            f" of data.tokenizer {values['data']['tokenizer']!r}; leave model.vocab out"
        )
    model = LanguageModelConfig.from_dict(values["model"])
    values["model"] = config_lib.plain(model)
    train = config_lib.section(TrainConfig, "train", values["train"])
    evaluate = config_lib.section(EvaluateConfig, "evaluate", values["evaluate"])
    sizes = dataclasses.asdict(config_lib.section(MeshConfig, "mesh", values["mesh"]))
    mesh = sharding.make_mesh(**sizes, devices=devices)

    def make_model(rngs: nnx.Rngs) -> nnx.Module:
        return LanguageModel(model, rngs=rngs)

    graphdef, shapes = state_lib.describe(make_model)
    return Run(values, model, train, evaluate, mesh, tokenizer, make_model, graphdef, shapes)


def load(
    workdir: str,
    config: ConfigDict | Mapping[str, Any] | None = None,
    *,
    step: int | None = None,
) -> tuple[Run, int, PyTree]:
    """A trained model from a work directory: `nnx.merge(run.graphdef, params)`.

    Args:
      workdir: of a run.
      config: in place of the one that the checkpoint was made with; it must describe the same
        model, but may have another mesh, context, dtype or data.
      step: which checkpoint; None takes the newest.

    Returns:
      (the parts of the run, step of the checkpoint, parameters on the run's mesh).

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the model has a mixer or feed-forward layer that nothing has registered.
      MismatchError: the checkpoint is of another model than `config` describes.
      DamagedError: its files are damaged.
    """
    given = {} if config is None else config_lib.plain(config)
    directory = checkpoint_dir(given, workdir)
    if config is None:
        step, given = checkpoint.read_config(directory, step)
        _check_registered(given["model"], f"the checkpoint of step {step} in {directory}")
    run = build(given)
    identity = run.identity
    identity["model"].pop("context")  # a model may be read with a longer one
    step, params = checkpoint.read_params(
        directory, run.abstract_params, identity=identity, step=step
    )
    return run, step, params


def _check_registered(model: Mapping[str, Any], where: str) -> None:
    """Raises a ValueError where a saved model has parts that are not of memjax, nor registered."""
    feed_forward = model["feed_forward"]
    for registry, names in (
        (mixers.registry, model["pattern"]),
        (feed_forwards.registry, [feed_forward] if isinstance(feed_forward, str) else feed_forward),
    ):
        for name in names:
            if name not in registry.names():
                raise ValueError(
                    f"{where} has the {registry.kind} {name!r}, which nothing has registered here:"
                    " give --config=FILE that registers it (from Python, import what does first)"
                )


def checkpoint_dir(config: Mapping[str, Any], workdir: str) -> str:
    """Where the checkpoints of a run are: `train.checkpoint_dir`, or `<workdir>/checkpoints`."""
    return config.get("train", {}).get("checkpoint_dir") or os.path.join(workdir, "checkpoints")
