"""Reads an optimised HLO module as text: what runs, how often, on which shapes.

Knows nothing of TPUs but the notation: layouts with tiles and memory spaces, `estimated_cycles`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "s4": 0.5, "u4": 0.5,
    "s2": 0.25, "u2": 0.25, "token": 0, "opaque": 0,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([^\]]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"^(?:ENTRY\s+)?%?([\w.\-]+)\s*\(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+) = (.*)$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_OPCODE = re.compile(r"\s([a-z][\w\-]*)\(")


class ArrayType(NamedTuple):
    """An array as HLO writes it: `bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`.

    Args:
      dtype: a key of `BYTES`, or f8 of some kind.
      shape: sizes.
      tile: of the most minor dimensions; () where the layout names none.
      order: dimensions, the most minor one first.
      space: memory space, 0 = HBM, 1 = VMEM, others smaller memories.
    """

    dtype: str
    shape: tuple[int, ...]
    tile: tuple[int, ...]
    order: tuple[int, ...]
    space: int

    @property
    def width(self) -> float | int:
        """Bytes of an element."""
        return 1 if self.dtype.startswith("f8") else BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        """Bytes that it takes where it lies, with what tiles pad."""
        sizes = [self.shape[i] for i in self.order] if self.order else list(self.shape[::-1])
        for place, tile in enumerate(reversed(self.tile)):
            if place < len(sizes):
                sizes[place] = -(-sizes[place] // tile) * tile
        return math.ceil(math.prod(sizes) * self.width)


def arrays(text: str) -> list[ArrayType]:
    """Every array in a type, the parts of a tuple one after another.

    Args:
      text: such as `(s32[], f32[4,4]{1,0:T(4,128)})`.
    """
    found = []
    for dtype, sizes, layout in _ARRAY.findall(text):
        if dtype not in BYTES and not dtype.startswith("f8"):
            continue
        shape = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size.strip())
        order, _, rest = layout.strip("{}").partition(":")
        tile = re.search(r"T\(([\d,]*)\)", rest)
        space = re.search(r"S\((\d+)\)", rest)
        found.append(
            ArrayType(
                dtype,
                shape,
                tuple(int(n) for n in tile[1].split(",") if n) if tile else (),
                tuple(int(n) for n in order.split(",") if n),
                int(space[1]) if space else 0,
            )
        )
    return found


class Instruction(NamedTuple):
    """One line of a computation.

    Args:
      name: unique in its module.
      opcode: such as "fusion".
      type: of its result, as written; `arrays(type)` reads it.
      operands: names.
      attributes: the rest of the line.
      root: whether it is what its computation returns.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from, "" where nothing says so."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1].replace("\\'", "'") if found else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's own estimate; None where it makes none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    def called(self, key: str) -> list[str]:
        """Names of the computations under an attribute: calls, body, branch_computations ..."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [] if found is None else re.findall(r"[\w.\-]+", found[1].replace("%", ""))


@dataclasses.dataclass(frozen=True)
class Module:
    """A module.

    Args:
      computations: their instructions, in order, by name.
      entry: name of the one that runs.
    """

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def by_name(self) -> dict[str, dict[str, Instruction]]:
        """Instructions by computation and name."""
        return {name: {one.name: one for one in lines} for name, lines in self.computations.items()}


def parse(text: str) -> Module:
    """The module that `compiled.as_text()` wrote.

    Args:
      text: the whole of it.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry = name = None
    for line in _logical_lines(text):
        if name is None:
            if (head := _HEAD.match(line)) and not line[0].isspace():
                name = head[1]
                computations[name] = []
                entry = name if line.startswith("ENTRY") else entry
        elif _END.match(line):
            name = None
        elif found := _LINE.match(line):
            computations[name].append(_instruction(*found.groups()))
    if entry is None:
        raise ValueError("this is no HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def _logical_lines(text: str) -> Iterator[str]:
    """Lines, those that attributes of a kernel spread over several put together again."""
    held = None
    for line in text.splitlines():
        begins = not line or _LINE.match(line) or _HEAD.match(line) or _END.match(line)
        if held is not None and begins:
            yield held
            held = None
        held = line if held is None else f"{held} {line}"
    if held is not None:
        yield held


def _instruction(root: str | None, name: str, rest: str) -> Instruction:
    """Of the text after the equals sign: a type, an opcode, operands in brackets, attributes."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else 0
    found = _OPCODE.search(rest, end)
    begin = found.end()
    stop = _closing(rest, begin - 1)
    inside = rest[begin:stop]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    if not operands and found[1] in ("parameter", "constant"):
        operands = (inside,)
    return Instruction(
        name, found[1], rest[: found.start()], operands, rest[stop + 1 :], bool(root)
    )


def _closing(text: str, begin: int) -> int:
    """Where the bracket that opens at `begin` closes."""
    depth = 0
    for place in range(begin, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)


def trips(module: Module, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None where its condition does not tell.

    Loops of `scan` count from 0 by 1 to the constant that their condition compares with.

    Args:
      module: that it is in.
      loop: the instruction.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    (condition,) = loop.called("condition")
    lines = module.by_name[condition]
    root = next(one for one in lines.values() if one.root)
    if root.opcode == "fusion":  # the compare may be in a fusion, with the constant outside or in
        (inner,) = root.called("calls")
        fused = module.by_name[inner]
        compare = next(one for one in fused.values() if one.root)
        names = [_argument(fused, root, name) for name in compare.operands]
        lines = {**fused, **lines}
    else:
        compare, names = root, list(root.operands)
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    limit = lines.get(names[1])
    if limit is None or limit.opcode != "constant" or not limit.operands[0].isdecimal():
        return None
    return int(limit.operands[0])


def _argument(fused: dict[str, Instruction], call: Instruction, name: str) -> str:
    """The name outside a fusion of one of its parameters; other names stay."""
    one = fused.get(name)
    if one is None or one.opcode != "parameter":
        return name
    return call.operands[int(one.operands[0])]


class Executed(NamedTuple):
    """An instruction that runs by itself, outside any fusion.

    Args:
      instruction: it.
      computation: name of the one that it stands in.
      times: how often it runs in a call of the module.
      certain: False where a loop did not tell how often it runs (once is assumed) or where it is in
        a branch.
    """

    instruction: Instruction
    computation: str
    times: int
    certain: bool


def executed(module: Module) -> Iterator[Executed]:
    """Everything that runs, loops entered with the number of their rounds.

    Of a conditional the branch is entered where its condition holds: memjax writes the usual case
    there (whole chunks, aligned segments).

    Args:
      module: of `parse`.
    """
    yield from _executed(module, module.entry, 1, True)


def _executed(module: Module, name: str, times: int, certain: bool) -> Iterator[Executed]:
    for one in module.computations[name]:
        if one.opcode == "while":
            rounds = trips(module, one)
            (body,) = one.called("body")
            yield from _executed(module, body, times * (rounds or 1), certain and bool(rounds))
        elif one.opcode == "conditional":
            yield from _executed(module, _usual(one), times, False)
        elif one.opcode == "call":
            yield from _executed(module, one.called("to_apply")[0], times, certain)
        else:
            yield Executed(one, name, times, certain)


def _usual(conditional: Instruction) -> str:
    """The branch where the condition holds: the last one of a choice by number."""
    held = conditional.called("true_computation")
    return held[0] if held else conditional.called("branch_computations")[-1]


def cycles(module: Module) -> int:
    """Sum of the compiler's estimates over all that a module runs.

    Args:
      module: of `parse`.
    """
    return sum((one.instruction.cycles or 0) * one.times for one in executed(module))


def flops(module: Module, computation: str) -> int:
    """Floating-point operations of the matrix products of a computation, fusions in it included.

    A multiply-add counts as two. Places where a convolution reads padding or holes of a dilation do
    not count: this is how products with batch dimensions are written.

    Args:
      module: of `parse`.
      computation: its name.
    """
    lines = module.by_name[computation]
    total = 0
    for one in lines.values():
        if one.opcode == "fusion":
            total += sum(flops(module, inner) for inner in one.called("calls"))
        else:
            total += product(lines, one)
    return total


def product(lines: dict[str, Instruction], one: Instruction) -> int:
    """Operations of one instruction, 0 where it is no matrix product.

    Args:
      lines: the computation that it stands in, by name.
      one: it.
    """
    if one.opcode == "convolution":
        return _convolution(lines, one)
    return _dot(lines, one) if one.opcode == "dot" else 0


def _shape(lines: dict[str, Instruction], name: str) -> tuple[int, ...]:
    return arrays(lines[name].type)[0].shape


def _dot(lines: dict[str, Instruction], one: Instruction) -> int:
    left, (out, *_) = _shape(lines, one.operands[0]), arrays(one.type)
    over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    sizes = [left[int(n)] for n in over[1].split(",") if n] if over else []
    return 2 * math.prod(out.shape) * math.prod(sizes)


def _convolution(lines: dict[str, Instruction], one: Instruction) -> int:
    left, right = (_shape(lines, name) for name in one.operands[:2])
    out = arrays(one.type)[0].shape
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes).groups()
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(label for label in labels[2] if label.isdecimal())
    groups = re.search(r"batch_group_count=(\d+)", one.attributes)

    def field(name: str, place: int, default: str) -> str:
        values = fields[name].split("x") if name in fields else []
        return values[place] if values else default

    total = 2 * out[labels[2].index("b")] * out[labels[2].index("f")]
    total *= right[labels[1].index("i")]
    total //= int(groups[1]) if groups else 1
    for place, label in enumerate(spatial):
        low, _ = map(int, field("pad", place, "0_0").split("_"))
        total *= _taps(
            size=left[labels[0].index(label)],
            kernel=right[labels[1].index(label)],
            out=out[labels[2].index(label)],
            stride=int(field("stride", place, "1")),
            low=low,
            dilate=int(field("lhs_dilate", place, "1")),
            spread=int(field("rhs_dilate", place, "1")),
        )
    return total


@functools.lru_cache(maxsize=4096)
def _taps(size: int, kernel: int, out: int, stride: int, low: int, dilate: int, spread: int) -> int:
    """Pairs of an output and a tap of the kernel that meet an element of the input."""
    last, count = (size - 1) * dilate, 0
    for tap in range(kernel):
        for place in range(out):
            at = place * stride + tap * spread - low
            count += 0 <= at <= last and at % dilate == 0
    return count
