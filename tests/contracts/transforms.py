"""Checks under JAX's transformations: jit, vmap, rematerialisation."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.contracts import scenes
from tests.contracts.scenes import assert_close, cast, float64, moving, pull, run


@float64
def check_jit(forms, case):
    """Traced or not, the same."""
    state, stream, ids = scenes.scene(case)
    state = cast(state, jnp.float64)
    y, last = forms.chunkwise(
        case.rule, state, *cast(stream, jnp.float64), segment_ids=jnp.asarray(ids)
    )
    want_y, want = run(forms.chunkwise, case, state, stream, ids)
    assert_close((y, moving(last)), (want_y, moving(want)), 1e-12, f"{case.name} eager: ")


@float64
def check_vmap(forms, case):
    """Over a further axis, values and gradients are those of the members one by one."""
    state, stream, ids = scenes.scene(case)
    state = cast(state, jnp.float64)
    other = scenes.stream(case, seed=60)
    ct = scenes.cotangent(case, state)
    both = jax.tree.map(lambda a, b: jnp.stack([jnp.asarray(a), b]), stream, other)
    form = forms.chunkwise
    one = scenes.pulled(form, case.rule, ()).__wrapped__
    over = jax.vmap(one, in_axes=(None, 0, None, None))
    got = scenes.quick_jit(over)(state, both, ids, ct)
    members = [pull(form, case, state, s, ids, ct) for s in (stream, other)]
    want = jax.tree.map(lambda a, b: np.stack([a, b]), *members)
    assert_close(got, want, 1e-10, f"{case.name} vmap: ")


@float64
def check_checkpoint(forms, case):
    """Under `jax.checkpoint` the gradients stay the same."""
    state, stream, ids = scenes.scene(case)
    state = cast(state, jnp.float64)
    ct = scenes.cotangent(case, state)

    def remade(rule, state, *stream, segment_ids):
        def inner(state, *stream):
            return forms.chunkwise(rule, state, *stream, segment_ids=segment_ids)

        return jax.checkpoint(inner)(state, *stream)

    got = pull(remade, case, state, stream, ids, ct)
    want = pull(forms.chunkwise, case, state, stream, ids, ct)
    assert_close(got, want, 1e-12, f"{case.name} checkpoint: ")
