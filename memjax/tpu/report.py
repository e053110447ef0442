"""What a compiled step needs and takes on a slice: the report, as data, text and picture."""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any

import jax
from flax import nnx

import memjax
from memjax import training
from memjax.evaluation import losses
from memjax.tpu import costs, hlo, kernels, operations, show, steps, target
from memjax.tpu.chips import Chip, parse


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the model in a step on one device; all its layers together.

    Args:
      name: "mixer.lmm", "feed_forward.swiglu", "optimizer" ..., or an opcode.
      backward: whether this is of its backward pass, what it computes again included.
      cycles: estimated by the compiler, of kernels from their schedules.
      flops: of matrix products.
      bytes: to and from HBM.
      seconds: `cycles` at the chip's clock.
      floor: seconds at the chip's peaks: the larger of operations and bytes.
      bound: which of the two that is, "compute" or "memory".
    """

    name: str
    backward: bool
    cycles: int
    flops: int
    bytes: int
    seconds: float
    floor: float
    bound: str

    @property
    def label(self) -> str:
        """How text calls it."""
        return self.name + (", backward" if self.backward else "")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind and part in a step, on one device.

    Args:
      kind: "all-gather", ...
      part: of the model.
      count: how many.
      group: devices that take part in each.
      bytes: of the arrays that come of them, see `costs.Collective`.
      seconds: that sending takes at least, over all links of the chip at once.
      asynchronous: whether other work can run meanwhile.
    """

    kind: str
    part: str
    count: int
    group: int
    bytes: int
    seconds: float
    asynchronous: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """What `analyse` found. Bytes, cycles and operations are those of one device in one step.

    Args:
      title: of the run.
      kind: "train" or "decode".
      topology, mesh, devices: where it runs.
      versions: of memjax, JAX and libtpu.
      model_parameters: how many.
      rows, tokens: of a step, over all devices.
      memory: bytes: parameters, optimiser, state or batch, temporaries, code, `total` and what the
        device has, `capacity`.
      flops, bytes, cycles: sums.
      guessed: share of the cycles in loops that do not tell how often they run, and in branches.
      parts, operations: by part of the model and by opcode, the dearest first.
      traffic: collectives.
      schedules: of Pallas kernels.
      unmeasured: kernels without a schedule, whose cycles count as 0.
      seconds: `compute`, `collectives` (those nothing can run beside), `step` their sum, and
        `floor`, what operations or bytes take at the chip's peaks.
      utilisation: of the peak, in `seconds["step"]`: `hardware`, by the products that the compiled
        step has outside kernels; `model` (MFU), by those of the traced program: of training three
        times the forward pass.
      bound: what limits the step.
    """

    title: str
    kind: str
    topology: str
    mesh: dict[str, int]
    devices: int
    versions: dict[str, str]
    model_parameters: int
    rows: int
    tokens: int
    memory: dict[str, int]
    flops: int
    bytes: int
    cycles: int
    guessed: float
    parts: tuple[Part, ...]
    operations: tuple[Part, ...]
    traffic: tuple[Traffic, ...]
    schedules: tuple[kernels.Schedule, ...]
    unmeasured: tuple[str, ...]
    seconds: dict[str, float]
    utilisation: dict[str, float]
    bound: str

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of a device."""
        return self.memory["total"] <= self.memory["capacity"]


def analyse(
    config: Any,
    topology: str,
    *,
    kind: str = "train",
    batch: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Compiles a step of a configuration for a slice and reads what comes out.

    Nothing runs and nothing is allocated. Call `target.prepare()` first in the process.

    Args:
      config: as `training.build` takes it; its mesh must fit the slice.
      topology: such as "v5p:4x4x4".
      kind: "train" or "decode".
      batch: rows to decode, see `steps.trace`.
      progress: called with what is being done.

    Returns:
      The report.

    Raises:
      ValueError: a bad configuration, topology or mesh, or a step that does not fit into the memory
        of a device, with how much it would need.
      ImportError: libtpu is missing or of another version.
    """
    chip, count = parse(topology)
    run = training.build(config, devices=target.devices(topology))
    if run.mesh.size != count:
        raise ValueError(
            f"the mesh {dict(run.mesh.shape)} has {run.mesh.size} of the {count} devices of"
            f" {topology}; set one axis to -1 to take what remains"
        )
    progress(f"tracing the {kind} step for {run.mesh.size} devices of {topology}")
    traced, arguments = steps.trace(run, kind, batch=batch)
    lowered = traced.lower()
    progress("compiling it, which takes minutes for a large model")
    compiled = _compile(lowered, chip)
    progress("reading what was compiled")
    found = costs.costs(hlo.parse(compiled.as_text()))
    try:
        schedules = kernels.schedules(traced.jaxpr, topology, chip)
    except RuntimeError as error:  # the rest of the report is worth having
        progress(str(error))
        schedules = ()
    rows = run.train.batch if kind == "train" or batch is None else batch
    useful = _useful(run, traced, kind) / run.mesh.size
    return summarise(
        found,
        chip,
        schedules=schedules,
        memory=memory(steps.placed(arguments, compiled), compiled.memory_analysis(), chip),
        useful=useful,
        title=f"{'-'.join(run.model.pattern)}, {run.parameters:,} parameters",
        kind=kind,
        topology=topology,
        mesh=dict(run.mesh.shape),
        devices=run.mesh.size,
        versions=versions(),
        model_parameters=run.parameters,
        rows=rows,
        tokens=rows * run.context if kind == "train" else rows,
    )


