"""Trains a memory at one chunk, evaluates it at others, goes on at a smaller one, and again.

  python experiments/chunks.py
  python experiments/chunks.py --config=configs/tnt.py:smoke --chunks=4,8 --stage_two=4

A deep memory does well near the chunk that it was trained at: TNT's second stage moves that point
for a few more steps. Each model here has `tnt` blocks with one local memory, whose chunk is what
varies. Runs that are there already are not repeated, and one that was stopped goes on. The table
goes to standard output, all figures to chunks.json and the curves to chunks.png beside the runs.
"""

import json
import pathlib
import statistics

from absl import flags, logging

from memjax import training
from memjax.training import cli, loop, report

HERE = pathlib.Path(__file__).resolve().parent.parent / "configs" / "tnt.py"
CONFIG = flags.DEFINE_string("config", str(HERE), "the config of stage 1")
CHUNKS = flags.DEFINE_list("chunks", "2,4,8,16,32,64", "local chunks to evaluate at")
STAGE_TWO = flags.DEFINE_integer("stage_two", 4, "the local chunk of stage 2")
MORE = flags.DEFINE_float("more", 0.1, "steps of stage 2, as a part of those of stage 1")
SEEDS = flags.DEFINE_list("seeds", "0,1,2", "one run for each")
WORKDIR = flags.DEFINE_string("workdir", "runs/chunks", "directory of the runs")


def _with(config, seed: int, chunk: int, steps: int):
    """A copy of the configuration with one local memory of this chunk."""
    config = config.copy_and_resolve_references()
    config.seed, config.train.steps = seed, steps
    config.model.memory.local_chunks = (chunk,)
    return config


def _measure(config, seed: int, workdir: str) -> list[dict] | None:
    """The rows of one seed, both stages; None where a signal stopped a run."""
    (first,), rows = config.model.memory.local_chunks, []
    begun = config.train.steps
    last = begun + max(1, round(MORE.value * begun))
    for stage, chunk, steps in ((1, first, begun), (2, STAGE_TWO.value, last)):
        print(f"== seed {seed}, stage {stage}: local chunk {chunk}, to step {steps}", flush=True)
        if _newest(workdir) < steps:
            summary = training.train(_with(config, seed, chunk, steps), workdir)
            if summary.stopped != "finished":
                print(f"stopped by {summary.stopped}; run the same command again to go on")
                return None
        for size in map(int, CHUNKS.value):
            run, step, params = training.load(workdir, _with(config, seed, size, steps), step=steps)
            bits = float(loop.evaluate(run, params).bits_per_byte)
            rows.append({"seed": seed, "stage": stage, "trained": chunk, "chunk": size,
                         "step": step, "bits_per_byte": bits})  # fmt: skip
    return rows


def _newest(workdir: str) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    try:
        return training.load(workdir)[1]
    except FileNotFoundError:
        return 0


def _mean(rows: list[dict], stage: int, chunk: int) -> float:
    return statistics.mean(
        row["bits_per_byte"] for row in rows if (row["stage"], row["chunk"]) == (stage, chunk)
    )


def _draw(rows: list[dict], path: pathlib.Path) -> None:
    figure_type = report.figure_class()
    if figure_type is None:
        logging.warning("%s", report.NO_PLOTS)
        return
    drawn = figure_type(figsize=(5.5, 3.6), layout="constrained")
    axes = drawn.subplots()
    for stage in (1, 2):
        of_stage = [row for row in rows if row["stage"] == stage]
        chunks = sorted({row["chunk"] for row in of_stage})
        label = f"stage {stage}, trained at {of_stage[0]['trained']}"
        axes.plot(chunks, [_mean(rows, stage, c) for c in chunks], "o-", label=label)
        axes.plot(
            [row["chunk"] for row in of_stage], [row["bits_per_byte"] for row in of_stage], "_",
            color=f"C{stage - 1}", alpha=0.6,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set(xlabel="local chunk when evaluated", ylabel="held-out bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn.savefig(path, dpi=120)


def main() -> int:
    root = pathlib.Path(WORKDIR.value)
    cli.use_compilation_cache(str(root))
    config = cli.load_config(CONFIG.value)
    if len(config.model.memory.local_chunks) != 1:
        raise ValueError(
            "the config must have one local memory, model.memory.local_chunks = (n,), got "
            f"{tuple(config.model.memory.local_chunks)}"
        )
    rows = []
    for seed in map(int, SEEDS.value):
        found = _measure(config, seed, str(root / f"seed-{seed}"))
        if found is None:
            return 1
        rows += found
    (root / "chunks.json").write_text(json.dumps(rows, indent=2) + "\n")
    _draw(rows, root / "chunks.png")
    chunks = sorted({row["chunk"] for row in rows})
    print("\n| held-out bits per byte at local chunk | " + " | ".join(map(str, chunks)) + " |")
    print("|---|" + "---:|" * len(chunks))
    for stage in (1, 2):
        trained = next(row["trained"] for row in rows if row["stage"] == stage)
        cells = " | ".join(f"{_mean(rows, stage, chunk):.3f}" for chunk in chunks)
        print(f"| stage {stage}, trained at {trained} | {cells} |")
    print(f"\nwritten: {root}/chunks.json, chunks.png")
    return 0


if __name__ == "__main__":
    cli.run(main)
