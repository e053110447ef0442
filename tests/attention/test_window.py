"""Windows, sinks, prefixes and caches against loops over the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.attention import Prefix, attend, window
from tests.attention import oracle

DIM = 4
attend = functools.partial(jax.jit, static_argnames=("window", "sinks", "implementation"))(attend)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def inputs(time, batch=2, heads=4, kv_heads=2, seed=0):
    q = draw(seed, batch, time, heads, DIM)
    return q, draw(seed + 1, batch, time, kv_heads, DIM), draw(seed + 2, batch, time, kv_heads, DIM)


def persistent(count, kv_heads=2):
    return Prefix(draw(7, count, kv_heads, DIM), draw(8, count, kv_heads, DIM)) if count else None


def documents(time, batch=2, seed=3):
    """Documents of mixed lengths; an id may come back, which is a new document all the same."""
    rng = np.random.default_rng(seed)
    changes = rng.random((batch, time)) < 0.2
    return (1 + np.cumsum(changes, axis=1) % 3).astype(np.int32)


def single(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def close(actual, expected, tolerance=1e-5):
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=tolerance, atol=tolerance
    )


CASES = [
    # time, window, sinks, persistent, documents
    (1, 1, 0, 0, False),
    (7, 7, 0, 0, False),
    (7, 64, 0, 0, False),
    (7, 64, 2, 3, True),
    (9, 1, 0, 0, False),
    (9, 1, 3, 0, True),
    (19, 4, 0, 0, False),
    (20, 4, 0, 0, True),
    (19, 4, 2, 0, False),
    (19, 4, 6, 3, False),
    (23, 5, 2, 3, True),
    (23, 22, 1, 0, True),
    (23, 6, 0, 1, True),
]


@pytest.mark.parametrize(("time", "width", "sinks", "count", "documented"), CASES)
def test_equals_the_definition(time, width, sinks, count, documented):
    q, k, v = inputs(time)
    prefix = persistent(count)
    ids = documents(time) if documented else None
    y, _ = attend(
        *single((q, k, v)), window=width, sinks=sinks, prefix=single(prefix), segment_ids=ids
    )
    close(y, oracle.attend(q, k, v, window=width, sinks=sinks, prefix=prefix, segment_ids=ids))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_query_heads_share_the_heads_of_their_group(kv_heads):
    q, k, v = inputs(11, kv_heads=kv_heads)
    prefix = persistent(2, kv_heads)
    y, _ = attend(*single((q, k, v)), window=4, prefix=single(prefix))
    close(y, oracle.attend(q, k, v, window=4, prefix=prefix))
    if kv_heads == 2:
        turned = Prefix(prefix.keys[:, ::-1], prefix.values[:, ::-1])
        expected = oracle.attend(q, k[:, :, ::-1], v[:, :, ::-1], window=4, prefix=turned)
        with pytest.raises(AssertionError):
            close(y, expected)


@pytest.mark.parametrize(
    "fault",
    [
        {"window": 6},
        {"window": 4},
        {"sinks": 1},
        {"sinks": 3},
        {"segment_ids": None},
        {"prefix": None},
        {"prefix": persistent(2)},
    ],
    ids=str,
)
def test_a_wrong_window_sink_prefix_or_document_is_noticed(fault):
    q, k, v = inputs(23)
    right = {"window": 5, "sinks": 2, "prefix": persistent(3), "segment_ids": documents(23)}
    y, _ = attend(*single((q, k, v)), **(right | {"prefix": single(right["prefix"])}))
    close(y, oracle.attend(q, k, v, **right))
    with pytest.raises(AssertionError):
        close(y, oracle.attend(q, k, v, **(right | fault)))


def run(q, k, v, ids, parts, *, width, sinks, prefix, drop=False):
    cache = window.start(q.shape[0], k.shape[2], DIM, window=width, sinks=sinks)
    shapes = jax.tree.map(jnp.shape, cache)
    outs, at = [], 0
    for n in parts:
        cut = slice(at, at + n)
        here = None if ids is None else jnp.asarray(ids[:, cut])
        y, cache = attend(
            q[:, cut],
            k[:, cut],
            v[:, cut],
            cache,
            window=width,
            sinks=sinks,
            prefix=prefix,
            segment_ids=here,
        )
        assert jax.tree.map(jnp.shape, cache) == shapes
        if drop:
            cache = cache._replace(values=jnp.zeros_like(cache.values))
        outs.append(y)
        at += n
    return jnp.concatenate(outs, axis=1), cache


def contents(cache):
    """What a cache holds, without what its empty slots happen to hold."""
    held = (jnp.arange(cache.keys.shape[1]) < cache.seen[:, None])[..., None, None]
    begun = (jnp.arange(cache.sink_keys.shape[1]) < cache.seen[:, None])[..., None, None]
    return cache._replace(
        keys=jnp.where(held, cache.keys, 0),
        values=jnp.where(held, cache.values, 0),
        sink_keys=jnp.where(begun, cache.sink_keys, 0),
        sink_values=jnp.where(begun, cache.sink_values, 0),
    )


@pytest.mark.parametrize(
    ("width", "sinks", "count", "documented"),
    [(4, 2, 3, True), (4, 3, 0, False), (16, 2, 0, True), (1, 1, 0, True)],
)
def test_split_anywhere_and_one_by_one(width, sinks, count, documented):
    time = 13
    q, k, v = inputs(time)
    prefix = persistent(count)
    ids = documents(time) if documented else None
    expected = oracle.attend(q, k, v, window=width, sinks=sinks, prefix=prefix, segment_ids=ids)
    given, prefix = single((q, k, v)), single(prefix)
    _, end = attend(*given, window=width, sinks=sinks, prefix=prefix, segment_ids=ids)
    options = {"width": width, "sinks": sinks, "prefix": prefix}
    lengths = [(i, time - i) for i in range(1, time)]
    lengths += [(time,), (1,) * time, (2, 9, 1, 1), (3, 3, 3, 3, 1)]
    for parts in lengths:
        y, cache = run(*given, ids, parts, **options)
        close(y, expected)
        jax.tree.map(close, contents(cache), contents(end))
    if width > 1:  # the check can fail: without what the ring holds
        for parts in [(1,) * time, (5, 8)]:
            y, _ = run(*given, ids, parts, drop=True, **options)
            with pytest.raises(AssertionError):
                close(y, expected)


@pytest.mark.parametrize("width", [3, 32])
def test_a_document_in_a_row_is_the_document_alone(width):
    time, begin = 14, 5
    q, k, v = single(inputs(time))
    ids = jnp.asarray([[1] * begin + [2] * (time - begin)] * 2)
    options = {"window": width, "sinks": 2, "prefix": single(persistent(2))}
    whole, _ = attend(q, k, v, segment_ids=ids, **options)
    alone, _ = attend(q[:, begin:], k[:, begin:], v[:, begin:], **options)
    close(whole[:, begin:], alone)
    # also when the document before came in an earlier call
    _, cache = attend(
        q[:, :begin], k[:, :begin], v[:, :begin], segment_ids=ids[:, :begin], **options
    )
    rest = (q[:, begin:], k[:, begin:], v[:, begin:], cache)
    after, _ = attend(*rest, segment_ids=ids[:, begin:], **options)
    close(after, alone)
    continued, _ = attend(*rest, segment_ids=jnp.ones_like(ids[:, begin:]), **options)
    with pytest.raises(AssertionError):
        close(continued, alone)
    unnamed, _ = attend(*rest, **options)  # no ids: the document of the state goes on
    close(unnamed, continued)


@pytest.mark.parametrize(("width", "sinks"), [(4, 2), (4, 0), (16, 1)])
@pytest.mark.parametrize("carried", [False, True])
def test_what_reaches_an_output_is_what_it_sees(width, sinks, carried):
    """The Jacobian is exactly zero everywhere else: causality, isolation, documents, windows."""
    time, first = 13, 6 if carried else 0
    q, k, v = single(inputs(time))
    ids = documents(time)

    def outputs(k, v):
        cache = None
        outs = []
        for cut in (slice(0, first), slice(first, time)):
            if cut.stop > cut.start:
                y, cache = attend(
                    q[:, cut],
                    k[:, cut],
                    v[:, cut],
                    cache,
                    window=width,
                    sinks=sinks,
                    segment_ids=jnp.asarray(ids[:, cut]),
                )
                outs.append(y)
        return jnp.concatenate(outs, 1).sum((2, 3))

    keys, values = jax.jacobian(outputs, argnums=(0, 1))(k, v)
    see = [oracle.visible(ids[b], time, width, sinks) for b in range(2)]
    expected = np.zeros((2, time, 2, time), bool)
    expected[0, :, 0], expected[1, :, 1] = see
    np.testing.assert_array_equal(np.abs(values).max((4, 5)) > 0, expected)
    # the key of the only token in sight has no say
    reach = np.abs(keys).max((4, 5)) > 0
    assert not (reach & ~expected).any()
    several = expected & (expected.sum((2, 3), keepdims=True) > 1)
    assert (reach | ~several).all()


def reference(q, k, v, prefix, see):
    """Dense attention under a mask, in the plainest JAX."""
    group = q.shape[2] // k.shape[2]
    batch, count = q.shape[0], prefix.keys.shape[0]
    tiled = [jnp.broadcast_to(x, (batch, *x.shape)) for x in prefix]
    keys = jnp.repeat(jnp.concatenate([tiled[0], k], 1), group, axis=2)
    values = jnp.repeat(jnp.concatenate([tiled[1], v], 1), group, axis=2)
    see = jnp.pad(see, ((0, 0), (0, 0), (count, 0)), constant_values=True)
    scores = jnp.einsum("bthd,bshd->bhts", q, keys) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(see[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, values)


@pytest.mark.parametrize(("time", "width"), [(9, 16), (19, 4)])
def test_gradients_equal_those_of_dense_attention(time, width):
    q, k, v = single(inputs(time))
    prefix, ids = single(persistent(3)), documents(time)
    see = np.stack([oracle.visible(row, time, width, 2) for row in ids])

    def ours(q, k, v, prefix):
        y, _ = attend(q, k, v, window=width, sinks=2, prefix=prefix, segment_ids=ids)
        return jnp.sum(jnp.sin(3 * y))

    def dense(q, k, v, prefix, see=see):
        return jnp.sum(jnp.sin(3 * reference(q, k, v, prefix, see)))

    actual = jax.grad(ours, argnums=range(4))(q, k, v, prefix)
    expected = jax.grad(dense, argnums=range(4))(q, k, v, prefix)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(actual))
    jax.tree.map(close, actual, expected)
    wrong = np.stack([oracle.visible(row, time, width, 1) for row in ids])
    if width < time:
        planted = jax.grad(dense, argnums=range(4))(q, k, v, prefix, wrong)
        with pytest.raises(AssertionError):
            jax.tree.map(close, actual, planted)


def test_gradients_reach_the_cache():
    q, k, v = single(inputs(12))

    def loss(k, v, parts):
        y, _ = run(q, k, v, None, parts, width=5, sinks=1, prefix=None)
        return jnp.sum(jnp.sin(y))

    whole = jax.grad(loss, argnums=(0, 1))(k, v, (12,))
    for parts in [(4, 8), (4, 3, 1, 1, 3)]:
        jax.tree.map(close, jax.grad(loss, argnums=(0, 1))(k, v, parts), whole)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes(dtype):
    time = 19
    q, k, v = (jnp.asarray(x, dtype) for x in inputs(time))
    ids = documents(time)
    options = {"window": 4, "sinks": 2, "segment_ids": ids}
    y, cache = attend(q, k, v, **options)
    assert y.dtype == dtype
    assert cache.keys.dtype == jnp.float32
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    # probabilities, products and the sum of at most six terms are each rounded
    close(y, oracle.attend(*wide, **options), 8 * float(jnp.finfo(dtype).eps))
    # a cache of the compute dtype keeps it, and loses nothing
    halves = []
    for kind in (dtype, jnp.float32):
        cache = window.start(2, 2, DIM, window=4, sinks=2, dtype=kind)
        outs = []
        for t in range(0, time, 1):
            here = {**options, "segment_ids": ids[:, t : t + 1]}
            y, cache = attend(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], cache, **here)
            outs.append(y)
        assert cache.keys.dtype == kind
        halves.append(jnp.concatenate(outs, 1))
    np.testing.assert_array_equal(*halves)


def test_large_scores_stay_finite():
    q, k, v = single(inputs(11))
    loss = lambda q: jnp.sum(attend(1e4 * q, 1e4 * k, v, window=4, segment_ids=documents(11))[0])  # noqa: E731
    y, gradient = jax.value_and_grad(loss)(q)
    assert np.isfinite(y)
    assert np.isfinite(gradient).all()


def largest(time, width):
    """Elements of the largest array in the program of a training call."""
    shape = jax.ShapeDtypeStruct((1, time, 2, DIM), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, time), jnp.int32)

    def loss(q, k, v, ids):
        return jnp.sum(attend(q, k, v, window=width, sinks=1, segment_ids=ids)[0])

    jaxpr = jax.make_jaxpr(jax.grad(loss))(shape, shape, shape, ids)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)
            yield from (out.aval.size for out in equation.outvars)

    return max(sizes(jaxpr.jaxpr))


def test_a_window_costs_linear_memory():
    assert largest(512, 8) == 2 * largest(256, 8)
    assert largest(512, 512) == 4 * largest(256, 256)  # as all of it would


QKV = [jnp.ones((2, 5, 4, 4)), jnp.ones((2, 5, 2, 4)), jnp.ones((2, 5, 2, 4))]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attend(*QKV, window=0), "window 0 must be at least 1"),
        (lambda: attend(*QKV, window=2, sinks=-1), "sinks -1"),
        (lambda: window.start(2, 2, 4, window=0), "window 0"),
        (lambda: attend(*(x[:, :0] for x in QKV), window=2), r"\(2, 0, 4, 4\)"),
        (lambda: attend(jnp.ones((2, 5, 3, 4)), *QKV[1:], window=2), "3 heads.* 2 heads"),
        (lambda: attend(*QKV, window.start(2, 2, 4, window=3), window=2), r"cache\.keys.*window 2"),
        (lambda: attend(*QKV, window.start(1, 2, 4, window=2), window=2), r"cache\.keys.*batch 2"),
        (
            lambda: attend(*QKV, window.start(2, 2, 4, window=2, sinks=1), window=2),
            r"cache\.sink_keys.*sinks 0",
        ),
        (
            lambda: attend(*QKV, window=2, prefix=Prefix(*(jnp.ones((3, 4, 4)),) * 2)),
            r"prefix.*\[P, 2, 4\]",
        ),
        (lambda: attend(*QKV, window=2, implementation="flash"), "'flash' must be None or one of"),
        (lambda: attend(*QKV, window=2, implementation="cudnn"), "cudnn.*GPU.*platform is cpu"),
        (
            lambda: attend(*QKV, window=2, sinks=1, implementation="splash"),
            "splash.*no sinks outside the window",
        ),
        (
            lambda: attend(
                *QKV, window.start(2, 2, 4, window=2), window=2, implementation="splash"
            ),
            "splash.*no cache",
        ),
        (
            lambda: attend(
                *QKV,
                window=2,
                prefix=Prefix(*(jnp.ones((3, 2, 4)),) * 2),
                implementation="splash",
            ),
            "splash.*no prefix",
        ),
        (
            lambda: attend(
                *(x.astype(jnp.float16) for x in QKV), window=2, implementation="splash"
            ),
            "splash.*float16",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