def _compile(lowered: Any, chip: Chip) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(
            f"the step does not fit into the {chip.hbm / 2**30:.0f} GiB of a device of {chip.name}"
            f" ({' '.join(lines)[:400]}): take a larger slice, fewer rows (train.batch) or more"
            " train.accumulate, model.remat=full, or split the model (--mesh=fsdp=..., tensor=...)"
        ) from error


def versions() -> dict[str, str]:
    """Of memjax, JAX and libtpu."""
    return {
        "memjax": memjax.__version__,
        "jax": jax.__version__,
        "libtpu": metadata.version("libtpu"),
    }


def memory(arguments: dict[str, Any], analysis: Any, chip: Chip) -> dict[str, int]:
    """Bytes on one device by what they hold.

    Args:
      arguments: trees of shapes with shardings, by name.
      analysis: `compiled.memory_analysis()`.
      chip: that it is for.
    """

    def held(tree: Any) -> int:
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * _itemsize(leaf.dtype)
            for leaf in jax.tree.leaves(tree)
        )

    found = {name: held(tree) for name, tree in arguments.items()}
    whole = analysis.argument_size_in_bytes
    found["padding and other arguments"] = max(0, whole - sum(found.values()))
    found["outputs"] = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    found["temporaries"] = analysis.temp_size_in_bytes
    found["code"] = analysis.generated_code_size_in_bytes
    found["total"] = whole + found["outputs"] + found["temporaries"] + found["code"]
    found["capacity"] = chip.hbm
    return found


