"""The matrix memories as blocks of a language model, by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.models import mixers, sample, statistics
from memjax.models.config import MemoryConfig
from tests.models.toys import call, config_of, loss_and_grad, model_of, tokens_of

NAMES = (
    "linear_attention", "retnet", "gla", "mamba2", "delta_net", "gated_delta_net", "kda",
    "longhorn", "mesa_net",
)  # fmt: skip


def small(name, **changes):
    return {"pattern": (name,), "feed_forward": "none", "conv": 3} | changes


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    """One mixer after the other: their programs together are more than a process may map."""
    yield request.param
    jax.clear_caches()


def test_loss_and_gradients_of_every_parameter(name):
    run, params = loss_and_grad(model_of(**small(name, layers=2, tied=False)))
    loss, grads = run(params, tokens_of(time=6))
    assert np.isfinite(loss)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), jax.tree_util.keystr(path)
        for layer in grad if "blocks" in jax.tree_util.keystr(path) else [grad]:
            assert np.abs(layer).max() > 0, jax.tree_util.keystr(path)


def test_generation_is_teacher_forcing(name):
    model, prompt, length = model_of(**small(name, layers=1)), tokens_of(time=4), 4
    tokens = sample(model, prompt, length=length, temperature=0)
    row, run = jnp.concatenate([prompt, tokens], axis=1), call(model)
    logits, _ = run(row)
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1)[:, 3:-1], tokens)
    # the first token is not forgotten on the way
    other, _ = run(row.at[:, 0].set(31 - row[:, 0]))
    assert np.abs(other[:, -1] - logits[:, -1]).max() > 1e-6


def built(name, **changes):
    """The mixer, with shapes for parameters, and these shapes by name."""
    config = config_of(**small(name, **changes))
    module = nnx.eval_shape(lambda: mixers.build(name, config, nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return module, {".".join(map(str, path)): p.shape for path, p in flat}


def test_fields_of_the_configuration_reach_the_layer(name):
    module, shapes = built(name)
    assert (module.dim, module.heads, module.head_dim) == (16, 2, 8)
    assert module.value_dim == {"mamba2": 16, "retnet": 16}.get(name, 8)
    memory = MemoryConfig(value_dim=5, heads=4, negative_eigenvalues=True)
    module, shapes = built(name, head_dim=6, memory=memory, rope_base=77.0)
    assert (module.heads, module.head_dim, module.value_dim) == (4, 4, 5)
    assert shapes["value.weight"] == (16, 4, 5)
    assert module.rope_base == (77.0 if name == "retnet" else None)
    delta = name in ("delta_net", "gated_delta_net", "kda")
    assert getattr(module.gates, "most", 1.0) == (2.0 if delta else 1.0)
    convolved = name not in ("linear_attention", "retnet", "gla")
    assert ("convs.2.weight" in shapes) == convolved
    module, shapes = built(name, head_dim=6, conv=0)
    assert module.head_dim == 6
    assert "convs.2.weight" not in shapes


def test_reports_what_there_is(name):
    model = nnx.eval_shape(lambda: model_of(**small(name)))
    reported = jax.eval_shape(lambda m, t: statistics(m(t)[1]), model, tokens_of())
    fields = {key.removeprefix("layer_01/") for key in reported if key.startswith("layer_01/")}
    decays = name in ("retnet", "gla", "mamba2", "gated_delta_net", "kda", "mesa_net")
    predicts = name in ("delta_net", "gated_delta_net", "kda", "longhorn", "mesa_net")
    wanted = {"lr": True, "retain": decays, "surprise": predicts}
    assert fields == {field for field, there in wanted.items() if there}
