"""Optimisers against their equations, and which parameters each rule reaches."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from memjax import models
from memjax.training import optimizer
from memjax.training.config import TrainConfig
from tests.training import helpers

CONFIG = TrainConfig(steps=20, warmup=4, lr=0.1, final_lr=0.2, weight_decay=0.3, clip=0.5)


class Layers(nnx.Module):
    """One parameter of every kind that the rules tell apart."""

    def __init__(self, rngs):
        def param(shape, axes):
            return nnx.Param(jax.random.normal(rngs.params(), shape), axes=axes)

        self.embedding = param((5, 4), ("vocab", "embed"))
        self.projection = param((3, 4, 6), ("layers", "embed", "mlp"))
        self.queries = param((4, 2, 3), ("embed", "heads", "kv"))
        self.out = param((2, 3, 4), ("heads", "kv", "embed"))
        self.memory = param((2, 3, 6), ("heads", "memory_in", "memory_out"))
        self.scale = param((3, 4), ("layers", "embed"))
        self.head_scale = param((2, 3), ("heads", "kv"))
        self.persistent = param((3, 4), ("persistent", "embed"))
        self.conv = param((4, 4), ("conv", "embed"))


MATRICES = {"projection", "queries", "out", "memory"}


def params():
    return nnx.split(Layers(nnx.Rngs(0)), nnx.Param)[1]


def test_learning_rate_is_warmup_then_cosine():
    rate = optimizer.learning_rate(CONFIG)
    for n in range(25):
        if n < 4:
            expected = 0.1 * n / 4
        else:
            progress = min(1.0, (n - 4) / 16)
            expected = 0.1 * (0.2 + 0.8 * (1 + math.cos(math.pi * progress)) / 2)
        np.testing.assert_allclose(rate(n), expected, rtol=1e-5, atol=1e-8)


def test_learning_rate_without_warmup_starts_at_the_peak():
    rate = optimizer.learning_rate(dataclasses.replace(CONFIG, warmup=0))
    np.testing.assert_allclose(rate(0), 0.1, rtol=1e-6)


def test_decay_reaches_matrices_only():
    mask = optimizer.decay_mask(params())
    decayed = {name for name in mask if jax.tree.leaves(mask[name]) == [True]}
    assert decayed == MATRICES


def test_decay_of_a_language_model():
    config = models.LanguageModelConfig.from_dict({**helpers.MODEL, "vocab": 384})
    _, values = nnx.split(models.LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)
    flat, _ = jax.tree_util.tree_flatten_with_path(optimizer.decay_mask(values))
    for path, decays in flat:
        name = jax.tree_util.keystr(path)
        assert decays == ("norm" not in name and "embedding" not in name), name


def test_muon_takes_each_layer_and_head_as_a_matrix():
    dims = optimizer.muon_dimensions(params())
    is_dims = lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)  # noqa: E731
    found = {name: jax.tree.leaves(dims[name], is_leaf=is_dims)[0] for name in dims}
    assert {name for name, d in found.items() if d is not None} == MATRICES
    assert tuple(found["projection"]) == ((1,), (2,))
    assert tuple(found["queries"]) == ((0,), (1, 2))
    assert tuple(found["out"]) == ((0, 1), (2,))
    assert tuple(found["memory"]) == ((1,), (2,))


def adamw_oracle(config, values, gradients, decays):
    """Float64 AdamW with global-norm clipping, from the equations (Loshchilov and Hutter, 2019)."""
    first = {k: np.zeros_like(v) for k, v in values.items()}
    second = {k: np.zeros_like(v) for k, v in values.items()}
    for n, grads in enumerate(gradients):
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        scale = min(1.0, config.clip / norm)
        rate = config.lr * n / config.warmup
        for k in values:
            g = grads[k] * scale
            first[k] = config.beta1 * first[k] + (1 - config.beta1) * g
            second[k] = config.beta2 * second[k] + (1 - config.beta2) * g**2
            m = first[k] / (1 - config.beta1 ** (n + 1))
            v = second[k] / (1 - config.beta2 ** (n + 1))
            decay = config.weight_decay * values[k] if decays(k) else 0.0
            values[k] = values[k] - rate * (m / (np.sqrt(v) + config.eps) + decay)
    return values


@pytest.mark.parametrize("decays", ["matrices", "all"])
def test_adamw_follows_the_equations(decays):
    """Three steps; the oracle that decays every parameter is the planted fault."""
    state = params()
    transform = optimizer.make(CONFIG, state)
    opt_state = transform.init(state)
    rng = np.random.default_rng(0)
    values = {k: np.asarray(v, np.float64) for k, v in helpers.leaves(state).items()}
    gradients = []
    for _ in range(3):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state)
        gradients.append({k: np.asarray(v, np.float64) for k, v in helpers.leaves(grads).items()})
        updates, opt_state = transform.update(grads, opt_state, state)
        state = optax.apply_updates(state, updates)
    chosen = (lambda name: name in MATRICES) if decays == "matrices" else (lambda name: True)
    expected = adamw_oracle(CONFIG, values, gradients, chosen)
    found = helpers.leaves(state)
    close = [np.allclose(found[k], expected[k], rtol=1e-5, atol=1e-6) for k in expected]
    assert all(close) == (decays == "matrices")


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adam():
    config = dataclasses.replace(
        CONFIG, optimizer="muon", warmup=0, weight_decay=0.0, clip=None, lr=1.0
    )
    state = params()
    transform = optimizer.make(config, state)
    rng = np.random.default_rng(1)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state)
    updates = helpers.leaves(transform.update(grads, transform.init(state), state)[0])
    matrices = {
        "projection": updates["projection"],
        "queries": updates["queries"].reshape(1, 4, 6),
        "out": updates["out"].reshape(1, 6, 4),
        "memory": updates["memory"],
    }
    for name, stack in matrices.items():
        for matrix in stack:
            values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * math.sqrt(6))
            assert 0.5 < values.min() <= values.max() < 1.5, name
    # The first Adam step is the sign of the gradient; Nesterov's differs only in size.
    for name in set(updates) - MATRICES:
        np.testing.assert_array_equal(np.sign(updates[name]), -np.sign(helpers.leaves(grads)[name]))


def test_muon_decays_matrices_only():
    config = dataclasses.replace(CONFIG, optimizer="muon", warmup=0, clip=None)
    state = params()
    transform = optimizer.make(config, state)
    zero = jax.tree.map(jnp.zeros_like, state)
    updates = helpers.leaves(transform.update(zero, transform.init(state), state)[0])
    for name, value in helpers.leaves(state).items():
        expected = -0.1 * 0.3 * value if name in MATRICES else 0.0 * value
        np.testing.assert_allclose(updates[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)


def test_an_unknown_optimizer_names_the_nearest():
    with pytest.raises(ValueError, match=r"train.optimizer 'adam'.*'adamw'"):
        optimizer.make(dataclasses.replace(CONFIG, optimizer="adam"), params())
