"""One step: metrics by hand, accumulation, a batch learned by heart, the step on a mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from memjax import models, sharding
from memjax.evaluation import losses
from memjax.evaluation.placement import place
from memjax.training import optimizer, state, step
from memjax.training.config import TrainConfig
from tests.training import helpers

BYTES = np.array([1, 2, 0, 3])


def table_batch():
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(0, 4, (4, 6)).astype(np.int32),
        "targets": rng.integers(0, 4, (4, 6)).astype(np.int32),
        "weights": rng.choice([0.0, 0.5, 1.0], (4, 6)).astype(np.float32),
        "segment_ids": np.ones((4, 6), np.int32),
        "positions": np.tile(np.arange(6, dtype=np.int32), (4, 1)),
    }


def table_oracle(table, batch):
    """Loss, gradient and bits per byte of the bigram table, token by token, in float64."""
    nats = weights = size = 0.0
    grad = np.zeros_like(table)
    for token, target, weight in zip(
        batch["tokens"].ravel(), batch["targets"].ravel(), batch["weights"].ravel(), strict=True
    ):
        row = table[token]
        p = np.exp(row - row.max())
        p /= p.sum()
        nats -= weight * math.log(p[target])
        weights += weight
        size += weight * BYTES[target]
        grad[token] += weight * (p - np.eye(4)[target])
    return nats, weights, size, grad / weights


def test_metrics_by_hand():
    """Every number of one SGD step on a table of logits."""
    table = np.random.default_rng(1).normal(size=(4, 4))
    graphdef, params = nnx.split(helpers.Bigram(jnp.asarray(table, jnp.float32)), nnx.Param)
    transform = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(0.5))
    take = jax.jit(
        step.make(graphdef, transform, lambda n: 0.25 + n, BYTES, forward=helpers.table_forward)
    )
    begin = state.TrainState(jnp.int32(7), params, transform.init(params), jax.random.key(0))
    batch = table_batch()
    after, metrics = take(begin, batch)
    nats, weights, size, grad = table_oracle(table, batch)
    norm = math.sqrt((grad**2).sum())
    update = -0.5 * grad * 0.01 / norm
    expected = {
        "nats": nats,
        "tokens": weights,
        "bytes": size,
        "loss": nats / weights,
        "bits_per_byte": nats / math.log(2) / size,
        "gradient_norm": norm,
        "update_norm": 0.005,
        "parameter_norm": math.sqrt(((table + update) ** 2).sum()),
        "learning_rate": 7.25,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(after.params["table"][...], table + update, rtol=1e-5, atol=1e-6)
    assert int(after.step) == 8
    assert not np.array_equal(jax.random.key_data(after.key), jax.random.key_data(begin.key))


def test_a_batch_without_counted_tokens_is_no_nan():
    graphdef, params = nnx.split(helpers.Bigram(jnp.ones((4, 4))), nnx.Param)
    batch = jax.tree.map(jnp.asarray, {**table_batch(), "weights": np.zeros((4, 6), np.float32)})
    grads, totals, _ = step.gradients(
        graphdef, params, batch, jax.random.key(0), BYTES, forward=helpers.table_forward
    )
    assert float(totals["nats"]) == 0.0
    assert np.all(np.asarray(grads["table"][...]) == 0.0)


@functools.cache
def model():
    return model_of()


def model_of(**changes):
    config = models.LanguageModelConfig.from_dict({**helpers.MODEL, "vocab": 32, **changes})
    return nnx.split(models.LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)


def text_batch(rows=8, time=16, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 32, (rows, time + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        # Rows with very different numbers of counted tokens, one with none.
        "weights": (np.arange(time) < 2 * np.arange(rows)[:, None]).astype(np.float32),
        "segment_ids": np.ones((rows, time), np.int32),
        "positions": np.tile(np.arange(time, dtype=np.int32), (rows, 1)),
    }


def big_batch():
    graphdef, params = model()
    return jax.jit(functools.partial(step.gradients, graphdef, byte_lengths=np.ones(32, np.int32)))(
        params, text_batch(), jax.random.key(0)
    )


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulation_is_the_big_batch(accumulate):
    graphdef, params = model()
    take = functools.partial(
        step.gradients, graphdef, byte_lengths=np.ones(32, np.int32), accumulate=accumulate
    )
    grads, totals, _ = jax.jit(take)(params, text_batch(), jax.random.key(0))
    expected, expected_totals, _ = big_batch()
    for name in totals:
        np.testing.assert_allclose(totals[name], expected_totals[name], rtol=1e-6)
    for name, value in helpers.leaves(expected).items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(
            helpers.leaves(grads)[name] / scale, value / scale, atol=1e-5, err_msg=name
        )


def test_an_auxiliary_loss_is_added_whatever_the_accumulation():
    routed = {"pattern": ("mom",), "memory": {"balance": 0.5}}
    graphdef, params = model_of(**routed)
    batch, lengths = jax.tree.map(jnp.asarray, text_batch()), np.ones(32, np.int32)

    def loss(params):
        """By hand: the mean over the counted tokens, and the layers' own."""
        logits, statistics = losses.forward(nnx.merge(graphdef, params), batch, jax.random.key(0))
        nats = losses.token_losses(logits, batch["targets"])
        own = statistics["auxiliary_loss"]
        assert own.shape == ()
        return jnp.sum(batch["weights"] * nats) / jnp.sum(batch["weights"]) + own, own

    expected, own = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert own >= 0.5 * 0.99 * len(params["blocks"])
    for accumulate in (1, 4):
        take = functools.partial(
            step.gradients, graphdef, byte_lengths=lengths, accumulate=accumulate
        )
        grads, _, statistics = jax.jit(take)(params, batch, jax.random.key(0))
        np.testing.assert_allclose(statistics["auxiliary_loss"], own, rtol=1e-6)
        for name, value in helpers.leaves(expected).items():
            scale = np.abs(value).max()
            np.testing.assert_allclose(
                helpers.leaves(grads)[name] / scale, value / scale, atol=1e-5, err_msg=name
            )


