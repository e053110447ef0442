"""The training loop: steps, metrics, evaluation, checkpoints, and every way to stop."""

import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

import memjax
from memjax import data
from memjax.evaluation import losses, perplexity
from memjax.evaluation.placement import place
from memjax.training import disk, report
from memjax.training import metrics as metrics_lib
from memjax.training import run as run_lib
from memjax.training import state as state_lib
from memjax.training.checkpoint import Checkpoints, NonFiniteError
from memjax.training.lock import exclusive
from memjax.training.signals import StopSignals

FULL = (
    "make room and run the same command again, which goes on from the last complete checkpoint"
    " (--config.train.keep=1 keeps only one; --config.train.checkpoint_dir=DIR keeps them in DIR)"
)


class Summary(NamedTuple):
    """How a run ended.

    Args:
      step: optimiser steps taken in all.
      stopped: "finished", "until", "SIGTERM" or "SIGINT".
      resumed: the step that it started from.
      validation: the last evaluation, or None.
      seconds: time in the loop.
      tokens_per_second: counted tokens over the time in training steps, without compiling.
      report: directory of the report, or None when the run is not finished.
    """

    step: int
    stopped: str
    resumed: int
    validation: perplexity.Result | None
    seconds: float
    tokens_per_second: float
    report: str | None


def train(
    config: ConfigDict | Mapping[str, Any],
    workdir: str,
    *,
    until: int | None = None,
    forward: losses.Forward = losses.forward,
) -> Summary:
    """Trains, from the newest checkpoint of the work directory when there is one.

    The work directory gets `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and, at
    the end, `report/`. A run that is stopped (by `until`, SIGTERM or Ctrl-C) saves first; the same
    call goes on from there and gives, to the bit, what the run would have given without the stop.

    Args:
      config: see `training.config`.
      workdir: directory of the run; made when missing.
      until: stop after this many steps in all, as if interrupted; the schedule is not shortened.
      forward: (model, batch, key) -> (logits, statistics), for losses with noise of their own.

    Returns:
      How the run ended.

    Raises:
      ValueError: a bad configuration, or checkpoints in `workdir` with `train.resume` off.
      NonFiniteError: a loss or gradient that is not finite; the last checkpoint stays.
      OSError: the disk is full, among others; the last complete checkpoint stays.
      MismatchError, DamagedError: of `training.checkpoint`.
    """
    run = run_lib.build(config)
    # What the configuration may get wrong comes first, so that an error leaves nothing behind.
    _ = run.abstract_state
    pipeline, validation = run.training_data(), run.validation_data()
    _say(run, f"{pipeline.describe()}\n{validation.describe()}")
    if jax.process_index() == 0 and (unfit := held_out_warning(run, pipeline, validation)):
        logging.warning("%s", unfit)
    with disk.explained(workdir, FULL):
        os.makedirs(workdir, exist_ok=True)
        with exclusive(workdir):
            return _train_from_checkpoints(run, workdir, until, forward, pipeline, validation)


def _train_from_checkpoints(run, workdir, until, forward, pipeline, validation) -> Summary:
    checkpoints = Checkpoints(
        run_lib.checkpoint_dir(run.config, workdir),
        identity=run.identity,
        config=run.config,
        keep=run.train.keep,
    )
    try:
        with jax.set_mesh(run.mesh), StopSignals() as signals:
            return _train(run, workdir, checkpoints, signals, until, forward, pipeline, validation)
    except NonFiniteError as error:
        checkpoints.wait()
        steps = checkpoints.steps()
        kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "none was saved so far"
        raise NonFiniteError(
            f"{error}. Training stopped; {kept} in {checkpoints.directory}. {_advice(run)}"
        ) from None
    finally:
        checkpoints.close()


def _advice(run: run_lib.Run) -> str:
    """What to try against a loss that is not finite."""
    clip = "a smaller --config.train.clip" if run.train.clip else "--config.train.clip=1.0"
    ways = ["a lower --config.train.lr", "a longer --config.train.warmup", clip]
    if run.model.dtype != "float32":
        ways.append("--config.model.dtype=float32")
    return (
        f"Try {', '.join(ways[:-1])} or {ways[-1]}; if it stops at the same step again, that"
        " checkpoint may be ruined already: begin anew in another --workdir"
    )


def _begin(run, checkpoints, pipeline) -> tuple[state_lib.TrainState, int]:
    """The state to start from, and its step; the pipeline is moved there too."""
    if checkpoints.steps() and not run.train.resume:
        raise ValueError(
            f"{checkpoints.directory} holds checkpoints up to step {checkpoints.steps()[-1]} but"
            " train.resume is off: give another --workdir, or --config.train.resume=true"
        )
    found = checkpoints.restore(run.abstract_state, on_damage=run.train.on_damage)
    if found is None:
        key = jax.random.key(run.config["seed"])
        return state_lib.start(run.make_model, run.optimizer, run.mesh, key), 0
    state, data_state = found
    pipeline.set_state(data_state)
    _say(run, f"continuing from step {int(state.step)} of {checkpoints.directory}")
    return state, int(state.step)


