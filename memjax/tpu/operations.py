"""Arithmetic of a program before it is compiled."""

import math
from collections.abc import Iterator
from typing import Any


def products(jaxpr: Any) -> int:
    """Floating-point operations of the matrix products of a traced program.

    A multiply-add counts as two. All rounds of a scan count, of a loop of unknown length one.
    Of the branches of a condition that where it holds counts: for memories the one that runs where
    chunks are whole. Under `jax.shard_map` the operations of all devices count, in Pallas kernels
    those of all steps of the grid.

    Args:
      jaxpr: such as `jax.make_jaxpr(f)(x)` or `jax.jit(f).trace(x).jaxpr`.
    """
    return sum(map(products_of, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def products_of(equation: Any) -> int:
    """`products` of one equation.

    Args:
      equation: of a jaxpr.
    """
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval.shape
        inner = math.prod(left[axis] for axis in contracted)
        return 2 * inner * math.prod(equation.outvars[0].aval.shape)
    if name == "cond":
        return products(parameters["branches"][-1])
    return _times(name, parameters) * sum(map(products, inside(equation)))


def _times(name: str, parameters: dict[str, Any]) -> int:
    """How often a call runs what is inside."""
    if name == "shard_map":
        mesh = parameters["mesh"]
        return math.prod(mesh.shape[axis] for axis in parameters["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(parameters["grid_mapping"].grid)
    return parameters.get("length", 1)


def inside(equation: Any) -> Iterator[Any]:
    """The programs that an equation runs: the body of a loop, what a call calls.

    Args:
      equation: of a jaxpr.
    """
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(part, "jaxpr", part), "eqns"):
                yield part
