"""What every contender of the benchmark of rules reads: the same numbers, drawn by NumPy."""

import numpy as np

BY_CHANNEL = ("gla", "kda", "rwkv7")  # their decay has a channel axis


def draw(spec: dict) -> dict[str, np.ndarray]:
    """Queries, keys, values and gates, fp32; keys and queries of length 1.

    Args:
        spec: rule, batch, tokens, heads, head_dim.
    Returns:
        q, k, v and, for RWKV-7, the written key `write` [B, T, H, D]; `lr`, `momentum`, `threshold`
        and `retain` [B, T, H], of some rules [B, T, H, D].
    """
    rng = np.random.default_rng(0)
    shape, dim = (spec["batch"], spec["tokens"], spec["heads"]), spec["head_dim"]
    q, k, v = (rng.standard_normal((*shape, dim), np.float32) for _ in range(3))
    q, k = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (q, k))

    def gate(low: float, high: float, *more: int) -> np.ndarray:
        return rng.uniform(low, high, (*shape, *more)).astype(np.float32)

    channels = (dim,) if spec["rule"] in BY_CHANNEL else ()
    return {
        "q": q,
        "k": k,
        "v": v,
        "lr": gate(0.0, 0.1, *(channels if spec["rule"] == "rwkv7" else ())),
        "momentum": gate(0.3, 0.7),
        "retain": gate(0.9, 1.0, *channels),
        "threshold": gate(0.5, 1.5),
        "write": 0.1 * k,
    }
