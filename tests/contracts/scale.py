"""Checks at length: values and gradients stay finite, and no weights are held for each token."""

import jax
import jax.numpy as jnp

from memjax import miras
from memjax.miras import zoo
from tests.contracts import scenes
from tests.contracts.rules import RuleCase
from tests.oracles import miras as oracle

DEEP = RuleCase(
    "titans_4_long",
    zoo.titans(depth=4, expansion=2, chunk=64),
    oracle.Rule(chunk=64, norm=True, residual=True),
    key=8,
    value=8,
    rate=0.1,
)


def _loss(form, rule, weights, stream):
    y, last = form(rule, miras.start(rule, weights, stream.q.shape[0]), *stream)
    state = sum(jnp.sum(jnp.square(w)) for w in last.weights)
    return jnp.mean(jnp.square(y.astype(jnp.float32))) + state, y


def check_finite(forms, length, case=DEEP):
    """In bf16, with four layers: outputs and every gradient are finite, and not all zero."""
    stream = scenes.stream(case, length, batch=1)
    stream = scenes.cast(stream, jnp.bfloat16)._replace(
        gates=scenes.cast(stream.gates, jnp.float32)
    )
    weights = scenes.cast(scenes.weights(case), jnp.float32)

    @jax.jit
    def gradient(weights, stream):
        return jax.grad(
            lambda *args: _loss(forms.chunkwise, case.rule, *args), argnums=(0, 1), has_aux=True
        )(weights, stream)

    gradients, y = gradient(weights, stream)
    assert bool(jnp.isfinite(y.astype(jnp.float32)).all()), f"an output of {length} is not finite"
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name = f"the gradient by {jax.tree_util.keystr(path)} over {length} tokens"
        assert bool(jnp.isfinite(leaf.astype(jnp.float32)).all()), f"{name} is not finite"
        assert bool(jnp.any(leaf != 0)), f"{name} is zero"


def _training_bytes(form, rule, length, dim):
    """What the compiled gradient holds beside its arguments and results."""
    keys = jax.random.split(jax.random.key(0), 1)
    weights = jax.vmap(lambda key: rule.init(key, dim, dim))(keys)
    x = jax.ShapeDtypeStruct((1, length, 1, dim), jnp.float32)
    gate = jax.ShapeDtypeStruct((1, length, 1), jnp.float32)
    stream = scenes.Stream(x, x, x, miras.Gates(gate, gate, gate))
    gradient = jax.grad(lambda *args: _loss(form, rule, *args)[0], argnums=(0, 1))
    compiled = jax.jit(gradient).lower(weights, stream).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def check_memory(forms, which):
    """Training holds a small part of the weights a token, and at most linearly more of them."""
    rule = zoo.titans(depth=2, expansion=4, norm=False, residual=False, chunk=16)
    dim, length = 16, 4096
    weights = 2 * dim * 4 * dim * 4  # bytes of one memory
    form = scenes.forms_of(forms)[which]
    held = _training_bytes(form, rule, length, dim)
    assert held < length * weights / 4, f"{which} holds {held} bytes, {weights} a memory"
    twice = _training_bytes(form, rule, 2 * length, dim)
    assert twice < 2.1 * held, f"{which} holds {held} bytes, and {twice} at twice the length"
