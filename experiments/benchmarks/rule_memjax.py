"""Child process: one rule of the zoo, forward and backward, in one form, compiled for one shape."""

import inspect
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
import rule_inputs

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
    drawn = rule_inputs.draw(spec)
    q, k, v = (jnp.asarray(drawn[name]) for name in ("q", "k", "v"))
    dim, window = spec["head_dim"], rule.learner.window
    needs = {
        "lr": True,
        "momentum": rule.learner.needs_momentum,
        "retain": rule.retention.needs_retain,
        "threshold": rule.bias.needs_threshold,
        "write": rule.learner.exchanges,
    }
    gates = miras.Gates(
        **{name: jnp.asarray(drawn[name]) for name, needed in needs.items() if needed}
    )
    if window > 1:
        drawn = jax.random.uniform(jax.random.key(1), (*q.shape[:3], window))
        gates = gates._replace(window=drawn)
    weights = jax.vmap(lambda key: rule.init(key, dim, dim))(
        jax.random.split(jax.random.key(0), spec["heads"])
    )
    form = getattr(miras, spec["form"])

    @jax.jit
    def read(weights, q, k, v, gates):
        return form(rule, miras.start(rule, weights, spec["batch"]), q, k, v, gates)[0]

    def loss(*given):
        y = read(*given)
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
    # In float64: the step's own loss is a sum of a million numbers in fp32.
    info["loss"] = float(np.sum(np.square(np.asarray(read(*arguments), np.float64))))
    watched = harness.Memory()
    results = compiled(*arguments)
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(results)):
        raise FloatingPointError(f"{spec['rule']}: loss or gradients are not finite")
    del results

    def run():
        jax.block_until_ready(compiled(*arguments))

    return info, harness.timed(run, spec["batch"] * spec["tokens"], watched)


if __name__ == "__main__":
    harness.serve(build)
