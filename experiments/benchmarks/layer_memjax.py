"""Child process: memjax's NeuralMemory, forward and backward, compiled for one shape."""

import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memjax import miras
from memjax.layers import NeuralMemory
from memjax.tpu.operations import products


def build(spec: dict):
    """Compiles the step for a shape.

    Args:
        spec: batch, tokens, dim, heads, depth, expansion, chunk; products: size n of plain matrix
            products [n, n] x [n, n] whose rate is measured for comparison, 0 = none.
    Returns:
        (info, answer): `answer(steps=n)` gives tokens, seconds and the memory so far.
    """
    rule = miras.zoo.titans(depth=spec["depth"], expansion=spec["expansion"], chunk=spec["chunk"])
    memory = NeuralMemory(spec["dim"], spec["heads"], rule=rule, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(memory, nnx.Param)
    x, weights = jax.random.normal(
        jax.random.key(1), (2, spec["batch"], spec["tokens"], spec["dim"])
    )

    def loss(params, x, weights):
        y, _ = nnx.merge(graphdef, params)(x)
        return jnp.vdot(y, weights)

    step = jax.value_and_grad(loss, argnums=(0, 1))
    began = time.perf_counter()
    compiled = jax.jit(step).lower(params, x, weights).compile()
    seconds = time.perf_counter() - began
    info = {
        "versions": harness.versions("memjax", "jax", "jaxlib", "flax"),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "compile_seconds": seconds,
        "planned_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "flops": products(jax.make_jaxpr(step)(params, x, weights)),
        "product_rate": product_rate(spec["products"]) if spec["products"] else None,
    }
    watched = harness.Memory()
    results = compiled(params, x, weights)
    # NumPy, because JAX would compile, and that takes memory.
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(results)):
        raise FloatingPointError("memjax: loss or gradients are not finite")
    del results

    def run():
        jax.block_until_ready(compiled(params, x, weights))

    return info, harness.timed(run, spec["batch"] * spec["tokens"], watched)


def product_rate(n: int) -> float:
    """The best of five: floating-point operations a second of fp32 products [n, n] x [n, n]."""
    a = jax.random.normal(jax.random.key(2), (n, n))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(product(a, a))
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


if __name__ == "__main__":
    harness.serve(build)
