"""The short convolution: loops in float64, what XLA runs, and the interpreted kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from memjax import layers, sharding
from memjax.layers import conv
from pallas_kernels.short_convolution import short_convolution, tpu

FORMS = {
    "xla": {"implementation": "xla"},
    "kernel": {"interpret": pltpu.InterpretParams(detect_races=True)},
}


def oracle(x, weight, before, starts, silu):
    """Token by token, tap by tap, in float64."""
    x, weight, before = (np.asarray(z, np.float64) for z in (x, weight, before))
    y = np.zeros_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        for s, tap in enumerate(weight):
            if s and starts is not None and t - s + 1 >= 0 and starts[b, t - s + 1]:
                break
            y[b, t] += tap * (x[b, t - s] if t >= s else before[b, t - s])
    return y / (1 + np.exp(-y)) if silu else y


def draw(batch=2, time=37, dim=128, width=4, documents=False, dtype="float32", seed=0):
    random = np.random.default_rng(seed)
    x, by = (jnp.asarray(random.normal(size=(batch, time, dim)), dtype) for _ in range(2))
    weight = jnp.asarray(random.normal(size=(width, dim)), "float32")
    before = jnp.asarray(random.normal(size=(batch, width - 1, dim)), "float32")
    starts = jnp.asarray(random.random((batch, time)) < 0.2) if documents else None
    return x, weight, before, starts, by


def pull(x, weight, before, starts, by, silu, **how):
    y, back = jax.vjp(
        lambda *given: short_convolution(*given, starts=starts, silu=silu, **how),
        x, weight, before,
    )  # fmt: skip
    return y, *back(by)


def check(form, given, silu=True, tolerance=1e-5):
    """Value and gradients, by the largest number of each."""
    x, weight, before, starts, by = given
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(z, np.float64)) for z in (x, weight, before)]
        y, *slopes = pull(*wide, starts, jnp.asarray(by, "float64"), silu, implementation="xla")
    np.testing.assert_allclose(y, oracle(x, weight, before, starts, silu), rtol=1e-9, atol=1e-9)
    got = pull(*given, silu, **FORMS[form])
    for mine, want, like in zip(got, (y, *slopes), (x, x, weight, before), strict=True):
        assert mine.shape == like.shape
        assert mine.dtype == like.dtype
        if want.size:
            np.testing.assert_allclose(
                np.asarray(mine, np.float64), want, rtol=0, atol=tolerance * np.abs(want).max()
            )


def test_the_derivative_of_what_xla_runs():
    """Against differences of the loops."""
    x, weight, before, starts, by = draw(1, 9, 3, documents=True)
    with jax.enable_x64(True):
        given = [np.asarray(z, np.float64) for z in (x, weight, before)]
        _, *slopes = pull(
            *map(jnp.asarray, given), starts, jnp.asarray(by, "float64"), True, implementation="xla"
        )
    random = np.random.default_rng(1)
    for place, slope in enumerate(slopes):
        way = random.normal(size=given[place].shape)
        ends = []
        for sign in (1, -1):
            moved = [z + sign * 1e-6 * way if i == place else z for i, z in enumerate(given)]
            ends.append(np.sum(oracle(*moved, starts, True) * np.asarray(by, np.float64)))
        np.testing.assert_allclose(
            np.sum(np.asarray(slope) * way), (ends[0] - ends[1]) / 2e-6, rtol=1e-5
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("width", [1, 2, 4, 9])
def test_values_and_gradients(form, silu, documents, width):
    check(form, draw(width=width, documents=documents), silu)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("time", [1, 2, 7, 16, 100, 130])
def test_any_length_in_several_blocks(form, time, monkeypatch):
    monkeypatch.setattr(tpu, "BLOCK", 32)
    monkeypatch.setattr(tpu, "CHANNELS", 128)
    check(form, draw(time=time, dim=256, documents=True))


@pytest.mark.parametrize("form", FORMS)
def test_bf16(form):
    """Two roundings of the result, and of the cotangent: 2^-8 each."""
    check(form, draw(documents=True, dtype="bfloat16"), tolerance=2 * 2.0**-8)


def test_blocks_of_the_real_size():
    check("kernel", draw(batch=1, time=tpu.BLOCK + 40, dim=128, documents=True))


def test_a_document_at_the_first_token_sees_nothing_before():
    x, weight, before, _, by = draw()
    starts = jnp.zeros(x.shape[:2], bool).at[:, 0].set(True)
    for how in FORMS.values():
        y, _, _, by_before = pull(x, weight, before, starts, by, True, **how)
        alone, *_ = pull(x, weight, 0 * before, None, by, True, **how)
        np.testing.assert_array_equal(y, alone)
        assert not by_before.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ["x", "before", "by"])
@pytest.mark.parametrize("begin", [5, 32])
def test_a_nan_stays_in_its_document(form, what, begin, monkeypatch):
    """The other document's answers and gradients are as they were, at edges of blocks too."""
    monkeypatch.setattr(tpu, "BLOCK", 16)
    x, weight, before, _, by = draw(time=37)
    ours = np.arange(37) >= begin
    starts = jnp.zeros(x.shape[:2], bool).at[:, begin].set(True)
    bad = {
        "x": (x.at[0, begin - 1].set(jnp.nan), before, by),
        "before": (x, before.at[0].set(jnp.nan), by),
        "by": (x, before, by.at[0, begin].set(jnp.nan)),
    }[what]
    if what == "before":
        starts = starts.at[:, 0].set(True)
        ours[:] = True
    if what == "by":
        ours = ~ours

    def found(x, before, by):
        return pull(x, weight, before, starts, by, True, **FORMS[form])

    y, by_x, _, by_before = found(*bad)
    want_y, want_x, _, want_before = found(x, before, by)
    np.testing.assert_array_equal(y[0, ours], want_y[0, ours])
    np.testing.assert_array_equal(by_x[0, ours], want_x[0, ours])
    np.testing.assert_array_equal(y[1], want_y[1])
    np.testing.assert_array_equal(by_x[1], want_x[1])
    if what != "x":
        np.testing.assert_array_equal(by_before, want_before)
    if what == "x":
        assert np.isnan(np.asarray(y)[0, begin - 1]).all()
    if what == "by":
        assert np.isnan(np.asarray(by_x)[0, begin]).all()


