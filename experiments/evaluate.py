"""Evaluates a trained model on its validation split: loss, bits per byte, perplexity, by position.

  python experiments/evaluate.py --workdir=runs/quickstart
  python experiments/evaluate.py --workdir=runs/quickstart --step=500
  python experiments/evaluate.py --workdir=runs/quickstart \\
      --config=configs/quickstart.py --config.evaluate.context=1024 --config.data.source=my_texts/

Without --config the configuration of the checkpoint is used. The numbers are printed and written to
<workdir>/evaluation-<step>.json, those of other settings to evaluation-<step>-2.json and so on, or
to --out; the settings are in the file.
"""

import json

import jax
from absl import flags

from memjax import training
from memjax.training import cli, loop, report

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run (default: the config's)")
STEP = flags.DEFINE_integer("step", None, "which checkpoint (default: the newest)")
OUT = flags.DEFINE_string("out", None, "file for the numbers (default: in the workdir)")


def main() -> int:
    if WORKDIR.value is None and CONFIG.value is None:
        raise ValueError("give --workdir=DIRECTORY of a run, or --config=FILE")
    workdir = WORKDIR.value or CONFIG.value.workdir
    cli.use_compilation_cache(workdir)
    run, step, params = training.load(workdir, CONFIG.value, step=STEP.value)
    result = loop.evaluate(run, params)
    stretches = report.buckets(result.loss_by_position, result.tokens_by_position)
    if jax.process_index() == 0:
        for name, value in {"step": step, **result.scalars()}.items():
            print(f"{name:<16}{report.number(value)}")
        print(f"\n{report.SEEN:<30}{'loss':<12}tokens")
        for first, end, loss, tokens in stretches:
            print(f"{report.seen(first, end):<30}{loss:<12.4f}{tokens:.0f}")
        path = OUT.value or report.evaluation_path(workdir, step, run.config)
        with open(path, "w", encoding="utf-8") as file:
            content = {"step": step, **result.scalars(), "loss_by_position": stretches}
            json.dump({**content, "config": run.config}, file, indent=1)
        print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    cli.run(main)
