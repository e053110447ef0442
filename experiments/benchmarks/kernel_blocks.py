"""The sizes of the Pallas kernels' steps with the fewest cycles: pallas_kernels/blocks_table.py.

  python experiments/benchmarks/kernel_blocks.py --table=pallas_kernels/blocks_table.py
  python experiments/benchmarks/kernel_blocks.py --ops=delta_rule --decays=head --chips=v5e

Every op, forward and backward, is compiled for each kind of decay, dimension of a head and chip,
and the cycles of its static schedules are counted, stalls included: no TPU is needed,
`pip install "memjax[tpu]"` is. The first chip tries every candidate, the others the best of these;
with packed documents and losses, too, the best must fit in VMEM. A candidate 64x2x8 is a step of 2
tiles of 64 tokens of 8 heads; 64x2x8x4 has 4 heads in the backward kernel. A tile of deep_memory is
a chunk of its rule, here of 64 tokens; its network has two layers with four times as many hidden
units, residual and normalised, its learner momentum and decay.

Prints a Markdown table and writes JSON: cycles per token and head, forward and backward, and the
share of the matrix units' slots that are taken. With --table, which takes over an hour on one core,
the best of each is written as Python too. What --out has of the same kernels, script and versions
is not measured again, so that a search goes on after a stop.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import operator
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX: a TPU that is here is not touched

import harness
import jax
import jax.numpy as jnp

import pallas_kernels
from memjax.tpu import chips, kernels, target
from pallas_kernels.blocks import Blocks
from pallas_kernels.deep_memory import deep_memory
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.linear_attention import linear_attention

OPS = {"deep_memory": deep_memory, "delta_rule": delta_rule, "linear_attention": linear_attention}
DECAYS = ("none", "head", "channel")  # deep_memory has "none" alone
DIMS = (128, 64, 256)
TOPOLOGIES = {"v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}
CANDIDATES = "128x2x8,128x1x8,64x2x8,128x2x4,128x1x4,64x2x4,64x1x8,64x1x4"
DEEP = "64x2x8,64x1x8,64x2x4,64x1x4,64x2x2,64x1x2,64x2x1,64x1x1"
CHUNK, EXPANSION = 64, 4  # of the deep memories
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
    result = harness.report("kernel_blocks", args, versions=versions, sources=sources())
    rows = best([*search(args, remembering(args.out, result, measure))])
    print(f"\n{show(rows)}\n\n{NOTES.format(HEADS)}")
    harness.write(args.out, result | {"rows": rows})
    if args.table:
        pathlib.Path(args.table).write_text(module(rows, result))
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
    add("--deep", type=sizes, default=sizes(DEEP), help=f"candidates of deep_memory: {DEEP}")
    add("--keep", type=harness.positive, default=2, help="candidates of a chip after the first")
    add("--out", default="runs/benchmarks/kernel_blocks.json", help="where the JSON goes and is")
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
    for blocks in args.deep:
        if blocks.block != CHUNK:
            made.error(f"--deep: {text_of(blocks)} must begin with {CHUNK}, the chunk of the rule")
    if not cases(args):
        made.error(f"--decays: deep_memory is of none alone, got {','.join(args.decays)}")
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


def sources() -> str:
    """A digest of the kernels and of this script, not of the table that it writes."""
    files = sorted(pathlib.Path(pallas_kernels.__path__[0]).rglob("*.py"))
    digest = hashlib.sha256(pathlib.Path(__file__).read_bytes())
    for file in files:
        if file.name != "blocks_table.py":
            digest.update(file.read_bytes())
    return digest.hexdigest()


def remembering(out: str, result: dict, measured: Callable[..., dict | None]):
    """`measured`, but for what the JSON of an earlier run has; writes and prints what it adds.

    Args:
        out: the JSON, which may be there.
        result: what goes there; another one's measurements count if its versions and sources are
            the same.
        measured: see `search`.
    """
    file = pathlib.Path(out)
    earlier = json.loads(file.read_text()) if file.exists() else {}
    same = all(earlier.get(name) == result[name] for name in ("versions", "sources"))
    found = result["measured"] = earlier["measured"] if same else {}

    def call(op, decay, chip, dim, blocks, packed):
        name = f"{op} {decay} {chip} {dim} {text_of(blocks)}{' packed' * packed}"
        if name not in found:
            found[name] = measured(op, decay, chip, dim, blocks, packed)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(result, indent=2))
            partial.replace(file)
            print(f"{name}: {figures(found[name])}", flush=True)
        row = found[name]
        return row and row | {"blocks": Blocks(*row["blocks"])}

    return call


def cases(args) -> list[tuple[str, str]]:
    """Ops, each with the kinds of decay that it has."""
    pairs = itertools.product(args.ops, args.decays)
    return [(op, decay) for op, decay in pairs if op != "deep_memory" or decay == "none"]


def search(args, measured: Callable[..., dict | None]) -> Iterator[dict]:
    """A row for everything that is compiled and fits.

    The first chip tries every candidate, the others the `keep` best of these that fit. What does
    not fit in VMEM is tried with half as many heads backward; nothing that is as large in all is
    tried again. The best of a chip and dimension must fit with packed documents and losses too.

    Args:
        args: of the command line.
        measured: (op, decay, chip, dim, blocks, packed) -> a row, or None where VMEM is too small.
    Raises:
        RuntimeError: none of the candidates fits.
    """
    for op, decay in cases(args):
        candidates = args.deep if op == "deep_memory" else args.candidates
        rankings: dict[int, list[Blocks]] = {}
        failed: list[tuple[int, ...]] = []
        for chip, dim in itertools.product(args.chips, args.dims):
            queue = [*rankings.get(dim, candidates)]
            count = args.keep if dim in rankings else len(queue)
            rows: list[dict] = []
            while queue and len(rows) < count:
                blocks = queue.pop(0)
                row = None
                if not any(larger(extent(dim, blocks), one) for one in failed):
                    row = measured(op, decay, chip, dim, blocks, packed=False)
                    if row and cycles(row) < min(map(cycles, rows), default=math.inf):
                        row = measured(op, decay, chip, dim, blocks, packed=True) and row
                if row:
                    rows.append(row)
                    continue
                failed.append(extent(dim, blocks))
                if blocks.backward is None:
                    queue.insert(0, blocks._replace(backward=max(1, blocks.heads // 2)))
            if not rows:
                raise RuntimeError(f"{op} {decay} {dim} {chip}: no candidate fits in VMEM")
            rows.sort(key=cycles)
            yield from rows
            rankings.setdefault(dim, [row["blocks"] for row in rows])


def extent(dim: int, blocks: Blocks) -> tuple[int, ...]:
    """What VMEM grows with."""
    return dim, blocks.block * blocks.tiles, blocks.heads, blocks.backward or blocks.heads


def larger(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether no number of the first is below the other's."""
    return all(map(operator.ge, one, other))


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
        schedules = kernels.schedules(traced, topology, chips.parse(topology)[0])
    except RuntimeError as error:
        if "memory space vmem" in str(error):
            return None
        raise
    found = {one.name: one for one in schedules}
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
    deep = op == "deep_memory"
    make = deep_arguments if deep else affine_arguments
    given, initial, starts = make(decay, dim, shape, dtype)
    options = {"chunk": CHUNK, "unit_eps": 1e-6} if deep else {}
    if packed and op == "delta_rule":
        options["surprise"] = True

    def step(given, initial, starts):
        def forward(given, initial):
            documents = {"starts": starts, "initial": initial} if packed else {}
            return OPS[op](*given, implementation="pallas", blocks=blocks, **documents, **options)

        found, pull = jax.vjp(forward, given, initial)
        return pull(found)

    return jax.jit(step).trace(given, initial, starts).jaxpr


