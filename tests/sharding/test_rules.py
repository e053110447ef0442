"""The rules table, meshes, and placements, on eight simulated devices."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from memjax import sharding


class Toy(nnx.Module):
    def __init__(self, inputs=8, outputs=4, axes=("embed", "heads")):
        self.kernel = nnx.Param(jnp.ones((inputs, outputs)), axes=axes)


def params_of(module):
    return nnx.split(module, nnx.Param)[1]


def test_every_rule_names_mesh_axes():
    for name, rule in sharding.RULES.items():
        for column in rule:
            assert set(column) <= set(sharding.MESH_AXES), name


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"data": -1}, (8, 1, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2, 1)),
        ({"fsdp": 4, "sequence": 2}, (1, 4, 1, 2)),
        ({}, (1, 1, 1, 1)),
    ],
)
def test_make_mesh(sizes, expected):
    mesh = sharding.make_mesh(**sizes)
    assert tuple(mesh.shape.items()) == tuple(zip(sharding.MESH_AXES, expected, strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 16}, "data=16 .* 16 devices but there are 8"),
        ({"data": -1, "fsdp": 3}, "8 devices cannot be split .* multiply to 3"),
        ({"data": -1, "fsdp": -1}, "only one mesh axis"),
        ({"tensor": 0}, "tensor=0 must be at least 1"),
    ],
)
def test_make_mesh_errors(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX asks a device of a TPU slice for."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0


@pytest.mark.parametrize(
    ("sizes", "neighbours"),
    [({"fsdp": 16, "tensor": 4}, 4), ({"fsdp": 32, "tensor": 2}, 2), ({"fsdp": 8, "tensor": 8}, 8)],
)
def test_a_mesh_may_split_the_axes_of_a_slice(sizes, neighbours):
    """A slice of 8 x 8 chips, in halves and quarters of an axis: those that share one are near."""
    chips = [Chip(8 * y + x, (x, y, 0)) for y in range(8) for x in range(8)]
    mesh = sharding.make_mesh(**sizes, devices=chips)
    assert mesh.devices.shape == (1, sizes["fsdp"], sizes["tensor"], 1)
    assert {chip.id for chip in mesh.devices.flat} == set(range(64))
    for group in mesh.devices[0, :, :, 0]:
        rows, columns = ({chip.coords[axis] for chip in group} for axis in (0, 1))
        assert len(rows) * len(columns) == neighbours
        assert all(max(places) - min(places) < neighbours for places in (rows, columns))


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite"])
def test_a_mesh_of_the_first_few_devices_of_a_slice(kind):
    """Three of 2 x 2 chips are no box, and stay in their order."""
    chips = [Chip(2 * y + x, (x, y, 0), device_kind=kind) for y in range(2) for x in range(2)]
    mesh = sharding.make_mesh(data=3, devices=chips)
    assert mesh.devices.shape == (3, 1, 1, 1)
    assert list(mesh.devices.flat) == chips[:3]
    assert mesh.axis_types == (AxisType.Auto,) * 4


def test_spec_reads_the_table():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert sharding.spec(("embed", "heads"), mesh) == PartitionSpec("fsdp", "tensor")
    assert sharding.spec(("layers", "vocab", None), mesh) == PartitionSpec(None, "tensor", None)
    batch = PartitionSpec(("data", "fsdp"), "sequence")
    assert sharding.spec(("batch", "time"), mesh, shape=(4, 3)) == batch


def test_spec_errors():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    with pytest.raises(ValueError, match=r"unknown logical axis 'head'.*'heads'"):
        sharding.spec(("embed", "head"), mesh)
    with pytest.raises(ValueError, match=r"'heads' and 'mlp' are both split over .* 'tensor'"):
        sharding.spec(("heads", "mlp"), mesh)
    with pytest.raises(ValueError, match=r"tokens \(6, 8\): .*'batch', size 6.* 4; make"):
        sharding.spec(("batch", "time"), mesh, shape=(6, 8), name="tokens")
    with pytest.raises(ValueError, match=r"shape \(8,\) but the axes"):
        sharding.spec(("batch", "time"), mesh, shape=(8,))


def test_collision_is_an_error_on_a_mesh_of_one_too():
    with pytest.raises(ValueError, match="collide"):
        sharding.spec(("embed", "embed"), sharding.make_mesh())


@pytest.mark.parametrize("traced", [False, True])
def test_constrain_lays_out(traced):
    x = jnp.arange(4.0 * 6 * 2).reshape(4, 6, 2)
    f = lambda x: sharding.constrain(x, ("batch", "time", "heads"))  # noqa: E731
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        y = (jax.jit(f) if traced else f)(x)
    assert y.addressable_shards[0].data.shape == (1, 6, 1)
    assert (y == x).all()


def test_constrain_in_an_eager_gradient():
    x = jnp.arange(4.0 * 6).reshape(4, 6)
    with jax.set_mesh(sharding.make_mesh(data=4, sequence=2)):
        grad = jax.grad(lambda x: (sharding.constrain(x, ("batch", "time")) ** 2).sum())(x)
    assert (grad == 2 * x).all()


def test_constrain_embed_of_an_activation_stays_whole():
    with jax.set_mesh(sharding.make_mesh(fsdp=4, sequence=2)):
        y = sharding.constrain(jnp.ones((4, 6, 8)), ("batch", "time", "embed"))
    assert y.addressable_shards[0].data.shape == (1, 3, 8)


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.ones((3, 5))
    assert sharding.constrain(x, ("batch", "time")) is x
    with jax.set_mesh(sharding.make_mesh()):
        assert sharding.constrain(x, ("batch", "time")) is x


def test_constrain_checks_names_without_a_mesh():
    with pytest.raises(ValueError, match="unknown logical axis 'tme'"):
        sharding.constrain(jnp.ones((3, 5)), ("batch", "tme"))
    with pytest.raises(ValueError, match=r"shape \(3, 5\)"):
        sharding.constrain(jnp.ones((3, 5)), ("batch",))


def test_constrain_one_token_and_indivisible_heads():
    with jax.set_mesh(sharding.make_mesh(data=2, tensor=2, sequence=2)):
        y = sharding.constrain(jnp.ones((1, 1, 4)), ("batch", "time", "heads"))
        assert y.addressable_shards[0].data.shape == (1, 1, 2)
        with pytest.raises(ValueError, match="'heads', size 3"):
            sharding.constrain(jnp.ones((2, 2, 3)), ("batch", "time", "heads"))


def test_constrain_under_vmap_and_shard_map():
    mesh = sharding.make_mesh(data=4, tensor=2)
    x = jnp.arange(48.0).reshape(3, 4, 4)
    with jax.set_mesh(mesh):
        y = jax.jit(jax.vmap(lambda x: sharding.constrain(x, ("batch", "mlp"))))(x)
        assert (y == x).all()
        assert y.addressable_shards[0].data.shape == (3, 1, 2)
        manual = jax.shard_map(
            lambda x: sharding.constrain(2 * x, ("batch", "mlp")),
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec("data"),
            axis_names={"data"},
        )
        assert (jax.jit(manual)(x[0]) == 2 * x[0]).all()


def test_param_axes():
    axes = sharding.param_axes(params_of(Toy()))
    assert axes["kernel"] == ("embed", "heads")
    with pytest.raises(ValueError, match=r"parameter \['kernel'\] names no logical axes"):
        sharding.param_axes(params_of(Toy(axes=None)))
    with pytest.raises(ValueError, match=r"'kernel'.* \(8, 4\) but the axes \('embed',\)"):
        sharding.param_axes(params_of(Toy(axes=("embed",))))


def test_constrain_params_splits_parameters_and_gradients():
    params = params_of(Toy())

    def loss(params):
        return jnp.square(sharding.constrain_params(params)["kernel"][...]).sum()

    with jax.set_mesh(sharding.make_mesh(fsdp=4, tensor=2)):
        grads = jax.jit(jax.grad(loss))(params)
        assert grads["kernel"].get_value().addressable_shards[0].data.shape == (2, 2)
        with pytest.raises(ValueError, match=r"parameter \['kernel'\] \(6, 4\)"):
            sharding.constrain_params(params_of(Toy(inputs=6)))
    assert (grads["kernel"][...] == 2).all()
    assert sharding.constrain_params(params)["kernel"].get_value() is params["kernel"].get_value()


def test_shardings_place_parameters_and_optimiser_state():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    params = params_of(Toy())
    optimiser = optax.adamw(1e-3).init(params)
    state = {"params": params, "optimiser": optimiser, "step": jnp.zeros((), jnp.int32)}
    placed = jax.device_put(state, sharding.shardings(state, mesh))
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    kernels = [leaf for leaf in jax.tree.leaves(placed) if leaf.ndim == 2]
    assert len(kernels) == 3  # the parameter and its two moments
    for leaf in kernels:
        assert leaf.addressable_shards[0].data.shape == (2, 2)
    assert placed["step"].sharding.is_fully_replicated


def test_shardings_of_shapes_serve_as_out_shardings():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    create = lambda: params_of(Toy())  # noqa: E731
    placements = sharding.shardings(jax.eval_shape(create), mesh)
    params = jax.jit(create, out_shardings=placements)()
    assert params["kernel"].get_value().addressable_shards[0].data.shape == (2, 2)


def test_mesh_that_does_not_divide_a_parameter():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    message = (
        r"parameter \['kernel'\] \(6, 4\): dimension 0 \('embed', size 6\) cannot be split over"
        r" the mesh axis fsdp of size 4; make fsdp a divisor of 6, or 'embed' a multiple of 4"
    )
    with pytest.raises(ValueError, match=message):
        sharding.shardings(params_of(Toy(inputs=6)), mesh)
