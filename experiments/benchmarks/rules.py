"""Every rule of the zoo, forward and backward: the fast form against the token-by-token scan.

  python experiments/benchmarks/rules.py
  python experiments/benchmarks/rules.py --rules=gated_delta_net,kda --scan_tokens=2048
  python experiments/benchmarks/rules.py --peer_python=/path/to/other/venv/bin/python

A step is the forward pass of the engine and the gradients of initial weights, queries, keys, values
and gates, in fp32: no projections. `chunkwise` and `recurrent`, which is a plain `lax.scan` over
tokens that recomputes in groups, run in processes of their own with the same number of threads, and
alternate. The scan may read fewer tokens: its time is linear in them.

Rules of which flash-linear-attention has a reference in plain PyTorch alternate with it too, on the
same inputs; it is an optional extra: pip install "memjax[peers]", here or in another environment.
(titans-pytorch, a whole layer, is in neural_memory.py.)

Prints Markdown tables and writes JSON: tokens per second (median), the ratio, memory.
"""

import contextlib
import functools
import os
import shutil
import sys

import harness
from rule_torch import PEERS

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
PEER_NOTES = """\
* PyTorch: functions of fla.ops, the fastest form that each has without Triton.
* difference: of the two sums of squared answers, relative; the same inputs, fp32."""


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    harness.limit_threads(args.threads)
    result = harness.report("rules", args, versions={}, peer={}, rows=[])
    print(harness.head(result), flush=True)
    for name in args.rules:
        result["rows"].append(compare(args, name, result))
        print(f"{name}: {result['rows'][-1]['tokens_per_second']['median']:,.0f}", flush=True)
    print(f"\n{show(result['rows'])}\n\n{NOTES.format(**vars(args))}")
    if "missing" in result["peer"]:
        print(f"\n{result['peer']['missing']}")
    elif any("peer" in row for row in result["rows"]):
        print(f"\n{show_peers(result['rows'])}\n\n{PEER_NOTES}")
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
    add("--peer_python", default=sys.executable, help="interpreter that has the references")
    args = harness.parse(made, SMOKE, argv)
    if shutil.which(args.peer_python) is None:
        made.error(f"--peer_python={args.peer_python} is no program that can be run")
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

    with contextlib.ExitStack() as opened:
        children = {
            "chunkwise": opened.enter_context(child("chunkwise", tokens)),
            "recurrent": opened.enter_context(child("recurrent", scanned)),
        }
        peer = _peer(args, spec | {"tokens": tokens}, result)
        if peer is not None:
            children["peer"] = opened.enter_context(peer)
        samples = harness.alternate(
            {name: functools.partial(held.ask, steps=1) for name, held in children.items()},
            args.rounds,
        )
        infos = {name: held.info for name, held in children.items()}
    for info in infos.values():
        result["versions"] |= info["versions"]
    return row(name, tokens, args.batch, infos, samples)


def _peer(args, spec: dict, result: dict) -> harness.Child | None:
    """The PyTorch reference, ready; None where there is none, and why in `result`."""
    if spec["rule"] not in PEERS or "missing" in result["peer"]:
        return None
    try:
        child = harness.Child(
            "rule_torch.py", spec | {"threads": args.threads}, python=args.peer_python
        )
    except harness.MissingError as error:
        result["peer"]["missing"] = (
            f"flash-linear-attention cannot be imported by {args.peer_python} ({error}), so only"
            ' memjax was measured. To compare: pip install "memjax[peers]" there, or give'
            " --peer_python=PYTHON of an environment that has it."
        )
        return None
    result["peer"]["python"] = os.path.abspath(args.peer_python)
    return child


def row(name: str, tokens: int, batch: int, infos: dict, samples: dict) -> dict:
    """One row: speeds, ratios and memory.

    Args:
        name: the rule.
        tokens, batch: what `chunkwise` and the peer read.
        infos: what each child told about itself, by name: chunkwise, recurrent and perhaps peer.
        samples: what it measured.
    """
    rates = {contender: harness.rate(taken) for contender, taken in samples.items()}
    speed, scan = rates["chunkwise"], rates["recurrent"]
    growth = {contender: taken[-1]["growth"] for contender, taken in samples.items()}
    ours = infos["chunkwise"]
    made = {
        "rule": name,
        "tokens": tokens,
        "tokens_per_second": speed,
        "scan_tokens_per_second": scan,
        "ratio": speed["median"] / scan["median"],
        "memory": growth["chunkwise"],
        "operations": ours["flops"] / (batch * tokens),
        "compile_seconds": ours["compile_seconds"],
        "samples": samples,
    }
    if "peer" in rates:
        made["peer"] = {
            "name": PEERS[name],
            "tokens_per_second": rates["peer"],
            "ratio": speed["median"] / rates["peer"]["median"],
            "memory": growth["peer"],
            "memory_ratio": growth["peer"] / max(1, growth["chunkwise"]),
            "difference": abs(infos["peer"]["loss"] / ours["loss"] - 1),
        }
    return made


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


def show_peers(made: list[dict]) -> str:
    """The rows that have a PyTorch reference, as a Markdown table."""
    titles = [
        "rule", "fla.ops", "tokens/s", "PyTorch tokens/s", "memjax is faster by", "memory MB",
        "PyTorch memory MB", "difference",
    ]  # fmt: skip
    lines = [
        [
            row["rule"],
            row["peer"]["name"].rsplit(".", 1)[1],
            f"{row['tokens_per_second']['median']:,.0f}",
            f"{row['peer']['tokens_per_second']['median']:,.0f}",
            f"{row['peer']['ratio']:.1f}",
            f"{row['memory'] / 1e6:,.0f}",
            f"{row['peer']['memory'] / 1e6:,.0f}",
            f"{row['peer']['difference']:.0e}",
        ]
        for row in made
        if "peer" in row
    ]
    return harness.table(titles, lines)


if __name__ == "__main__":
    sys.exit(main())