def affine_arguments(decay: str, dim: int, shape, dtype):
    """Shapes: what the op is called with, what documents begin from, where they may begin."""
    spec, heads = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32), shape[2]
    wide, gate = spec((*shape, dim), dtype=dtype), spec(shape)
    decays = {"none": None, "head": gate, "channel": spec((*shape, dim))}[decay]
    state, initial = spec((shape[0], heads, dim, dim)), spec((heads, dim, dim))
    return (wide, wide, wide, gate, decays, state), initial, spec(shape[:2], dtype=jnp.bool_)


def deep_arguments(decay: str, dim: int, shape, dtype):
    """Likewise; documents begin with chunks."""
    spec, (batch, length, heads) = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32), shape
    wide, gate, norm = spec((*shape, dim), dtype=dtype), spec(shape), spec((heads, dim))
    maps = [(heads, dim, EXPANSION * dim), (heads, EXPANSION * dim, dim)]
    weights, initial = tuple(spec((batch, *one)) for one in maps), tuple(map(spec, maps)) * 2
    given = (wide, wide, wide, gate, gate, gate, weights, weights, (norm, norm))
    return given, initial, spec((batch, length // CHUNK), dtype=jnp.bool_)


def best(rows: list[dict]) -> list[dict]:
    """Of each op, decay, chip and dim the row with the fewest cycles, sorted."""
    found: dict[tuple, dict] = {}
    for row in sorted(rows, key=cycles):
        found.setdefault((row["op"], row["decay"], row["chip"], row["dim"]), row)
    return [found[key] for key in sorted(found, key=lambda k: (k[0], DECAYS.index(k[1]), *k[2:]))]


def text_of(blocks: Blocks) -> str:
    """As --candidates has them; heads of the backward kernel after those of the forward one."""
    return "x".join(str(number) for number in blocks if number is not None)


def figures(row: dict | None) -> str:
    if row is None:
        return "does not fit"
    return f"{row['forward']:.2f} + {row['backward']:.2f} cycles, MXU {row['mxu']:.2f}"


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
