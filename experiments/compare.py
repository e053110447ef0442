"""Trains MAC, MAG, MAL, LMM and Transformer at equal parameters, several seeds, and tabulates them.

  python experiments/compare.py
  python experiments/compare.py --blocks=mac,transformer --seeds=0,1 --smoke

Each run is one of configs/compare.py in a directory of its own; a run that is there already is
not repeated, and one that was stopped goes on where it was. The table goes to standard output, and
with every figure to compare.json beside the runs.
"""

import json
import pathlib
import statistics

from absl import flags

from memjax import training
from memjax.training import cli, loop

CONFIG = pathlib.Path(__file__).resolve().parent.parent / "configs" / "compare.py"
BLOCKS = flags.DEFINE_list(
    "blocks", "mac,mag,mal,lmm,transformer", "variants of configs/compare.py"
)
SEEDS = flags.DEFINE_list("seeds", "0,1,2", "one run of each block for each")
WORKDIR = flags.DEFINE_string("workdir", "runs/compare", "directory of the runs")
SMOKE = flags.DEFINE_bool("smoke", False, "runs of seconds, to see that everything works")


def main() -> int:
    root = pathlib.Path(WORKDIR.value)
    cli.use_compilation_cache(str(root))
    rows = []
    for block in BLOCKS.value:
        for seed in SEEDS.value:
            config = cli.load_config(f"{CONFIG}:{block}{'_smoke' if SMOKE.value else ''}")
            config.seed = int(seed)
            workdir = str(root / f"{block}-{seed}")
            print(f"== {block}, seed {seed}", flush=True)
            summary = training.train(config, workdir)
            if summary.stopped != "finished":
                print(f"stopped by {summary.stopped}; run the same command again to go on")
                return 1
            run, _, params = training.load(workdir)
            rows.append(
                {
                    "block": block,
                    "seed": int(seed),
                    "parameters": run.parameters,
                    "bits_per_byte": float(loop.evaluate(run, params).bits_per_byte),
                }
            )
    (root / "compare.json").write_text(json.dumps(rows, indent=2) + "\n")
    print("\n| block | parameters | held-out bits per byte, mean | of each seed |")
    print("|---|---|---|---|")
    for block in BLOCKS.value:
        of_block = [row for row in rows if row["block"] == block]
        values = [row["bits_per_byte"] for row in of_block]
        each = ", ".join(f"{value:.3f}" for value in values)
        mean = statistics.mean(values)
        print(f"| {block} | {of_block[0]['parameters']:,} | {mean:.3f} | {each} |")
    return 0


if __name__ == "__main__":
    cli.run(main)
