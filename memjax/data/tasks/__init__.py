"""Synthetic tasks of recall and state tracking: batches from a key, made on the device.

task = tasks.MQAR(vocabulary=256, length=64, pairs=4)
batch = jax.jit(task.batch, static_argnums=1)(jax.random.key(0), 8)    # a `TaskBatch`
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from memjax.data.tasks.copying import SelectiveCopying
from memjax.data.tasks.joint_recall import JointRecall
from memjax.data.tasks.mqar import MQAR
from memjax.data.tasks.needle import NeedleInText
from memjax.data.tasks.state_tracking import Parity, Permutations
from memjax.data.tasks.task import Task, TaskBatch, options

# The class of each name, and what the name fixes.
TASKS: dict[str, tuple[Callable[..., Task], dict[str, Any]]] = {
    "mqar": (MQAR, {}),
    "joint_recall": (JointRecall, {}),
    "selective_copying": (SelectiveCopying, {}),
    "parity": (Parity, {}),
    "s5": (Permutations, {"degree": 5, "moved": None}),
    "s5_swaps": (Permutations, {"degree": 5, "moved": 2}),
    "permutations": (Permutations, {}),
    "s_niah_1": (NeedleInText, {"haystack": "noise", "value": "number"}),
    "s_niah_2": (NeedleInText, {"haystack": "text", "value": "number"}),
    "s_niah_3": (NeedleInText, {"haystack": "text", "value": "uuid"}),
}


def make(name: str, settings: Mapping[str, Any] | None = None) -> Task:
    """A task by its name: `make("mqar", {"length": 128, "pairs": 8})`.

    Args:
      name: a key of `TASKS`.
      settings: its fields; those left out take their defaults.

    Raises:
      ValueError: an unknown name or field, with the nearest ones; a field that the name fixes; what
        the task itself refuses.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; {_nearest(name, TASKS)}")
    cls, fixed = TASKS[name]
    known = [f.name for f in dataclasses.fields(cls) if f.name not in fixed]
    settings = dict(settings or {})
    for key in settings:
        if key in fixed:
            raise ValueError(f"{key} is fixed by the task {name!r}: leave it out")
        if key not in known:
            raise ValueError(f"the task {name!r} has no {key!r}; {_nearest(key, known)}")
    return cls(**fixed, **settings)


def _nearest(name: str, valid: Any) -> str:
    close = difflib.get_close_matches(name, list(valid), n=3)
    if close:
        return "did you mean " + " or ".join(map(repr, close)) + "?"
    return f"valid: {', '.join(valid)}"


__all__ = [
    "MQAR",
    "TASKS",
    "JointRecall",
    "NeedleInText",
    "Parity",
    "Permutations",
    "SelectiveCopying",
    "Task",
    "TaskBatch",
    "make",
    "options",
]
