"""The table of a sweep and its picture: accuracy against the size of the state."""

import json
import os
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from absl import logging

from memjax.training import report
from memjax.training.sweep.grid import Run
from memjax.training.sweep.runs import Record, versions


class Row(NamedTuple):
    """A cell in the table: of each seed, the run of the rate with the best accuracy.

    Args:
      task, model, dim: the cell.
      parameters, state_bytes: of the model.
      accuracy: mean over seeds.
      accuracies, exacts, lrs, steps: of each seed.
      diverged: how many runs of all seeds and rates did.
    """

    task: str
    model: str
    dim: int
    parameters: int
    state_bytes: int
    accuracy: float
    accuracies: tuple[float, ...]
    exacts: tuple[float, ...]
    lrs: tuple[float, ...]
    steps: tuple[int, ...]
    diverged: int


def best(found: list[tuple[Run, Record]]) -> Iterator[Row]:
    """The rows of the table: for each cell and seed, the learning rate that did best.

    As Zoology does, the rate is chosen by the accuracy that is then reported, on the same test
    rows; between equals the smaller one.

    Args:
      found: what `run` returns.
    """
    cells: dict[tuple, dict[int, list[tuple[Run, Record]]]] = {}
    for one, record in found:
        name = (one.cell.task_name, one.cell.model_name, one.cell.dim)
        cells.setdefault(name, {}).setdefault(one.seed, []).append((one, record))
    for name, seeds in cells.items():
        chosen = [max(runs, key=lambda x: (x[1].accuracy, -x[0].lr)) for runs in seeds.values()]
        records = [record for _, record in chosen]
        accuracies = tuple(record.accuracy for record in records)
        yield Row(
            *name,
            parameters=records[0].parameters,
            state_bytes=records[0].state_bytes,
            accuracy=statistics.mean(accuracies),
            accuracies=accuracies,
            exacts=tuple(record.exact for record in records),
            lrs=tuple(one.lr for one, _ in chosen),
            steps=tuple(record.steps for record in records),
            diverged=sum(r.diverged is not None for runs in seeds.values() for _, r in runs),
        )


def table(rows: list[Row]) -> str:
    """The rows as markdown.

    Args:
      rows: of `best`.
    """
    seeds = max(len(row.accuracies) for row in rows)
    lines = [
        "| task | model | dim | parameters | state bytes | accuracy | of each seed | whole rows |"
        " learning rates | steps | diverged |",
        "|---|---|---:|---:|---:|---:|---|---:|---|---|---:|",
    ]
    for row in rows:
        cells = [
            row.task,
            row.model,
            str(row.dim),
            f"{row.parameters:,}",
            f"{row.state_bytes:,}",
            f"{row.accuracy:.3f}",
            ", ".join(f"{value:.3f}" for value in row.accuracies),
            f"{statistics.mean(row.exacts):.3f}",
            ", ".join(f"{value:g}" for value in row.lrs),
            ", ".join(str(value) for value in row.steps),
            str(row.diverged),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    note = (
        f"Accuracy: share of scored positions, mean of {seeds} seed{'s' * (seeds > 1)}, each with"
        " its best learning rate by this same accuracy; whole rows: share of rows without a"
        " mistake. State: what is carried from token to token, for one row."
    )
    return "\n".join([*lines, "", note]) + "\n"


def figure(rows: list[Row], path: str) -> bool:
    """Draws accuracy against the size of the state, one panel a task, one line a model.

    Args:
      rows: of `best`.
      path: of the PNG.

    Returns:
      Whether it was drawn: without matplotlib it is not, and a warning says how to get it.
    """
    figure_type = report.figure_class()
    if figure_type is None:
        logging.warning("%s", report.NO_PLOTS)
        return False
    names = list(dict.fromkeys(row.task for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    size = (4.2 * columns + 1.8, 3.4 * lines)
    drawn = figure_type(figsize=size, layout="constrained")
    panels = drawn.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, task in zip(panels.flat, names, strict=False):
        for number, model in enumerate(models):
            points = sorted(
                (row.state_bytes, row.accuracy, min(row.accuracies), max(row.accuracies))
                for row in rows
                if (row.task, row.model) == (task, model)
            )
            if not points:
                continue
            x, y, low, high = zip(*points, strict=True)
            spread = [[b - a for a, b in zip(low, y, strict=True)],
                      [b - a for a, b in zip(y, high, strict=True)]]  # fmt: skip
            style = {"color": f"C{number % 10}", "marker": "osD^vP"[number // 10 % 6]}
            axes.errorbar(x, y, spread, label=model, linewidth=1, markersize=4, **style)
        sizes = [row.state_bytes for row in rows if row.task == task]
        axes.set_xscale("log", base=2)
        # So wide that at least two powers of two are marked.
        limits = (min(sizes) / 2, 2 * max(sizes))
        axes.set(title=task, xlabel="state (bytes a row)", xlim=limits, ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy")
    handles = {}
    for axes in panels.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    drawn.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    drawn.savefig(path, dpi=120)
    return True


def write(workdir: str, found: list[tuple[Run, Record]], command: str) -> str:
    """Writes `recall.json`, `recall.md` and `recall.png` into the directory of a sweep.

    Args:
      workdir: of the sweep.
      found: what `run` returns, at least one.
      command: that made it, for the record.

    Returns:
      The table.
    """
    rows = list(best(found))
    text = table(rows)
    content: dict[str, Any] = {
        "command": command,
        "versions": versions(),
        "rows": [row._asdict() for row in rows],
        "runs": [{"run": one.identity(), "result": record._asdict()} for one, record in found],
    }
    with open(os.path.join(workdir, "recall.json"), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    drawn = figure(rows, os.path.join(workdir, "recall.png"))
    picture = "\n![Accuracy against the size of the state](recall.png)\n" if drawn else ""
    with open(os.path.join(workdir, "recall.md"), "w", encoding="utf-8") as file:
        file.write(f"# Synthetic tasks\n\n`{command}`\n\n{text}{picture}")
    return text
