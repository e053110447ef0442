"""Checkpoints: one pytree, saved in the background, checked when saved and when read.

A checkpoint holds parameters, optimiser state, step, key and the place of the data iterator as one
tree of arrays, a checksum of each array, and the configuration as JSON. It is complete or absent:
Orbax commits it when all of it is written.

What can be wrong with one, and what happens:

* it is of another model or optimiser: `MismatchError` names the first field or array that differs;
* its files are damaged (truncated, missing, a flipped bit): `DamagedError` names it. Nothing is
  deleted. With `on_damage="previous"` it is renamed to `damaged-<step>` and the one before is used,
  loudly;
* the state that should be saved is not finite: `NonFiniteError`, and nothing is written.
"""

import errno
import functools
import gc
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

import memjax
from memjax.training import config as config_lib
from memjax.training import disk
from memjax.training.arrays import audit, flatten, unflatten
from memjax.training.metrics import NonFiniteError
from memjax.training.state import TrainState
from memjax.typing import Array, PyTree

log = logging.getLogger(__name__)


class MismatchError(ValueError):
    """The checkpoint is of another model or optimiser."""


class DamagedError(RuntimeError):
    """The checkpoint's files are truncated, missing or altered."""


def _manager(directory: str, *, keep: int | None, create: bool) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        preservation_policy=None if keep is None else ocp.checkpoint_managers.LatestN(keep),
        create=create,
        cleanup_tmp_directories=create,
    )
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "config": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(epath.Path(directory), options=options, item_handlers=handlers)


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: a local path or a bucket; made when missing.
      identity: nested dictionary of what must be the same for a checkpoint to be continued.
      config: the whole configuration, stored for `evaluate` and `generate`.
      keep: how many of the newest to keep; None keeps all.
    """

    def __init__(
        self,
        directory: str,
        *,
        identity: Mapping[str, Any],
        config: Mapping[str, Any],
        keep: int | None = 3,
    ):
        self.directory = _absolute(directory)
        self._identity = config_lib.plain(identity)
        self._stored = {
            "memjax": memjax.__version__,
            "identity": self._identity,
            "config": config_lib.plain(config),
        }
        self._manager = _manager(self.directory, keep=keep, create=True)

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data_state: Mapping[str, int]) -> None:
        """Starts to save; returns as soon as the state may change (it is donated to the next step).

        Args:
          state: the training state.
          data_state: what the data iterator's `get_state()` gives: integers, the same on all hosts.

        Raises:
          NonFiniteError: an array of the state is not finite; the earlier checkpoints stay.
          OSError: the disk was full, for this checkpoint or for the one before.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        flat = flatten(state)
        finite, checksums = jax.device_get(audit(flat))
        bad = [name for name, fine in finite.items() if not fine]
        if bad:
            raise NonFiniteError(f"{bad[0]} is not finite at step {step}; it was not saved")
        tree = {
            "state": flat,
            "checksum": {name: np.asarray(value) for name, value in checksums.items()},
            "data": {name: np.asarray(value, np.int64) for name, value in data_state.items()},
        }
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree), config=ocp.args.JsonSave(self._stored)
        )
        self._writing(lambda: self._manager.save(step, args=args))

    def restore(
        self, like: TrainState, *, step: int | None = None, on_damage: str = "stop"
    ) -> tuple[TrainState, dict[str, int]] | None:
        """Reads a checkpoint into the places (the mesh) that `like` names.

        Args:
          like: shapes and shardings, of `state.abstract`.
          step: which one; None takes the newest.
          on_damage: "stop" raises; "previous" renames a damaged newest checkpoint to
            `damaged-<step>` and takes the one before it.

        Returns:
          (state, the data iterator's state), or None when there is no checkpoint.

        Raises:
          MismatchError: it is of another model or optimiser.
          DamagedError: its files are damaged.
        """
        steps = self.steps()
        if step is not None:
            if step not in steps:
                raise ValueError(
                    f"no checkpoint of step {step} in {self.directory}; there are {steps}"
                )
            steps = [step]
        while steps:
            candidate = steps.pop()
            try:
                return self._restore(candidate, like)
            except DamagedError as error:
                if on_damage != "previous" or step is not None:
                    raise DamagedError(f"{error}. {self._remedy(steps)}") from error
                moved = self._set_aside(candidate)
                log.error(
                    "CHECKPOINT DAMAGED: %s. It was moved to %s; continuing from %s.",
                    error,
                    moved,
                    f"step {steps[-1]}" if steps else "nothing: no other checkpoint is left",
                )
                if not steps:
                    raise DamagedError(
                        f"{error}. No other checkpoint is left; it was moved to {moved}. To start"
                        " anew, run again"
                    ) from error
        return None

    def _remedy(self, steps: list[int]) -> str:
        if not steps:
            return "It is the only one: restore its files, or start anew in another --workdir"
        return (
            f"The one before it is of step {steps[-1]}: to continue from there run with"
            " --config.train.on_damage=previous (the damaged one is renamed, not deleted)"
        )

    def _set_aside(self, step: int) -> str:
        source = epath.Path(self.directory) / str(step)
        target = epath.Path(self.directory) / f"damaged-{step}"
        count = 1
        while target.exists():
            count += 1
            target = epath.Path(self.directory) / f"damaged-{step}-{count}"
        if jax.process_count() > 1:  # all hosts have chosen the name before it is taken
            multihost_utils.sync_global_devices(f"set aside {step}")
        if jax.process_index() == 0:
            source.rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"was set aside {step}")
        self._manager.reload()
        return str(target)

    def _restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, int]]:
        where = f"checkpoint {self.directory}/{step}"
        stored = _reading(where, lambda: _read_config(self._manager, step))
        _compare_identity(where, stored, self._identity)
        shapes = _reading(where, lambda: self._manager.item_metadata(step)["state"].tree)
        wanted = flatten(like)
        _compare_shapes(where, shapes["state"], wanted)
        tree = {
            "state": wanted,
            "checksum": {name: np.zeros((), np.uint32) for name in wanted},
            "data": {name: np.zeros((), np.int64) for name in shapes["data"]},
        }
        tree = _reading(where, lambda: _read_arrays(self._manager, step, tree))
        _verify(where, tree["state"], tree["checksum"])
        data_state = {name: int(value) for name, value in tree["data"].items()}
        return unflatten(tree["state"], like), data_state

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong in the background."""
        self._writing(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits, and ends the background threads."""
        self._writing(self._manager.close)

    def _writing(self, write: Callable[[], Any]) -> None:
        """`write()`, with the errors of a full disk, of which Orbax has several, as one."""
        try:
            write()
        except Exception as error:
            if not disk.is_full(error):
                raise
        else:
            return
        _forget_pending_tasks()
        raise OSError(errno.ENOSPC, "No space left for a checkpoint", self.directory)


