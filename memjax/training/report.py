"""The report of a run: loss curve, loss by position in the context, and the numbers, as files."""

import itertools
import json
import math
import os
from typing import Any

import numpy as np
from absl import logging

from memjax.training import metrics

NO_PLOTS = 'no figures: they need matplotlib; install it with `pip install "memjax[plot]"`'

SEEN = "tokens of the document seen"


def figure_class():
    """matplotlib's Figure (which draws without a screen), or None when it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure


def _numbers(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(x["step"], float(x[name])) for x in lines if name in x]
    return np.array([s for s, _ in pairs]), np.array([value for _, value in pairs])


def _loss_curve(figure_type, history, path: str) -> None:
    figure = figure_type(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for kind, style in (("train", "-"), ("validation", "o-")):
        steps, values = _numbers(history[kind], "bits_per_byte")
        if len(steps):
            axes.plot(steps, values, style, label=kind, linewidth=1, markersize=4)
    axes.set(xlabel="step", ylabel="bits per byte", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def buckets(
    loss: np.ndarray, count: np.ndarray, most: int = 16
) -> list[tuple[int, int, float, float]]:
    """Loss by position, averaged over stretches that grow with the position.

    Args:
      loss: [T] mean loss at each position.
      count: [T] how many tokens each mean is over.
      most: about how many stretches.

    Returns:
      (first position, one past the last, mean loss weighted by count, tokens), without empty ones.
    """
    time = len(loss)
    edges = np.unique(np.round(np.geomspace(1, time + 1, most + 1)).astype(int)) - 1
    found = []
    for first, end in itertools.pairwise(edges):
        tokens = float(count[first:end].sum())
        if tokens:
            total = float(np.nansum(loss[first:end] * count[first:end]))
            found.append((int(first), int(end), total / tokens, tokens))
    return found


def seen(first: int, end: int) -> str:
    """A stretch of `buckets` in words: how many tokens of the document were seen before the target.

    Position p has seen p + 1 tokens, the one that begins the document among them.
    """
    return str(end) if end == first + 1 else f"{first + 1}-{end}"


def _position_curve(figure_type, stretches, path: str) -> None:
    figure = figure_type(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([(a + b - 1) / 2 + 1 for a, b, *_ in stretches], [x[2] for x in stretches], "o-")
    axes.set(
        xlabel=f"{SEEN} in this row",
        ylabel="loss (nats a token)",
        title="Loss by position in the context (validation)",
        xscale="log",
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def evaluation_path(workdir: str, step: int, config: dict[str, Any]) -> str:
    """Where the numbers of an evaluation go, so that those of other settings are kept.

    Args:
      workdir: directory of the run.
      step: of the checkpoint.
      config: the whole configuration of the evaluation.

    Returns:
      `<workdir>/evaluation-<step>.json`, or with -2, -3 ... at the end: the first that does not
      exist or has the same configuration.
    """
    config = json.loads(json.dumps(config))
    for number in itertools.count(1):
        name = f"evaluation-{step}" + (f"-{number}" if number > 1 else "")
        path = os.path.join(workdir, f"{name}.json")
        try:
            with open(path, encoding="utf-8") as file:
                there = json.load(file)
        except FileNotFoundError:
            return path
        except ValueError:  # damaged: kept
            continue
        if isinstance(there, dict) and there.get("config") == config:
            return path


def write(workdir: str, summary: dict[str, Any]) -> str:
    """Writes `<workdir>/report/`: report.md, report.json, loss.png, position.png.

    The curves come from `metrics.jsonl`; loss by position from its last validation. Without
    matplotlib the figures are left out and the report says how to get them.

    Args:
      workdir: directory of the run.
      summary: named numbers and texts of the run, as the loop gives them; the median of the
        logged tokens per second is added.

    Returns:
      The directory.
    """
    directory = os.path.join(workdir, "report")
    os.makedirs(directory, exist_ok=True)
    history = metrics.read(workdir)
    validation = history["validation"]
    stretches = []
    if validation:
        last = validation[-1]
        stretches = buckets(
            np.array([float(x) for x in last["loss_by_position"]]),
            np.array([float(x) for x in last["tokens_by_position"]]),
        )

    figures = {}
    figure_type = figure_class()
    if figure_type is None:
        logging.warning("%s", NO_PLOTS)
    else:
        if history["train"] or validation:
            figures["loss.png"] = "Bits per byte during training"
            _loss_curve(figure_type, history, os.path.join(directory, "loss.png"))
        if stretches:
            figures["position.png"] = "Validation loss by position in the context"
            _position_curve(figure_type, stretches, os.path.join(directory, "position.png"))

    curve = {
        kind: [[x["step"], x["bits_per_byte"]] for x in lines] for kind, lines in history.items()
    }
    _, speeds = _numbers(history["train"], "tokens_per_second")
    if len(speeds):
        summary = {**summary, "tokens_per_second": float(np.median(speeds))}
    content = {**summary, "bits_per_byte_curve": curve, "loss_by_position": stretches}
    with open(os.path.join(directory, "report.json"), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    with open(os.path.join(directory, "report.md"), "w", encoding="utf-8") as file:
        file.write(_markdown(summary, figures, stretches))
    return directory


def number(value: Any) -> str:
    """A number as a table has it: 1,312,048, 2.810, 16.61, 1.000e-05; other things as they are."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000 or value.is_integer():
        return f"{value:,.0f}"
    return f"{value:#.4g}"


def _markdown(summary: dict[str, Any], figures: dict[str, str], stretches) -> str:
    lines = [f"# {summary.get('name', 'Run')}", "", "| | |", "|---|---|"]
    lines += [
        f"| {name.replace('_', ' ')} | {number(value)} |"
        for name, value in summary.items()
        if name != "name"
    ]
    for name, caption in figures.items():
        lines += ["", f"![{caption}]({name})"]
    if not figures:
        lines += ["", NO_PLOTS[0].upper() + NO_PLOTS[1:] + "."]
    if stretches:
        lines += ["", f"| {SEEN} | loss (nats a token) | tokens |", "|---|---|---|"]
        lines += [f"| {seen(a, b)} | {loss:.4f} | {number(n)} |" for a, b, loss, n in stretches]
    return "\n".join(lines) + "\n"
