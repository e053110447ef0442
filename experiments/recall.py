"""Trains models on synthetic tasks of recall and state tracking, and tabulates accuracy and state.

  python experiments/recall.py --config=configs/recall.py:smoke
  python experiments/recall.py --config=configs/recall.py:mqar --workdir=runs/mqar
  python experiments/recall.py --config=configs/recall.py:s5 --models=lmm,transformer \\
      --config.seeds="(0,)" --config.train.steps=1000

Every model of the config is trained on every task of it, in every dimension, with every seed and
learning rate. Each run leaves a JSON file when it ends, so that after a stop of any kind the same
command goes on: finished runs are skipped, the one that was cut off begins anew. At the end the
table of all that is finished, also of what --models and --tasks leave out, goes to standard output
and to <workdir>/recall.md, all figures to recall.json, and accuracy against the size of the state
to recall.png. The tasks are described in docs/tasks.md.
"""

import shlex
import sys

from absl import flags

from memjax.training import cli, sweep
from memjax.training.signals import EXIT_CODES

CONFIG = cli.define_config(of_training=False)
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the sweep (default: the config's)")
MODELS = flags.DEFINE_list("models", None, "names of the config's models to run (default: all)")
TASKS = flags.DEFINE_list("tasks", None, "names of the config's tasks to run (default: all)")
LIST = flags.DEFINE_bool("list", False, "print the runs of the sweep and leave")


def main() -> int:
    if CONFIG.value is None:
        raise ValueError("give --config=configs/recall.py, with its variant after a colon")
    everything = sweep.read(CONFIG.value)
    grid = sweep.read(CONFIG.value, only_tasks=TASKS.value, only_models=MODELS.value)
    workdir = WORKDIR.value or CONFIG.value.workdir
    if LIST.value:
        for one in grid.runs(workdir):
            print(f"{one.name}: {one.path}")
        return 0
    cli.use_compilation_cache(workdir)
    _, stopped = sweep.run(grid, workdir)
    if stopped:
        print(f"stopped by {stopped}; run the same command again to go on")
        return EXIT_CODES[stopped]
    found = sweep.kept(everything, workdir)  # also what --models left out
    print(sweep.write(workdir, found, shlex.join(["python", *sys.argv])))
    print(f"written: {workdir}/recall.json, recall.md, recall.png")
    return 0


if __name__ == "__main__":
    cli.run(main)
