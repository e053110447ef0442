"""Cycles that a memory layer takes on a TPU, forward and backward, as its compiler says.

  python experiments/benchmarks/layer_cycles.py
  python experiments/benchmarks/layer_cycles.py --layers=gated_delta_net,kda --topology=v6e:2x2

Each layer is compiled for one device of the topology, without a TPU, but with libtpu
(`pip install "memjax[tpu]"`). The compiler estimates the cycles of its own code, and writes down
the schedule of every Pallas kernel, stalls counted; both are added up here. Prints a Markdown
table, what takes the most of the rest, and writes JSON.
"""

import argparse
import inspect
import os
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX: a TPU that is here is not touched

import harness
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from memjax import miras, sharding
from memjax.layers import NeuralMemory, matrix_memory
from memjax.tpu import chips, costs, hlo, kernels, target

NOTES = """\
* cycles: of a token, all heads and the projections included, all cores of the chip at work.
* kernels: the part of them that Pallas kernels take; of their matrix units, the share of slots
  that are taken."""
MOST = 8  # operations that are listed
# Rules of `miras.zoo` in a `NeuralMemory`; with features of degree 1, where they have some.
DEEP = ("ttt_mlp", "moneta", "yaad", "memora", "dla", "swdt", "omega_net", "atlas", "lact")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    target.prepare()
    versions = harness.versions("memjax", "jax", "libtpu")
    if versions["libtpu"] == "unknown":
        sys.exit(f"error: compiling for TPU needs libtpu: {target.INSTALL}")
    result = harness.report("layer_cycles", args, versions=versions, rows=[])
    for name in args.layers:
        for way in ("forward", "forward + backward"):
            row = measure(args, name, way)
            result["rows"].append(row)
            print(f"{name} {way}: {row['cycles']:.1f} cycles a token", file=sys.stderr, flush=True)
    print(f"{args.topology}, bf16, libtpu {versions['libtpu']}, jax {versions['jax']}\n")
    print(show(result["rows"]))
    print(f"\n{NOTES}")
    harness.write(args.out, result)
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--layers", type=lambda text: text.split(","), default=["neural_memory"],
        help=f"neural_memory, {', '.join(matrix_memory.__all__[2:])}")  # fmt: skip
    add("--topology", default="v5p:2x2x1", help=f"such as {chips.EXAMPLES}")
    add("--batch", type=harness.positive, default=8)
    add("--tokens", type=harness.positive, default=4096)
    add("--dim", type=harness.positive, default=1024)
    add("--heads", type=harness.positive, default=8)
    add("--chunk", type=harness.positive, default=64, help="of the deep memories")
    add("--expansion", type=harness.positive, default=4, help="of the deep memories")
    add("--out", default="runs/benchmarks/layer_cycles.json")
    args = made.parse_args(argv)
    known = ["neural_memory", *DEEP, *matrix_memory.__all__[2:]]
    for name in args.layers:
        if name not in known:
            made.error(f"--layers: {name!r} is none of {', '.join(known)}")
    if args.dim % args.heads:
        made.error(f"--heads {args.heads} does not divide --dim {args.dim}")
    try:
        chips.parse(args.topology)
    except ValueError as error:
        made.error(f"--topology: {error}")
    return args


def build(args: argparse.Namespace, name: str) -> nnx.Module:
    if name in ("neural_memory", *DEEP):
        make = getattr(miras.zoo, "titans" if name == "neural_memory" else name)
        taken = inspect.signature(make).parameters
        options = {"chunk": args.chunk, "expansion": args.expansion, "degree": 1}
        rule = make(**{key: value for key, value in options.items() if key in taken})
        return NeuralMemory(args.dim, args.heads, rule=rule, rngs=nnx.Rngs(0))
    head = args.dim // args.heads
    return getattr(matrix_memory, name)(args.dim, args.heads, head, rngs=nnx.Rngs(0))


def measure(args: argparse.Namespace, name: str, way: str) -> dict[str, Any]:
    """One row: the layer compiled forward, or forward and backward."""
    graph, parameters = nnx.split(build(args, name))
    parameters = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), parameters)
    x = jax.ShapeDtypeStruct((args.batch, args.tokens, args.dim), jnp.bfloat16)

    def forward(parameters, x):
        return nnx.merge(graph, parameters)(x)[0]

    def both(parameters, x, by):
        y, pull = jax.vjp(forward, parameters, x)
        return y, pull(by)

    run, arrays = (forward, (parameters, x)) if way == "forward" else (both, (parameters, x, x))
    chip, _ = chips.parse(args.topology)
    mesh = sharding.make_mesh(devices=target.devices(args.topology)[:1])
    with jax.set_mesh(mesh):
        traced = jax.jit(run, in_shardings=NamedSharding(mesh, PartitionSpec())).trace(*arrays)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        schedules = kernels.schedules(traced.jaxpr, args.topology, chip)
    module, tokens = hlo.parse(compiled.as_text()), args.batch * args.tokens
    rest = sorted(costs.costs(module), key=lambda cost: -cost.cycles)
    known = {(one.name, one.results): one for one in schedules}
    of_kernels = {one.name: 0.0 for one in schedules}
    for cost in rest:
        if cost.kernel:
            cycles = known[cost.kernel, cost.results].cycles
            of_kernels[cost.kernel] += cycles * cost.times / tokens
    cycles = hlo.cycles(module) / tokens + sum(of_kernels.values())
    return {
        "layer": name,
        "way": way,
        "cycles": cycles,
        "kernels": of_kernels,
        "use": {one.name: one.use.get("MXU", one.use.get("MATMUL")) for one in schedules},
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "rest": [
            {"operation": one.operation, "name": one.name, "cycles": one.cycles / tokens}
            for one in rest[:MOST]
        ],
    }


def show(rows: list[dict[str, Any]]) -> str:
    titles = ("layer", "", "cycles", "kernels", "matrix units in them", "rest", "temporaries GiB")
    cells = []
    for row in rows:
        of_kernels = sum(row["kernels"].values())
        use = ", ".join(f"{share:.0%}" for share in row["use"].values() if share is not None)
        cells.append(
            (
                row["layer"], row["way"], f"{row['cycles']:.0f}", f"{of_kernels:.0f}", use or "-",
                f"{row['cycles'] - of_kernels:.0f}", f"{row['temporaries'] / 2**30:.2f}",
            )
        )  # fmt: skip
    parts = [harness.table(titles, cells)]
    for row in rows:
        most = ", ".join(f"{one['operation']} {one['cycles']:.0f}" for one in row["rest"])
        parts.append(f"{row['layer']}, {row['way']}, most of the rest: {most}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