def _train(run, workdir, checkpoints, signals, until, forward, pipeline, held_out) -> Summary:
    began = time.perf_counter()
    state, first = _begin(run, checkpoints, pipeline)
    if jax.process_index() == 0:
        with open(os.path.join(workdir, "config.json"), "w", encoding="utf-8") as file:
            json.dump(run.config, file, indent=1)
    take_step = run.compiled_step(forward)
    evaluate_params = _evaluator(run, held_out)
    options, total = run.train, run.train.steps
    last = total if until is None else min(until, total)
    if first < last:
        _say(run, f"{title(run)}, {devices(run)}; compiling, which the first step waits for")
    meter = metrics_lib.Meter()
    step, stopped, validation = first, None, None
    with metrics_lib.Writer(workdir, first) as writer, _bar(run, first) as bar:
        while step < last and not stopped:
            state, found = take_step(state, place(next(pipeline), run.mesh))
            step += 1
            meter.push(step, found)
            if step == first + 1:
                meter.restart_clock()  # it was compiled
                _restart(bar, step)
            else:
                bar.update()
            stopped = signals.received(step)
            ending = step == last or stopped is not None
            save = ending or step % options.checkpoint_every == 0
            validate = options.evaluate_every and step % options.evaluate_every == 0
            if ending or save or validate or step % options.log_every == 0:
                values = meter.take()
                writer.write("train", step, values)
                _show(bar, values)
            if save:
                checkpoints.save(state, pipeline.get_state())
            if validate and step < total and not stopped:
                validation = evaluate_params(state.params)
                writer.write("validation", step, validation._asdict())
            if save or validate:
                meter.restart_clock()
        if step >= total and not stopped:
            stopped = "finished"
            validation = evaluate_params(state.params)
            writer.write("validation", step, validation._asdict())
    checkpoints.wait()
    summary = Summary(
        step=step,
        stopped=stopped or "until",
        resumed=first,
        validation=validation,
        seconds=time.perf_counter() - began,
        tokens_per_second=meter.tokens_per_second,
        report=None,
    )
    if summary.stopped != "finished" or jax.process_index() != 0:
        return summary
    return summary._replace(report=report.write(workdir, describe(run, summary)))


def _say(run: run_lib.Run, text: str) -> None:
    if run.train.progress and jax.process_index() == 0:
        tqdm.write(text, file=sys.stderr)


def _bar(run: run_lib.Run, first: int) -> tqdm:
    return tqdm(
        total=run.train.steps,
        initial=first,
        unit="step",
        disable=not run.train.progress or jax.process_index() != 0,
        dynamic_ncols=True,
    )


def _restart(bar: tqdm, step: int) -> None:
    """Starts the bar's clock at this step: the time before it was not that of steps."""
    bar.unpause()
    bar.initial = bar.n = bar.last_print_n = step
    bar.refresh()


def _show(bar: tqdm, values: Mapping[str, float]) -> None:
    speed = values.get("tokens_per_second")
    bar.set_postfix_str(
        f"loss {values['loss']:.3f}, {values['bits_per_byte']:.3f} bits/byte"
        + ("" if speed is None else f", {speed:.0f} tok/s")
    )


def _evaluator(run: run_lib.Run, pipeline: data.Pipeline):
    """params -> the result on the validation split; compiled once, one pipeline for all passes."""
    step = perplexity.make_step(run.graphdef, run.byte_lengths, run.mesh)

    def evaluate(params) -> perplexity.Result:
        pipeline.reset()
        return perplexity.run(step, params, pipeline, mesh=run.mesh)

    return evaluate


def evaluate(run: run_lib.Run, params: Any) -> perplexity.Result:
    """The parameters of a run on its validation split.

    Args:
      run: of `run.build`.
      params: on the mesh of the run.

    Returns:
      The result over all hosts.
    """
    return _evaluator(run, run.validation_data())(params)


def held_out_warning(
    run: run_lib.Run, training: data.Pipeline, validation: data.Pipeline
) -> str | None:
    """What is odd about the size of the validation split, or None.

    Args:
      run: of `run.build`.
      training, validation: its pipelines.

    Returns:
      A sentence where the held-out share is under a fifth or over five times the
      `validation_fraction` that was asked for, or where validation has less than four rows.
    """
    settings, counts = run.config["data"], validation.statistics
    remedy = "give --config.data.validation_source=PATH, or more and smaller files"
    if counts["tokens"] < 4 * counts["context"]:
        return (
            f"validation has {counts['bytes']:,} bytes, {counts['tokens']:,} tokens, which is less"
            f" than four rows of {counts['context']:,}: its loss says little; {remedy}"
        )
    if settings["validation_source"] or settings["source"].startswith("hf:"):
        return None
    share = counts["bytes"] / (counts["bytes"] + training.statistics["bytes"])
    asked = settings["validation_fraction"]
    if asked / 5 <= share <= 5 * asked:
        return None
    return (
        f"validation holds {share:.1%} of the bytes although data.validation_fraction is"
        f" {asked:.1%}: whole files are held out, and these are few or of unequal size; {remedy}"
    )


def title(run: run_lib.Run) -> str:
    """The blocks of a model and how many parameters it has."""
    return f"{'-'.join(run.model.pattern)}, {run.parameters:,} parameters"


def devices(run: run_lib.Run) -> str:
    """How many devices of which kind a run uses."""
    return f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"


def training_time(summary: Summary) -> str:
    """The time in the loop, what it includes, and which steps it was for."""
    since = f", from step {summary.resumed} on" if summary.resumed else ""
    return f"{summary.seconds:.0f} s{since}, with compiling, evaluating and saving"


def describe(run: run_lib.Run, summary: Summary) -> dict[str, Any]:
    """The numbers and texts at the top of a report."""
    result = summary.validation
    numbers = {} if result is None else result.scalars()
    return {
        "name": title(run),
        "parameters": run.parameters,
        "steps": summary.step,
        **{f"validation_{name}": value for name, value in numbers.items()},
        "data": run.config["data"]["source"],
        "tokenizer": run.tokenizer.name,
        "seed": run.config["seed"],
        **({} if summary.resumed == summary.step else {"training_time": training_time(summary)}),
        "devices": devices(run),
        "mesh": " ".join(f"{name}={size}" for name, size in run.mesh.shape.items()),
        "context": run.context,
        "batch": run.train.batch,
        "memjax": memjax.__version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "numpy": np.__version__,
    }
