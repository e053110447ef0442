"""What the memories of a model report, layer by layer."""

from typing import Any

import jax
import jax.numpy as jnp

from memjax.layers.statistics import MemoryStats
from memjax.models.language_model import LanguageModelState
from memjax.typing import Array, Float


def statistics(state: LanguageModelState) -> dict[str, Float[Array, ""]]:
    """Means of what each memory reported about the last call, over batch and heads.

        {"layer_00/surprise": 0.31, "layer_00/lr": 0.02, ..., "layer_03/retain": 0.98}

    A layer with several memories counts them: "layer_00/memory_1/surprise".

    Args:
        state: what the model returned.

    Returns:
        fp32 scalars by name, empty for a model without memories. Works inside jit.
    """

    def is_stats(node: Any) -> bool:
        return isinstance(node, MemoryStats)

    found: dict[int, list[MemoryStats]] = {}
    period = len(state.blocks)
    for place, block in enumerate(state.blocks):
        for node in jax.tree.leaves(block, is_leaf=is_stats):
            if not is_stats(node):
                continue
            for repeat in range(node.lr.shape[0]):
                one = jax.tree.map(lambda leaf, r=repeat: leaf[r], node)
                found.setdefault(repeat * period + place, []).append(one)

    digits = max(2, len(str(max(found, default=0))))
    scalars = {}
    for layer in sorted(found):
        for number, stats in enumerate(found[layer]):
            memory = f"memory_{number}/" if len(found[layer]) > 1 else ""
            for field, value in stats._asdict().items():
                if value is not None:
                    mean = jnp.mean(value.astype(jnp.float32))
                    scalars[f"layer_{layer:0{digits}d}/{memory}{field}"] = mean
    return scalars
