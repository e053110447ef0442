"""Training: optimisers, the step, checkpoints, the loop, and the report of a run."""

from memjax.training.checkpoint import Checkpoints, DamagedError, MismatchError
from memjax.training.config import EvaluateConfig, MeshConfig, TrainConfig, complete
from memjax.training.loop import Summary, train
from memjax.training.metrics import NonFiniteError
from memjax.training.run import Run, build, load
from memjax.training.state import TrainState

__all__ = [
    "Checkpoints",
    "DamagedError",
    "EvaluateConfig",
    "MeshConfig",
    "MismatchError",
    "NonFiniteError",
    "Run",
    "Summary",
    "TrainConfig",
    "TrainState",
    "build",
    "complete",
    "load",
    "train",
]