def _reading(where: str, read) -> Any:
    """`read()`, with every error that damaged files can cause turned into a `DamagedError`."""
    _silence_late_reads()
    try:
        return read()
    except (MismatchError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # says nothing about the files
    except Exception as error:
        summary = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    _forget_pending_tasks()
    raise DamagedError(f"{where} is damaged ({summary})")


# When one read fails, Orbax closes its event loop under those that are still under way. Each of
# them would print a traceback, long after the one line that matters: the threads that read, when
# they find the loop closed, and the tasks that waited for them, when they are freed.


def _silence_late_reads() -> None:
    """From now on, nothing is printed of a read that finds its event loop closed."""
    before = sys.unraisablehook
    if getattr(before, "silences_late_reads", False):
        return

    def hook(unraisable):
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    hook.silences_late_reads = True
    sys.unraisablehook = hook


def _forget_pending_tasks() -> None:
    """Frees now, and without a word, the tasks of reads and writes that will not end."""
    asyncio_log = logging.getLogger("asyncio")
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    disabled, asyncio_log.disabled = asyncio_log.disabled, True
    try:
        gc.collect()
    finally:
        sys.unraisablehook, asyncio_log.disabled = hook, disabled


def _read_config(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    stored = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
    if not isinstance(stored, dict) or not {"identity", "config"} <= set(stored):
        raise ValueError("its configuration is missing")
    return stored


def _read_arrays(manager: ocp.CheckpointManager, step: int, tree: Any, *, partial=False) -> Any:
    return manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                tree,
                restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
                partial_restore=partial,
            )
        ),
    )["state"]


def _compare_identity(
    where: str, stored: Mapping[str, Any], current: Any, *, partial: bool = False
) -> None:
    saved = config_lib.with_new_fields(stored["identity"], current)
    saved = _restrict(saved, current) if partial else saved
    found = config_lib.difference(saved, current)
    if not found:
        return
    name, there, here = found
    if name in ("model.vocab", "data.tokenizer") and saved["data"] != current["data"]:
        raise MismatchError(_other_tokenizer(where, stored, saved, current))
    raise MismatchError(
        f"{where} was made with {name} = {there!r}, but this run has {here!r}: give"
        f" --config.{name}={there!r} to continue it, or another --workdir to start anew"
    )


