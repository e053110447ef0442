"""The whole way once: train, stop, resume, evaluate on held-out files, write a sample and a report.

  python experiments/quickstart.py
  python experiments/quickstart.py --config=configs/quickstart.py:smoke

Trains the model of configs/quickstart.py on the text of the Python standard library, stops halfway,
goes on from the checkpoint, reads the trained model back, evaluates it on the files that were held
out and lets it continue a line of Python.
"""

import pathlib
import sys
import time

import jax
from absl import flags

from memjax import training
from memjax.training import cli, loop
from memjax.training.signals import EXIT_CODES
from memjax.training.text import stream

DEFAULT = pathlib.Path(__file__).resolve().parent.parent / "configs" / "quickstart.py"
CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run (default: the config's)")
PROMPT = flags.DEFINE_string("prompt", "def main(", "what the sample continues")
LENGTH = flags.DEFINE_integer("length", 300, "tokens of the sample", lower_bound=1)


def main() -> int:
    began = time.perf_counter()
    config = CONFIG.value or cli.load_config(str(DEFAULT))
    workdir = WORKDIR.value or config.workdir
    cli.use_compilation_cache(workdir)

    print(f"== training in {workdir}, with a stop at step {config.train.steps // 2}", flush=True)
    first = training.train(config, workdir, until=config.train.steps // 2)
    print("== resuming from the checkpoint", flush=True)
    second = training.train(config, workdir) if first.stopped == "until" else first
    if second.stopped != "finished":
        print(f"stopped by {second.stopped}; run the same command again to go on")
        return EXIT_CODES[second.stopped]

    print("== evaluating the saved model on held-out files", flush=True)
    run, step, params = training.load(workdir)
    result = loop.evaluate(run, params)
    print(f"== a sample that continues {PROMPT.value!r}\n\n{PROMPT.value}", end="", flush=True)
    key = jax.random.key(0)
    sampling = time.perf_counter()
    for piece in stream(
        run, params, PROMPT.value.encode(), length=LENGTH.value, key=key, temperature=0.8
    ):
        sys.stdout.write(piece)
        sys.stdout.flush()
    now = time.perf_counter()
    seconds = sum(part.seconds for part in {id(p): p for p in (first, second)}.values())
    lines = {
        "parameters": f"{run.parameters:,}",
        "steps": f"{step} ({second.resumed} before the stop)",
        "held-out files": f"{result.bits_per_byte:.3f} bits per byte",
        "training": f"{seconds:.0f} s",
        "speed": f"{second.tokens_per_second:,.0f} tokens/s",
        "sampling": f"{now - sampling:.0f} s",
        "in all": f"{now - began:.0f} s",
        "report": f"{second.report}/report.md",
    }
    if second.resumed == second.step:  # the run was there already
        del lines["training"], lines["speed"]
        lines["steps"] = f"{step} (finished already; not trained again)"
    print("\n\n== summary")
    for name, value in lines.items():
        print(f"{name:<16}{value}")
    return 0


if __name__ == "__main__":
    cli.run(main)
