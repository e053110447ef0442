"""What a token costs NeuralMemory at 2k to 32k tokens, forward and backward: time and memory.

  python experiments/benchmarks/length.py
  python experiments/benchmarks/length.py --lengths=2048,65536 --chunk=16

A step is the layer's forward pass and the gradients of all its parameters and of its input, in
fp32. Each length runs in a process of its own; a sample has as many tokens at every length, and
samples of the lengths alternate.

Prints a Markdown table and writes JSON: time per token, its ratio to the shortest length, memory.
"""

import sys

import harness

SMOKE = {
    "batch": 1, "lengths": [32, 64], "dim": 32, "heads": 2, "chunk": 16, "rounds": 2,
}  # fmt: skip
NOTES = """\
* step memory is the peak of resident memory over all steps, less what was held before the first:
  what forward and backward need, the gradients included.
* planned is the compiler's own figure for temporary buffers, without the gradients.
* ratios are to the first row."""


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    harness.limit_threads(args.threads)
    result = harness.report("length", args)
    print(harness.head(result), flush=True)
    infos, samples = measure(args)
    result["versions"] = next(iter(infos.values()))["versions"]
    result["rows"] = rows(args.batch, infos, samples)
    print(f"\n{show(result['rows'])}\n\n{NOTES}")
    harness.write(args.out, result)
    return 0


def arguments(argv: list[str] | None):
    made = harness.parser(__doc__, "length", SMOKE)
    add = made.add_argument
    add("--lengths", type=harness.integers, default=[2048, 4096, 8192, 16384, 32768],
        help="tokens a row, comma-separated; each a multiple of the first")  # fmt: skip
    add("--batch", type=harness.positive, default=1, help="rows")
    add("--dim", type=harness.positive, default=256, help="model dimension")
    add("--heads", type=harness.positive, default=4, help="heads; each has dim / heads channels")
    add("--depth", type=harness.positive, default=2, help="layers of the memory network")
    add("--expansion", type=harness.positive, default=4, help="its width, in head dimensions")
    add("--chunk", type=harness.positive, default=64, help="chunk size")
    args = harness.parse(made, SMOKE, argv)
    if args.dim % args.heads:
        made.error(f"--dim={args.dim} must be a multiple of --heads={args.heads}")
    longest = max(args.lengths)
    if any(longest % length for length in args.lengths):
        made.error(f"--lengths={args.lengths} must divide the longest, for samples of one size")
    return args


def measure(args) -> tuple[dict[int, dict], dict[int, list[dict]]]:
    """What each length's child tells about itself, and its samples."""
    spec = {key: getattr(args, key) for key in ("batch", "dim", "heads", "depth", "expansion")}
    longest = max(args.lengths)
    children: dict[int, harness.Child] = {}
    try:
        for tokens in args.lengths:
            children[tokens] = harness.Child(
                "layer_memjax.py", spec | {"tokens": tokens, "chunk": args.chunk, "products": 0}
            )
        samples = harness.alternate(
            {n: _asker(child, longest // n) for n, child in children.items()}, args.rounds
        )
        return {n: child.info for n, child in children.items()}, samples
    finally:
        for child in children.values():
            child.close()


def _asker(child: harness.Child, steps: int):
    return lambda: child.ask(steps=steps)


def rows(batch: int, infos: dict[int, dict], samples: dict[int, list[dict]]) -> list[dict]:
    """One row a length.

    Args:
        batch: rows of a step.
        infos: what each child told about itself, by length.
        samples: what it measured.
    """
    made = []
    for tokens, taken in samples.items():
        speed = harness.rate(taken)
        growth = max(sample["growth"] for sample in taken)
        row = {
            "tokens": tokens,
            "tokens_per_second": speed,
            "seconds_per_token": 1 / speed["median"],
            "step_bytes": growth,
            "planned_bytes": infos[tokens]["planned_bytes"],
            "step_bytes_per_token": growth / (batch * tokens),
            "peak_bytes": max(sample["largest"] for sample in taken),
            "compile_seconds": infos[tokens]["compile_seconds"],
            "samples": taken,
        }
        first = made[0] if made else row
        row["time_ratio"] = row["seconds_per_token"] / first["seconds_per_token"]
        row["memory_ratio"] = row["step_bytes"] / max(1, first["step_bytes"])
        made.append(row)
    return made


def show(made: list[dict]) -> str:
    """The rows as a Markdown table."""
    titles = [
        "tokens", "us/token", "ratio", "tokens/s", "least to most", "step memory MiB", "ratio",
        "KiB/token", "planned MiB", "peak MiB", "compile s",
    ]  # fmt: skip
    lines = [
        [
            row["tokens"],
            f"{row['seconds_per_token'] * 1e6:.2f}",
            f"{row['time_ratio']:.3f}",
            f"{row['tokens_per_second']['median']:,.0f}",
            f"{row['tokens_per_second']['least']:,.0f} to {row['tokens_per_second']['most']:,.0f}",
            f"{row['step_bytes'] / harness.MIB:,.0f}",
            f"{row['memory_ratio']:.2f}",
            f"{row['step_bytes_per_token'] / 1024:.1f}",
            f"{row['planned_bytes'] / harness.MIB:,.0f}",
            f"{row['peak_bytes'] / harness.MIB:,.0f}",
            f"{row['compile_seconds']:.1f}",
        ]
        for row in made
    ]
    return harness.table(titles, lines)


if __name__ == "__main__":
    sys.exit(main())
