r"""The Titans ablation in miniature: the memory without each of its parts, on the embedded corpus.

What:     the paper's ablation, of the long-term memory alone (LMM), in configs/compare.py's sizes:
          in turn a linear memory, no convolution, momentum, decay, or persistent tokens.
Command:  python experiments/compare.py --config=configs/ablation.py
Hardware: two CPU cores, a few minutes for each run.
Result:   bits per byte, mean of three seeds: 2.449 in full, 2.388 linear, 3.159 no convolution,
          2.429 no momentum, 2.467 no decay, 2.477 no persistent tokens; seeds differ by up to
          0.07. Not the paper's order of perplexities: 27.01 in full, 28.49 linear, 28.73 no
          convolution, 28.98 no momentum, 29.04 no decay (docs/performance.md).

Variants: `:full`, `:linear`, `:no_conv`, `:no_momentum`, `:no_decay`, `:no_persistent`, and each
with `_smoke` for a run of seconds; `:smoke` is `:full_smoke`. Parameters are not made equal: each
variant is the full one less a part, and the feed-forward layers stay as they are.
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

from memjax.training import complete

VARIANTS = {
    "full": {},
    "linear": {"memory": {"depth": 1, "expansion": None}},
    "no_conv": {"conv": 0},
    "no_momentum": {"memory": {"momentum": False}},
    "no_decay": {"memory": {"decay": False}},
    "no_persistent": {"persistent": 0},
}


def get_config(variant: str = "full") -> ConfigDict:
    name = "full_smoke" if variant == "smoke" else variant
    smoke = name.endswith("_smoke")
    name = name.removesuffix("_smoke")
    if name not in VARIANTS:
        raise ValueError(
            f"configs/ablation.py has no variant {variant!r}; there are {', '.join(VARIANTS)}, each"
            " also with _smoke"
        )
    config = _compared().get_config("lmm_smoke" if smoke else "lmm").to_dict()
    changes = dict(VARIANTS[name])
    config["model"]["memory"] |= changes.pop("memory", {})
    config["model"] |= changes
    config["workdir"] = f"runs/ablation/{name}{'-smoke' if smoke else ''}"
    return complete(config)


def _compared():
    """configs/compare.py, which has the sizes."""
    path = pathlib.Path(__file__).with_name("compare.py")
    spec = importlib.util.spec_from_file_location("compared_blocks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
