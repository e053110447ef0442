"""The command line of the experiments: a config file with overrides, errors that say what to do."""

import functools
import importlib.util
import os
import pathlib
import re
import sys
import types
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from memjax.training import disk
from memjax.training import help as help_lib
from memjax.training.checkpoint import DamagedError, MismatchError
from memjax.training.config import complete, nearest
from memjax.training.metrics import NonFiniteError

flags.disclaim_key_flags()  # --help shows them as the script's own
HELP = (
    "config file, with its variant after a colon (configs/quickstart.py:smoke); every field of it"
    " can be overridden: --config.train.lr=1e-3, --config.mesh.data=8,"
    " --config.model.pattern=mac,transformer"
)
TRACEBACK = flags.DEFINE_bool("traceback", False, "show where in the code an error was raised")
USER_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    MismatchError,
    DamagedError,
    NonFiniteError,
)


class _ConfigParser(flags.ArgumentParser):
    """What `--config` takes: the file runs once, here and for the checks before."""

    def __init__(self, of_training: bool):
        self.of_training = of_training

    def parse(self, argument: str) -> ConfigDict:
        return load_config(argument).lock()


def define_config(*, of_training: bool = True) -> flags.FlagHolder:
    """Defines `--config` and its overrides.

    Args:
      of_training: its fields are those of `complete`; `--help` lists them without a file too.

    Returns:
      The holder of the configuration, which is None without `--config`.
    """
    holder = config_flags.DEFINE_config_file("config", None, HELP)
    flags.FLAGS["config"].parser = _ConfigParser(of_training)
    return holder


def configs_there() -> str:
    """The end of an error message: the config files beside the experiments, from here."""
    folder = pathlib.Path(sys.argv[0]).resolve().parent.parent / "configs"
    names = sorted(os.path.relpath(path) for path in folder.glob("*.py"))
    return "there are " + ", ".join(names) if names else "see docs/training.md"


def load_config(argument: str) -> ConfigDict:
    """What a config file gives.

    The file runs once in a process, unless it has changed: it may register mixers.

    Args:
      argument: `path` or `path:variant`.

    Returns:
      Its `get_config(variant)`.

    Raises:
      ValueError: no such file, an import in it that fails, no `get_config` in it, or a variant
        that it does not know.
    """
    path, _, variant = argument.partition(":")
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        found = os.listdir(folder) if os.path.isdir(folder) else []
        names = [os.path.join(os.path.dirname(path), f) for f in found if f.endswith(".py")]
        hint = nearest(path, names) if names else "give the path of a config file"
        raise ValueError(f"config file {path!r} does not exist: {hint}")
    try:
        module = _module(os.path.abspath(path), os.stat(path).st_mtime_ns)
    except ImportError as error:
        raise ValueError(f"config file {path} cannot be loaded: {error}") from error
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no function get_config(variant), so it is no config file")
    return module.get_config(variant) if variant else module.get_config()


def variants(path: str) -> tuple[str, ...]:
    """The names in a config file's `VARIANTS`, () where it has none.

    Args:
      path: of the file.
    """
    load_config(path)  # complains of what is no config file
    module = _module(os.path.abspath(path), os.stat(path).st_mtime_ns)
    return tuple(getattr(module, "VARIANTS", ()))


def numbers(flag: flags.FlagHolder, least: int) -> list[int]:
    """What a flag lists, each once.

    Args:
      flag: of `flags.DEFINE_list`.
      least: the smallest that will do.

    Raises:
      ValueError: nothing, or what is no integer of at least `least`.
    """
    words = [word.strip() for word in flag.value]
    if not words or not all(word.isdecimal() and int(word) >= least for word in words):
        raise ValueError(
            f"--{flag.name} must list integers of at least {least}, got {','.join(words)!r}"
        )
    return list(dict.fromkeys(map(int, words)))


