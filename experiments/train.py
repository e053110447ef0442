"""Trains a language model from a config file, going on from the work directory's last checkpoint.

  python experiments/train.py --config=configs/quickstart.py:smoke --workdir=runs/smoke
  python experiments/train.py --config=configs/quickstart.py --config.train.lr=1e-3
  python experiments/train.py --config=configs/titans.py:mac_340m --config.mesh.fsdp=16

Run it again after a stop of any kind and it continues. SIGTERM and Ctrl-C finish the step and save;
the exit status is then 143 or 130, which schedulers take as "not done yet". Docs: docs/training.md.
"""

import jax
from absl import flags

from memjax.training import cli, train
from memjax.training.signals import EXIT_CODES

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run (default: the config's)")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "several hosts (a TPU pod slice): call jax.distributed.initialize()"
)


def main() -> int:
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    if CONFIG.value is None:
        raise ValueError(
            f"give --config=FILE, with its variant after a colon; {cli.configs_there()}"
        )
    config = CONFIG.value
    workdir = WORKDIR.value or config.workdir
    cli.use_compilation_cache(workdir)
    summary = train(config, workdir)
    if jax.process_index() != 0:
        return EXIT_CODES.get(summary.stopped, 0)
    if summary.stopped in EXIT_CODES:
        print(
            f"stopped by {summary.stopped} after step {summary.step}, which is saved in {workdir};"
            " run the same command again to go on"
        )
        return EXIT_CODES[summary.stopped]
    result = summary.validation
    speed = f"; {summary.tokens_per_second:.0f} tokens/s"
    if summary.resumed == summary.step:
        print(f"{workdir} was finished already; it was evaluated again and not trained")
        speed = ""
    print(
        f"step {summary.step}: validation loss {result.loss:.4f},"
        f" {result.bits_per_byte:.4f} bits per byte, perplexity {result.perplexity:.2f}"
        f"{speed}\nreport: {summary.report}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
