"""The memories of the zoo and their kin as blocks of a language model, by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.models import mixers, sample
from memjax.models.config import MemoryConfig
from tests.models.toys import call, config_of, loss_and_grad, model_of, tokens_of

TIME, PROMPT = 9, 5
FIELDS = {
    "rwkv7": {},
    "mom": {"memories": 3, "active": 2},
    "tnt": {"chunk": 2, "local_chunks": (1, 2), "shard": 4, "expansion": 2},
    "gam": {"slots": 5},
    "self_referential_titans": {"chunk": 2, "projection_chunk": 1, "expansion": 2},
    "continuum": {"periods": (2, 3), "expansion": 2},
    "hope": {"chunk": 2, "periods": (3,), "expansion": 2},
    **{
        name: {"chunk": 2, "window": 3}
        for name in (
            "ttt_linear", "ttt_mlp", "moneta", "yaad", "memora", "dla", "swdt",
            "deep_omega_transformer", "omega_net", "atlas", "lact",
        )
    },
}  # fmt: skip


def small(name, **changes):
    memory = MemoryConfig(**FIELDS[name])
    fields = {"pattern": (name,), "feed_forward": "none", "conv": 3, "memory": memory}
    # a prefix is one more program to compile: two of them have one
    prefix = 2 if name in ("atlas", "lact") else 0
    return fields | {"layers": 1, "persistent": prefix} | changes


@pytest.fixture(scope="module", params=FIELDS)
def name(request):
    """One mixer after the other: their programs together are more than a process may map."""
    yield request.param
    jax.clear_caches()


@pytest.mark.parametrize("mixer", mixers.registry.names())
def test_parameters_have_types_of_their_own(mixer):
    """A weak type (of a Python number) is lost in the first step, and the next compiles again."""
    config = config_of(pattern=(mixer,), layers=1)
    module = nnx.eval_shape(lambda: mixers.build(mixer, config, nnx.Rngs(0)))
    for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        assert not param.get_value().weak_type, path


def test_loss_and_gradients_of_every_parameter(name):
    run, params = loss_and_grad(model_of(**small(name, tied=False)))
    loss, grads = run(params, tokens_of(time=TIME))
    assert np.isfinite(loss)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), jax.tree_util.keystr(path)
        assert np.abs(grad).max() > 0, jax.tree_util.keystr(path)


def test_generation_is_teacher_forcing_and_documents_stay_apart(name):
    model, prompt = model_of(**small(name)), tokens_of(time=PROMPT)
    tokens = sample(model, prompt, length=TIME - PROMPT, temperature=0)
    row, run = jnp.concatenate([prompt, tokens], axis=1), call(model)
    one, two = jnp.ones_like(row[:, :PROMPT]), 2 * jnp.ones_like(tokens)
    logits, _ = run(row, None, jnp.concatenate([one, two // 2], axis=1))
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1)[:, PROMPT - 1 : -1], tokens)
    # a token is not forgotten on the way
    other, _ = run(row.at[:, -3].set(31 - row[:, -3]), None, jnp.ones_like(row))
    assert np.abs(other[:, -1] - logits[:, -1]).max() > 1e-6
    # a document that follows another is as it is alone, whatever follows it
    alone = logits[:, :PROMPT]
    turned = jnp.concatenate([row[:, PROMPT:], row[:, :PROMPT]], axis=1)
    packed, _ = run(turned, None, jnp.concatenate([two, one], axis=1))
    joined, _ = run(turned, None, jnp.ones_like(row))
    close = functools.partial(np.testing.assert_allclose, atol=1e-5 * np.abs(alone).max(), rtol=0)
    close(packed[:, -PROMPT:], alone)
    with pytest.raises(AssertionError):
        close(joined[:, -PROMPT:], alone)


def built(name, **changes):
    """The mixer, with shapes for parameters."""
    return nnx.eval_shape(
        lambda: mixers.build(name, config_of(**small(name, **changes)), nnx.Rngs(0))
    )


def test_fields_of_the_configuration_reach_the_layer(name):
    module = built(name)
    assert module.dim == 16
    if name == "gam":
        assert module.bank.shape == (5, 16)
        assert built(name, conv=0).conv.width == 1
        return
    if name == "continuum":
        rules = [level.rule for level in module.levels]
        assert [(rule.chunk, rule.structure.expansion) for rule in rules] == [(2, 2), (3, 2)]
        faster = MemoryConfig(**FIELDS[name] | {"continuum_lr_max": 2.0})
        assert built(name, memory=faster).levels[0].scale == 2 * module.levels[0].scale
        return
    if name == "hope":
        assert module.titans.rule.chunk == module.titans.projection_rule.chunk == 2
        assert [level.rule.chunk for level in module.continuum.levels] == [3]
        return
    assert (module.heads, module.head_dim) == (2, 8)
    memory = MemoryConfig(**FIELDS[name] | {"heads": 4, "lr_max": 0.05})
    assert (built(name, head_dim=6, memory=memory).heads, built(name, head_dim=6).head_dim) == (
        4,
        6,
    )
    assert built(name, head_dim=6, memory=memory).head_dim == 4
    if name == "rwkv7":
        return
    assert [conv.width for conv in module.convs] == [3] * (2 if name.startswith("self") else 3)
    assert not built(name, conv=0).convs
    if name == "mom":
        assert (module.memories, module.active) == (3, 2)
        return
    assert module.rule.chunk == 2
    assert built(name, memory=memory).lr_max == 0.05
    if name == "self_referential_titans":
        assert (module.projection_rule.chunk, module.rule.structure.expansion) == (1, 2)
        return
    if name == "tnt":
        assert (module.shard, [rule.chunk for rule in module.local_rules]) == (4, [1, 2])
        assert module.rule.structure.expansion == 2
        return
    assert built(name, persistent=2).persistent.shape == (2, 16)
    windows = ("swdt", "deep_omega_transformer", "omega_net", "atlas")
    assert module.rule.learner.window == (3 if name in windows else 1)
    assert (module.window is not None) == (name in windows)
    assert (module.threshold is not None) == (name == "yaad")
    assert (module.momentum is not None) == (name in ("atlas", "lact"))
    assert (module.retain is not None) == (not name.startswith("ttt") and name != "lact")
    if name in windows:
        cubic = MemoryConfig(**FIELDS[name] | {"degree": 3})
        assert built(name, memory=cubic).rule.structure.features.degree == 3
