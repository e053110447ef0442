"""Static schedules of the Pallas kernels of a program: cycles of a grid step, use of each unit.

The compiler estimates no cycles for a kernel, but it can write down the schedule: one row for each
cycle, with what every unit does in it. It writes that for all it compiles, gigabytes for a model,
so that each kernel is compiled alone, in a process of its own:

    python -m memjax.tpu.kernels DIRECTORY TOPOLOGY     # what `schedules` runs
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from jax import export

from memjax.tpu import operations, target
from memjax.tpu.chips import Chip

# What tells how a kernel uses the chip; names differ between versions of the compiler.
UNITS = ("MXU", "MATMUL", "MATPUSH", "XLU", "VALU", "EUP", "VLOAD", "VSTORE")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the compiler made of a kernel.

    Args:
      name: of the kernel.
      results: shapes of what it returns, which tell kernels of one name apart.
      rows: cycles of one step of the grid, stalls counted. A loop inside that is not unrolled
        counts once.
      grid: its steps.
      cores: over which a parallel dimension of the grid is split.
      use: of each unit the share of its slots that are taken.
      flops: of the matrix products of one call, masked halves and padding included.
    """

    name: str
    results: tuple[tuple[int, ...], ...]
    rows: int
    grid: tuple[int, ...]
    cores: int
    use: dict[str, float]
    flops: int

    @property
    def cycles(self) -> int:
        """Of one call: all steps, divided among the cores."""
        return math.ceil(self.rows * math.prod(self.grid) / self.cores)


def calls(jaxpr: Any) -> Iterator[Any]:
    """The `pallas_call` equations of a program, those inside loops and other calls included.

    Args:
      jaxpr: such as `jax.jit(f).trace(...).jaxpr`.
    """
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for part in operations.inside(equation):
                yield from calls(part)


def kernel_name(equation: Any) -> str:
    """The name that a `pallas_call` has in the compiled module."""
    return equation.params["name"]


def schedules(jaxpr: Any, topology: str, chip: Chip) -> tuple[Schedule, ...]:
    """Compiles every kernel of a program alone and reads its schedule.

    Args:
      jaxpr: of the program, traced for TPU.
      topology: to compile for.
      chip: that it is made of.

    Returns:
      One for each name and shapes of results, of several the one with the largest grid; a kernel of
      which the compiler wrote none is left out.

    Raises:
      RuntimeError: a kernel does not compile alone; has the compiler's message.
    """
    found: dict[tuple, Any] = {}
    for equation in calls(jaxpr):
        key = kernel_name(equation), _results(equation)
        if key not in found or math.prod(_grid(equation)) > math.prod(_grid(found[key])):
            found[key] = equation
    if not found:
        return ()
    with tempfile.TemporaryDirectory(prefix="memjax-kernels-") as folder:
        for number, equation in enumerate(found.values()):
            _export(equation, os.path.join(folder, f"{number}.kernel"))
        command = [sys.executable, "-m", "memjax.tpu.kernels", folder, topology]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise RuntimeError(f"a kernel did not compile alone: {' '.join(lines[-3:])}")
        measured = json.loads(done.stdout.splitlines()[-1])
    return tuple(
        Schedule(
            name,
            results,
            measured[str(number)]["rows"],
            _grid(one),
            _cores(one, chip),
            measured[str(number)]["use"],
            operations.products_of(one),
        )
        for number, ((name, results), one) in enumerate(found.items())
        if str(number) in measured
    )


def _results(equation) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(result.aval.shape) for result in equation.outvars)


def _grid(equation) -> tuple[int, ...]:
    return tuple(int(size) for size in equation.params["grid_mapping"].grid)


def _cores(equation, chip: Chip) -> int:
    """Over how many cores the grid is split: over all where a dimension is parallel."""
    semantics = getattr(equation.params.get("compiler_params"), "dimension_semantics", None) or ()
    return chip.cores if any("parallel" in str(kind).lower() for kind in semantics) else 1


def _export(equation, path: str) -> None:
    """Writes a kernel as a program of its own."""

    def alone(*arguments):
        return equation.primitive.bind(*arguments, **equation.params)

    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
    exported = export.export(jax.jit(alone), platforms=["tpu"])(*shapes)
    pathlib.Path(path).write_bytes(exported.serialize())


def read_schedule(text: str) -> tuple[int, dict[str, float]]:
    """Rows and use of units in a file `*-static-per-bundle-utilization.txt` of the compiler.

        == CAPACITY: / names of the units / how many of each / == UTILIZATION: / a row a cycle

    Args:
      text: of the file.

    Returns:
      (rows, for each of `UNITS` that it names the share of its slots that are taken).

    Raises:
      ValueError: it is no such file.
    """
    lines = text.splitlines()
    if len(lines) < 4 or "," not in lines[1]:
        raise ValueError("this is no schedule: its second line must name the units")
    names = [name.strip() for name in lines[1].split(",")]
    numbers = [
        [int(word) for word in line.split()]
        for line in lines[2:]
        if re.fullmatch(r"\s*\d+(\s+\d+)*\s*", line)
    ]
    capacity, rows = numbers[0], numbers[1:]
    use = {
        name: sum(row[place] for row in rows) / (len(rows) * size)
        for place, (name, size) in enumerate(zip(names, capacity, strict=True))
        if name in UNITS and size and rows
    }
    return len(rows), use


def _measure(folder: str, topology: str) -> dict[str, Any]:
    """Compiles the exported kernels of a folder, with the schedules written."""
    found = {}
    (device, *_) = target.devices(topology)
    placed = jax.sharding.SingleDeviceSharding(device)
    dump = pathlib.Path(folder, "dump")
    for path in sorted(pathlib.Path(folder).glob("*.kernel")):
        exported = export.deserialize(bytearray(path.read_bytes()))
        shapes = [
            jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=placed)
            for aval in exported.in_avals
        ]
        jax.jit(exported.call).lower(*shapes).compile()
        # named after the function that `_export` wraps around the kernel
        files = list(dump.glob("*-alone*pre-delay_hlo-static-per-bundle-utilization.txt"))
        if files:
            rows, use = read_schedule(max(files, key=lambda file: file.stat().st_size).read_text())
            found[path.stem] = {"rows": rows, "use": use}
        for file in dump.iterdir():
            file.unlink()
    return found


if __name__ == "__main__":
    os.makedirs(os.path.join(sys.argv[1], "dump"))
    target.prepare(dump=os.path.join(sys.argv[1], "dump"))
    print(json.dumps(_measure(sys.argv[1], sys.argv[2])))
