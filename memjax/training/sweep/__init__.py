"""Sweeps over synthetic tasks: a grid of runs, its files, its table."""

from memjax.training.sweep.grid import Cell, Run, Sweep, complete, read
from memjax.training.sweep.report import Row, best, figure, table, write
from memjax.training.sweep.runs import Record, finished, kept, run

__all__ = [
    "Cell",
    "Record",
    "Row",
    "Run",
    "Sweep",
    "best",
    "complete",
    "figure",
    "finished",
    "kept",
    "read",
    "run",
    "table",
    "write",
]
