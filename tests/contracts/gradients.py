"""Checks of gradients: of every input, through outputs and through the final state."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.contracts import scenes
from tests.contracts.scenes import assert_close, cast, cut, float64, parts, pull
from tests.oracles import miras as oracle


def _pulled(forms, case, which, kind, **options):
    state, stream, ids = scenes.scene(case, kind)
    ct = scenes.cotangent(case, state)
    form = scenes.forms_of(forms)[which]
    out, gradient = pull(form, case, cast(state, jnp.float64), stream, ids, ct, **options)
    return out, gradient | {"state": scenes.folded(state, gradient["state"])}


@float64
def check_gradients(forms, case, which):
    """Outputs and gradients of every input equal the recurrent form's to 1e-9."""
    for kind in ("carried", "aligned"):
        want = _pulled(forms, case, "recurrent", kind)
        got = _pulled(forms, case, which, kind)
        assert_close(got, want, 1e-9, f"{case.name} {which} {kind}: ")


@float64
def check_differences(forms, case, which):
    """The gradients equal central differences of the oracle, each in a random direction."""
    for kind in ("carried", "aligned"):
        _differences(forms, case, which, kind)


def _differences(forms, case, which, kind):
    state, stream, ids = scenes.scene(case, kind)
    ct_y, ct_state = scenes.cotangent(case, state)
    _, gradient = _pulled(forms, case, which, kind)
    idle = state.place == 0

    def value(floats):
        moved = scenes.with_parts(state, floats["state"])
        base = tuple(
            np.where(idle.reshape(-1, 1, 1, 1), w, b)
            for w, b in zip(moved.weights, moved.began, strict=True)
        )
        moved = scenes.to_oracle(moved._replace(base=base))
        y, _, last = oracle.run(case.oracle, moved, *floats["stream"], ids)
        last = scenes.held(scenes.from_oracle(state, last))
        pairs = zip(jax.tree.leaves(last), jax.tree.leaves(ct_state), strict=True)
        return np.sum(y * ct_y) + sum(np.sum(a * b) for a, b in pairs)

    floats = {"state": parts(state), "stream": stream}
    leaves, structure = jax.tree_util.tree_flatten_with_path(floats)
    random = np.random.default_rng(11)
    for i, ((path, leaf), slope) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
        direction = random.normal(size=leaf.shape) * np.sqrt(np.mean(np.square(leaf)) + 1e-9)

        def along(step, i=i, direction=direction):
            moved = [a for _, a in leaves]
            moved[i] = moved[i] + step * direction
            return value(jax.tree.unflatten(structure, moved))

        # Of fourth order: the halved step cancels the error of the whole one.
        whole, half = ((along(h) - along(-h)) / (2 * h) for h in (1e-4, 5e-5))
        want = (4 * half - whole) / 3
        got = np.sum(np.asarray(slope) * direction)
        size = 1 + np.linalg.norm(slope) * np.linalg.norm(direction)
        name = f"{case.name} {which} {kind} {jax.tree_util.keystr(path)}"
        assert abs(got - want) <= 1e-7 * size, f"{name}: {got} and {want}"


@float64
def check_start_gradient(forms, case):
    """W_0 is in every row at the start and where documents start: its gradient is their sum."""
    weights = cast(scenes.weights(case), jnp.float64)
    state, back = jax.vjp(lambda w: parts(forms.start(case.rule, w, scenes.BATCH)), weights)
    random = np.random.default_rng(13)
    ct = jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape)), state)
    (got,) = back(ct)
    for i, fast in enumerate(got.fast):
        want = ct["weights"][i].sum(0) + ct["begin"].weights[i]
        if ct["base"]:
            want = want + ct["base"][i].sum(0)
        assert_close(fast, want, 1e-12, f"{case.name} W_0[{i}]")
    assert_close(got.slow, ct["slow"], 0, f"{case.name} slow")


@float64
def check_split_gradient(forms, case):
    """Gradients pass through a carried state: two calls equal one, at a cut inside a chunk."""
    state, stream, ids = scenes.scene(case)
    ct_y, ct_state = scenes.cotangent(case, state)
    form, at = forms.chunkwise, 7
    state = cast(state, jnp.float64)
    _, want = pull(form, case, state, stream, ids, (ct_y, ct_state))
    _, middle = scenes.run(form, case, state, cut(stream, 0, at), ids[:, :at])
    _, late = pull(form, case, middle, cut(stream, at, None), ids[:, at:], (ct_y[:, at:], ct_state))
    through = {name: late["state"][name] for name in ct_state}
    _, early = pull(form, case, state, cut(stream, 0, at), ids[:, :at], (ct_y[:, :at], through))
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), early["stream"], late["stream"])
    assert_close(joined, want["stream"], 1e-9, f"{case.name} split: ")
    for name in ("begin", "slow"):
        total = jax.tree.map(jnp.add, early["state"][name], late["state"][name])
        assert_close(total, want["state"][name], 1e-9, f"{case.name} split {name}")
    got, want = (scenes.folded(state, g["state"]) for g in (early, want))
    for name in ct_state:
        assert_close(got[name], want[name], 1e-9, f"{case.name} split {name}")


@float64
def check_option(forms, case, **option):
    """An option of `chunkwise` that is not the rule's changes neither values nor gradients."""
    for kind in ("carried", "aligned", "halfway"):
        want = _pulled(forms, case, "chunkwise", kind)
        got = _pulled(forms, case, "chunkwise", kind, **option)
        assert_close(got, want, 1e-12, f"{case.name} {option} {kind}: ")