def test_the_mean_of_microbatch_means_is_not_the_big_batch():
    """The planted fault: what accumulation would give if each microbatch were averaged alone."""
    graphdef, params = model()
    batch, expected = jax.tree.map(jnp.asarray, text_batch()), helpers.leaves(big_batch()[0])
    parts = step.microbatches(batch, 2)
    means = []
    for i in range(2):
        part = {name: x[i] for name, x in parts.items()}
        grads, _, _ = jax.jit(
            functools.partial(step.gradients, graphdef, byte_lengths=np.ones(32, np.int32))
        )(params, part, jax.random.key(0))
        means.append(helpers.leaves(grads))
    wrong = {name: (means[0][name] + means[1][name]) / 2 for name in expected}
    errors = [np.abs(wrong[n] - expected[n]).max() / np.abs(expected[n]).max() for n in expected]
    assert max(errors) > 1e-2


def test_microbatches_hold_every_row_once():
    parts = step.microbatches({"tokens": jnp.arange(12).reshape(6, 2)}, 3)["tokens"]
    np.testing.assert_array_equal(parts[:, :, 0], [[0, 6], [2, 8], [4, 10]])


def test_a_batch_is_learned_by_heart():
    graphdef, params = model()
    config = TrainConfig(steps=150, warmup=5, lr=3e-2, weight_decay=0.0, final_lr=0.1)
    transform = optimizer.make(config, params)
    take = jax.jit(
        step.make(graphdef, transform, optimizer.learning_rate(config), np.ones(32, np.int32))
    )
    now = state.TrainState(jnp.int32(0), params, transform.init(params), jax.random.key(0))
    batch = {**text_batch(rows=2, time=8), "weights": np.ones((2, 8), np.float32)}
    first = None
    for _ in range(150):
        now, metrics = take(now, batch)
        first = first or float(metrics["loss"])
    assert first > 3.0
    assert float(metrics["loss"]) < 0.05


def make_model(rngs):
    config = models.LanguageModelConfig.from_dict({**helpers.MODEL, "vocab": 32})
    return models.LanguageModel(config, rngs=rngs)


def two_steps(sizes, accumulate=1, order=(0, 1)):
    """Two steps from one seed on a mesh, with metrics of both."""
    mesh = sharding.make_mesh(**sizes)
    config = TrainConfig(steps=4, warmup=0, lr=1e-2)
    graphdef, shapes = state.describe(make_model)
    transform = optimizer.make(config, shapes)
    take = step.compile(
        step.make(
            graphdef,
            transform,
            optimizer.learning_rate(config),
            np.ones(32, np.int32),
            accumulate=accumulate,
        ),
        state.abstract(make_model, transform, mesh),
        mesh,
    )
    now = state.start(make_model, transform, mesh, jax.random.key(5))
    found = []
    with jax.set_mesh(mesh):
        for n in order:
            now, metrics = take(now, place(text_batch(seed=n), mesh))
            found.append({name: float(x) for name, x in metrics.items()})
    return now, found


@pytest.mark.parametrize(
    ("sizes", "accumulate"),
    [({"data": 2, "fsdp": 2, "tensor": 2}, 1), ({"fsdp": 4, "sequence": 2}, 2)],
)
def test_the_sharded_step_is_the_single_device_step(sizes, accumulate):
    single, expected = two_steps({"data": 1})
    sharded, found = two_steps(sizes, accumulate)
    for a, b in zip(expected, found, strict=True):
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-4, err_msg=name)
    moved = differs_much(single, sharded)
    assert not moved, moved
    # Planted fault: the same steps on the batches in another order.
    assert differs_much(single, two_steps({"data": 1}, order=(1, 0))[0])


def differs_much(a, b):
    a, b = helpers.leaves(a.params), helpers.leaves(b.params)
    return [n for n in a if np.abs(a[n] - b[n]).max() > 1e-3 * np.abs(a[n]).max()]


def test_parameters_and_optimiser_state_are_split_over_the_mesh():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    _, shapes = state.describe(make_model)
    for name in ("adamw", "muon"):
        transform = optimizer.make(TrainConfig(optimizer=name), shapes)
        now = state.start(make_model, transform, mesh, jax.random.key(0))
        flat, _ = jax.tree_util.tree_flatten_with_path(now)
        split = {
            jax.tree_util.keystr(path) for path, x in flat if not x.sharding.is_fully_replicated
        }
        params = {n for n in split if n.startswith(".params")}
        assert any("embedding" in n for n in params)
        for moment in ("mu", "nu"):
            assert any(f".{moment}" in n and "embedding" in n for n in split), (name, moment)


def test_a_batch_that_the_mesh_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"batch \(6, 16\): dimension 0"):
        place(text_batch(rows=6), sharding.make_mesh(data=4))
