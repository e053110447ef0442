"""The sizes of the Pallas kernels' steps with the fewest cycles: pallas_kernels/blocks_table.py.

  python experiments/benchmarks/kernel_blocks.py --table=pallas_kernels/blocks_table.py
  python experiments/benchmarks/kernel_blocks.py --ops=delta_rule --decays=head --chips=v5e

Every op, forward and backward, is compiled for each kind of decay, dimension of a head and chip,
and the cycles of its static schedules are counted, stalls included: no TPU is needed,
`pip install "memjax[tpu]"` is. The first chip and dimension try every candidate, the others the
best of these; with packed documents and losses, too, the sizes must fit in VMEM. A candidate 64x2x8
is a step of 2 tiles of 64 tokens of 8 heads; 64x2x8x4 has 4 heads in the backward kernel.

Prints a Markdown table and writes JSON: cycles per token and head, forward and backward, and the
share of the matrix units' slots that are taken. With --table, which takes half an hour on one core,
the best of each is written as Python too.
"""

import argparse
import itertools
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX: a TPU that is here is not touched

import harness
import jax
import jax.numpy as jnp

from memjax.tpu import chips, kernels, target
from pallas_kernels.blocks import Blocks
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.linear_attention import linear_attention

OPS = {"delta_rule": delta_rule, "linear_attention": linear_attention}
DECAYS = ("none", "head", "channel")
DIMS = (128, 64, 256)
TOPOLOGIES = {"v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}
CANDIDATES = "128x2x8,128x1x8,64x2x8,128x2x4,128x1x4,64x2x4,64x1x8,64x1x4"
BATCH, TOKENS, HEADS = 4, 4096, 8
NOTES = """\
* cycles: of a token and head, all cores of the chip at work; bf16, {0} heads of dim x dim.
* MXU: the share of the slots of the matrix units that are taken, forward and backward."""


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    target.prepare()
    versions = harness.versions("memjax", "jax", "libtpu")
    if versions["libtpu"] == "unknown":
        sys.exit(f"error: compiling for TPU needs libtpu: {target.INSTALL}")
    result = harness.report("kernel_blocks", args, versions=versions, rows=[])
    for row in search(args, measure):
        result["rows"].append(row)
        print(line(row), flush=True)
    print(f"\n{show(best(result['rows']))}\n\n{NOTES.format(HEADS)}")
    harness.write(args.out, result)
    if args.table:
        pathlib.Path(args.table).write_text(module(best(result["rows"]), result))
        print(f"written: {args.table}")
    return 0


def arguments(argv: list[str] | None):
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--ops", type=names, default=[*OPS], help="comma-separated, as all of these")
    add("--decays", type=names, default=[*DECAYS], help="kinds of decay")
    add("--dims", type=harness.integers, default=[*DIMS], help="of keys and of values")
    add("--chips", type=names, default=[*TOPOLOGIES], help="the first tries every candidate")
    add("--candidates", type=sizes, default=sizes(CANDIDATES), help=f"default: {CANDIDATES}")
    add("--keep", type=harness.positive, default=2, help="candidates after the first")
    add("--out", default="runs/benchmarks/kernel_blocks.json", help="where the JSON goes")
    add("--table", help="where the Python goes; only with all ops, decays, chips and dims")
    args = made.parse_args(argv)
    for name, known in (("ops", OPS), ("decays", DECAYS), ("chips", TOPOLOGIES), ("dims", DIMS)):
        given = getattr(args, name)
        for one in given:
            if one not in known:
                made.error(f"--{name}: no {one!r}; there are {', '.join(map(str, known))}")
        # Chips that are not in the table have the sizes of v5p.
        if args.table and {*given} != {*known} and not (name == "chips" and "v5p" in given):
            made.error(f"--table wants all of --{name}, got {','.join(map(str, given))}")
    return args


def names(text: str) -> list[str]:
    return text.split(",")


def sizes(text: str) -> list[Blocks]:
    """Candidates of 64x2x8,128x1x8x4: tokens of a tile, tiles, heads, and heads backward."""
    made = []
    for part in text.split(","):
        numbers = part.split("x")
        if len(numbers) not in (3, 4) or not all(number.isdecimal() for number in numbers):
            raise argparse.ArgumentTypeError(f"{part!r} must be BLOCKxTILESxHEADS, such as 64x2x8")
        made.append(Blocks(*map(int, numbers)))
    return made


def search(args, measured: Callable[..., dict | None]) -> Iterator[dict]:
    """A row for everything that is compiled and fits.

    The first chip and dimension try every candidate. Its other dimensions, and the other chips at
    the first dimension, try the `keep` best of those, and all else the best of its dimension on the
    first chip. What does not fit in VMEM is tried with half as many heads backward; nothing as wide
    is tried again. On the first chip the best must fit with packed documents and losses too.

    Args:
        args: of the command line.
        measured: (op, decay, chip, dim, blocks, packed) -> a row, or None where VMEM is too small.
    Raises:
        RuntimeError: none of the candidates fits.
    """
    for op, decay in itertools.product(args.ops, args.decays):
        rankings, widest = {}, math.inf
        for chip, dim in itertools.product(args.chips, args.dims):
            first_chip, first_dim = chip == args.chips[0], dim == args.dims[0]
            ranking = rankings.get(args.dims[0] if first_chip else dim, args.candidates)
            count = len(ranking) if not rankings else args.keep if first_chip or first_dim else 1
            rows: list[dict] = []
            queue = [*ranking]
            while queue and len(rows) < count:
                blocks = queue.pop(0)
                row = None
                if width(dim, blocks) < widest:
                    row = measured(op, decay, chip, dim, blocks, packed=False)
                if row and first_chip and cycles(row) < min(map(cycles, rows), default=math.inf):
                    row = measured(op, decay, chip, dim, blocks, packed=True) and row
                if row:
                    rows.append(row)
                    continue
                widest = min(widest, width(dim, blocks))
                if blocks.backward is None:
                    queue.insert(0, blocks._replace(backward=max(1, blocks.heads // 2)))
            if not rows:
                raise RuntimeError(f"{op} {decay} {dim} {chip}: no candidate fits in VMEM")
            rows.sort(key=cycles)
            yield from rows
            if first_chip:
                rankings[dim] = [row["blocks"] for row in rows]


def width(dim: int, blocks: Blocks) -> int:
    """What a backward step holds of an array, as good as what it needs of VMEM."""
    return dim * blocks.block * blocks.tiles * (blocks.backward or blocks.heads)


def cycles(row: dict) -> float:
    return row["forward"] + row["backward"]


def measure(op: str, decay: str, chip: str, dim: int, blocks: Blocks, packed: bool) -> dict | None:
    """Cycles of a token and head; None where VMEM is too small.

    Args:
        packed: whether there are documents, and losses where the op has them.
    """
    shape, topology = (BATCH, TOKENS, HEADS), TOPOLOGIES[chip]
    try:
        traced = kernels_of(op, decay, dim, shape, jnp.bfloat16, packed, blocks)
        found = kernels.schedules(traced, topology, chips.parse(topology)[0])
    except RuntimeError as error:
        if "memory space vmem" in str(error):
            return None
        raise
    forward, backward = found[f"{op}_{decay}"], found[f"{op}_{decay}_backward"]
    use = [one.use.get("MXU", one.use.get("MATMUL")) for one in (forward, backward)]
    rows = forward.rows + backward.rows
    return {
        "op": op, "decay": decay, "chip": chip, "dim": dim, "blocks": blocks,
        "forward": forward.cycles / math.prod(shape),
        "backward": backward.cycles / math.prod(shape),
        "mxu": (use[0] * forward.rows + use[1] * backward.rows) / rows,
    }  # fmt: skip


def kernels_of(op: str, decay: str, dim: int, shape, dtype, packed: bool, blocks):
    """The program of an op and its gradients, traced: a jaxpr with both kernels."""
    batch, _, heads = shape
    spec = jax.ShapeDtypeStruct
    wide, gate = spec((*shape, dim), dtype), spec(shape, jnp.float32)
    tokens = (wide, wide, wide, gate, spec((batch, heads, dim, dim), jnp.float32))
    decays = {"none": None, "head": gate, "channel": spec((*shape, dim), jnp.float32)}[decay]
    more = (spec(shape[:2], jnp.bool_), spec((heads, dim, dim), jnp.float32)) if packed else ()
    options = {"surprise": True} if packed and op == "delta_rule" else {}

    def step(tokens, decays, more):
        def forward(tokens, decays, initial):
            q, k, v, lr, state = tokens
            documents = {"starts": more[0], "initial": initial} if packed else {}
            return OPS[op](
                q, k, v, lr, decays, state,
                implementation="pallas", blocks=blocks, **documents, **options,
            )  # fmt: skip

        found, pull = jax.vjp(forward, tokens, decays, more[1] if packed else None)
        return pull(found)

    return jax.jit(step).trace(tokens, decays, more).jaxpr


def best(rows: list[dict]) -> list[dict]:
    """Of each op, decay, chip and dim the row with the fewest cycles, sorted."""
    found: dict[tuple, dict] = {}
    for row in sorted(rows, key=cycles):
        found.setdefault((row["op"], row["decay"], row["chip"], row["dim"]), row)
    return [found[key] for key in sorted(found, key=lambda k: (k[0], DECAYS.index(k[1]), *k[2:]))]


def text_of(blocks: Blocks) -> str:
    """As --candidates has them; heads of the backward kernel after those of the forward one."""
    return "x".join(str(number) for number in blocks if number is not None)


def line(row: dict) -> str:
    return (
        f"{row['op']} {row['decay']} {row['chip']} {row['dim']}"
        f" {text_of(row['blocks'])}: {row['forward']:.2f} + {row['backward']:.2f}"
        f" cycles, MXU {row['mxu']:.2f}"
    )


def show(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    titles = ["op", "decay", "chip", "dim", "blocks", "forward", "backward", "both", "MXU"]
    lines = [
        [
            row["op"],
            row["decay"],
            row["chip"],
            row["dim"],
            text_of(row["blocks"]),
            f"{row['forward']:.2f}",
            f"{row['backward']:.2f}",
            f"{cycles(row):.2f}",
            f"{row['mxu']:.2f}",
        ]
        for row in rows
    ]
    return harness.table(titles, lines)


def module(rows: list[dict], result: dict) -> str:
    """The rows as the Python of `pallas_kernels.blocks_table`."""
    versions, command = result["versions"], result["command"].replace(" --", " \\\\\n    --")
    text = f'''"""Sizes of steps: op -> decay -> chip -> widest dimension -> `Blocks`.

Generated: {command}
JAX {versions["jax"]}, libtpu {versions["libtpu"]}, {result["date"][:10]}.
"""

# Beside each the cycles of a token and head, forward + backward.
TABLE: dict[str, dict[str, dict[str, dict[int, tuple[int, ...]]]]] = {{
'''
    tree: dict[str, dict[str, dict[str, dict[int, dict]]]] = {}
    for row in rows:
        chip = (
            tree.setdefault(row["op"], {}).setdefault(row["decay"], {}).setdefault(row["chip"], {})
        )
        chip[row["dim"]] = row
    return text + _nested(tree, 1) + "}\n"


def _nested(tree: dict, depth: int) -> str:
    indent = " " * 4 * depth
    text = ""
    for key, value in tree.items():
        if "blocks" in value:
            figures = f"{value['forward']:.2f} + {value['backward']:.2f}"
            numbers = tuple(number for number in value["blocks"] if number is not None)
            text += f"{indent}{key}: {numbers},  # {figures}\n"
        else:
            text += f'{indent}"{key}": {{\n{_nested(value, depth + 1)}{indent}}},\n'
    return text


if __name__ == "__main__":
    sys.exit(main())
