"""Compiles a step of a config for a TPU slice, on any machine, and says what it needs and takes.

  python experiments/compile.py --config=configs/titans.py:mac_1.3b --topology=v5p:4x4x4 \\
      --mesh=fsdp=64 --config.data.tokenizer=byte --config.model.vocab=32000
  python experiments/compile.py --config=... --topology=v5e:2x4 --kind=decode --batch=8
  python experiments/compile.py --compare=runs/compile/one,runs/compile/other

The very step that experiments/train.py runs is traced with shapes, compiled by libtpu for the named
slice (v5e, v5p, v6e or tpu7x, 4 to thousands of chips) and read: memory of a device by kind, cycles
by part and operation, traffic between devices, kernels, the predicted time and what bounds it. No
TPU is needed, `pip install "memjax[tpu]"` is. Docs: docs/tpu.md.
"""

import os
import re
import shlex
import sys

# Before JAX: a TPU that is here is not touched, and a cached program may bear older names.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

from absl import flags

from memjax.tpu import report, show, target
from memjax.training import cli

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string("topology", None, "slice, such as v5p:4x4x4: chip and shape")
MESH = flags.DEFINE_list(
    "mesh", [], "sizes of the mesh, fsdp=16,tensor=4; the same as --config.mesh.fsdp=16 ..."
)
KIND = flags.DEFINE_enum("kind", "train", ["train", "decode"], "which step")
BATCH = flags.DEFINE_integer("batch", None, "rows to decode (default: train.batch)", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "directory of the report (default: runs/compile/<names>)")
COMPARE = flags.DEFINE_list("compare", [], "two directories of reports to show side by side")


def main() -> int:
    if COMPARE.value:
        return compare(COMPARE.value)
    if CONFIG.value is None or TOPOLOGY.value is None:
        raise ValueError(
            f"give --config=FILE and --topology=v5p:2x2x1, or --compare; {cli.configs_there()}"
        )
    if BATCH.value is not None and KIND.value != "decode":
        raise ValueError("--batch is of --kind=decode; a training step has --config.train.batch")
    target.prepare()
    config = CONFIG.value
    for pair in MESH.value:
        name, _, size = pair.partition("=")
        if name not in config.mesh or not re.fullmatch("-?[0-9]+", size):
            raise ValueError(f"--mesh={pair}: give sizes of {', '.join(config.mesh)}, as fsdp=16")
        config.mesh[name] = int(size)
    runs = os.path.join("runs", "compile")
    report.check_writable(OUT.value or runs)  # compiling takes minutes
    found = report.analyse(
        config,
        TOPOLOGY.value,
        kind=KIND.value,
        batch=BATCH.value,
        progress=lambda words: print(words, file=sys.stderr, flush=True),
    )
    name = "-".join(f"{axis}{size}" for axis, size in found.mesh.items())
    model = f"{'-'.join(config.model.pattern)}-{found.model_parameters / 1e6:.0f}m"
    step = f"{KIND.value}-{found.rows}x{found.tokens // found.rows}"
    slug = f"{model}-{step}-{TOPOLOGY.value}-{name}"
    out = OUT.value or os.path.join(runs, slug.replace(":", "-"))
    print(show.text(found), flush=True)
    paths = report.write(found, out, shlex.join(["python", *sys.argv]))
    print(f"written: {', '.join(paths)}")
    return 0 if found.fits else 3


def compare(directories: list[str]) -> int:
    if len(directories) != 2:
        raise ValueError(f"--compare takes two directories, got {len(directories)}")
    print(show.compare([report.read(directory) for directory in directories]), end="")
    return 0


if __name__ == "__main__":
    cli.run(main)
