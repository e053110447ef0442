"""Checks of values: every form gives what the oracle gives, in every dtype."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.contracts import scenes
from tests.contracts.scenes import assert_close, cast, float64, moving, run
from tests.oracles import miras as oracle


def _expected(case, state, stream, ids):
    """The oracle's outputs and moving state on inputs of any dtype."""
    exact = jax.tree.map(lambda a: np.asarray(a).astype(np.float64), stream)
    y, _, last = oracle.run(case.oracle, scenes.to_oracle(state), *exact, ids)
    return y, moving(last)


def _agree(forms, case, which, state, stream, ids, tolerance):
    form = scenes.forms_of(forms)[which]
    y, last = run(form, case, state, stream, ids)
    want = _expected(case, state, stream, ids)
    assert_close((y, moving(last)), want, tolerance, f"{case.name} {which}: ")


@float64
def check_oracle(forms, case, which):
    """Outputs and state equal the oracle's to 1e-10 in float64, from a start and when carried."""
    for kind in ("carried", "aligned", "halfway"):
        state, stream, ids = scenes.scene(case, kind)
        _agree(forms, case, which, cast(state, jnp.float64), stream, ids, 1e-10)
    _agree(forms, case, which, scenes.fresh(case, forms), stream, ids, 1e-10)


@float64
def check_lengths(forms, case, which):
    """So they do at one token and below a chunk, without segment ids."""
    state = cast(scenes.scene(case).state, jnp.float64)
    for length in (1, 3):
        stream = scenes.stream(case, length, seed=length)
        _agree(forms, case, which, state, stream, None, 1e-10)


def check_precision(forms, case, which, dtype):
    """fp32 is within 1e-5; bf16 within its rounding times the root of the terms on the way."""
    dtype = jnp.dtype(dtype)
    tolerance = 1e-5
    if dtype == jnp.bfloat16:
        # A token's write goes forward and back through the memory and is read forward again.
        widths = sum(w.shape[-2] for w in scenes.scene(case).state.weights)
        terms = 3 * widths + scenes.LENGTH
        tolerance = float(jnp.finfo(dtype).eps) / 2 * np.sqrt(terms)
    for kind in ("carried", "aligned"):
        state, stream, ids = scenes.scene(case, kind)
        gates = cast(stream.gates, jnp.float32)
        stream = cast(stream, dtype)._replace(gates=gates)
        _agree(forms, case, which, cast(state, jnp.float32), stream, ids, tolerance)


def _dtypes(forms, case, which, dtype, gates_dtype, state_dtype):
    state, stream, ids = scenes.scene(case)
    state, gates = cast(state, state_dtype), cast(stream.gates, gates_dtype)
    stream = cast(stream, dtype)._replace(gates=gates)
    form = getattr(forms, which)
    if which == "step":
        stream, ids = scenes.cut((stream, ids), 0, 1)
    y, last = jax.eval_shape(
        lambda *args: form(case.rule, args[0], *args[1], segment_ids=args[2]),
        state, stream, jnp.asarray(ids),
    )  # fmt: skip
    assert y.dtype == dtype, f"{case.name} {which}: {dtype} in, {y.dtype} out"
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(last), jax.tree.leaves(state), strict=True
    ):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (
            f"{case.name} {which}: state{jax.tree_util.keystr(path)} {b.dtype}{b.shape} became "
            f"{a.dtype}{a.shape}"
        )


def check_dtypes(forms, case, which):
    """dtype in = dtype out; the state keeps its dtype, fp32 (float64 under x64), and its shapes."""
    _dtypes(forms, case, which, jnp.float32, jnp.float32, jnp.float32)
    _dtypes(forms, case, which, jnp.bfloat16, jnp.float32, jnp.float32)
    _dtypes(forms, case, which, jnp.bfloat16, jnp.bfloat16, jnp.float32)
    started = forms.start(case.rule, cast(scenes.weights(case), jnp.bfloat16), 2)
    for leaf in jax.tree.leaves((started.base, started.weights, started.momentum, started.begin)):
        assert leaf.dtype == jnp.float32, f"a state started as {leaf.dtype}, not float32"
    with jax.enable_x64(True):
        _dtypes(forms, case, which, jnp.float64, jnp.float64, jnp.float64)
        _dtypes(forms, case, which, jnp.float32, jnp.float32, jnp.float64)


@float64
def check_read(forms, case):
    """`read` answers at the current weights of a carried state."""
    state, stream, _ = scenes.scene(case)
    read = scenes.quick_jit(forms.read, static_argnums=0)
    got = read(case.rule, cast(state, jnp.float64), stream.q)
    want = oracle.read(case.oracle, scenes.to_oracle(state), stream.q)
    assert_close(got, want, 1e-10, f"{case.name} read")


@float64
def check_surprise(forms, case):
    """`surprise` is each token's loss at the weights its chunk began with."""
    state, (q, k, v, gates), ids = scenes.scene(case)

    def surprise(state, k, v, gates, ids):
        return forms.surprise(case.rule, state, k, v, gates, segment_ids=ids)

    got = scenes.quick_jit(surprise)(cast(state, jnp.float64), k, v, gates, ids)
    _, want, _ = oracle.run(case.oracle, scenes.to_oracle(state), q, k, v, gates, ids)
    assert_close(got, want, 1e-10, f"{case.name} surprise")


@float64
def check_shared_heads(forms, case):
    """Heads that share weights without a heads axis start as copies of them."""
    one = jax.tree.map(lambda w: w[0], scenes.weights(case))
    copies = jax.tree.map(lambda w: np.stack([w] * case.heads), one)
    want = forms.start(case.rule, cast(copies, jnp.float64), 2)
    got = forms.start(case.rule, cast(one, jnp.float64), 2, heads=case.heads)
    assert_close(got, want, 0, f"{case.name} shared heads")
    _, stream, ids = scenes.scene(case)
    _agree(forms, case, "chunkwise", got, stream, ids, 1e-10)
