"""Child process: one rule of the zoo, forward and backward, in one form, compiled for one shape."""

import inspect
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np

from memjax import miras
from memjax.tpu.operations import products


def build(spec: dict):
    """Compiles the step for a shape.

    Args:
        spec: rule: a row of the zoo; options: its arguments, those that it has; form: "chunkwise"
            or "recurrent"; batch, tokens, heads, head_dim.
    Returns:
        (info, answer): `answer(steps=n)` gives tokens, seconds and the memory so far.
    """
    make = getattr(miras.zoo, spec["rule"])
    known = inspect.signature(make).parameters
    rule = make(**{name: value for name, value in spec["options"].items() if name in known})
    shape, dim = (spec["batch"], spec["tokens"], spec["heads"]), spec["head_dim"]
    keys = jax.random.split(jax.random.key(0), 6)
    q, k, v = (jax.random.normal(key, (*shape, dim)) for key in keys[:3])
    q, k = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (q, k))

    def gate(low: float, high: float, *more: int):
        return jax.random.uniform(keys[3], (*shape, *more), minval=low, maxval=high)

    channels = (dim,) if spec["rule"] in ("gla", "kda", "rwkv7") else ()
    window = rule.learner.window
    gates = miras.Gates(
        lr=gate(0.0, 0.1, *(channels if rule.learner.exchanges else ())),
        momentum=gate(0.3, 0.7) if rule.learner.needs_momentum else None,
        retain=gate(0.9, 1.0, *channels) if rule.retention.needs_retain else None,
        threshold=gate(0.5, 1.5) if rule.bias.needs_threshold else None,
        window=gate(0.0, 1.0, window) if window > 1 else None,
        write=0.1 * k if rule.learner.exchanges else None,
    )
    weights = jax.vmap(lambda key: rule.init(key, dim, dim))(
        jax.random.split(keys[4], spec["heads"])
    )
    form = getattr(miras, spec["form"])

    def loss(weights, q, k, v, gates):
        y, _ = form(rule, miras.start(rule, weights, spec["batch"]), q, k, v, gates)
        return jnp.sum(jnp.square(y))

    step = jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))
    arguments = (weights, q, k, v, gates)
    began = time.perf_counter()
    compiled = jax.jit(step).lower(*arguments).compile()
    info = {
        "versions": harness.versions("memjax", "jax", "jaxlib", "flax"),
        "compile_seconds": time.perf_counter() - began,
        "flops": products(jax.make_jaxpr(step)(*arguments)),
    }
    watched = harness.Memory()
    results = compiled(*arguments)
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(results)):
        raise FloatingPointError(f"{spec['rule']}: loss or gradients are not finite")
    del results

    def answer(steps: int) -> dict:
        began = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(compiled(*arguments))
        seconds = time.perf_counter() - began
        return {
            "tokens": steps * spec["batch"] * spec["tokens"],
            "seconds": seconds,
            "growth": watched.growth(),
        }

    return info, answer


if __name__ == "__main__":
    harness.serve(build)
