"""Trains the variants of a config with several seeds, and tabulates them.

  python experiments/compare.py
  python experiments/compare.py --variants=mac,transformer --seeds=0,1 --smoke
  python experiments/compare.py --config=configs/ablation.py

By default MAC, MAG, MAL, LMM and Transformer at equal parameters, configs/compare.py. Each run has
a directory of its own; a run that is there already is not repeated, and one that was stopped goes
on where it was. The table goes to standard output, and with every figure to compare.json beside the
runs.
"""

import json
import pathlib
import statistics

from absl import flags

from memjax import training
from memjax.training import cli, loop
from memjax.training.signals import EXIT_CODES

HERE = pathlib.Path(__file__).resolve().parent.parent / "configs" / "compare.py"
CONFIG = flags.DEFINE_string("config", str(HERE), "a config file with variants")
VARIANTS = flags.DEFINE_list("variants", None, "which of them (default: all)")
SEEDS = flags.DEFINE_list("seeds", "0,1,2", "one run of each variant for each")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of the runs (default: runs/ and the name of the config, and -smoke)"
)
SMOKE = flags.DEFINE_bool("smoke", False, "runs of seconds, to see that everything works")


def main() -> int:
    end = "-smoke" if SMOKE.value else ""
    root = pathlib.Path(WORKDIR.value or f"runs/{pathlib.Path(CONFIG.value).stem}{end}")
    seeds = cli.numbers(SEEDS, 0)
    variants = VARIANTS.value or cli.variants(CONFIG.value)
    if not variants:
        raise ValueError(f"{CONFIG.value} has no VARIANTS: give --variants")
    configs = {
        variant: cli.load_config(f"{CONFIG.value}:{variant}{end.replace('-', '_')}")
        for variant in variants
    }
    cli.use_compilation_cache(str(root))
    rows = []
    for variant, config in configs.items():
        for seed in seeds:
            config.seed = seed
            workdir = str(root / f"{variant}-{seed}")
            print(f"== {variant}, seed {seed}", flush=True)
            summary = training.train(config, workdir)
            if summary.stopped != "finished":
                print(f"stopped by {summary.stopped}; run the same command again to go on")
                return EXIT_CODES[summary.stopped]
            run, _, params = training.load(workdir)
            rows.append(
                {
                    "variant": variant,
                    "seed": seed,
                    "parameters": run.parameters,
                    "bits_per_byte": float(loop.evaluate(run, params).bits_per_byte),
                }
            )
    (root / "compare.json").write_text(json.dumps(rows, indent=2) + "\n")
    print("\n| variant | parameters | held-out bits per byte, mean | of each seed |")
    print("|---|---|---|---|")
    for variant in configs:
        of_variant = [row for row in rows if row["variant"] == variant]
        values = [row["bits_per_byte"] for row in of_variant]
        each = ", ".join(f"{value:.3f}" for value in values)
        mean = statistics.mean(values)
        print(f"| {variant} | {of_variant[0]['parameters']:,} | {mean:.3f} | {each} |")
    return 0


if __name__ == "__main__":
    cli.run(main)
