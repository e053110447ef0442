"""Kernels found in a traced program, and the schedule that the compiler writes of one."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from memjax.tpu import chips, kernels, operations

TABLE = """== CAPACTIY:
MXU, XLU, VALU, VPOP, SALU
    4     3     4     2     0
== UTILIZATION:
4 0 1 0 2
0 0 0 0 0
4 3 2 0 0
0 0 0 2 1
"""


def doubled(x, grid):
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] @ x_ref[...]

    return pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), grid=grid, name="doubled"
    )(x)


def test_kernels_are_found_inside_loops():
    def f(x):
        return jax.lax.scan(
            lambda x, _: (jax.jit(doubled, static_argnums=1)(x, (3, 2)), 0), x, None, 5
        )[0]

    jaxpr = jax.make_jaxpr(f)(jnp.ones((8, 8)))
    (call,) = kernels.calls(jaxpr)
    assert kernels.kernel_name(call) == "doubled"
    assert operations.products(jaxpr) == 5 * 6 * 2 * 8 * 8 * 8
    assert list(kernels.calls(jax.make_jaxpr(jnp.sin)(1.0))) == []


def test_a_program_without_kernels_starts_no_compiler():
    assert kernels.schedules(jax.make_jaxpr(jnp.sin)(1.0), "v5p:2x2x1", chips.CHIPS["v5p"]) == ()


def test_schedules_are_read():
    rows, use = kernels.read_schedule(TABLE)
    assert rows == 4
    assert use == {"MXU": 0.5, "XLU": 0.25, "VALU": 3 / 16}
    one = kernels.Schedule("k", (), rows, (3, 2), 2, use, 10)
    assert one.cycles == 12
    with pytest.raises(ValueError, match="no schedule"):
        kernels.read_schedule("something else")


@pytest.mark.parametrize(
    ("semantics", "cores"), [(("arbitrary",), 1), (("parallel", "arbitrary"), 2)]
)
def test_parallel_grids_are_split_over_the_cores(semantics, cores):
    parameters = {"compiler_params": types.SimpleNamespace(dimension_semantics=semantics)}
    call = types.SimpleNamespace(params=parameters)
    assert kernels._cores(call, chips.CHIPS["v5p"]) == cores
    assert kernels._cores(call, chips.CHIPS["v5e"]) == 1
    assert kernels._cores(types.SimpleNamespace(params={}), chips.CHIPS["v5p"]) == 1


def test_products_of_a_program():
    a, b = jnp.ones((4, 8)), jnp.ones((8, 16))
    one = 2 * 4 * 8 * 16
    assert operations.products(jax.make_jaxpr(jnp.matmul)(a, b)) == one
    batched = jax.make_jaxpr(jax.vmap(jnp.matmul))(jnp.ones((3, 4, 8)), jnp.ones((3, 8, 16)))
    assert operations.products(batched) == 3 * one

    def chosen(flag, a, b):
        return jax.lax.cond(flag, lambda: a @ b, lambda: a @ b @ b.T @ b)

    assert operations.products(jax.make_jaxpr(chosen)(True, a, b)) == one

    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    whole = jax.sharding.PartitionSpec()
    with jax.set_mesh(mesh):
        each = jax.shard_map(jnp.matmul, in_specs=(spec, whole), out_specs=spec)
        jaxpr = jax.make_jaxpr(each)(jnp.ones((32, 8)), b)
    assert operations.products(jaxpr) == 8 * one, "all devices together"
    gradient = jax.make_jaxpr(jax.grad(functools.partial(lambda b, a: jnp.sum((a @ b) ** 2), a=a)))(
        b
    )
    assert operations.products(gradient) == 2 * one
