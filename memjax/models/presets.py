"""The sizes of the papers, for every block.

| size | layers | dim | heads | source |
|---|---|---|---|---|
| 170m | 12 | 768 | 16 | Titans, arXiv:2501.00663, appendix |
| 340m | 24 | 1024 | 16 | Titans |
| 760m | 24 | 1536 | 16 | Titans |
| 1.3b | 18 | 2048 | 8 | Miras, arXiv:2504.13173, appendix |

The vocabulary is that of the Llama 2 tokenizer (32,000), the context 4096. A size is the papers'
label; what a preset really has, `parameter_count` tells.
"""

import dataclasses
import math
from typing import Any

import jax
from flax import nnx

from memjax.models.config import LanguageModelConfig
from memjax.models.language_model import LanguageModel
from memjax.models.registry import nearest

SIZES = {
    "170m": {"layers": 12, "dim": 768, "heads": 16},
    "340m": {"layers": 24, "dim": 1024, "heads": 16},
    "760m": {"layers": 24, "dim": 1536, "heads": 16},
    "1.3b": {"layers": 18, "dim": 2048, "heads": 8},
}
BLOCKS = ("transformer", "lmm", "mac", "mag", "mal")
NAMES = tuple(f"{block}_{size}" for block in BLOCKS for size in SIZES)


def preset(name: str, **changes: Any) -> LanguageModelConfig:
    """The configuration of a paper's model: `preset("mac_170m", remat="full")`.

    Args:
        name: one of `NAMES`, a block and a size.
        **changes: fields of `LanguageModelConfig` to set otherwise.

    Raises:
        ValueError: an unknown name (the message has the nearest valid ones) or a bad change.
    """
    if name not in NAMES:
        raise ValueError(f"unknown preset {name!r}; {nearest(name, NAMES)}")
    block, _, size = name.rpartition("_")
    config = LanguageModelConfig(vocab=32000, pattern=(block,), context=4096, **SIZES[size])
    return dataclasses.replace(config, **changes)


def parameter_count(config: LanguageModelConfig) -> int:
    """The number of parameters of a model, counted on shapes: nothing is allocated.

    Args:
        config: of the model.

    Returns:
        The sum of the sizes of all `nnx.Param`; a tied embedding counts once.
    """

    def params():
        return nnx.state(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(params)))
