"""The kernel of the deep memory, interpreted, and its form for XLA against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import Blocks
from pallas_kernels.deep_memory import deep_memory, fits, op
from pallas_kernels.deep_memory import reference as definition

CHUNK = 16
FORMS = {
    "xla": {"implementation": "xla"},
    "kernel": {"interpret": pltpu.InterpretParams(detect_races=True)},
}
# momentum, decay, norm, residual, activation, read, documents
CASES = {
    "titans": (True, True, True, True, "gelu", "after", False),
    "documents, before": (True, True, True, True, "silu", "before", True),
    "plain": (False, False, False, False, "relu", "after", True),
    "no decay": (True, False, True, False, "gelu", "before", False),
}


def drawn(case, *, batch=2, length=45, heads=2, dim=64, hidden=128, dtype=jnp.float32):
    """(arguments of the op, options): rates that leave the memory well conditioned."""
    momentum, decay, norm, residual, activation, read, documents = CASES[case]
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    tokens = (batch, length, heads, dim)
    q, k, v = normal(*tokens), normal(*tokens), 0.3 * normal(*tokens)
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    lr = 0.05 * jax.nn.sigmoid(normal(*tokens[:3]))
    eta = -0.5 - jnp.exp(normal(*tokens[:3])) if momentum else None
    retain = -0.1 * jnp.exp(normal(*tokens[:3])) if decay else None

    def pair(*axes):
        return normal(*axes, dim, hidden) / 8, normal(*axes, hidden, dim) / 11

    velocity = tuple(0.1 * s for s in pair(batch, heads)) if momentum else None
    scale = (1 + 0.1 * normal(heads, dim), 0.1 * normal(heads, dim)) if norm else None
    chunks = -(-length // CHUNK)
    options = {"chunk": CHUNK, "activation": activation, "residual": residual, "read": read}
    if not decay:  # queries and keys as they come
        q, k, options["unit_eps"] = 3 * q, 2 * k, 1e-6
    if documents:
        starts = np.arange(chunks)[None, :] % 2 == np.arange(batch)[:, None] % 2
        options |= {"starts": jnp.asarray(starts), "initial": pair(heads)}
        if momentum:
            options["initial"] += tuple(0.1 * s for s in pair(heads))
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    return (q, k, v, lr, eta, retain, pair(batch, heads), velocity, scale), options


def outcome(run, arguments, options):
    """Results, and the gradients of a function of all of them by all arrays."""
    initial, starts = options.get("initial"), options.get("starts")
    rest = {name: x for name, x in options.items() if name not in ("initial", "starts")}

    def value(arguments, initial):
        more = {} if starts is None else {"initial": initial, "starts": starts}
        found = run(*arguments, **more, **rest)
        weighed = [jnp.sin(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(found)]
        return sum(weighed), found

    gradients, found = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(arguments, initial)
    return jax.tree.leaves(found), jax.tree.leaves(gradients)


def furthest(actual, expected) -> float:
    """The largest error of any array, relative to its largest number."""
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        worst = max(worst, np.abs(a - b).max() / max(np.abs(b).max(), 1e-6))
    return worst


def reference(*arguments, **options):
    return definition.deep_memory(*arguments, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(form, case):
    arguments, options = drawn(case)
    expected = outcome(reference, arguments, options)
    actual = outcome(
        lambda *a, **o: deep_memory(*a, blocks=Blocks(CHUNK, 2, 2, 1), **FORMS[form], **o),
        arguments,
        options,
    )
    assert furthest(actual[0], expected[0]) < 1e-5
    assert furthest(actual[1], expected[1]) < 5e-5  # of gradients of gradients


def test_a_fault_is_seen():
    """One rate of one token in forty-five."""
    arguments, options = drawn("titans")
    expected, _ = outcome(reference, arguments, options)
    changed = (*arguments[:3], arguments[3].at[0, 20, 0].multiply(1.01), *arguments[4:])
    actual, _ = outcome(
        lambda *a, **o: deep_memory(*a, **FORMS["xla"], **o), changed, options
    )  # fmt: skip
    assert furthest(actual, expected) > 1e-5


def test_in_bf16():
    """2^-8 times the root of the terms that are summed on a token's way: those of the two maps and
    of the scores beside each."""
    arguments, options = drawn("titans")
    expected, _ = outcome(reference, arguments, options)
    half = tuple(x.astype(jnp.bfloat16) for x in arguments[:3]) + arguments[3:]
    actual = deep_memory(*half, **FORMS["kernel"], **options)
    assert actual[0].dtype == jnp.bfloat16
    assert actual[2][0].dtype == jnp.float32
    terms = sum(w.shape[-2] for w in arguments[6]) + 2 * CHUNK
    assert furthest(jax.tree.leaves(actual), expected) < 2**-8 * terms**0.5


def test_no_token_sees_a_later_one():
    arguments, options = drawn("titans", length=40)

    def of_token(q, k, v):
        y, *_ = deep_memory(q, k, v, *arguments[3:], **FORMS["xla"], **options)
        return jnp.sum(y[:, 21])

    for gradient in jax.grad(of_token, argnums=(0, 1, 2))(*arguments[:3]):
        assert not np.asarray(gradient)[:, 22:].any()
        assert np.asarray(gradient)[:, 21].any() or gradient is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk 0"),
        ({"chunk": 12, "interpret": True}, "power of two"),
        ({"activation": "swish"}, "activation 'swish'"),
        ({"read": "now"}, "read 'now'"),
        ({"implementation": "mosaic"}, "implementation 'mosaic'"),
        ({"initial": ()}, "give starts too"),
        ({"starts": jnp.zeros((2, 9), bool)}, "one a chunk"),
        ({"starts": jnp.zeros((2, 3), int)}, "starts int32.* must be bool"),
    ],
)
def test_bad_options_are_named(change, message):
    arguments, options = drawn("titans")
    with pytest.raises(ValueError, match=message):
        deep_memory(*arguments, **{**options, "implementation": None, **change})


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (0, "must be"),
        (3, "lr"),
        (4, "come together"),
        (5, "log_retain"),
        (6, "weights"),
        (8, "norm"),
    ],
)
def test_bad_arrays_are_named(place, message):
    arguments, options = drawn("titans")
    arguments = list(arguments)
    if place == 4:
        arguments[4] = None
    else:
        arguments[place] = jax.tree.map(lambda x: x[:, :1], arguments[place])
    with pytest.raises(ValueError, match=message):
        deep_memory(*arguments, **options)


@pytest.mark.parametrize(("place", "message"), [(6, "weights"), (7, "velocity"), (8, "norm")])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_pairs_are_of_two(place, message, count):
    arguments, options = drawn("titans")
    arguments = list(arguments)
    arguments[place] = (arguments[place] * 2)[:count]
    with pytest.raises(ValueError, match=f"{message} must be "):  # the op's types say so in tests
        op._check(*arguments, None, None, options["chunk"])


def test_documents_begin_from_single_precision():
    arguments, options = drawn("documents, before")
    options["initial"] = tuple(x.astype(jnp.bfloat16) for x in options["initial"])
    with pytest.raises(ValueError, match=r"initial \['bfloat16.* must be float32"):
        deep_memory(*arguments, **options)


@pytest.mark.parametrize(
    ("dim", "expansion", "chunk", "dtype", "compiles"),
    [
        (256, 4, 64, "bfloat16", True),
        (256, 4, 64, "float32", False),
        (256, 4, 128, "bfloat16", True),
        (256, 4, 256, "bfloat16", False),
        (256, 6, 64, "bfloat16", False),
        (128, 16, 64, "bfloat16", True),
        (128, 16, 128, "bfloat16", False),
        (128, 32, 64, "bfloat16", False),
        (128, 4, 256, "bfloat16", True),
        (128, 8, 64, "float32", True),
        (64, 16, 64, "float32", False),
    ],
)
def test_what_fits_is_what_compiles_for_v5p(dim, expansion, chunk, dtype, compiles):
    maps = [(dim, expansion * dim), (expansion * dim, dim)]
    assert fits(maps, 8, chunk, jnp.dtype(dtype)) == compiles


def test_a_head_that_is_too_large_is_refused():
    arguments, options = drawn("titans", hidden=40_000)
    with pytest.raises(ValueError, match="wants more VMEM"):
        deep_memory(*arguments, **options, implementation="pallas")
