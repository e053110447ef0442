"""Child process: small language models, decoding from states that have read many tokens."""

import functools
import time

import harness
import jax
import jax.numpy as jnp
from flax import nnx

from memjax.models import LanguageModel, LanguageModelConfig
from memjax.models.generation import prefill


def build(spec: dict):
    """Builds a model and reads it to each position.

    Args:
        spec: config: fields of the model's configuration; batch, positions; prefill: tokens read at
            once.
    Returns:
        (info, answer): `answer(position=p, tokens=n)` decodes n tokens from there and gives the
        count of tokens of all rows, and seconds.
    """
    config = LanguageModelConfig.from_dict(spec["config"])
    graphdef, values = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)))
    batch = spec["batch"]
    states, tokens, positions = {}, {}, []

    def fresh():
        # prefill uses each buffer up, and leaves of a fresh state share some.
        return jax.tree.map(jnp.copy, nnx.merge(graphdef, values).start(batch))

    chunk = jnp.zeros((batch, spec["prefill"]), jnp.int32)
    jax.block_until_ready(prefill(graphdef, values, fresh(), chunk, spec["prefill"]))  # compiles
    for position in spec["positions"]:
        text = jax.random.randint(
            jax.random.key(position), (batch, position), 0, config.vocab, jnp.int32
        )
        state = fresh()
        began = time.perf_counter()
        logits, state = prefill(graphdef, values, state, text, spec["prefill"])
        jax.block_until_ready((logits, state))
        seconds = time.perf_counter() - began
        states[position], tokens[position] = state, jnp.argmax(logits, axis=-1)
        positions.append(
            {
                "position": position,
                "seen": int(state.seen[0]),
                "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
                "prefill_seconds": seconds,
            }
        )

    @functools.partial(jax.jit, donate_argnums=1)
    def step(values, state, token):
        logits, state = nnx.merge(graphdef, values)(token[:, None], state)
        return jnp.argmax(logits[:, 0], axis=-1), state

    def run(position: int, count: int):
        # A step uses its state up; the one at the position is kept.
        state, token = jax.tree.map(jnp.copy, states[position]), tokens[position]
        jax.block_until_ready((state, token))
        began = time.perf_counter()
        for _ in range(count):
            token, state = step(values, state, token)
        jax.block_until_ready((token, state))
        return time.perf_counter() - began

    run(spec["positions"][0], 1)  # compiles

    def answer(position: int, tokens: int) -> dict:
        return {"tokens": batch * tokens, "seconds": run(position, tokens)}

    info = {
        "versions": harness.versions("memjax", "jax", "jaxlib", "flax"),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(values)),
        "positions": positions,
    }
    return info, answer


if __name__ == "__main__":
    harness.serve(build)