def _itemsize(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def _useful(run: training.Run, traced: Any, kind: str) -> int:
    """Operations of the products of a step without what is computed again, over all devices."""
    if kind == "decode":
        return operations.products(traced.jaxpr)

    def forward(params, batch, key):
        return losses.forward(nnx.merge(run.graphdef, params), batch, key)

    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(run.mesh):
        jaxpr = jax.jit(forward).trace(run.abstract_params, run.abstract_batch, key).jaxpr
    return 3 * operations.products(jaxpr)


def summarise(
    found: list[costs.Cost],
    chip: Chip,
    *,
    schedules: Sequence[kernels.Schedule],
    memory: dict[str, int],
    useful: float,
    **described: Any,
) -> Report:
    """The report of costs.

    Args:
      found: of `costs.costs`.
      chip: that they are of.
      schedules: of `kernels.schedules`.
      memory: of `memory`.
      useful: operations of a step on one device, for the utilisation of the model.
      described: the fields of `Report` that are only passed on.
    """
    known = {(one.name, one.results): one for one in schedules}
    counted = [_with_schedule(cost, known) for cost in found]
    cycles = sum(cost.cycles for cost in counted)
    flops = sum(cost.flops for cost in counted)
    traffic = tuple(_traffic(counted, chip))
    seconds = {
        "compute": cycles / chip.clock,
        "collectives": sum(one.seconds for one in traffic if not one.asynchronous),
        "floor": max(flops / chip.flops, sum(cost.bytes for cost in counted) / chip.hbm_bandwidth),
    }
    seconds["step"] = seconds["compute"] + seconds["collectives"]
    parts = _grouped(counted, chip, lambda cost: (cost.part, cost.backward))
    guessed = sum(cost.cycles for cost in counted if not cost.certain)
    return Report(
        **described,
        memory=memory,
        flops=flops,
        bytes=sum(cost.bytes for cost in counted),
        cycles=cycles,
        guessed=guessed / cycles if cycles else 0.0,
        parts=parts,
        operations=_grouped(counted, chip, lambda cost: (_operation(cost), False)),
        traffic=traffic,
        schedules=tuple(schedules),
        unmeasured=tuple(
            sorted({c.kernel for c in found if c.kernel and (c.kernel, c.results) not in known})
        ),
        seconds=seconds,
        utilisation={
            "hardware": flops / chip.flops / seconds["step"],
            "model": useful / chip.flops / seconds["step"],
        },
        bound=_bound(seconds, parts),
    )


def _with_schedule(cost: costs.Cost, known: dict[tuple, kernels.Schedule]) -> costs.Cost:
    one = known.get((cost.kernel, cost.results))
    if one is None:
        return cost
    return cost._replace(cycles=one.cycles * cost.times, flops=one.flops * cost.times)


def _operation(cost: costs.Cost) -> str:
    return f"kernel {cost.kernel}" if cost.kernel else cost.operation


def _grouped(
    found: list[costs.Cost], chip: Chip, key: Callable[[costs.Cost], tuple[str, bool]]
) -> tuple[Part, ...]:
    groups: dict[tuple[str, bool], list[costs.Cost]] = {}
    for cost in found:
        if not cost.collective:
            groups.setdefault(key(cost), []).append(cost)
    parts = []
    for (name, backward), members in groups.items():
        cycles, flops, moved = (
            sum(getattr(cost, field) for cost in members) for field in ("cycles", "flops", "bytes")
        )
        compute, memory = flops / chip.flops, moved / chip.hbm_bandwidth
        parts.append(
            Part(
                name=name,
                backward=backward,
                cycles=cycles,
                flops=flops,
                bytes=moved,
                seconds=cycles / chip.clock,
                floor=max(compute, memory),
                bound="compute" if compute > memory else "memory",
            )
        )
    return tuple(sorted(parts, key=lambda part: -part.cycles))


def _traffic(found: Iterable[costs.Cost], chip: Chip) -> list[Traffic]:
    groups: dict[tuple, list[costs.Cost]] = {}
    for cost in found:
        if one := cost.collective:
            groups.setdefault((one.kind, cost.part, one.group, one.asynchronous), []).append(cost)
    rows = [
        Traffic(
            kind=kind,
            part=part,
            count=sum(cost.times for cost in members),
            group=group,
            bytes=sum(cost.times * cost.collective.bytes for cost in members),
            seconds=sum(cost.times * cost.collective.sent for cost in members) / chip.ici_bandwidth,
            asynchronous=asynchronous,
        )
        for (kind, part, group, asynchronous), members in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.seconds)


def _bound(seconds: dict[str, float], parts: tuple[Part, ...]) -> str:
    """In words, what limits a step."""
    if seconds["collectives"] > seconds["compute"]:
        return "collectives"
    dearest = parts[0]
    share = dearest.seconds / seconds["step"]
    which = f"{dearest.label} ({share:.0%} of the step)"
    if dearest.floor > 0.5 * dearest.seconds:
        peak = "the matrix units" if dearest.bound == "compute" else "HBM"
        return f"{which}, near the peak of {peak}"
    return f"{which}, at {dearest.floor / dearest.seconds:.0%} of what {dearest.bound} would allow"


def to_dict(report: Report) -> dict[str, Any]:
    """Plain data, for JSON."""
    return {**dataclasses.asdict(report), "fits": report.fits}


def check_writable(directory: str) -> None:
    """Raises an OSError where `write` could not, before what it writes took minutes to make.

    Args:
      directory: need not be there, and is not made.
    """
    nearest = os.path.abspath(directory)
    while not os.path.lexists(nearest):
        nearest = os.path.dirname(nearest)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OSError(
            f"no report can be written to {directory} ({nearest}: {error.strerror}):"
            " give another directory as --out"
        ) from error


def write(report: Report, directory: str, command: str) -> list[str]:
    """Writes `report.json`, `report.txt` and, with matplotlib, `report.png`.

    Args:
      report: of `analyse`.
      directory: made when missing.
      command: that made it, kept in the files.

    Returns:
      The paths written.
    """
    os.makedirs(directory, exist_ok=True)
    paths = [os.path.join(directory, name) for name in ("report.json", "report.txt", "report.png")]
    with open(paths[0], "w", encoding="utf-8") as file:
        json.dump({"command": command, **to_dict(report)}, file, indent=1)
    with open(paths[1], "w", encoding="utf-8") as file:
        file.write(f"{command}\n\n{show.text(report)}")
    chip, _ = parse(report.topology)
    return paths if show.figure(report, chip, paths[2]) else paths[:2]


def read(directory: str) -> dict[str, Any]:
    """What `report.json` holds, as `show.compare` takes it.

    Args:
      directory: of `write`.

    Raises:
      ValueError: it is not there, or does not hold a report.
    """
    path = os.path.join(directory, "report.json")
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist: make it with --out={directory}")
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        show.compare([found, found])
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{path} does not hold a report: make it again with --out={directory}"
        ) from error
    return found
