"""What each instruction of a compiled module costs a device: cycles, operations, bytes, traffic."""

import collections
import math
import re
from typing import NamedTuple

from memjax.tpu import hlo

# They move nothing, or their other half has been counted.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "domain", "add-dependency", "copy-done", "async-done",
    "async-update", "slice-done", "send-done", "recv-done", "all-gather-done", "all-reduce-done",
    "collective-permute-done", "dynamic-slice-done", "dynamic-update-slice-done",
}  # fmt: skip
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
# The names that `memjax.models` and the training step give their parts.
_PART = re.compile(
    r"(?<![\w.])(mixer\.\w+|feed_forward\.\w+|embedding|head|loss|optimizer)(?=[/()]|$)"
)
OTHER = "other"


class Cost(NamedTuple):
    """An instruction with what it costs over a whole step.

    Args:
      name, opcode: of the instruction.
      part: "mixer.lmm", "optimizer", ...; `OTHER` where nothing tells.
      operation: what of the traced program it comes from, "dot_general"; else the opcode.
      backward: whether it belongs to the backward pass.
      times: how often it runs.
      certain: see `hlo.Executed`.
      cycles: the compiler's estimate; 0 for collectives and kernels, of which it makes none.
      flops: of matrix products.
      bytes: read from and written to HBM.
      collective: None, or what it sends.
      kernel: name of a Pallas kernel, None for anything else.
      results: of a kernel the shapes of what it returns.
    """

    name: str
    opcode: str
    part: str
    operation: str
    backward: bool
    times: int
    certain: bool
    cycles: int
    flops: int
    bytes: int
    collective: "Collective | None"
    kernel: str | None
    results: tuple[tuple[int, ...], ...] = ()


class Collective(NamedTuple):
    """Traffic between devices.

    Args:
      kind: one of `COLLECTIVES`.
      bytes: of the whole array that comes of it, on one device, once: for an all-gather what it
        gathers, for a reduce-scatter what it starts from.
      group: devices that take part together.
      asynchronous: whether other work can run beside it.
    """

    kind: str
    bytes: int
    group: int
    asynchronous: bool

    @property
    def sent(self) -> float:
        """Bytes that each device sends at least, in a ring."""
        n = self.group
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
        return self.bytes * share.get(self.kind, (n - 1) / n)


def costs(module: hlo.Module) -> list[Cost]:
    """The costs of everything that a module runs.

    Args:
      module: of `hlo.parse`.
    """
    executed = [one for one in hlo.executed(module) if one.instruction.opcode not in _FREE]
    channels = [_channel(module, one) for one in executed]
    fused, found = collections.Counter(channels), []
    for one, channel in zip(executed, channels, strict=True):
        cost = _cost(module, one)
        if channel is not None and fused[channel] != 1:
            # Begun in one fusion, carried on in others beside their work, ended in a last one.
            if fused[channel] > 1:
                traffic = cost.collective._replace(asynchronous=True)
                found.append(cost._replace(cycles=0, flops=0, bytes=0, collective=traffic))
                fused[channel] = 0
            moved = _bytes(module, module.by_name[one.computation], one.instruction)
            cost = cost._replace(bytes=moved * one.times, collective=None)
        found.append(cost)
    return found


def _channel(module: hlo.Module, one: hlo.Executed) -> tuple[str, str] | None:
    """Which collective a fusion takes part in, None where in none."""
    if one.instruction.opcode == "fusion":
        for name in one.instruction.called("calls"):
            for inner in module.computations.get(name, ()):
                if inner.opcode.removesuffix("-start") in COLLECTIVES:
                    number = re.search(r"channel_id=(\d+)", inner.attributes)
                    return None if number is None else (one.computation, number[1])
    return None


def kernel_name(instruction: str) -> str:
    """What a kernel was named, of the name that its call has in a module.

    kernel_name("transpose_jvp_doubled__.2") == "doubled"
    """
    name = re.sub(r"(\.(\d+|clone))+$", "", instruction)
    while wrapped := re.match(r"(?:transpose|jvp|vmap)_(.*)_$", name):
        name = wrapped[1]
    return name


def _cost(module: hlo.Module, one: hlo.Executed) -> Cost:
    what, times = one.instruction, one.times
    lines = module.by_name[one.computation]
    collective = _collective(module, lines, what)
    kernel, results = None, ()
    if 'custom_call_target="tpu_custom_call"' in what.attributes:
        kernel = kernel_name(what.name)
        results = tuple(tuple(array.shape) for array in hlo.arrays(what.type))
    if what.opcode == "fusion":
        flops = sum(hlo.flops(module, inner) for inner in what.called("calls"))
    else:
        flops = hlo.product(lines, what)
    origin = what.op_name or _origin(module, what)
    name, backward = part(origin)
    return Cost(
        name=what.name,
        opcode=what.opcode,
        part=name,
        operation=origin.rpartition("/")[2].partition(":")[0] or what.opcode,
        backward=backward,
        times=times,
        certain=one.certain,
        cycles=(what.cycles or 0) * times,
        flops=flops * times,
        bytes=0 if collective else _bytes(module, lines, what) * times,
        collective=collective,
        kernel=kernel,
        results=results,
    )