def _other_tokenizer(where: str, stored: Mapping[str, Any], saved: Any, current: Any) -> str:
    """What to say of two tokenizers, whose vocabularies may be the model's only difference."""
    there, here = saved["data"]["tokenizer"], current["data"]["tokenizer"]
    sizes = saved["model"]["vocab"], current["model"]["vocab"]
    given = stored["config"]["data"]["tokenizer"]  # a path, whose file may be another one by now
    file = "" if given == there else " (that file as it was then)"
    return (
        f"{where} was made with the tokenizer {there!r} (model.vocab = {sizes[0]}), but this run"
        f" has {here!r} (model.vocab = {sizes[1]}): give --config.data.tokenizer={given!r}{file}"
        f" and --config.model.vocab={sizes[0]} to continue it, or another --workdir to start anew"
    )


def _restrict(saved: Any, like: Any) -> Any:
    """The entries of `saved` that `like` has too."""
    if not isinstance(saved, Mapping) or not isinstance(like, Mapping):
        return saved
    return {name: _restrict(saved[name], like[name]) for name in like if name in saved}


def _compare_shapes(where: str, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, leaf in wanted.items():
        if name not in saved:
            raise MismatchError(
                f"{where} has no array {name}, which this model or optimiser needs: it was made by"
                " another model, optimiser or version of memjax; start anew in another --workdir"
            )
        if tuple(saved[name].shape) != tuple(leaf.shape) or saved[name].dtype != leaf.dtype:
            raise MismatchError(
                f"{where} has {name} of shape {tuple(saved[name].shape)} {saved[name].dtype}, but"
                f" this model needs {tuple(leaf.shape)} {leaf.dtype}: use the configuration that"
                " the checkpoint was made with, or another --workdir"
            )
    extra = [name for name in saved if name not in wanted]
    if extra:
        raise MismatchError(
            f"{where} has the array {extra[0]}, which this model or optimiser does not have: use"
            " the configuration that the checkpoint was made with, or another --workdir"
        )


def _verify(where: str, flat: dict[str, Array], checksums: Mapping[str, Any]) -> None:
    _, found = jax.device_get(audit(flat))
    for name, value in found.items():
        if int(value) != int(checksums[name]):
            raise DamagedError(f"{where} is damaged (the checksum of {name} does not match)")


@functools.lru_cache(maxsize=8)
def _reader(directory: str) -> ocp.CheckpointManager:
    return _manager(directory, keep=None, create=False)


def _absolute(directory: str) -> str:
    """Orbax takes absolute paths only; a bucket is one already."""
    return directory if "://" in directory else str(epath.Path(directory).absolute())


def _newest(directory: str, step: int | None) -> tuple[ocp.CheckpointManager, int, str]:
    directory = _absolute(directory)
    if not epath.Path(directory).exists():
        raise FileNotFoundError(
            f"{directory} does not exist: train first (experiments/train.py), or give the --workdir"
            " of a run"
        )
    manager = _reader(directory)
    manager.reload()
    steps = sorted(manager.all_steps())
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(
            f"no checkpoint{'' if step is None else f' of step {step}'} in {directory};"
            f" there are {steps or 'none'}"
        )
    step = steps[-1] if step is None else step
    return manager, step, f"checkpoint {directory}/{step}"


def read_config(directory: str, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """The configuration that a checkpoint was made with.

    Args:
      directory: of the checkpoints.
      step: which one; None takes the newest.

    Returns:
      (its step, the configuration as nested dictionaries).

    Raises:
      FileNotFoundError: there is none.
      DamagedError: its files are damaged.
    """
    manager, step, where = _newest(directory, step)
    return step, _reading(where, lambda: _read_config(manager, step))["config"]


def read_params(
    directory: str, like: PyTree, *, identity: Mapping[str, Any], step: int | None = None
) -> tuple[int, PyTree]:
    """Only the parameters of a checkpoint, for evaluation and generation.

    Args:
      directory: of the checkpoints.
      like: shapes and shardings of the parameters.
      identity: what must match; entries of the checkpoint's identity that it lacks are free.
      step: which one; None takes the newest.

    Returns:
      (its step, the parameters).

    Raises:
      FileNotFoundError: there is none.
      MismatchError: it is of another model.
      DamagedError: its files are damaged.
    """
    manager, step, where = _newest(directory, step)
    stored = _reading(where, lambda: _read_config(manager, step))
    _compare_identity(where, stored, config_lib.plain(identity), partial=True)
    shapes = _reading(where, lambda: manager.item_metadata(step)["state"].tree)["state"]
    wanted = {f"params/{name}": leaf for name, leaf in flatten(like).items()}
    _compare_shapes(where, {k: v for k, v in shapes.items() if k.startswith("params/")}, wanted)
    checksums = {name: np.zeros((), np.uint32) for name in wanted}
    tree = {"state": wanted, "checksum": checksums}
    tree = _reading(where, lambda: _read_arrays(manager, step, tree, partial=True))
    _verify(where, tree["state"], tree["checksum"])
    flat = {name.removeprefix("params/"): leaf for name, leaf in tree["state"].items()}
    return step, unflatten(flat, like)
