"""The runs of a sweep, one after another, each kept as a JSON file when it ends."""

import dataclasses
import json
import math
import os
import platform
import sys
import time
from typing import NamedTuple

import jax
from tqdm import tqdm

import memjax
from memjax import checks
from memjax.evaluation import recall
from memjax.training import config as config_lib
from memjax.training.lock import exclusive
from memjax.training.signals import StopSignals
from memjax.training.sweep.grid import Run, Sweep
from memjax.training.tasks import Outcome, Stopped, TaskTrainer

LOG_SECONDS = 60  # between two lines about a run that goes on, where there is no terminal


class Record(NamedTuple):
    """What is kept of a finished run, in its JSON under `result`.

    Args:
      accuracy, exact, loss, rows: of the last test; loss is None where it was not finite.
      steps, seconds, diverged: of the training, see `tasks.Outcome`.
      parameters: how many the model has.
      state_bytes: what it carries from token to token, see `recall.state_bytes`.
    """

    accuracy: float
    exact: float
    loss: float | None
    rows: int
    steps: int
    seconds: float
    diverged: int | None
    parameters: int
    state_bytes: int


def finished(run: Run) -> Record | None:
    """The result of a run, when it has one.

    Raises:
      ValueError: its file is damaged, or of a run with other settings; names the file.
    """
    if not os.path.exists(run.path):
        return None
    try:
        with open(run.path, encoding="utf-8") as file:
            content = json.load(file)
        if not isinstance(content["run"], dict):
            raise TypeError("its settings are no mapping")
        saved = config_lib.with_new_fields(content["run"], run.identity())
        record = Record(**content["result"])
        _check(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{run.path} is not the result of a run ({type(error).__name__}: {error}); delete it,"
            " and the same command makes it again"
        ) from error
    if found := config_lib.difference(saved, run.identity()):
        field, was, now = found
        raise ValueError(
            f"{run.path} is of a run with {field} = {was!r}, but this sweep has {now!r}: give"
            " another --workdir, or delete it"
        )
    return record


def _check(record: Record) -> None:
    """Raises ValueError where a field is not of its type, or out of range."""
    for name in ("accuracy", "exact", "seconds"):
        checks.real(name, getattr(record, name), least=0.0)
    for name in ("accuracy", "exact"):
        if getattr(record, name) > 1:
            raise ValueError(f"{name} {getattr(record, name)!r} is not between 0 and 1")
    if record.loss is not None:
        checks.real("loss", record.loss)
    for name in ("rows", "steps", "parameters", "state_bytes"):
        checks.whole(name, getattr(record, name), 0)
    if record.diverged is not None:
        checks.whole("diverged", record.diverged, 0)


def kept(sweep: Sweep, workdir: str) -> list[tuple[Run, Record]]:
    """All finished runs of a sweep that `workdir` has, without those of other settings."""
    found = []
    for one in sweep.runs(workdir):
        try:
            record = finished(one)
        except ValueError as error:
            _say(True, f"left out of the table: {error}")
            continue
        if record is not None:
            found.append((one, record))
    return found


def _save(run: Run, record: Record) -> None:
    """Writes the JSON, which is there in full or not at all."""
    os.makedirs(os.path.dirname(run.path), exist_ok=True)
    content = {"run": run.identity(), "result": record._asdict(), "versions": versions()}
    part = run.path + ".part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(part, run.path)


