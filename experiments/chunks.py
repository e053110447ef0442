"""Trains a memory at one chunk, evaluates it at others, goes on at a smaller one, and again.

  python experiments/chunks.py                                       (configs/tnt.py)
  python experiments/chunks.py --config=configs/tnt.py:smoke --chunks=4,8 --stage_two=4

A deep memory does well near the chunk that it was trained at: TNT's second stage moves that point
for a few more steps. Each model here has `tnt` blocks with one local memory, whose chunk is what
varies. Runs that are there already are not repeated, and one that was stopped goes on; a directory
with runs of other settings is refused. The table goes to standard output, all figures to
chunks.json and the curves to chunks.png beside the runs.
"""

import json
import pathlib
import statistics

from absl import flags, logging

from memjax import training
from memjax.training import checkpoint, cli, loop, report
from memjax.training.config import difference
from memjax.training.signals import EXIT_CODES

HERE = pathlib.Path(__file__).resolve().parent.parent / "configs" / "tnt.py"
CONFIG = cli.define_config()
CHUNKS = flags.DEFINE_list("chunks", "2,4,8,16,32,64", "local chunks to evaluate at")
STAGE_TWO = flags.DEFINE_integer("stage_two", 4, "the local chunk of stage 2", lower_bound=1)
MORE = flags.DEFINE_float("more", 0.1, "steps of stage 2, as a part of those of stage 1")
SEEDS = flags.DEFINE_list("seeds", "0,1,2", "one run for each")
WORKDIR = flags.DEFINE_string("workdir", "runs/chunks", "directory of the runs")
SETTINGS = ("seed", "model", "data", "train")  # what must be the same to go on


def _with(config, seed: int, chunk: int, steps: int):
    """The configuration with one local memory of this chunk; all checkpoints are kept."""
    config = config.copy_and_resolve_references()
    config.seed, config.train.steps, config.train.keep = seed, steps, None
    config.model.memory.local_chunks = (chunk,)
    config.train.checkpoint_dir = None
    return config


def _stages(config) -> list[tuple[int, int]]:
    """Local chunk and last step of both stages.

    Raises:
        ValueError: the config has not one local memory, or there is no stage 2.
    """
    chunks = tuple(config.model.memory.local_chunks)
    if len(chunks) != 1:
        raise ValueError(
            f"the config must have one local memory, model.memory.local_chunks = (n,), got {chunks}"
        )
    if not 0 < MORE.value < float("inf"):
        raise ValueError(f"--more must be a number above 0, got {MORE.value}")
    begun = config.train.steps
    return [(chunks[0], begun), (STAGE_TWO.value, begun + max(1, round(MORE.value * begun)))]


def _reached(workdir: str, expected: list) -> int:
    """The step of the newest checkpoint, 0 where there is none.

    Args:
        workdir: of a seed.
        expected: the configuration of each stage.

    Raises:
        ValueError: a checkpoint that does not come from these stages.
    """
    directory = str(pathlib.Path(workdir, "checkpoints"))
    try:
        newest, _ = checkpoint.read_config(directory)
    except FileNotFoundError:
        return 0
    for config in expected:
        step, there = checkpoint.read_config(directory, min(newest, config.train.steps))
        ours = training.build(config).config
        found = difference(*({name: c[name] for name in SETTINGS} for c in (there, ours)))
        if found:
            name, saved, current = found
            raise ValueError(
                f"checkpoint {directory}/{step} was made with {name} = {saved!r}, but now it would "
                f"be {current!r}: give the same settings to go on, or another --workdir"
            )
        if newest <= config.train.steps:
            break
    return newest


def _measure(config, stages, chunks, seed: int, workdir: str) -> list[dict] | str:
    """The rows of one seed, both stages, or the signal that stopped a run."""
    rows, expected = [], [_with(config, seed, *stage) for stage in stages]
    reached = _reached(workdir, expected)
    for stage, (chunk, steps) in enumerate(stages, 1):
        print(f"== seed {seed}, stage {stage}: local chunk {chunk}, to step {steps}", flush=True)
        if reached < steps:
            summary = training.train(expected[stage - 1], workdir)
            if summary.stopped != "finished":
                print(f"stopped by {summary.stopped}; run the same command again to go on")
                return summary.stopped
        for size in chunks:
            run, step, params = training.load(workdir, _with(config, seed, size, steps), step=steps)
            bits = float(loop.evaluate(run, params).bits_per_byte)
            rows.append({"seed": seed, "stage": stage, "trained": chunk, "chunk": size,
                         "step": step, "bits_per_byte": bits})  # fmt: skip
    return rows


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
    config = CONFIG.value or cli.load_config(str(HERE))
    stages, chunks, seeds = _stages(config), cli.numbers(CHUNKS, 1), cli.numbers(SEEDS, 0)
    for chunk in [*chunks, *(chunk for chunk, _ in stages)]:  # what does not fit is said at once
        training.build(_with(config, seeds[0], chunk, config.train.steps))
    cli.use_compilation_cache(str(root))
    rows = []
    for seed in seeds:
        found = _measure(config, stages, chunks, seed, str(root / f"seed-{seed}"))
        if isinstance(found, str):
            return EXIT_CODES[found]
        rows += found
    (root / "chunks.json").write_text(json.dumps(rows, indent=2) + "\n")
    _draw(rows, root / "chunks.png")
    chunks = sorted(chunks)
    print("\n| held-out bits per byte at local chunk | " + " | ".join(map(str, chunks)) + " |")
    print("|---|" + "---:|" * len(chunks))
    for stage, (trained, _) in enumerate(stages, 1):
        cells = " | ".join(f"{_mean(rows, stage, chunk):.3f}" for chunk in chunks)
        print(f"| stage {stage}, trained at {trained} | {cells} |")
    print(f"\nwritten: {root}/chunks.json, chunks.png")
    return 0


if __name__ == "__main__":
    cli.run(main)
