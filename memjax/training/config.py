"""The sections of a configuration, their defaults, and how a bad key is answered.

A configuration is an `ml_collections.ConfigDict` with the sections `model` (`LanguageModelConfig`),
`data` (`DataConfig`), `train`, `evaluate`, `mesh` and the entries `seed` and `workdir`.
`complete` writes every default into it, so that each field can be overridden on the command line
and the file that is stored beside the results says everything.
"""

import dataclasses
import difflib
import numbers
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from memjax.data import DataConfig
from memjax.models import LanguageModelConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The `train` section.

    Args:
      steps: optimiser steps in all; the learning rate reaches its end there.
      batch: rows of one optimiser step, summed over all hosts.
      context: tokens of a row; None takes `model.context`.
      accumulate: microbatches that one step is cut into (same result, less memory).
      optimizer: "adamw" or "muon".
      lr: peak learning rate.
      warmup: steps of linear warm-up from 0.
      final_lr: learning rate at the end of the cosine, as a fraction of `lr`.
      weight_decay: decoupled decay, times the learning rate; see `optimizer.decay_mask`.
      clip: global gradient norm to clip to; None turns it off.
      beta1: decay of Adam's mean of gradients; Muon's own momentum is 0.95.
      beta2: decay of Adam's mean of squared gradients.
      eps: of Adam, added to the root of that mean.
      log_every: steps between two log lines.
      checkpoint_every: steps between two checkpoints.
      evaluate_every: steps between two evaluations; None evaluates only at the end.
      keep: newest checkpoints kept; None keeps all.
      resume: continue from the newest checkpoint of the work directory.
      on_damage: "stop", or "previous" to set a damaged newest checkpoint aside and use the one
        before it.
      checkpoint_dir: where checkpoints go (a path or a bucket); None means `<workdir>/checkpoints`.
      progress: show a progress bar.
    """

    steps: int = 1000
    batch: int = 8
    context: int | None = None
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    warmup: int = 100
    final_lr: float = 0.1
    weight_decay: float = 0.1
    clip: float | None = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    log_every: int = 10
    evaluate_every: int | None = 250
    checkpoint_every: int = 250
    keep: int | None = 3
    resume: bool = True
    on_damage: str = "stop"
    checkpoint_dir: str | None = None
    progress: bool = True

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("context", "evaluate_every", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name} must be at least 1 or None, got {value}")
        if self.batch % self.accumulate:
            raise ValueError(
                f"train.batch {self.batch} must be a multiple of train.accumulate {self.accumulate}"
            )
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(
                f"train.warmup {self.warmup} must lie between 0 and train.steps {self.steps}"
            )
        if self.on_damage not in ("stop", "previous"):
            raise ValueError(
                f'train.on_damage must be "stop" or "previous", got {self.on_damage!r}'
            )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """The `evaluate` section.

    Args:
      batch: rows of one evaluation step; None takes `train.batch`.
      context: tokens of a row; None takes that of training.
      batches: at most this many steps; None reads the whole validation split.
    """

    batch: int | None = None
    context: int | None = None
    batches: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"evaluate.{field.name} must be at least 1 or None, got {value}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The `mesh` section; a size of -1 (for one axis) takes the devices that are left.

    Args:
      data: devices that split the rows of a batch.
      fsdp: devices that split the rows, the parameters and the optimiser's state.
      tensor: devices that split heads and hidden units.
      sequence: devices that split the tokens of a row.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1


SECTIONS = {
    "model": LanguageModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "mesh": MeshConfig,
}
ENTRIES = ("seed", "workdir")


def nearest(key: str, valid: Iterable[str]) -> str:
    """The end of an error message about an unknown key: the closest valid ones.

    Args:
      key: what was written.
      valid: what would have been understood.

    Returns:
      `did you mean 'lr'?`, or the list of all valid keys when none is close.
    """
    valid = sorted(valid)
    section, _, last = key.rpartition(".")
    inside = [name for name in valid if name.startswith(section + ".")] if section else valid
    # In a section that exists the last parts are compared: the section alone makes nothing similar.
    lasts = {name: name.rpartition(".")[2] for name in inside}
    similar = difflib.get_close_matches(last, sorted(set(lasts.values())), n=3, cutoff=0.6)
    short = "".join(word[:1] for word in last.split("_"))
    if "_" in last and short in lasts.values():  # learning_rate: lr
        similar.append(short)
    close = [name for part in similar for name in inside if lasts[name] == part][:3]
    if inside and section and not close:  # the name of a field of another section
        close = [name for name in valid if name.rpartition(".")[2] == last]
    if not close and not (inside and section):
        close = difflib.get_close_matches(key, valid, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "valid keys: " + ", ".join(inside or valid)


def section(cls: type, name: str, values: Mapping[str, Any]) -> Any:
    """The dataclass of one section, from a mapping.

    Args:
      cls: `TrainConfig`, `EvaluateConfig` or `MeshConfig`.
      name: the section's name, for errors.
      values: its entries; those left out take their defaults.

    Returns:
      An instance of `cls`.

    Raises:
      ValueError: a key that the section does not have, with the nearest valid ones; a value that is
        not of the field's type.
    """
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in types:
            raise ValueError(f"unknown key {name}.{key}: {nearest(key, types)}")
        kinds = typing.get_args(types[key]) or (types[key],)
        if not any(_is(value, kind) for kind in kinds):
            wanted = " or ".join(_WORDS[kind] for kind in kinds)
            raise ValueError(f"{name}.{key} must be {wanted}, got {value!r}")
    return cls(**dict(values))


_WORDS = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "True or False",
    type(None): "None",
}


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, {int: numbers.Integral, float: numbers.Real}.get(kind, kind))


def plain(values: Any) -> Any:
    """A configuration as dictionaries, tuples and scalars only (what JSON can hold)."""
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        values = {f.name: getattr(values, f.name) for f in dataclasses.fields(values)}
    if isinstance(values, Mapping):
        return {str(key): plain(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return tuple(plain(value) for value in values)
    return values


def _defaults(cls: type) -> dict[str, Any]:
    """The default of each field of a dataclass; None for those that have none."""
    values = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            values[field.name] = plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = plain(field.default_factory())
        else:
            values[field.name] = None
    return values


def merge(defaults: Any, given: Any) -> Any:
    """`given` over `defaults`, field by field in mappings of any depth."""
    if isinstance(defaults, Mapping) and isinstance(given, Mapping):
        return {**defaults, **{key: merge(defaults.get(key), given[key]) for key in given}}
    return given


def overridable(values: Mapping[str, Any], cls: type | None = None) -> ConfigDict:
    """A ConfigDict whose fields take from a flag whatever their type allows.

    A flag takes values of the type of the one that is there. Where that would be too narrow (a
    field that may be None, or a name or a tuple of names) it takes any, and the field's own check
    judges it.

    Args:
      values: the fields; sections in them are mappings.
      cls: the dataclass that they are of; None lets only the fields that are None take any value.

    Returns:
      The fields with their values.
    """
    types = {} if cls is None else {field.name: field.type for field in dataclasses.fields(cls)}
    config = ConfigDict()
    for key, value in values.items():
        kind = types.get(key)
        origins = {typing.get_origin(part) or part for part in typing.get_args(kind)}
        if isinstance(value, Mapping):
            config[key] = overridable(value, kind if dataclasses.is_dataclass(kind) else None)
        elif value is None:
            config[key] = config_dict.placeholder(object)
        elif typing.get_origin(kind) is tuple:
            config[key] = (value,) if isinstance(value, str) else value
        elif origins & {tuple, type(None)}:
            config[key] = config_dict.FieldReference(value, field_type=object)
        else:
            config[key] = value
    return config


def complete(config: ConfigDict | Mapping[str, Any]) -> ConfigDict:
    """The configuration with every default of every section written out.

    Args:
      config: sections and entries as described at the top of this file; any may be missing.

    Returns:
      A `ConfigDict` whose every field can be overridden on the command line.

    Raises:
      ValueError: an unknown section or key, with the nearest valid ones.
    """
    given = plain(config)
    for key in given:
        if key not in SECTIONS and key not in ENTRIES:
            raise ValueError(f"unknown section {key}: {nearest(key, [*SECTIONS, *ENTRIES])}")
    values: dict[str, Any] = {}
    for name, cls in SECTIONS.items():
        defaults = _defaults(cls)
        if not isinstance(given.get(name, {}), Mapping):
            raise ValueError(f"section {name} must be a mapping, got {given[name]!r}")
        for key in given.get(name, {}):
            if key not in defaults:
                raise ValueError(f"unknown key {name}.{key}: {nearest(key, defaults)}")
        values[name] = merge(defaults, given.get(name, {}))
    values["seed"] = given.get("seed", 0)
    values["workdir"] = given.get("workdir", "runs/default")
    config = overridable({name: values[name] for name in ENTRIES})
    for name, cls in SECTIONS.items():
        config[name] = overridable(values[name], cls)
    return config


def with_new_fields(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration with the defaults of fields that were added since.

    Args:
      saved: sections of a configuration, or parts of them.
      current: the same of this version, whose fields count.

    Returns:
      `saved`, and the default of each field that only `current` has.
    """

    def fill(saved: Any, current: Any, defaults: Any) -> Any:
        if not (isinstance(saved, Mapping) and isinstance(current, Mapping)):
            return saved
        defaults = defaults if isinstance(defaults, Mapping) else {}
        new = {key: defaults[key] for key in current if key not in saved and key in defaults}
        return {
            **{key: fill(saved[key], current.get(key), defaults.get(key)) for key in saved},
            **new,
        }

    return fill(saved, current, {name: _defaults(cls) for name, cls in SECTIONS.items()})


def difference(saved: Any, current: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two plain configurations differ.

    Args:
      saved: one configuration (what `plain` returns, or what JSON made of it).
      current: the other.

    Returns:
      (dotted name, value in `saved`, value in `current`), or None when they are equal. A field that
      one of them lacks counts as None there.
    """
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for key in [*current, *(key for key in saved if key not in current)]:
            found = difference(
                saved.get(key), current.get(key), f"{path}.{key}" if path else str(key)
            )
            if found:
                return found
        return None
    if isinstance(saved, list | tuple) and isinstance(current, list | tuple):
        if len(saved) == len(current) and not any(
            difference(a, b, path) for a, b in zip(saved, current, strict=True)
        ):
            return None
        return path, saved, current
    return None if saved == current else (path, saved, current)
