"""The language model over its mixers: shapes, states, documents, layers, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax import sharding
from memjax.models import LanguageModel
from tests.models.toys import call, config_of, loss_and_grad, model_of, tokens_of

MIXERS = ("toy_average", "transformer", "swa")


def same(a, b, tolerance=2e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes(mixer, dtype):
    model = model_of(pattern=(mixer,), dtype=dtype)
    tokens = tokens_of()
    logits, state = call(model)(tokens)
    assert logits.shape == (2, 12, 32)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    hidden = jax.eval_shape(lambda: model.hidden(tokens)[0])
    assert hidden.dtype == jnp.dtype(dtype)
    start = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.start(2))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == start
    _, later = call(model)(tokens, state)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), later) == start


def test_logits_of_a_single_position():
    model = model_of()
    hidden, _ = model.hidden(tokens_of())
    same(model.head(hidden[:, 3]), model(tokens_of())[0][:, 3])


@pytest.mark.parametrize("mixer", MIXERS)
def test_split_at_every_position(mixer):
    model = model_of(pattern=(mixer,))
    run = call(model)
    tokens = tokens_of(time=7)
    ids = jnp.asarray([[1] * 3 + [2] * 4, [1] * 7], jnp.int32)
    whole, final = run(tokens, None, ids)
    for cut in range(1, 7):
        first, state = run(tokens[:, :cut], model.start(2), ids[:, :cut])
        second, state = run(tokens[:, cut:], state, ids[:, cut:])
        same(jnp.concatenate([first, second], axis=1), whole)
        assert (state.segment == final.segment).all()
        assert (state.seen == final.seen).all()


def test_split_needs_its_state():
    run = call(model_of())
    tokens = tokens_of(time=8)
    whole, _ = run(tokens)
    with pytest.raises(AssertionError):
        same(run(tokens[:, 4:])[0], whole[:, 4:])


@pytest.mark.parametrize("mixer", MIXERS)
def test_decode_is_the_whole(mixer):
    model = model_of(pattern=(mixer,))
    run = call(model)
    tokens = tokens_of()
    whole, final = run(tokens)
    state = model.start(2)
    for t in range(tokens.shape[1]):
        logits, state = run(tokens[:, t : t + 1], state)
        same(logits[:, 0], whole[:, t])
    assert (state.seen == final.seen).all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_packed_documents_are_isolated(mixer):
    run = call(model_of(pattern=(mixer,)))
    tokens = tokens_of(batch=1)
    ids = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3], jnp.int32)
    packed, state = run(tokens, None, ids)
    for begin, end in ((0, 5), (5, 9), (9, 12)):
        alone, _ = run(tokens[:, begin:end])
        same(packed[:, begin:end], alone)
    assert int(state.seen[0]) == 3
    with pytest.raises(AssertionError):  # without ids the documents run into one another
        same(run(tokens)[0][:, 5:9], packed[:, 5:9])


def test_documents_are_isolated_exactly():
    graphdef, params = nnx.split(model_of(tied=False))
    tokens = jnp.arange(12, dtype=jnp.int32)[None]

    def second_document(params, ids):
        logits, _ = nnx.merge(graphdef, params)(tokens, segment_ids=ids)
        return jnp.square(logits[:, 5:]).sum()

    def reached(ids):
        table = jax.jit(jax.grad(second_document))(params, jnp.asarray([ids], jnp.int32))[
            "embedding"
        ]
        return np.abs(table[...]).sum(-1) > 0

    np.testing.assert_array_equal(reached([1] * 5 + [2] * 7)[:12], [False] * 5 + [True] * 7)
    assert reached([1] * 12)[:12].all()


def test_causality_is_exact():
    model = model_of(tied=False)
    graphdef, params = nnx.split(model)
    tokens = jnp.arange(12, dtype=jnp.int32)[None]

    def upto(params, end):
        return jnp.square(nnx.merge(graphdef, params)(tokens)[0][:, :end]).sum()

    table = jax.jit(jax.grad(upto), static_argnums=1)(params, 7)["embedding"][...]
    assert (table[7:] == 0).all()
    assert (np.abs(table[:7]).sum(-1) > 0).all()


def test_positions_default_to_the_place_in_the_document():
    run = call(model_of())
    tokens = tokens_of(batch=1)
    ids = jnp.asarray([[1] * 5 + [2] * 7], jnp.int32)
    places = jnp.asarray([[*range(5), *range(7)]], jnp.int32)
    default, _ = run(tokens, None, ids)
    given, state = run(tokens, None, ids, places)
    same(given, default)
    assert int(state.seen[0]) == 7
    with pytest.raises(AssertionError):
        same(run(tokens, None, ids, places + 3)[0], default)


def test_scan_over_layers_is_the_unrolled_pattern():
    scanned = model_of(layers=3)
    unrolled = model_of(layers=3, pattern=("toy_average",) * 3, seed=1)
    _, stacked = nnx.split(scanned)
    graphdef, params = nnx.split(unrolled)
    for layer in range(3):
        one = jax.tree.map(lambda x, layer=layer: x[layer : layer + 1], stacked["blocks"][0])
        params["blocks"][layer] = one
    for name in ("embedding", "norm"):
        params[name] = stacked[name]
    copied = nnx.merge(graphdef, params)
    tokens = tokens_of()
    expected, states = call(copied)(tokens)
    logits, state = call(scanned)(tokens)
    same(logits, expected)
    for layer in range(3):
        same(state.blocks[0].average[layer], states.blocks[layer].average[0])
    with pytest.raises(AssertionError):
        same(call(unrolled)(tokens)[0], expected)


def test_layers_start_differently():
    _, params = nnx.split(model_of(layers=2))
    weight = params["blocks"][0]["mixer"]["projection"]["weight"][...]
    assert weight.shape == (2, 16, 16)
    assert np.abs(weight[0] - weight[1]).max() > 0.1


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(remat):
    tokens = tokens_of()
    run, params = loss_and_grad(model_of())
    loss, grads = run(params, tokens)
    again, params = loss_and_grad(model_of(remat=remat))
    other_loss, other = again(params, tokens)
    same(other_loss, loss, 1e-6)
    jax.tree.map(lambda a, b: same(a, b, 1e-6), other, grads)


def residuals(**changes):
    """Bytes that the forward pass of the gradient keeps for the backward pass."""
    graphdef, params = nnx.split(model_of(layers=4, **changes), nnx.Param)
    loss = lambda params: nnx.merge(graphdef, params)(tokens_of())[0].sum()  # noqa: E731
    _, backward = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


def test_remat_keeps_less():
    none, dots, full = (residuals(remat=name) for name in ("none", "dots", "full"))
    assert full < dots < none


@pytest.mark.parametrize(
    ("mixer", "tied"), [*((mixer, True) for mixer in MIXERS), ("toy_average", False)]
)
def test_gradient_reaches_every_parameter(mixer, tied):
    run, params = loss_and_grad(model_of(pattern=(mixer,), tied=tied))
    _, grads = run(params, tokens_of())
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), jax.tree_util.keystr(path)
        assert np.abs(grad).max() > 0, jax.tree_util.keystr(path)


def test_tied_head_is_the_embedding():
    names = {path[0] for path, _ in nnx.to_flat_state(nnx.state(model_of(tied=True)))}
    assert "head_kernel" not in names
    names = {path[0] for path, _ in nnx.to_flat_state(nnx.state(model_of(tied=False)))}
    assert "head_kernel" in names

    model = model_of(tied=True)
    hidden, _ = model.hidden(tokens_of())
    same(model.head(hidden), model.norm(hidden) @ model.embedding[...].T)


def test_initialisation():
    model = model_of(vocab=512, dim=64, tied=False)
    assert abs(float(model.embedding[...].std()) - 0.02) < 0.001
    assert abs(float(model.head_kernel[...].std()) - 64**-0.5) < 0.005
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))


def test_same_seed_same_parameters():
    a, b, c = (nnx.state(model_of(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert (a["embedding"][...] != c["embedding"][...]).any()


def test_every_parameter_has_axes():
    params = nnx.state(model_of(pattern=("toy_average", "toy_average"), tied=False), nnx.Param)
    axes = sharding.param_axes(params)
    assert axes["embedding"] == ("vocab", "embed")
    assert axes["blocks"][1]["feed_forward"]["down"]["weight"] == ("layers", "mlp", "embed")


def test_feed_forward_by_layer():
    model = model_of(pattern=("toy_average", "toy_average"), feed_forward=("swiglu", "none"))
    assert model.blocks[0].feed_forward is not None
    assert model.blocks[1].feed_forward is None
    assert model.blocks[1].feed_forward_norm is None
    assert model(tokens_of())[0].shape == (2, 12, 32)


def test_errors_name_shapes():
    model = model_of()
    with pytest.raises(ValueError, match=r"tokens must be integers \[batch, time\].*\[2, 0\]"):
        model(jnp.zeros((2, 0), jnp.int32))
    with pytest.raises(ValueError, match=r"state is for a batch of 3, tokens for 2"):
        model(tokens_of(), model.start(3))


@pytest.mark.parametrize("wrong", [32, 10**6, -1, -33])
def test_an_id_outside_the_vocabulary_is_loud(wrong):
    tokens = tokens_of().at[1, 5].set(wrong)
    logits = jax.jit(lambda model, tokens: model(tokens)[0])(model_of(), tokens)
    assert jnp.isnan(logits[1, 5:]).all()
    assert jnp.isfinite(logits[0]).all()
    assert jnp.isfinite(logits[1, :5]).all()


def test_one_compilation_serves_equal_configs():
    assert hash(nnx.split(model_of(0))[0]) == hash(nnx.split(model_of(1))[0])
    assert nnx.split(model_of(0))[0] == nnx.split(model_of(1))[0]
    assert nnx.split(model_of(0))[0] != nnx.split(model_of(0, window=6))[0]


def test_init_without_memory():
    shapes = nnx.eval_shape(lambda: LanguageModel(config_of(), rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(shapes))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_model_is_its_equations():
    """Embedding, pre-norm residual blocks one by one, norm, head: written out."""
    model = model_of(pattern=("transformer", "toy_average"), layers=4, feed_forward="swiglu")
    tokens = tokens_of()
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), tokens.shape)
    split = [nnx.split(block) for block in model.blocks]

    @jax.jit
    def expected(table, values):
        x = table[tokens]
        for layer in range(4):
            graphdef = split[layer % 2][0]
            own = jax.tree.map(lambda leaf, n=layer // 2: leaf[n], values[layer % 2])
            block = nnx.merge(graphdef, own)
            x = x + block.mixer(block.mixer_norm(x), positions=positions)[0]
            x = x + block.feed_forward(block.feed_forward_norm(x))
        return model.norm(x) @ table.T

    same(call(model)(tokens)[0], expected(model.embedding[...], [values for _, values in split]))
