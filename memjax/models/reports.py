"""What the layers of a model report about a call: statistics, and losses of their own."""

from typing import Any

import jax
import jax.numpy as jnp

from memjax.layers.statistics import Auxiliary, MemoryStats
from memjax.models.language_model import LanguageModelState
from memjax.typing import Array, Float, PyTree

AUXILIARY_LOSS = "auxiliary_loss"


def statistics(state: LanguageModelState) -> dict[str, Float[Array, ""]]:
    """Means of what each memory reported about the last call, over batch and heads.

        {"layer_00/surprise": 0.31, "layer_00/lr": 0.02, ..., "layer_03/retain": 0.98}

    A layer with several memories counts them: "layer_00/memory_1/surprise". Where layers have a
    loss of their own, as the router of "mom" has, "auxiliary_loss" is their sum over the layers and
    mean over the batch, as training adds it to the loss of the tokens.

    Args:
        state: what the model returned.

    Returns:
        fp32 scalars by name, empty for a model without memories. Works inside jit; a gradient
        passes through the auxiliary loss alone.
    """

    found: dict[int, list[MemoryStats]] = {}
    period = len(state.blocks)
    for place, block in enumerate(state.blocks):
        for node in _nodes(block, MemoryStats):
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
    return scalars | auxiliary_loss(state)


def auxiliary_loss(state: PyTree) -> dict[str, Float[Array, ""]]:
    """What the layers of a model add to the loss, under the name "auxiliary_loss".

    Args:
        state: what the model returned.

    Returns:
        The sum over the layers of the means over the batch, fp32; empty where no layer adds any.
    """
    own = [jnp.mean(node.loss, axis=-1) for node in _nodes(state, Auxiliary)]
    return {AUXILIARY_LOSS: sum(jnp.sum(x, dtype=jnp.float32) for x in own)} if own else {}


def _nodes(tree: PyTree, kind: type) -> list[Any]:
    """The nodes of a tree that are of one kind, in order."""

    def is_one(node: Any) -> bool:
        return isinstance(node, kind)

    return [node for node in jax.tree.leaves(tree, is_leaf=is_one) if is_one(node)]
