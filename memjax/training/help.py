"""The fields of a configuration as help texts: each with its value and what it is."""

import inspect
import re
import textwrap
from typing import Any

from ml_collections import ConfigDict

from memjax.models import MemoryConfig
from memjax.training.config import SECTIONS, plain
from memjax.training.tasks import ScoreConfig

_ENTRIES = {
    "seed": "of the parameters, the order of the training rows, and every random draw.",
    "workdir": "directory of the run, where --workdir gives no other.",
    "tasks": "of a sweep, by name; see memjax.data.tasks.",
    "models": "of a sweep, by name: fields over those of the section model.",
    "dims": "of a sweep: model dimensions.",
    "lrs": "of a sweep: peak learning rates.",
    "seeds": "of a sweep: one run with each.",
}


def described(cls: type) -> dict[str, str]:
    """What the docstring of a dataclass says of its fields, under `Args:`.

    Args:
      cls: with entries `name: text` or `name, name: text`; lines that go on are indented further.

    Returns:
      The text of each name, in one line.
    """
    _, _, entries = inspect.getdoc(cls).partition("\nArgs:\n")
    entries = textwrap.dedent(re.split(r"\n(?=\S)", entries)[0])
    found = {}
    for entry in re.finditer(r"^([a-z]\w*(?:, \w+)*): (.+(?:\n\s+.+)*)", entries, re.MULTILINE):
        for name in entry[1].split(", "):
            found[name] = " ".join(entry[2].split())
    return found


def _texts() -> dict[str, str]:
    """The text of every field of every section by its dotted name."""
    sections = {**SECTIONS, "model.memory": MemoryConfig, "score": ScoreConfig}
    texts = dict(_ENTRIES)
    for section, cls in sections.items():
        texts |= {f"{section}.{name}": text for name, text in described(cls).items()}
    return texts


def _flag(value: Any) -> str:
    """A value as a flag takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def fields(config: ConfigDict, width: int = 100) -> str:
    """A line for each field of a configuration, as the flag that overrides it, and what it is.

        --config.train.lr=0.001
          peak learning rate.

    Args:
      config: of `complete`, or what a config file gives.
      width: of a line.

    Returns:
      The lines.
    """
    texts, lines = _texts(), []

    def add(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict) and value:
                add(value, f"{prefix}{name}.")
                continue
            lines.append(f"  --config.{prefix}{name}={_flag(value)}")
            if text := texts.get(prefix + name):
                lines.append(textwrap.indent(textwrap.fill(text, width - 4), "    "))

    add(plain(config), "")
    return "\n".join(lines)
