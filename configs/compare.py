"""MAC, MAG, MAL, LMM and Transformer at equal parameters on the embedded corpus.

What:     five models of half the depth of configs/quickstart.py; the feed-forward layers as wide as
          it takes for all to have the parameters of the MAC model (within 0.5 %).
Command:  python experiments/compare.py        (all of them, three seeds each, and the table)
          python experiments/train.py --config=configs/compare.py:mac --config.seed=1 \
              --workdir=runs/compare/mac-1
Hardware: two CPU cores, a few minutes each.
Result:   held-out bits per byte, mean of three seeds: lmm 2.482, mag 2.544, mal 2.548, mac 2.719,
          transformer 2.830 (the first command; 3 to 6 minutes a run on one core).

Variants: `:mac`, `:mag`, `:mal`, `:lmm`, `:transformer`, and each with `_smoke` for a run of
seconds; `:smoke` is `:mac_smoke`.
"""

from ml_collections import ConfigDict

from memjax import models
from memjax.training import complete

VARIANTS = ("mac", "mag", "mal", "lmm", "transformer")


def _equal(block: str, sizes: dict) -> int:
    """Hidden units that give a model of these blocks as many parameters as the MAC model has."""

    def parameters(name: str, hidden: int) -> int:
        config = {"vocab": 384, **sizes, "pattern": (name,), "hidden": hidden}
        return models.parameter_count(models.LanguageModelConfig.from_dict(config))

    wanted = parameters("mac", sizes["hidden"])
    one, two = parameters(block, 8), parameters(block, 16)
    per_unit = (two - one) / 8  # parameters are linear in the hidden units
    return max(2, 2 * round((8 + (wanted - one) / per_unit) / 2))


def get_config(variant: str = "mac") -> ConfigDict:
    block, _, smoke = ("mac_smoke" if variant == "smoke" else variant).partition("_")
    if block not in VARIANTS or smoke not in ("", "smoke"):
        raise ValueError(
            f"configs/compare.py has no variant {variant!r}; there are {', '.join(VARIANTS)}, each"
            " also with _smoke"
        )
    sizes = {
        "dim": 128,
        "layers": 2,
        "heads": 4,
        "hidden": 384,
        "context": 256,
        "segment": 64,
        "window": 64,
        "persistent": 4,
        "memory": {"chunk": 32, "expansion": 2},
        "dtype": "float32",
    }
    train = {
        "steps": 300,
        "batch": 8,
        "lr": 2e-3,
        "warmup": 30,
        "evaluate_every": 100,
        "checkpoint_every": 100,
    }
    evaluate = {"batches": 32}
    if smoke:
        sizes |= {"dim": 32, "layers": 2, "heads": 2, "hidden": 64, "context": 64}
        sizes |= {"segment": 32, "window": 32}
        train |= {"steps": 4, "batch": 8, "warmup": 2, "log_every": 2}
        evaluate = {"batches": 1}
    model = {**sizes, "pattern": (block,), "hidden": _equal(block, sizes)}
    return complete(
        {
            "model": model,
            "data": {"source": "stdlib", "tokenizer": "byte"},
            "train": train,
            "evaluate": evaluate,
            "workdir": f"runs/compare/{block}{'-smoke' if smoke else ''}",
        }
    )
