"""Continues a text with a trained model; the text appears as it is made.

  python experiments/generate.py --workdir=runs/quickstart --prompt="def main(" --length=400
  cat long.txt | python experiments/generate.py --workdir=runs/quickstart --prompt=- --top_p=0.9

A prompt may have any length: it is read in chunks into a state of constant size. Generation ends
after --length tokens, or where the model ends the document. Without --config the configuration of
the checkpoint is used.
"""

import sys

import jax
from absl import flags

from memjax import training
from memjax.training import cli
from memjax.training.text import stream

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run (default: the config's)")
STEP = flags.DEFINE_integer("step", None, "which checkpoint (default: the newest)")
PROMPT = flags.DEFINE_string("prompt", "", "text to continue; - reads standard input")
LENGTH = flags.DEFINE_integer("length", 256, "at most this many tokens", lower_bound=0)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token", lower_bound=0)
TOP_K = flags.DEFINE_integer("top_k", None, "draw among the k most likely tokens only")
TOP_P = flags.DEFINE_float("top_p", None, "draw among the likeliest tokens of this probability")
SEED = flags.DEFINE_integer("seed", 0, "of the random draws")


def main() -> int:
    if WORKDIR.value is None and CONFIG.value is None:
        raise ValueError("give --workdir=DIRECTORY of a run, or --config=FILE")
    workdir = WORKDIR.value or CONFIG.value.workdir
    cli.use_compilation_cache(workdir)
    run, _, params = training.load(workdir, CONFIG.value, step=STEP.value)
    prompt = sys.stdin.buffer.read() if PROMPT.value == "-" else PROMPT.value.encode()
    sys.stdout.write(prompt.decode("utf-8", errors="replace"))
    for piece in stream(
        run,
        params,
        prompt,
        length=LENGTH.value,
        key=jax.random.key(SEED.value),
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
    ):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