@functools.lru_cache
def _module(path: str, changed: int) -> types.ModuleType:
    """The module of a config file, run once for each time at which it was changed."""
    stem = re.sub(r"\W", "_", pathlib.Path(path).stem)
    name = f"memjax_config_{stem}_{zlib.crc32(path.encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look it up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _keys(config: ConfigDict, prefix: str = "") -> dict[str, bool]:
    """The dotted name of every section (False) and field (True)."""
    keys = {}
    for key in config:
        section = isinstance(config[key], ConfigDict)
        keys[prefix + key] = not section
        if section:
            keys |= _keys(config[key], f"{prefix}{key}.")
    return keys


def _config_arguments(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """What `--config` was given, and the names of the overrides."""
    argument, overrides = None, []
    for i, arg in enumerate(argv):
        if arg == "--":
            break
        if match := re.fullmatch(r"--?config(?:=(.*))?", arg):
            argument = match[1] if match[1] is not None else (argv[i + 1 : i + 2] or [None])[0]
        elif match := re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=.*)?", arg):
            overrides.append(match[1])
    return argument, overrides


def check(argv: Sequence[str]) -> None:
    """Checks the config file and the names of the overrides before the flags are parsed.

    Args:
      argv: the command line.

    Raises:
      ValueError: what `load_config` raises; an override of a field that the configuration does not
        have, with the nearest ones; overrides without a config file.
    """
    argument, overrides = _config_arguments(argv)
    if argument is None:
        if overrides:
            raise ValueError(f"--config.{overrides[0]} needs --config=FILE before it")
        return
    keys = _keys(load_config(argument))
    for name in overrides:
        if name not in keys:
            raise ValueError(
                f"unknown field --config.{name}: {nearest(name, [k for k in keys if keys[k]])}"
            )


def _parse(argv: list[str]) -> list[str]:
    try:
        if any(re.fullmatch(r"--?(help|helpshort|\?)", arg) for arg in argv):
            _help(argv)
            sys.exit(0)
        if not any(re.match(r"--?help", arg) for arg in argv):
            check(argv)
        return flags.FLAGS(argv)
    except (ValueError, flags.Error) as error:
        if "--traceback" in argv:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _help(argv: Sequence[str]) -> None:
    """Prints what the script does, its flags, and the fields of the configuration."""
    text = ""
    if "config" in flags.FLAGS and isinstance(flags.FLAGS["config"].parser, _ConfigParser):
        argument, _ = _config_arguments(argv)
        text = "\nfields of the configuration"
        if argument is not None:
            text += f", as in {argument}:\n\n{help_lib.fields(load_config(argument))}\n"
        elif flags.FLAGS["config"].parser.of_training:
            text += ", with their defaults (add --config=FILE for those of a file):\n\n"
            text += f"{help_lib.fields(complete({}))}\n"
        else:
            text += ": add --config=FILE, which decides what they are\n"
    app.usage(shorthelp=True, writeto_stdout=True)
    print(text, end="")


def use_compilation_cache(workdir: str) -> None:
    """Keeps compiled programs in `xla_cache` beside the work directory, unless JAX was told where.

    Args:
      workdir: directory of the run.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = os.path.join(os.path.dirname(os.path.abspath(workdir)), "xla_cache")
        jax.config.update("jax_compilation_cache_dir", folder)


def run(main: Callable[[], Any]) -> None:
    """Parses the flags and calls `main()`; its integer, if any, is the exit status.

    An error that the user can mend is one line and exit status 1; bad flags are exit status 2.

    Args:
      main: the program.
    """

    def guarded(argv: Sequence[str]) -> Any:
        if len(argv) > 1:
            print(f"error: {argv[1]!r} is no flag; see --help", file=sys.stderr)
            return 2
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # at INFO, Orbax says much about each save
        try:
            return main()
        except USER_ERRORS as error:
            if TRACEBACK.value:
                raise
            full = isinstance(error, OSError) and error.errno in disk.NUMBERS
            hint = "; make room and run the same command again" if full else ""
            print(f"error: {error}{hint}", file=sys.stderr)
            return 1

    app.run(guarded, flags_parser=_parse)
