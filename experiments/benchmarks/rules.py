"""Every rule of the zoo, forward and backward: the fast form against the token-by-token scan.

  python experiments/benchmarks/rules.py
  python experiments/benchmarks/rules.py --rules=gated_delta_net,kda --scan_tokens=2048

A step is the forward pass of the engine and the gradients of initial weights, queries, keys, values
and gates, in fp32: no projections. `chunkwise` and `recurrent`, which is a plain `lax.scan` over
tokens that recomputes in groups, run in processes of their own with the same number of threads, and
alternate. The scan may read fewer tokens: its time is linear in them.

Prints a Markdown table and writes JSON: tokens per second (median), the ratio, memory.
"""

import sys

import harness

MATRIX = (
    "linear_attention", "retnet", "gla", "mamba2", "delta_net", "gated_delta_net", "kda",
    "longhorn", "rwkv7", "mesa_net",
)  # fmt: skip
DEEP = (
    "titans", "ttt_linear", "ttt_mlp", "moneta", "yaad", "memora", "dla", "swdt",
    "deep_omega_transformer", "omega_net", "atlas", "lact", "self_referential_titans", "continuum",
)  # fmt: skip
SMOKE = {
    "rules": ["gated_delta_net", "yaad"], "batch": 1, "tokens": 32, "scan_tokens": 16,
    "muon_tokens": 16, "heads": 2, "head_dim": 8, "chunk": 8, "rounds": 2,
}  # fmt: skip
NOTES = """\
* operations: of the products of one step (recomputation included) per token of the batch, all
  heads; GFLOP/s is that at the measured speed.
* memory: the peak of resident memory over all steps, less what was held before the first.
* deep rules have chunk {chunk} (LaCT: {tokens}, the row), expansion {expansion} and, where they
  have features, degree {degree}; matrix rules learn at every token.
* Newton-Schulz at every token (atlas) reads {muon_tokens} tokens a row."""


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    harness.limit_threads(args.threads)
    result = harness.report("rules", args, versions={}, rows=[])
    print(harness.head(result), flush=True)
    for name in args.rules:
        result["rows"].append(compare(args, name, result))
        print(f"{name}: {result['rows'][-1]['tokens_per_second']['median']:,.0f}", flush=True)
    print(f"\n{show(result['rows'])}\n\n{NOTES.format(**vars(args))}")
    harness.write(args.out, result)
    return 0


def arguments(argv: list[str] | None):
    made = harness.parser(__doc__, "rules", SMOKE)
    add = made.add_argument
    add("--rules", type=lambda text: text.split(","), default=[*MATRIX, *DEEP],
        help="rows of memjax.miras.zoo, comma-separated")  # fmt: skip
    add("--batch", type=harness.positive, default=2, help="rows")
    add("--tokens", type=harness.positive, default=2048, help="tokens of a row")
    add("--scan_tokens", type=harness.positive, default=256, help="tokens of a row for the scan")
    add("--muon_tokens", type=harness.positive, default=128, help="tokens of a row for atlas")
    add("--heads", type=harness.positive, default=4, help="heads")
    add("--head_dim", type=harness.positive, default=64, help="dimension of keys and values")
    add("--chunk", type=harness.positive, default=64, help="chunk of the deep rules")
    add("--expansion", type=harness.positive, default=4, help="of the deep rules")
    add("--degree", type=harness.positive, default=1, help="of polynomial features")
    args = harness.parse(made, SMOKE, argv)
    for name in args.rules:
        if name not in (*MATRIX, *DEEP):
            made.error(f"--rules: no rule {name!r}; there are {', '.join((*MATRIX, *DEEP))}")
    return args


def compare(args, name: str, result: dict) -> dict:
    """One row of the table: both forms of a rule."""
    tokens = args.muon_tokens if name == "atlas" else args.tokens
    scanned = min(tokens, args.scan_tokens)
    spec = {"rule": name, "batch": args.batch, "heads": args.heads, "head_dim": args.head_dim}
    options = {"chunk": args.chunk, "expansion": args.expansion, "degree": args.degree}
    if name == "lact":
        options |= {"chunk": args.tokens}

    def child(form: str, count: int):
        return harness.Child(
            "rule_memjax.py", spec | {"form": form, "tokens": count, "options": options}
        )

    with child("chunkwise", tokens) as ours, child("recurrent", scanned) as scan:
        samples = harness.alternate(
            {"chunkwise": lambda: ours.ask(steps=1), "recurrent": lambda: scan.ask(steps=1)},
            args.rounds,
        )
        result["versions"] = ours.info["versions"]
        speed, plain = (harness.rate(samples[form]) for form in ("chunkwise", "recurrent"))
        return {
            "rule": name,
            "tokens": tokens,
            "tokens_per_second": speed,
            "scan_tokens_per_second": plain,
            "ratio": speed["median"] / plain["median"],
            "memory": samples["chunkwise"][-1]["growth"],
            "operations": ours.info["flops"] / (args.batch * tokens),
            "compile_seconds": ours.info["compile_seconds"],
            "samples": samples,
        }


def show(made: list[dict]) -> str:
    """The rows as a Markdown table."""
    titles = [
        "rule", "tokens/s", "least to most", "scan tokens/s", "ratio", "memory MB",
        "MFLOP a token", "GFLOP/s", "compile s",
    ]  # fmt: skip
    lines = [
        [
            row["rule"],
            f"{row['tokens_per_second']['median']:,.0f}",
            f"{row['tokens_per_second']['least']:,.0f} to {row['tokens_per_second']['most']:,.0f}",
            f"{row['scan_tokens_per_second']['median']:,.0f}",
            f"{row['ratio']:.1f}",
            f"{row['memory'] / 1e6:,.0f}",
            f"{row['operations'] / 1e6:.2f}",
            f"{row['operations'] * row['tokens_per_second']['median'] / 1e9:.1f}",
            f"{row['compile_seconds']:.0f}",
        ]
        for row in made
    ]
    return harness.table(titles, lines)


if __name__ == "__main__":
    sys.exit(main())