def test_a_nan_of_the_last_document_is_not_in_gradients_of_the_one_before():
    """Rows that fill the last block do not carry it back."""
    x, weight, before, _, by = draw(time=37)
    starts = jnp.zeros(x.shape[:2], bool).at[:, 36].set(True)
    for how in FORMS.values():
        want = pull(x, weight, before, starts, by, True, **how)[1]
        got = pull(x.at[:, 36].set(jnp.nan), weight, before, starts, by, True, **how)[1]
        np.testing.assert_array_equal(got[:, :36], want[:, :36])


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("_above", lambda right, *given: 0 * right(*given)),
        ("_below", lambda right, *given: 0 * right(*given)),
        ("_seen", lambda right, since, width: [None] * width),
    ],
)
def test_the_check_can_fail(monkeypatch, name, broken):
    """Blocks that do not see their neighbours, and taps that see across documents."""
    monkeypatch.setattr(tpu, "BLOCK", 16)
    monkeypatch.setattr(tpu, name, functools.partial(broken, getattr(tpu, name)))
    with pytest.raises(AssertionError):
        check("kernel", draw(documents=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 128))}, r"x \(2, 128\) must be"),
        ({"x": jnp.zeros((2, 0, 128))}, r"x \(2, 0, 128\) must be"),
        ({"weight": jnp.zeros((4, 64))}, r"weight \(4, 64\) must be \[W >= 1, 128\]"),
        ({"before": jnp.zeros((2, 4, 128))}, r"before \(2, 4, 128\) must be \(2, 3, 128\)"),
        ({"starts": jnp.zeros((2, 5), int)}, "starts int32.* must be bool"),
        ({"implementation": "cuda"}, "implementation 'cuda' must be"),
        ({"x": jnp.zeros((2, 5, 128), jnp.float16), "interpret": True}, "not float16; use impl"),
        (
            {"weight": jnp.zeros((10, 128)), "before": jnp.zeros((2, 9, 128)), "interpret": True},
            "up to 9 taps, not 10",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    fine = {"x": jnp.zeros((2, 5, 128)), "weight": jnp.zeros((4, 128))}
    fine |= {"before": jnp.zeros((2, 3, 128))}
    with pytest.raises(ValueError, match=message):
        short_convolution(**fine | change)


def test_odd_channels_are_no_kernel():
    x, weight, before, _, _ = draw(dim=96)
    with pytest.raises(ValueError, match="96 channels do not fill registers of 128; use impl"):
        short_convolution(x, weight, before, interpret=True)


@pytest.mark.parametrize("layout", [{"data": 8}, {"data": 2, "tensor": 4}, {"data": 3}])
def test_the_layer_takes_it_on_every_device(layout, monkeypatch):
    """On what looks like a TPU; a batch that 3 devices do not divide stays whole."""
    layer = layers.CausalConv(512, rngs=nnx.Rngs(0), axis_name="heads")
    x, _, _, _, by = draw(batch=8, time=20, dim=512)
    ids = jnp.asarray(np.cumsum(np.random.default_rng(2).random((8, 20)) < 0.2, axis=1))
    state = layer(x[:, :7])[1]._replace(segment=ids[:, 0].astype(jnp.int32))

    def run(x, inputs):
        y, after = layer(x, state._replace(inputs=inputs), segment_ids=ids, silu=True)
        return y, after

    def pulled(x, inputs):
        y, back, after = jax.vjp(run, x, inputs, has_aux=True)
        return y, after, back(by)

    want = pulled(x, state.inputs)
    shapes, real = [], conv.short_convolution

    def spied(x, *given, implementation, **named):
        shapes.append((x.shape, implementation))
        return real(x, *given, interpret=True, **named)

    monkeypatch.setattr(conv, "short_convolution", spied)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    mesh = sharding.make_mesh(**layout, devices=jax.devices()[: np.prod(list(layout.values()))])
    with jax.set_mesh(mesh):
        got = jax.jit(pulled)(x, state.inputs)
    rows = 8 // layout["data"] if layout["data"] != 3 else 8
    assert shapes[0] == ((rows, 20, 512 // layout.get("tensor", 1)), "pallas")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