def part(op_name: str) -> tuple[str, bool]:
    """The part of the model that an `op_name` lies in, and whether in its backward pass.

    Memories take gradients in the forward pass too: only what is transposed around the part is
    backward. Of parts inside one another the innermost counts.

    Args:
      op_name: such as "jit(step)/transpose(jvp())/while/body/mixer.lmm/dot_general".
    """
    found = list(_PART.finditer(op_name))
    if not found:
        return OTHER, "transpose(" in "/".join(op_name.split("/")[:2])
    return found[-1][0], "transpose(" in op_name[: found[-1].start()]


def _origin(module: hlo.Module, what: hlo.Instruction) -> str:
    """An `op_name` from inside a fusion that has none itself."""
    for name in what.called("calls"):
        for inner in reversed(module.computations.get(name, ())):
            if inner.op_name:
                return inner.op_name
    return ""


def _size(text: str) -> int:
    """Bytes in HBM of the arrays of a type."""
    return sum(array.bytes for array in hlo.arrays(text) if array.space == 0)


def _bytes(module: hlo.Module, lines: dict[str, hlo.Instruction], what: hlo.Instruction) -> int:
    def size_of(name: str) -> int:
        return _size(lines[name].type) if name in lines else 0

    if 'custom_call_target="AllocateBuffer"' in what.attributes:
        return 0
    if what.opcode in ("copy-start", "slice-start"):  # a tuple of target, source and a flag
        return sum(array.bytes for array in hlo.arrays(what.type)[:2] if array.space == 0)
    if what.opcode in ("dynamic-slice", "gather"):
        return 2 * _size(what.type)
    if what.opcode == "dynamic-update-slice":
        return 2 * size_of(what.operands[1])
    if what.opcode == "fusion":
        return _fused_bytes(module, lines, what)
    return sum(map(size_of, set(what.operands))) + _size(what.type)


def _fused_bytes(module, lines, what) -> int:
    """Of a fusion: whole operands, but only what is taken of one that is sliced."""
    (inner,) = what.called("calls")
    fused, total = module.by_name[inner], 0
    for place, name in enumerate(what.operands):
        outside = lines.get(name)
        types = [] if outside is None else hlo.arrays(outside.type)
        if types and not types[0].space:
            taken = _taken(module, inner, place)
            total += _size(outside.type) if taken is None else taken
    root = next(one for one in fused.values() if one.root)
    outputs = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    spaces = [array.space for array in hlo.arrays(what.type)]
    for output, space in zip(outputs, spaces, strict=False):
        if space:
            continue
        if output.opcode == "dynamic-update-slice" and output.operands[1] in fused:
            total += hlo.arrays(fused[output.operands[1]].type)[0].bytes
        else:
            total += sum(array.bytes for array in hlo.arrays(output.type))
    return total


def _taken(module: hlo.Module, computation: str, place: int) -> int | None:
    """Bytes that a fused computation reads of its argument at a place; None = all of it.

    Slices are taken of it where that is all that is done to it, here or in fusions inside; nothing
    where it is what a slice is put into.
    """
    fused = module.by_name[computation].values()
    (name,) = (
        one.name for one in fused if one.opcode == "parameter" and int(one.operands[0]) == place
    )
    names, total = {name}, 0  # the argument, and what is it under another name
    for user in fused:  # in an order of evaluation
        at = [index for index, operand in enumerate(user.operands) if operand in names]
        if not at or user.opcode == "parameter":
            continue
        if user.opcode == "bitcast" or "output_to_operand_aliasing={{}:" in user.attributes:
            names.add(user.name)
        elif user.opcode == "fusion":
            (inner,) = user.called("calls")
            taken = [_taken(module, inner, index) for index in at]
            if None in taken:
                return None
            total += sum(taken)
        elif at != [0]:
            return None
        elif user.opcode in ("dynamic-slice", "gather"):
            total += hlo.arrays(user.type)[0].bytes
        elif user.opcode != "dynamic-update-slice":
            return None
    return total


def _collective(module, lines, what) -> Collective | None:
    kind = what.opcode.removesuffix("-start")
    asynchronous = what.opcode.endswith("-start")
    if kind in COLLECTIVES:
        return _traffic(lines, what, kind, asynchronous)
    if what.opcode in ("fusion", "async-start"):
        for name in what.called("calls"):
            for inner in module.computations.get(name, ()):
                kind = inner.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                scattered = kind == "all-reduce" and "all-reduce-scatter" in name
                found = _traffic(module.by_name[name], inner, kind, what.opcode == "async-start")
                return found._replace(kind="reduce-scatter") if scattered else found
    return None


def _traffic(lines, what, kind: str, asynchronous: bool) -> Collective:
    given = sum(
        math.prod(array.shape) * array.width
        for name in what.operands
        if name in lines
        for array in hlo.arrays(lines[name].type)
    )
    group = _group(what.attributes)
    whole = given * group if kind == "all-gather" else given
    return Collective(kind, math.ceil(whole), group, asynchronous)


def _group(attributes: str) -> int:
    """How many devices take part in one of the groups."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))
    return 2  # pairs of a permutation
