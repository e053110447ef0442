"""What a model keeps for its backward pass, and what it computes again."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from memjax.typing import PyTree

_KEPT = "kept"  # under every policy
_POLICIES = jax.checkpoint_policies

Tree = TypeVar("Tree", bound=PyTree)


def keep(tree: Tree) -> Tree:
    """Marks arrays that are kept even where the rest of a block is computed again."""
    return jax.tree.map(lambda x: checkpoint_name(x, _KEPT), tree)


def computed_again(body: Callable, policy: str) -> Callable:
    """The body of a scan, with what `LanguageModelConfig.remat` asks for."""
    if policy == "none":
        return body
    kept = _POLICIES.save_only_these_names(_KEPT)
    saveable = {
        "full": kept,
        "dots": _POLICIES.save_from_both_policies(kept, _POLICIES.dots_with_no_batch_dims_saveable),
    }
    # the scan itself keeps XLA from merging the two computations
    return jax.checkpoint(body, prevent_cse=False, policy=saveable[policy])
