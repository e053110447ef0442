"""Decoding speed and state size of small language models after 1k and after 100k tokens.

  python experiments/benchmarks/decode.py
  python experiments/benchmarks/decode.py --patterns=mal --positions=1024,1048576

Each pattern of blocks reads random tokens to each position, in chunks, and then decodes greedily,
in fp32; samples of the positions alternate. The state has one size, so neither its bytes nor the
time of a token may depend on the position.

Prints a Markdown table and writes JSON: tokens per second (median), the ratio to the first
position, bytes of the state.
"""

import sys

import harness

SMOKE = {
    "patterns": ["lmm", "mac"], "positions": [32, 64], "prefill": 16, "tokens": 8, "rounds": 2,
    "dim": 32, "layers": 1, "heads": 2, "segment": 16, "window": 16, "chunk": 8, "vocab": 64,
}  # fmt: skip
NOTES = """\
* tokens/s counts the tokens of all rows; prefill is the speed of reading up to the position."""


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    harness.limit_threads(args.threads)
    result = harness.report("decode", args, rows=[])
    print(harness.head(result), flush=True)
    for pattern in args.patterns:
        config = {
            "pattern": pattern.split("+"),
            "dtype": "float32",
            "persistent": 4,
            "memory": {"chunk": args.chunk},
        } | {k: getattr(args, k) for k in ("vocab", "dim", "layers", "heads", "segment", "window")}
        spec = {"config": config, "batch": args.batch, "prefill": args.prefill}
        with harness.Child("decode_memjax.py", spec | {"positions": args.positions}) as child:
            contenders = {p: _asker(child, p, args.tokens) for p in args.positions}
            samples = harness.alternate(contenders, args.rounds)
            result["versions"] = child.info["versions"]
            result["rows"] += rows(pattern, args.batch, child.info, samples)
    print(f"\n{show(result['rows'])}\n\n{NOTES}")
    harness.write(args.out, result)
    return 0


def arguments(argv: list[str] | None):
    made = harness.parser(__doc__, "decode", SMOKE)
    add = made.add_argument
    add("--patterns", type=lambda text: text.split(","), default=["lmm", "mac", "mag"],
        help="patterns of blocks, comma-separated; + joins the blocks of one")  # fmt: skip
    add("--positions", type=harness.integers, default=[1024, 102400],
        help="tokens read before decoding, comma-separated")  # fmt: skip
    add("--tokens", type=harness.positive, default=256, help="tokens decoded a sample")
    add("--prefill", type=harness.positive, default=1024, help="tokens read at once")
    add("--batch", type=harness.positive, default=1, help="rows")
    add("--vocab", type=harness.positive, default=384, help="vocabulary")
    add("--dim", type=harness.positive, default=256, help="model dimension")
    add("--layers", type=harness.positive, default=4, help="blocks")
    add("--heads", type=harness.positive, default=4, help="heads of attention and of memory")
    add("--segment", type=harness.positive, default=128, help="segment of MAC")
    add("--window", type=harness.positive, default=128, help="window of MAG and MAL")
    add("--chunk", type=harness.positive, default=64, help="chunk of the memory")
    args = harness.parse(made, SMOKE, argv)
    if args.prefill % args.segment:
        made.error(
            f"--prefill={args.prefill} must be a multiple of --segment={args.segment}: MAC reads"
            " from inside a segment token by token"
        )
    return args


def _asker(child: harness.Child, position: int, tokens: int):
    return lambda: child.ask(position=position, tokens=tokens)


def rows(pattern: str, batch: int, info: dict, samples: dict[int, list[dict]]) -> list[dict]:
    """One row a position.

    Args:
        pattern: of blocks.
        batch: rows of the model's input.
        info: what the child told about itself.
        samples: what it measured, by position.
    Raises:
        RuntimeError: a state that is not where it should be.
    """
    made = []
    for place in info["positions"]:
        position = place["position"]
        if place["seen"] != position:
            raise RuntimeError(f"{pattern}: the state has seen {place['seen']}, not {position}")
        row = {
            "pattern": pattern,
            "position": position,
            "tokens_per_second": harness.rate(samples[position]),
            "state_bytes": place["state_bytes"],
            "prefill_tokens_per_second": batch * position / place["prefill_seconds"],
            "parameters": info["parameters"],
            "samples": samples[position],
        }
        first = made[0] if made else row
        row["ratio"] = row["tokens_per_second"]["median"] / first["tokens_per_second"]["median"]
        row["same_bytes"] = row["state_bytes"] == first["state_bytes"]
        made.append(row)
    return made


def show(made: list[dict]) -> str:
    """The rows as a Markdown table."""
    titles = [
        "pattern", "position", "tokens/s", "ratio", "least to most", "state bytes", "same bytes",
        "prefill tokens/s",
    ]  # fmt: skip
    lines = [
        [
            row["pattern"],
            f"{row['position']:,}",
            f"{row['tokens_per_second']['median']:,.0f}",
            f"{row['ratio']:.3f}",
            f"{row['tokens_per_second']['least']:,.0f} to {row['tokens_per_second']['most']:,.0f}",
            f"{row['state_bytes']:,}",
            "yes" if row["same_bytes"] else "NO",
            f"{row['prefill_tokens_per_second']:,.0f}",
        ]
        for row in made
    ]
    return harness.table(titles, lines)


if __name__ == "__main__":
    sys.exit(main())
