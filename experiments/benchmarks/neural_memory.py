"""NeuralMemory, forward and backward, against titans-pytorch on the same shapes.

  python experiments/benchmarks/neural_memory.py
  python experiments/benchmarks/neural_memory.py --peer_python=/path/to/other/venv/bin/python
  python experiments/benchmarks/neural_memory.py --peer_exact

A step is the layer's forward pass and the gradients of all its parameters and of its input, in
fp32. Each contender runs in a process of its own with the same number of threads; steps alternate.
The peer is an optional extra: pip install "memjax[peers]", here or in another environment. Without
it only memjax is measured.

Prints a Markdown table and writes JSON: tokens per second (median), the ratio, memory.
"""

import os
import shutil
import sys

import harness

SMOKE = {
    "batch": 1, "tokens": 64, "dim": 32, "heads": 2, "chunks": [16], "rounds": 2, "products": 64,
}  # fmt: skip
OURS, PEER, EXACT = "memjax", "titans-pytorch", "titans-pytorch, exact"
NOTES = """\
The memories: an MLP with GELU, residual and normalised output, momentum and decay in both.
* memjax takes each gradient at the weights held when its chunk began. titans-pytorch takes the
  gradients of all chunks at the weights of the call's start (its default; also the faster way);
  {exact}
* memjax has momentum and decay gates per token, titans-pytorch per chunk; memjax reads the memory
  after every token, titans-pytorch that of the last whole chunk.
* memjax has what titans-pytorch's defaults leave out: convolutions of width 4, SiLU and l2
  normalisation of queries and keys, an output norm, a full output gate (the peer: one per head).
  titans-pytorch has an RMSNorm of its input, and learns the norm's scale at test time.
* step memory is the peak of resident memory over all steps, less what was held before the first;
  peak (ru_maxrss) is the whole process, libraries and compilation included.
* of matmul rate: the products' arithmetic (recomputation included) at the measured speed, as a
  share of {products} x {products} fp32 products in the same process."""
WITHOUT = "--peer_exact adds it with updates after each chunk."
WITH = "the row `exact` updates them after each chunk (batch_size = chunk, rates below 0.01)."


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    harness.limit_threads(args.threads)
    result = harness.report("neural_memory", args, versions={}, peer={}, rows=[])
    print(harness.head(result), flush=True)
    for chunk in args.chunks:
        result["rows"] += compare(args, chunk, result)
    print(f"\n{show(result['rows'])}\n")
    if "missing" in result["peer"]:
        print(result["peer"]["missing"])
    else:
        notes = NOTES.format(exact=WITH if args.peer_exact else WITHOUT, products=args.products)
        print(notes)
    harness.write(args.out, result)
    return 0


def arguments(argv: list[str] | None):
    made = harness.parser(__doc__, "neural_memory", SMOKE)
    add = made.add_argument
    add("--batch", type=harness.positive, default=2, help="rows")
    add("--tokens", type=harness.positive, default=2048, help="length of a row")
    add("--dim", type=harness.positive, default=256, help="model dimension")
    add("--heads", type=harness.positive, default=4, help="heads; each has dim / heads channels")
    add("--depth", type=harness.positive, default=2, help="layers of the memory network")
    add("--expansion", type=harness.positive, default=4, help="its width, in head dimensions")
    add("--chunks", type=harness.integers, default=[64, 16], help="chunk sizes, comma-separated")
    add("--steps", type=harness.positive, default=1, help="steps a sample")
    add("--products", type=harness.positive, default=1536, help="size of the reference products")
    add("--peer_python", default=sys.executable, help="interpreter that has titans-pytorch")
    add("--peer_exact", action="store_true", help="also the peer with updates after each chunk")
    args = harness.parse(made, SMOKE, argv)
    if args.dim % args.heads:
        made.error(f"--dim={args.dim} must be a multiple of --heads={args.heads}")
    for chunk in args.chunks:
        if args.tokens < 2 * chunk:
            made.error(f"--tokens={args.tokens} must be at least two chunks of {chunk}")
    if shutil.which(args.peer_python) is None:
        made.error(f"--peer_python={args.peer_python} is no program that can be run")
    return args


