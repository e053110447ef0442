"""The numbers of a run: summed over steps, checked, written to TensorBoard and as JSON lines."""

import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from memjax.typing import Array

FILE = "metrics.jsonl"


class NonFiniteError(FloatingPointError):
    """The loss, a gradient or the state is nan or infinite."""


class Meter:
    """Adds up the metrics of the steps since the last log line, one step behind the device.

    Reading a step's metrics waits for it, so the next step is sent off first. All are checked.
    """

    def __init__(self):
        self._pending: deque = deque()
        self._seconds = self._timed = 0.0
        self._clear()
        self.restart_clock()

    def _clear(self) -> None:
        self._sums = dict.fromkeys(("nats", "tokens", "bytes"), 0.0)
        self._last: dict[str, float] = {}
        self._untimed = 0.0

    def restart_clock(self) -> None:
        """From here on time counts as training time, and tokens as those of that time."""
        self._drain()
        self._untimed = self._sums["tokens"]
        self._since = time.perf_counter()

    def push(self, step: int, metrics: Mapping[str, Array]) -> None:
        """Takes what a step returned; raises NonFiniteError about the step before it."""
        self._pending.append((step, metrics))
        if len(self._pending) > 1:
            self._collect()

    def _collect(self) -> None:
        step, metrics = self._pending.popleft()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(values[name]):
                raise NonFiniteError(f"{name} is {values[name]} at step {step}")
        for name in self._sums:
            self._sums[name] += values.pop(name)
        self._last = values

    def _drain(self) -> None:
        while self._pending:
            self._collect()

    def take(self) -> dict[str, float]:
        """Waits for all steps so far and starts the sums anew.

        Returns:
          Metrics since the last call: `loss` and `bits_per_byte` over all its steps,
          `tokens_per_second` (if any step was timed), the others of the last step.

        Raises:
          NonFiniteError: a loss or a gradient is not finite.
        """
        self._drain()
        now, sums, values = time.perf_counter(), self._sums, dict(self._last)
        values["loss"] = sums["nats"] / (sums["tokens"] or 1.0)
        values["bits_per_byte"] = sums["nats"] / math.log(2) / (sums["bytes"] or 1.0)
        timed = sums["tokens"] - self._untimed
        if timed:
            values["tokens_per_second"] = timed / (now - self._since)
            self._timed += timed
            self._seconds += now - self._since
        self._clear()
        self._since = now
        return values

    @property
    def tokens_per_second(self) -> float:
        """Of all timed tokens up to the last `take`; 0 when there are none."""
        return self._timed / self._seconds if self._timed else 0.0


def _number(x: Any) -> Any:
    """A value that JSON can hold; nan and infinities as strings, since JSON has none."""
    x = np.asarray(x).tolist()
    if isinstance(x, list):
        return [_number(value) for value in x]
    return x if not isinstance(x, float) or math.isfinite(x) else str(x)


class Writer:
    """Appends to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard`; only on the first host.

    Args:
      workdir: directory of the run; made when missing.
      step: the step that the run continues from. What an earlier, cut-off run logged after it is
        superseded: a reader drops it.
    """

    def __init__(self, workdir: str, step: int = 0):
        self._file = None
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter  # slow to import

        os.makedirs(workdir, exist_ok=True)
        self._file = open(os.path.join(workdir, FILE), "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(
            os.path.join(workdir, "tensorboard"), purge_step=step + 1 if step else None
        )
        try:
            self._line({"kind": "start", "step": step})
        except OSError as error:
            self.__exit__(type(error), error, None)
            raise

    def _line(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes scalars (and, to the JSON lines only, arrays) of a step.

        Args:
          kind: "train" or "validation": the TensorBoard group, and the field `kind` of the line.
          step: optimiser steps taken.
          values: by name.
        """
        if self._file is None:
            return
        self._line({"kind": kind, "step": step, **{k: _number(v) for k, v in values.items()}})
        for name, value in values.items():
            if np.ndim(value) == 0:
                tag = name if "/" in name else f"{kind}/{name}"
                self._board.add_scalar(tag, float(value), step)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc) -> None:
        if self._file is None:
            return
        try:
            self._file.close()
            self._board.close()
        except OSError:
            # Its exit handler would try once more, and print a traceback below the error.
            events = self._board.file_writer.event_writer
            events._worker.stop()
            events._closed = True
            if exc[0] is None:  # else that is what went wrong first
                raise


def read(workdir: str) -> dict[str, list[dict[str, Any]]]:
    """The lines of `metrics.jsonl` by kind, without what a restart has superseded.

    Args:
      workdir: directory of the run.

    Returns:
      For "train" and "validation", the lines in order of their steps.
    """
    lines: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "validation": {}}
    path = os.path.join(workdir, FILE)
    if not os.path.exists(path):
        return {kind: [] for kind in lines}
    with open(path, encoding="utf-8") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # the run was cut off while it wrote
                continue
            if line["kind"] == "start":
                for kind in lines:
                    lines[kind] = {s: x for s, x in lines[kind].items() if s <= line["step"]}
            elif line["kind"] in lines:
                lines[line["kind"]][line["step"]] = line
    return {kind: [found[step] for step in sorted(found)] for kind, found in lines.items()}
