"""Recall and state tracking: accuracy of every mixer against the size of its state.

What:     two-layer models without feed-forward layers on synthetic tasks (docs/tasks.md), as in
          Zoology (arXiv 2312.04927, Figure 2); per cell the best of four learning rates.
Command:  python experiments/recall.py --config=configs/recall.py:mqar
Hardware: meant for one accelerator. `:smoke` takes seconds on two CPU cores.
Result:   `:mqar_small` and `:states_small` in part, docs/tasks.md; the others not run yet.
          Zoology's attention solves all four of its MQAR settings at every size; fixed states fall
          off as pairs outgrow them.

Variants: `:mqar` (T, pairs = 64, 4 to 512, 64; noise off, vocabulary 8192), `:joint`, `:copying`,
`:parity` (trained on 65 tokens, tested on 257), `:s5` (trained on 33, tested on 129),
`:niah` (S-NIAH 1 to 3 in bytes of the embedded corpus), `:mqar_small` and `:states_small` (what
two CPU cores do: some models, one width, two learning rates, three seeds), and `:smoke`.

The models of the others are all names of `memjax.models.mixers`, each as the pattern of a model of
its own, and one hybrid; a mixer that is registered is in. `--models=lmm,swa` picks some; a model of
your own is one more entry of `models`, with any fields of `LanguageModelConfig`.

Differences from Zoology: rows are drawn anew in every step instead of 64 passes over 100,000;
attention has rotary positions instead of learned ones.
"""

from ml_collections import ConfigDict

from memjax.models import mixers
from memjax.training import sweep

VARIANTS = (
    "mqar",
    "joint",
    "copying",
    "parity",
    "s5",
    "niah",
    "mqar_small",
    "states_small",
    "smoke",
)


def _tasks(variant: str) -> dict:
    if variant == "mqar":
        sizes = ((64, 4), (128, 8), (256, 16), (512, 64))
        return {f"mqar-{t}-{k}": {"task": "mqar", "length": t, "pairs": k} for t, k in sizes}
    if variant == "joint":
        sizes = ((128, 4, 4), (512, 8, 8))
        return {
            f"joint-{n}x{m}": {"task": "joint_recall", "length": t, "contexts": n, "keys": m}
            for t, n, m in sizes
        }
    if variant == "copying":
        return {
            f"copying-{t}": {"task": "selective_copying", "length": t, "count": 16}
            for t in (256, 1024)
        }
    if variant in ("parity", "s5"):
        short, long = {"parity": (65, 257), "s5": (33, 129)}[variant]
        settings = {"task": variant, "length": short, "test": {"length": long}}
        return {f"{variant}-{short - 1}-{long - 1}": settings}
    return {
        f"s_niah_{n}": {"task": f"s_niah_{n}", "length": 2048, "test": {"split": "validation"}}
        if n > 1
        else {"task": "s_niah_1", "length": 2048}
        for n in (1, 2, 3)
    }


def _small(variant: str) -> dict:
    """What two CPU cores do in some hours: one width, two rates, few steps."""
    if variant == "mqar_small":
        sizes = ((64, 4), (128, 8))
        tasks = {
            f"mqar-{t}-{k}": {"task": "mqar", "length": t, "pairs": k, "vocabulary": 256}
            for t, k in sizes
        }
        names = (
            "transformer", "gated_delta_net", "delta_net", "lmm", "atlas", "linear_attention",
            "retnet",
        )  # fmt: skip
        models: dict = {name: {"pattern": (name,)} for name in names}
        # Newton-Schulz at every token is dear: four small heads, no monomials.
        models["atlas"] |= {"heads": 4, "memory": {"degree": 1}}
    else:
        tasks = {
            "parity-32-128": {"task": "parity", "length": 33, "test": {"length": 129}},
            "s5_swaps-16-32": {"task": "s5_swaps", "length": 17, "test": {"length": 33}},
            "s5-16-32": {"task": "s5", "length": 17, "test": {"length": 33}},
        }
        names = ("transformer", "linear_attention", "gated_delta_net", "delta_net", "rwkv7", "lmm")
        models = {name: {"pattern": (name,)} for name in names}
        for name in ("gated_delta_net", "delta_net"):
            options = {"negative_eigenvalues": True}
            models[f"{name}-negative"] = {"pattern": (name,), "memory": options}
    return {
        "tasks": tasks,
        "models": models,
        "model": {
            "layers": 2,
            "heads": 1,
            "feed_forward": "none",
            "persistent": 0,
            "memory": {"chunk": 16, "expansion": 2},
            "dtype": "float32",
        },
        "dims": (64,),
        "lrs": (1e-2, 2.15e-3),  # one that solves a task is enough
        "seeds": (0, 1, 2),
        "train": {"steps": 1500, "batch": 64, "warmup": 100, "final_lr": 0.0},
        "score": {"rows": 1024, "batch": 64, "every": 100},
        "workdir": f"runs/recall-{variant}",
    }


def get_config(variant: str = "mqar") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/recall.py has no variant {variant!r}; there are {', '.join(VARIANTS)}"
        )
    if variant == "smoke":
        return sweep.complete(
            {
                "tasks": {"mqar": {"vocabulary": 16, "length": 16, "pairs": 2}},
                "models": {"lmm-ttt": {"pattern": ("lmm",)}, "transformer": {}},
                "model": {
                    "layers": 1,
                    "heads": 1,
                    "feed_forward": "none",
                    "persistent": 0,
                    "conv": 0,
                    "memory": {"rule": "ttt_linear", "chunk": 16},
                    "dtype": "float32",
                },
                "dims": (8,),
                "lrs": (1e-2, 1e-3),
                "train": {"steps": 4, "batch": 8, "warmup": 0, "log_every": 2},
                "score": {"rows": 16, "batch": 8, "every": 2},
                "workdir": "runs/recall-smoke",
            }
        )
    if variant.endswith("_small"):
        return sweep.complete(_small(variant))
    names = [name for name in mixers.registry.names() if name != "attention"]  # is `transformer`
    models: dict = {name: {"pattern": (name,)} for name in names}
    models["ttt_linear"]["memory"] = {"expansion": None}  # a single matrix
    # Monomials of one head of 256 channels would take hundreds of megabytes a row.
    for name in ("omega_net", "atlas", "swdt", "deep_omega_transformer"):
        models[name] |= {"heads": 4, "memory": {"degree": 1}}
    for name in ("continuum", "hope"):  # rows are shorter than the default periods
        models[name]["memory"] = {"periods": (16, 64)}
    models["lmm+swa"] = {"pattern": ("lmm", "swa")}
    return sweep.complete(
        {
            "tasks": _tasks(variant),
            "models": models,
            "model": {
                "layers": 2,
                "heads": 1,
                "feed_forward": "none",
                "window": 64,
                "segment": 64,
                "persistent": 4,
                "memory": {"chunk": 16, "expansion": 2},
                "dtype": "float32",
            },
            "dims": (64, 128, 256),
            "lrs": (1e-4, 4.64e-4, 2.15e-3, 1e-2),
            "seeds": (0, 1, 2),
            "train": {"steps": 10000, "batch": 64, "warmup": 500, "final_lr": 0.0},
            "score": {"rows": 3008, "batch": 64, "every": 500},
            "workdir": f"runs/recall-{variant}",
        }
    )