def versions() -> dict[str, str]:
    """Of what a result may depend on, with the kind of device."""
    return {
        "memjax": memjax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def run(
    sweep: Sweep, workdir: str, *, progress: bool = True
) -> tuple[list[tuple[Run, Record]], str | None]:
    """Runs what is not finished, with a line on standard error for each run.

    Each run leaves `<workdir>/runs/<task>/<model>-d<dim>-s<seed>-lr<lr>.json` when it ends, and
    nothing before: after a stop of any kind the same call skips the finished ones and begins the
    one that was cut off anew. A learning rate that reached `score.stop` is enough: those after it
    are not tried for that seed.

    Args:
      sweep: of `read`.
      workdir: directory of the sweep; made when missing.
      progress: show lines and a bar.

    Returns:
      ([(run, record), ...] of all finished runs, the signal that stopped it or None).

    Raises:
      ValueError: a damaged file, one of other settings, another sweep at work in `workdir`, or
        more than one host.
    """
    if jax.process_count() > 1:
        raise ValueError("a sweep runs on one host: start others with tasks of their own")
    os.makedirs(workdir, exist_ok=True)
    with exclusive(workdir), StopSignals() as signals:
        everything = sweep.runs(workdir)
        records = {one.path: finished(one) for one in everything}  # complains before any work
        waiting = [one for one in everything if not _settled(one, everything, records)]
        done = len(everything) - len(waiting)
        _say(progress, f"{len(everything)} runs, {done} of them finished already, in {workdir}")
        began, cell, trainer = time.perf_counter(), None, None
        for number, one in enumerate(waiting, 1):
            if _settled(one, everything, records):
                continue  # solved since, at another rate
            if one.cell is not cell:
                # A copy: its compiled programs go when the next cell comes.
                cell, trainer = one.cell, dataclasses.replace(one.cell.trainer)
            record = _run_one(one, trainer, signals, progress)
            if record is not None:
                records[one.path] = record
                _save(one, record)
                left = (time.perf_counter() - began) / number * (len(waiting) - number)
                place = f"[{number}/{len(waiting)}]"
                _say(progress, f"{place} {_line(one, record)}; {duration(left)} left")
            if signals.received(number):
                break
        found = [(one, record) for one in everything if (record := records[one.path])]
        complete = all(_settled(one, everything, records) for one in everything)
        return found, None if complete else signals.received(0)


def _settled(one: Run, everything: list[Run], records: dict[str, Record | None]) -> bool:
    """Whether a run has a result, or its seed is solved at another learning rate."""
    of_seed = (
        records[other.path]
        for other in everything
        if other.cell is one.cell and other.seed == one.seed
    )
    stop = one.cell.trainer.score.stop
    return records[one.path] is not None or any(r and r.accuracy >= stop for r in of_seed)


def _run_one(one: Run, trainer: TaskTrainer, signals: StopSignals, progress: bool) -> Record | None:
    """The result of a run, or None when a signal stopped it."""
    terminal = sys.stderr.isatty()
    said = time.perf_counter()
    with tqdm(
        total=trainer.train.steps,
        desc=one.name,
        unit="step",
        leave=False,
        dynamic_ncols=True,
        # In a log file the old bars would bury the lines: a line now and then instead.
        disable=not progress or not terminal,
    ) as bar:

        def keep_going(step: int, loss: float) -> bool:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update(step - bar.n)
            nonlocal said
            if not terminal and time.perf_counter() - said >= LOG_SECONDS:
                said = time.perf_counter()
                _say(progress, f"{one.name}: step {step} of {trainer.train.steps}, loss {loss:.3f}")
            return signals.received(step) is None

        try:
            outcome = trainer.run(one.seed, one.lr, keep_going=keep_going)
        except Stopped:
            return None
    return _record(trainer, outcome)


def _record(trainer: TaskTrainer, outcome: Outcome) -> Record:
    score = outcome.score
    return Record(
        accuracy=score.accuracy,
        exact=score.exact,
        loss=score.loss if math.isfinite(score.loss) else None,
        rows=score.rows,
        steps=outcome.steps,
        seconds=outcome.seconds,
        diverged=outcome.diverged,
        parameters=trainer.parameters,
        state_bytes=recall.state_bytes(trainer.model),
    )


def _line(one: Run, record: Record) -> str:
    after = f"{record.steps} steps, {duration(record.seconds)}"
    if record.diverged is not None:
        return f"{one.name}: diverged ({after})"
    return f"{one.name}: accuracy {record.accuracy:.3f} ({after})"


def duration(seconds: float) -> str:
    """A time in words: 8 s, 3 min 20 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _say(progress: bool, text: str) -> None:
    if progress:
        tqdm.write(text, file=sys.stderr)
