"""Compiles kernels, forward and backward, for a slice: `python -m tests.tpu.mosaic v5e:2x2 small`.

`small` = every op, decay and dimension in small steps; `bfloat16`, `float32` = in the steps of
`pallas_kernels.blocks`. All have documents and losses, which is the most that a step holds.
"""

import functools
import itertools
import re
import sys

from memjax.tpu import target

target.prepare()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from pallas_kernels import dispatch  # noqa: E402
from pallas_kernels.blocks import Blocks  # noqa: E402
from pallas_kernels.deep_memory import deep_memory  # noqa: E402
from pallas_kernels.short_convolution import short_convolution  # noqa: E402
from tests.pallas_kernels import affine  # noqa: E402

DECAYS, DIMS = ("none", "head", "channel"), (64, 128, 256)
CHUNK = 64  # of the deep memories


def main(topology: str, which: str) -> None:
    mesh = jax.sharding.Mesh(np.array(target.devices(topology)[:1]), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spec = functools.partial(jax.ShapeDtypeStruct, sharding=everywhere)
    for programs in (affine_ops, deep_memories, convolutions):
        for case, name, run, arguments in programs(which, spec):
            with jax.set_mesh(mesh):
                assert dispatch.here() == topology.partition(":")[0]
                text = run.lower(*arguments).compile().as_text()
            for kernel in (name, f"{name}_backward"):
                assert re.search(rf"{kernel}_*\b", text), f"{case}: no {kernel} in the program"
            print(case, flush=True)


def affine_ops(which, spec):
    """Programs: (case, name of the kernel, jitted function, its arguments)."""
    for op, decay, dim in itertools.product(affine.OPS, DECAYS, DIMS):
        case = affine.Case(
            op, decay, packed=True, length=256, batch=1, heads=8, key=dim, value=dim,
            blocks=Blocks(32, 2, 2) if which == "small" else None,
            dtype="float32" if which == "float32" else "bfloat16",
            implementation="pallas", cores=0, unit_eps=1e-6 if op == "delta_rule" else None,
        )  # fmt: skip
        given = jax.tree.map(
            lambda x: spec(x.shape, x.dtype), (affine.inputs(case), affine.cotangents(case))
        )
        yield case, f"{op}_{decay}", affine.compiled(affine.call, case), given


def deep_memories(which, spec):
    """Likewise."""
    # 256 channels in fp32 do not fit (`pallas_kernels.deep_memory.fits`).
    dims, dtype = (DIMS[:2], "float32") if which == "float32" else (DIMS, "bfloat16")
    blocks = Blocks(CHUNK, 1, 1) if which == "small" else None
    for dim in dims:
        tokens, maps = (1, 4 * CHUNK, 8), ((8, dim, 4 * dim), (8, 4 * dim, dim))
        wide, gate = spec((*tokens, dim), dtype), spec(tokens, "float32")
        weights = tuple(spec((1, *one), "float32") for one in maps)
        norm = (spec((8, dim), "float32"),) * 2
        given = (wide, wide, wide, gate, gate, gate, weights, weights, norm)

        def learn(given, initial, starts):
            def forward(given, initial):
                return deep_memory(
                    *given, chunk=CHUNK, initial=initial, starts=starts, unit_eps=1e-6,
                    implementation="pallas", blocks=blocks,
                )  # fmt: skip

            found, pull = jax.vjp(forward, given, initial)
            return pull(found)

        initial = tuple(spec(one, "float32") for one in maps * 2)
        arguments = (given, initial, spec((1, 4), bool))
        yield f"deep-{dim}", "deep_memory_none", jax.jit(learn), arguments


def convolutions(which, spec):
    """Likewise."""
    for documents, dtype in itertools.product((True, False), ("float32", "bfloat16")):
        shapes = ((2, 1000, 1280), dtype), ((4, 1280), "float32"), ((2, 3, 1280), "float32")
        starts = spec((2, 1000), bool) if documents else None

        def run(x, weight, before, starts):
            y, pull = jax.vjp(
                lambda *given: short_convolution(
                    *given, starts=starts, silu=True, implementation="pallas"
                ),
                x, weight, before,
            )  # fmt: skip
            return y, pull(y)

        arguments = (*(spec(*shape) for shape in shapes), starts)
        yield f"convolution-{dtype}-{documents}", "short_convolution", jax.jit(run), arguments


if __name__ == "__main__":
    main(*sys.argv[1:])