def compare(args, chunk: int, result: dict) -> list[dict]:
    """The rows of one chunk size; versions, and what is missing, go into `result`."""
    spec = {
        key: getattr(args, key)
        for key in ("batch", "tokens", "dim", "heads", "depth", "expansion", "threads", "products")
    } | {"chunk": chunk}
    children: dict[str, harness.Child] = {}
    try:
        children[OURS] = harness.Child("layer_memjax.py", spec)
        options = {PEER: {}}
        if args.peer_exact:
            options[EXACT] = {"batch_size": chunk, "default_step_transform_max_lr": 0.01}
        for name, given in options.items():
            try:
                children[name] = harness.Child(
                    "layer_titans_pytorch.py", spec | {"options": given}, python=args.peer_python
                )
            except harness.MissingError as error:
                result["peer"]["missing"] = (
                    f"titans-pytorch cannot be imported by {args.peer_python} ({error}), so only"
                    ' memjax was measured. To compare: pip install "memjax[peers]" there, or give'
                    " --peer_python=PYTHON of an environment that has it."
                )
                break
            result["peer"][name] = {"python": os.path.abspath(args.peer_python), "options": given}
        for child in children.values():
            result["versions"] |= child.info["versions"]
        samples = harness.alternate(
            {name: _asker(child, args.steps) for name, child in children.items()}, args.rounds
        )
        infos = {name: child.info for name, child in children.items()}
    finally:
        for child in children.values():
            child.close()
    return rows(chunk, infos, samples)


def _asker(child: harness.Child, steps: int):
    return lambda: child.ask(steps=steps)


def rows(chunk: int, infos: dict[str, dict], samples: dict[str, list[dict]]) -> list[dict]:
    """One row a contender: speed, memory, and of a peer the ratios to memjax.

    Args:
        chunk: the chunk size.
        infos: what each child told about itself, by name; memjax first.
        samples: what it measured.
    """
    made = []
    for name, taken in samples.items():
        info = infos[name]
        row = {
            "chunk": chunk,
            "contender": name,
            "tokens_per_second": harness.rate(taken),
            "step_bytes": max(sample["growth"] for sample in taken),
            "peak_bytes": max(sample["largest"] for sample in taken),
            "compile_seconds": info.get("compile_seconds"),
            "parameters": info["parameters"],
            "samples": taken,
        }
        if "flops" in info:
            per_token = info["flops"] / (taken[0]["tokens"] / taken[0]["steps"])
            speed = per_token * row["tokens_per_second"]["median"]
            row |= {
                "planned_bytes": info["planned_bytes"],
                "flops_per_token": per_token,
                "product_rate": info["product_rate"],
                "share_of_product_rate": speed / info["product_rate"],
            }
        made.append(row)
    ours = made[0]
    for row in made[1:]:
        row["ratio"] = ours["tokens_per_second"]["median"] / row["tokens_per_second"]["median"]
        row["memory_ratio"] = row["step_bytes"] / max(1, ours["step_bytes"])
    return made


def show(made: list[dict]) -> str:
    """The rows as a Markdown table."""
    titles = [
        "chunk", "", "tokens/s", "least to most", "memjax is faster by", "step memory MiB",
        "times memjax's", "peak MiB", "compile s", "of matmul rate",
    ]  # fmt: skip
    lines = []
    for row in made:
        speed = row["tokens_per_second"]
        faster, memory = row.get("ratio"), row.get("memory_ratio")
        lines.append(
            [
                row["chunk"],
                row["contender"],
                f"{speed['median']:,.0f}",
                f"{speed['least']:,.0f} to {speed['most']:,.0f}",
                None if faster is None else f"{faster:.2f}",
                f"{row['step_bytes'] / harness.MIB:,.0f}",
                None if memory is None else f"{memory:.2f}",
                f"{row['peak_bytes'] / harness.MIB:,.0f}",
                None if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f}",
                f"{row['share_of_product_rate']:.0%}" if "share_of_product_rate" in row else None,
            ]
        )
    return harness.table(titles, lines)


if __name__ == "__main__":
    sys.exit(main())
