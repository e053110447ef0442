"""Compiles kernels, forward and backward, for a slice: `python -m tests.tpu.mosaic v5e:2x2 small`.

`small` = every op, decay and dimension in small steps; `bfloat16`, `float32` = in the steps of
`pallas_kernels.blocks`. All have documents and losses, which is the most that a step holds.
"""

import itertools
import re
import sys

from memjax.tpu import target

target.prepare()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from pallas_kernels import dispatch  # noqa: E402
from pallas_kernels.blocks import Blocks  # noqa: E402
from pallas_kernels.short_convolution import short_convolution  # noqa: E402
from tests.pallas_kernels import affine  # noqa: E402

DECAYS, DIMS = ("none", "head", "channel"), (64, 128, 256)


def main(topology: str, which: str) -> None:
    mesh = jax.sharding.Mesh(np.array(target.devices(topology)[:1]), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for op, decay, dim in itertools.product(affine.OPS, DECAYS, DIMS):
        case = affine.Case(
            op, decay, packed=True, length=256, batch=1, heads=8, key=dim, value=dim,
            blocks=Blocks(32, 2, 2) if which == "small" else None,
            dtype="float32" if which == "float32" else "bfloat16",
            implementation="pallas", cores=0, unit_eps=1e-6 if op == "delta_rule" else None,
        )  # fmt: skip
        given = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
            (affine.inputs(case), affine.cotangents(case)),
        )
        with jax.set_mesh(mesh):
            assert dispatch.here() == topology.partition(":")[0]
            text = affine.compiled(affine.call, case).lower(*given).compile().as_text()
        for kernel in (f"{op}_{decay}", f"{op}_{decay}_backward"):
            assert re.search(rf"{kernel}\b", text), f"{case}: no {kernel} in the program"
        print(case, flush=True)
    for documents, dtype in itertools.product((True, False), ("float32", "bfloat16")):
        shapes = ((2, 1000, 1280), dtype), ((4, 1280), "float32"), ((2, 3, 1280), "float32")
        x, weight, before = (jax.ShapeDtypeStruct(*shape, sharding=everywhere) for shape in shapes)
        starts = jax.ShapeDtypeStruct((2, 1000), bool, sharding=everywhere) if documents else None

        def run(x, weight, before, starts):
            y, pull = jax.vjp(
                lambda *given: short_convolution(
                    *given, starts=starts, silu=True, implementation="pallas"
                ),
                x, weight, before,
            )  # fmt: skip
            return y, pull(y)

        with jax.set_mesh(mesh):
            text = jax.jit(run).lower(x, weight, before, starts).compile().as_text()
        for kernel in ("short_convolution", "short_convolution_backward"):
            assert re.search(rf"{kernel}_*\b", text), f"no {kernel} in the program"
        print(f"convolution-{dtype}-{documents}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
